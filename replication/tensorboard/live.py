"""A journal that is read while it grows: the new lines alone, and all of it again where it was rewritten."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replication.runs.files import number
from replication.runs.journal import parse_line

Curve = tuple[NDArray[np.int64], NDArray[np.float64]]
"""(steps [T], ascending; values [T], finite) of one tag."""
REMEMBERED_BYTES = 256
"""How much of what was read is compared with the file before reading on; the end of a line holds a loss a step."""


class LiveJournal:
    """The wanted scalars of one cell's metrics.jsonl.

    A resumed run rewrites its journal without the lines after its checkpoint: then the bytes before the place that was
    read last are others, or gone, and the journal is read from its start again. A torn last line waits for its end.
    """

    def __init__(self, path: Path, is_wanted: Callable[[str], bool]) -> None:
        self.path, self._is_wanted = path, is_wanted
        self._forget()

    def _forget(self) -> None:
        self._offset, self._before = 0, b""
        self._points: dict[str, tuple[array[int], array[float]]] = {}  # tag -> steps, values

    def read(self) -> bool:
        """Take in what is new; whether anything was."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset - len(self._before))
                is_new = file.read(len(self._before)) != self._before
                if is_new:
                    self._forget()
                    file.seek(0)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break
                    self._offset += len(raw)
                    self._before = (self._before + raw[-REMEMBERED_BYTES:])[-REMEMBERED_BYTES:]
                    is_new = self._add(raw) or is_new
                return is_new
        except OSError:
            gone = self._offset > 0
            self._forget()
            return gone

    def _add(self, raw: bytes) -> bool:
        if (line := parse_line(raw)) is None:
            return False
        for tag, value in line.values.items():
            if self._is_wanted(tag) and (point := number(value)) is not None:
                steps, values = self._points.setdefault(tag, (array("q"), array("d")))
                while steps and steps[-1] >= line.step:  # a step that comes again replaces what was there from it on
                    steps.pop()
                    values.pop()
                steps.append(line.step)
                values.append(point)
        return True

    def curves(self) -> dict[str, Curve]:
        """Tag -> its finite points; missing values are left out."""
        return {tag: (np.array(steps), np.array(values)) for tag, (steps, values) in self._points.items()}
