"""Atlases lie on the template, left is left, and files of labels are read for what they say."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit.cohort.tables import read_cohort
from kit.cohort.tabular import TableError
from kit.explain.atlas import atlas_for, load_atlas, own_atlas, own_atlases, placement
from kit.explain.atlas_files import LICENCES, AtlasError, atlas_names
from kit.explain.label_names import label_names
from kit.params import Saliency
from kit.preprocess.nifti import read_nifti, write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.preprocess.template import template_on
from kit.runs import ROOT
from kit.store.grid import Grid
from kit.store.store import Store, scan_path, write_scan
from tests.conftest import GRID as SMALL
from tests.conftest import absent, make_store

GRID = Grid((36, 48, 40), 4.0)
# Of ICBM152's brain: (x, y, z) mm inside the left one of a pair; its mirror image lies in the right one.
HIPPOCAMPUS = {"aal3": "Hippocampus", "neuromorphometrics": "Hippocampus", "hammers": "TL hippocampus",
               "ibsr": "Hippocampus", "lpba40": "Hippocampus", "mori": "Hippocampus"}
COVERS = {"aal3": 0.7, "neuromorphometrics": 0.95, "hammers": 0.9, "ibsr": 0.95, "lpba40": 0.75, "mori": 0.85,
          "Schaefer2018_100Parcels_17Networks_order": 0.5}
NAMES = ["Schaefer2018_100Parcels_17Networks_order", "Schaefer2018_200Parcels_17Networks_order",
         "Schaefer2018_400Parcels_17Networks_order", "Schaefer2018_600Parcels_17Networks_order", "aal3", "anatomy3",
         "cobra", "hammers", "ibsr", "julichbrain", "lpba40", "mori", "neuromorphometrics", "suit", "thalamic_nuclei",
         "thalamus"]


def at(grid: Grid, x: float, y: float, z: float) -> tuple[int, int, int]:
    """The (z, y, x) index of a point in MNI millimetres, found through the affine alone."""
    return tuple(np.rint(np.linalg.solve(grid.affine, [x, y, z, 1])[:3]).astype(int)[::-1])


def write_labels(path: Path, grid: Grid = GRID) -> Path:
    """Two boxes, 4 to the left of the midline and 9 to the right, the right one smaller."""
    labels = np.zeros(grid.shape, np.float32)
    for label, x, half in ((4, -30, 4), (9, 30, 3)):
        z, y, x = at(grid, x, -20, 10)
        labels[z - half:z + half, y - half:y + half, x - half:x + half] = label
    write_nifti(path, labels, grid.affine)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_deepmriprep_atlases_lie_on_the_template_and_left_is_left(deepmriprep, name):
    atlas = load_atlas(f"deepmriprep:{name}", GRID)
    lies = placement(atlas, GRID)
    assert lies.inside > 0.94 and lies.sides > 0.95 and lies.covered > COVERS.get(name, 0.005)
    assert atlas.labels.shape == GRID.shape and atlas.labels.dtype == np.int32
    assert {"left", "right"} <= set(atlas.table["side"]) <= {"left", "right", "both"}
    assert not atlas.table["region"].str.contains(r"\b(?:left|right|LH|RH)\b", case=False).any()
    found = np.intersect1d(np.unique(atlas.labels), atlas.table["label"])
    assert len(found) >= 0.9 * len(atlas.table)
    # Regions at the midline spill over it, most of all the smallest of a single brain (mori): none of more than 1 ml
    # lies on the other side, as it would if names or sides were swapped.
    right = np.broadcast_to(GRID.affine[0, 0] * np.arange(GRID.shape[2]) + GRID.affine[0, 3] >= 0, GRID.shape)
    for row in atlas.table[atlas.table["side"] != "both"].itertuples():
        if (here := atlas.labels == row.label).sum() > 16:
            assert (right[here] == (row.side == "right")).mean() > 0.4, (name, row)


def test_the_list_above_is_the_wheels(deepmriprep):
    assert deepmriprep == NAMES
    assert all(any(name.startswith(start) for start in LICENCES) for name in NAMES)


@pytest.mark.parametrize("name", HIPPOCAMPUS)
def test_the_hippocampus_is_where_it_is(deepmriprep, name):
    fine = Grid((75, 96, 96), 2.0)
    atlas = load_atlas(f"deepmriprep:{name}", fine)
    for side, x in (("left", -26), ("right", 26)):
        label = atlas.table.set_index(["region", "side"])["label"][HIPPOCAMPUS[name], side]
        z, y, x_middle = fine.spacing_mm * np.argwhere(atlas.labels == label).mean(0)
        middle = np.array([x_middle, y, z]) + fine.origin_mm
        assert np.linalg.norm(middle - [x, -21, -15]) < 10, (name, side, middle)


def test_the_package_is_not_imported(deepmriprep):
    code = ("import sys; from kit.explain.atlas_files import atlas_names; "
            "sys.exit(not atlas_names() or 'deepmriprep' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unpacked_folder_serves_as_the_wheel(tmp_path, monkeypatch):
    folder = tmp_path / "deepmriprep/data/templates"
    folder.mkdir(parents=True)
    write_labels(folder / "mine.nii.gz")
    (folder / "mine.csv").write_text("ROIid;ROIname\n4;Left box\n9;Right box\n", encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "deepmriprep.whl", "w") as wheel:
        for path in folder.iterdir():
            wheel.write(path, f"deepmriprep/data/templates/{path.name}")
    for place in (tmp_path, tmp_path / "deepmriprep.whl"):
        monkeypatch.setenv("KIT_DEEPMRIPREP", str(place))
        assert atlas_names() == ["mine"]
        atlas = load_atlas("deepmriprep:mine", Grid((36, 48, 41 if place == tmp_path else 42), 4.0))
        assert atlas.table.values.tolist() == [[4, "box", "left"], [9, "box", "right"]]
        assert atlas.licence == "not verified"
    with pytest.raises(AtlasError, match="deepmriprep has mine; did you mean mine"):
        load_atlas("deepmriprep:min", GRID)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    monkeypatch.setenv("KIT_DEEPMRIPREP", str(tmp_path / "other.whl"))
    with pytest.raises(AtlasError, match="KIT_DEEPMRIPREP names .*other.whl, which is neither deepmriprep's wheel"):
        atlas_names()
    monkeypatch.setenv("KIT_DEEPMRIPREP", str(tmp_path / "nothing"))
    with pytest.raises(AtlasError, match="KIT_DEEPMRIPREP names .*nothing"):
        load_atlas("deepmriprep:mine", GRID)


def test_a_nifti_with_a_table_of_names(tmp_path):
    path = write_labels(tmp_path / "mine.nii.gz")
    (tmp_path / "mine.tsv").write_text("index\tname\n0\tair\n4\tbox_L\n9\tbox_R\n", encoding="utf-8")
    atlas = load_atlas(path, GRID, tmp_path / "mine.tsv")
    assert atlas.table.values.tolist() == [[4, "box", "left"], [9, "box", "right"]]
    assert atlas.labels[at(GRID, -30, -20, 10)] == 4 and atlas.labels[at(GRID, 30, -20, 10)] == 9
    assert placement(atlas, GRID).sides == 1

    (tmp_path / "swapped.tsv").write_text("index\tname\n4\tRight box\n9\tLeft box\n", encoding="utf-8")
    with pytest.raises(AtlasError, match="called left lie right of the midline"):
        load_atlas(path, GRID, tmp_path / "swapped.tsv")

    write_nifti(tmp_path / "far.nii.gz", np.pad(np.ones((9, 9, 9), np.float32), 1), np.diag([1.0, 1, 1, 1]) + np.eye(
        4, k=3) * 70)
    with pytest.raises(AtlasError, match=r"far.nii.gz: only 0% of it lies in the template's brain"):
        load_atlas(tmp_path / "far.nii.gz", GRID)
    with pytest.raises(AtlasError, match="say deepmriprep:NAME"):
        load_atlas("nilearn:aal", GRID)


def test_labels_that_name_no_side_are_split_at_the_midline(tmp_path):
    atlas = load_atlas(write_labels(tmp_path / "plain.nii.gz"), GRID)
    assert sorted(map(tuple, atlas.table[["region", "side"]].values)) == [
        ("label 4", "left"), ("label 4", "right"), ("label 9", "left"), ("label 9", "right")]
    label = atlas.table.set_index(["region", "side"])["label"]
    assert atlas.labels[at(GRID, -30, -20, 10)] == label["label 4", "left"]
    assert atlas.labels[at(GRID, 30, -20, 10)] == label["label 9", "right"]
    assert not (atlas.labels == label["label 4", "right"]).any()


def test_a_file_that_was_changed_is_read_again(tmp_path):
    path, names = write_labels(tmp_path / "mine.nii.gz"), tmp_path / "mine.csv"
    names.write_text("id,name\n4,Left old\n9,Right old\n", encoding="utf-8")
    assert load_atlas(path, GRID, names).table["region"].tolist() == ["old", "old"]
    names.write_text("id,name\n4,Left new\n9,Right new\n", encoding="utf-8")
    assert load_atlas(path, GRID, names).table["region"].tolist() == ["new", "new"]
    labels = read_nifti(path)[0]
    write_nifti(path, np.where(labels == 4, 5, labels), GRID.affine)
    assert load_atlas(path, GRID, names).labels[at(GRID, -30, -20, 10)] == 5


def test_what_rounds_to_zero_is_no_region(tmp_path):
    labels = read_nifti(write_labels(tmp_path / "mine.nii.gz"))[0]
    write_nifti(tmp_path / "mine.nii.gz", np.where(labels == 0, 0.3, labels), GRID.affine)
    assert set(load_atlas(tmp_path / "mine.nii.gz", GRID).table["region"]) == {"label 4", "label 9"}


def test_a_label_without_a_name_is_no_other_regions_right_half(tmp_path, monkeypatch):
    folder = tmp_path / "deepmriprep/data/templates"
    folder.mkdir(parents=True)
    labels = read_nifti(write_labels(folder / "mine.nii.gz"))[0]
    unnamed = at(GRID, -30, 30, 10)
    labels[unnamed] = 18  # twice the largest number that has a name
    write_nifti(folder / "mine.nii.gz", labels, GRID.affine)
    (folder / "mine.csv").write_text("ROIid;ROIname\n4;one\n9;other\n", encoding="utf-8")
    monkeypatch.setenv("KIT_DEEPMRIPREP", str(tmp_path))
    atlas = load_atlas("deepmriprep:mine", GRID)
    label = atlas.table.set_index(["region", "side"])["label"]
    assert atlas.labels[at(GRID, 30, -20, 10)] == label["other", "right"]
    assert atlas.labels[unnamed] == 18 and 18 not in set(label)


@pytest.mark.parametrize(("name", "region", "side"), [
    ("Left Precentral gyrus", "Precentral gyrus", "left"),
    ("17Networks_RH_VisCent_ExStr_1", "17Networks VisCent ExStr 1", "right"),
    ("TL hippocampus L", "TL hippocampus", "left"),
    ("Right-Cerebral-White-Matter", "Cerebral-White-Matter", "right"),
    ("ctx-lh-precentral", "ctx-precentral", "left"),
    ("Bothside Brain Stem", "Brain Stem", "both"),
    ("Lobule I-II of vermis", "Lobule I-II of vermis", "both"),
    ("Precentral_R", "Precentral", "right"),
    ("Lateral ventricle", "Lateral ventricle", "both"),
])
def test_sides_in_names(tmp_path, name, region, side):
    (tmp_path / "names.csv").write_text(f"id,name\n7,{name}\n", encoding="utf-8")
    assert label_names(tmp_path / "names.csv").values.tolist() == [[7, region, side]]


def test_tables_of_names_in_other_words(tmp_path):
    (tmp_path / "a.csv").write_text("index,label,hemisphere\n1,Insula,L\n2,Insula,R\n3,Pons,\n4,Left Pole,right\n",
                                    encoding="utf-8")
    assert label_names(tmp_path / "a.csv")["side"].tolist() == ["left", "right", "both", "left"]
    (tmp_path / "below.csv").write_text("id,name\n-1,nowhere\n0,air\n3,Pons\n", encoding="utf-8")
    assert label_names(tmp_path / "below.csv")["label"].tolist() == [3]  # -1 would index the last region
    for text, words in (("a,b\n1,2\n", "needs columns index and label"), ("id,name\n1.x,A\n", "whole numbers"),
                        ("id,name\n3.7,A\n", "whole numbers"),
                        ("id,name\n1,A\n1,B\n", "label 1 is in several rows")):
        (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
        with pytest.raises(TableError, match=words):
            label_names(tmp_path / "bad.csv")


def test_tissues_are_the_last_resort(tmp_path, monkeypatch):
    atlas = load_atlas("tissues", GRID)
    brain = template_on(GRID)[1]
    volume = {row.region + row.side: (brain & (atlas.labels == row.label)).sum() * 0.064
              for row in atlas.table.itertuples()}
    assert 250 < volume["white matterleft"] < 350 and 450 < volume["grey matterright"] < 650
    assert (atlas.labels > 0).all() and atlas.table["region"].nunique() == 3
    (tmp_path / "deepmriprep/data/templates").mkdir(parents=True)
    monkeypatch.setenv("KIT_DEEPMRIPREP", str(tmp_path))
    with pytest.raises(AtlasError, match="deepmriprep has"):
        load_atlas("deepmriprep:aal3", Grid((36, 48, 43), 4.0))


def test_own_label_maps_follow_the_stored_transform(tmp_path):
    turn = np.eye(4)  # the scan lies turned by 20 degrees about x, and shifted
    turn[1:3, 1:3] = [[np.cos(0.35), -np.sin(0.35)], [np.sin(0.35), np.cos(0.35)]]
    turn[:3, 3] = 6, -9, 4
    folder = tmp_path / "store"
    store = make_store(folder, participants=2)
    mask = store.read("made_000_01")[1]
    write_scan(scan_path(folder, "made_000_01"), np.where(mask, 1.0, 0), mask, "made_000_01", SMALL.affine,
               {"transform": turn.tolist()})
    affine = turn @ SMALL.affine  # the label map's voxels are the grid's, seen from the scan's own space
    labels = np.zeros(SMALL.shape, np.float32)
    labels[3:9, 4:12, 5:11], labels[3:9, 4:12, 14:18] = 48, 47
    write_nifti(tmp_path / "own.nii.gz", labels, affine)
    atlas = own_atlas(store, "made_000_01", tmp_path / "own.nii.gz")
    np.testing.assert_array_equal(atlas.labels, labels)
    assert atlas.table["region"].tolist() == ["label 47", "label 48"]

    pd.DataFrame({"participant": ["000", "001"], "session": "01", "dataset": "made", "image_path": ["a.nii", "b.nii"],
                  "labels_path": ["own.nii.gz", ""]}).to_csv(tmp_path / "cohort.csv", index=False)
    (tmp_path / "names.csv").write_text("index,name\n48,Left Hippocampus\n", encoding="utf-8")
    found = own_atlases(store, ["made_000_01"], tmp_path / "cohort.csv", "labels_path", tmp_path / "names.csv")
    assert found["made_000_01"].table.values.tolist() == [[48, "Hippocampus", "left"], [47, "label 47", "both"]]
    with pytest.raises(AtlasError, match="no labels_path of 1 scans: made_001_01"):
        own_atlases(store, ["made_000_01", "made_001_01"], tmp_path / "cohort.csv", "labels_path")
    with pytest.raises(AtlasError, match="no column dlmuse_path; its columns are participant"):
        own_atlases(store, ["made_000_01"], tmp_path / "cohort.csv", "dlmuse_path")


def box_labels(path: Path, shift_mm: float = 0) -> Path:
    """A scan's own label map, 4 left and 9 right, in the store's own millimetres or beside them."""
    labels = np.zeros(SMALL.shape, np.float32)
    labels[4:8, 6:12, 6:10], labels[4:8, 6:12, 14:18] = 4, 9
    write_nifti(path, labels, SMALL.affine + shift_mm * np.outer([1, 0, 0, 0], [0, 0, 0, 1]))
    return path


def unmoved_store(folder: Path) -> Store:
    store = make_store(folder, participants=1)
    mask = store.read("made_000_01")[1]
    write_scan(scan_path(folder, "made_000_01"), np.where(mask, 1.0, 0), mask, "made_000_01", SMALL.affine,
               {"transform": np.eye(4).tolist()})
    return store


def test_own_label_maps_of_swapped_names_or_another_place_are_refused(tmp_path, capsys):
    store, path = unmoved_store(tmp_path / "store"), tmp_path / "own.nii.gz"
    (tmp_path / "names.csv").write_text("id,name\n4,Left box\n9,Right box\n", encoding="utf-8")
    (tmp_path / "swapped.csv").write_text("id,name\n4,Right box\n9,Left box\n", encoding="utf-8")
    own_atlas(store, "made_000_01", box_labels(path), tmp_path / "names.csv")
    assert capsys.readouterr().out == ""
    with pytest.raises(AtlasError, match="own.nii.gz: its regions called left lie right of the midline of made_000_01"):
        own_atlas(store, "made_000_01", path, tmp_path / "swapped.csv")
    own_atlas(store, "made_000_01", box_labels(path, shift_mm=28))
    assert "own.nii.gz: 33% of its labels' volume lies outside the brain of made_000_01" in capsys.readouterr().out
    with pytest.raises(AtlasError, match=r"own.nii.gz: only \d+% of its labels' volume lies in the brain of made_000"):
        own_atlas(store, "made_000_01", box_labels(path, shift_mm=60))  # half of it beyond the grid


@pytest.mark.parametrize(("registration", "dataset", "atlas", "warned"), [
    ("rigid", "made", None, True), ("affine", "made", None, False), ("none", "made", None, False),
    ("rigid", "procedural-A", None, False), ("rigid", "made", "column:labels_path", False)])
def test_a_templates_atlas_over_heads_of_their_own_size_is_warned_of(tmp_path, capsys, registration, dataset, atlas,
                                                                      warned):
    store = unmoved_store(tmp_path / "store")
    store.record["registration"] = registration
    store.index["dataset"] = dataset
    box_labels(tmp_path / "own.nii.gz")
    pd.DataFrame({"participant": ["000"], "session": "01", "dataset": "made", "image_path": ["a.nii"],
                  "labels_path": ["own.nii.gz"]}).to_csv(tmp_path / "cohort.csv", index=False)
    atlas_for(Saliency(prepared=store.folder, model="m", output_dir="outputs/x", atlas=atlas or "tissues",
                       cohort=str(tmp_path / "cohort.csv")), store, ["made_000_01"])
    assert ("registered rigidly, so heads keep their own size" in capsys.readouterr().out) == warned


def test_harvard_oxford_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("NILEARN_DATA", str(tmp_path))
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(AtlasError, match="go online once, or put FSL's atlases"):
        load_atlas("harvard-oxford", GRID)


@pytest.mark.real
@pytest.mark.slow
def test_ixis_own_label_maps_lie_on_the_prepared_scan(tmp_path):
    from tests.real.conftest import FOLDER

    cohort = FOLDER / "ixi_2mm/cohort.csv"
    if not cohort.is_file():
        absent(f"no {cohort} (KIT_REAL_SCANS names its folder)")
    one = read_cohort(cohort).iloc[[0]]
    labels = [str(cohort.parent / one["dlmuse_path"].item())]
    index, failed = prepare(one.assign(mask_path=labels), tmp_path / "store",
                            Preparation(grid=GRID, registration="rigid", mask="given"), workers=0)
    assert failed.empty
    store, scan = Store.open(tmp_path / "store"), index["scan"].item()
    atlas = own_atlases(store, [scan], cohort, "dlmuse_path", ROOT / "params/ixi/dlmuse.csv")[scan]
    labelled, mask = atlas.labels > 0, store.read(scan)[1]
    assert 2 * (labelled & mask).sum() / (labelled.sum() + mask.sum()) > 0.97  # the labels are the mask
    assert placement(atlas, GRID).sides > 0.97
    assert atlas.table["region"].str.startswith("label ").sum() == 1  # label 1 alone has no name
    label_of = atlas.table.set_index(["region", "side"])["label"]
    for side, x in (("left", -26), ("right", 26)):
        label = label_of["Hippocampus", side]
        middle = GRID.affine @ [*np.argwhere(atlas.labels == label).mean(0)[::-1], 1]
        assert np.linalg.norm(middle[:3] - [x, -21, -12]) < 10, middle
