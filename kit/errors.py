"""The base class of the kit's own errors."""

from __future__ import annotations


class KitError(Exception):
    """An error whose message says what happened, where, and what to do.

    Notebooks show the message alone, not a page of traceback. Other errors keep their traceback.
    """

    def _render_traceback_(self) -> list[str]:  # IPython asks an exception for this
        return [f"{type(self).__name__}: {self}"]
