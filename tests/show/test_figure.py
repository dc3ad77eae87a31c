"""Figures that pyplot never saw still show in a notebook."""

import nbclient
import nbformat

from kit.show.figure import MAX_WIDTH, blank


def test_width_is_cut_and_the_note_has_its_own_room():
    figure = blank(2000, 300, "title", "procedural data")
    assert figure.get_size_inches()[0] * figure.dpi == MAX_WIDTH
    axes = figure.subplots()
    axes.set_xlabel("epoch")
    figure.draw_without_rendering()
    note = figure._supxlabel
    assert note.get_text() == "procedural data"
    assert not note.get_window_extent().overlaps(axes.xaxis.label.get_window_extent())
    assert note.get_window_extent().y0 >= 0


def test_a_figure_at_the_end_of_a_cell_is_drawn():
    code = "from kit.show.figure import blank\nfigure = blank(300, 200)\nfigure.subplots()\nfigure"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    assert "image/png" in notebook.cells[0].outputs[-1]["data"]
