"""A journal that is read while it grows: the new lines alone, and all of it again where it was rewritten."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replication.runs.files import number
from replication.runs.journal import parse_line

Curve = tuple[NDArray[np.int64], NDArray[np.float64]]
"""(steps [T], ascending; values [T], finite) of one tag."""
REMEMBERED_BYTES = 256
"""How much of what was read is compared with the file before reading on; the end of a line holds a loss a step."""


@dataclass
class _Points:
    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        while self.steps and self.steps[-1] >= step:  # a step that comes again replaces what was there from it on
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)


class LiveJournal:
    """The wanted scalars of one cell's metrics.jsonl.

    A resumed run rewrites its journal without the lines after its checkpoint: then the bytes before the place that was
    read last are others, or gone, and the journal is read from its start again. A torn last line waits for its end.
    """

    def __init__(self, path: Path, is_wanted: Callable[[str], bool]) -> None:
        self.path, self._is_wanted = path, is_wanted
        self._forget()

    def read(self) -> bool:
        """Take in what is new.

        Returns:
            Whether anything was.
        """
        try:
            with open(self.path, "rb") as file:
                rewritten = not self._continues(file)
                if rewritten:
                    self._forget()
                file.seek(self._offset)
                return self._take(file) or rewritten
        except OSError:
            gone = self._offset > 0
            self._forget()
            return gone

    def curves(self) -> dict[str, Curve]:
        """Tag -> its finite points; missing values are left out."""
        return {
            tag: (np.array(points.steps, dtype=np.int64), np.array(points.values, dtype=np.float64))
            for tag, points in self._points.items()
        }

    def _forget(self) -> None:
        self._offset, self._before = 0, b""
        self._points: dict[str, _Points] = {}

    def _continues(self, file: Any) -> bool:
        file.seek(self._offset - len(self._before))
        return bool(file.read(len(self._before)) == self._before)

    def _take(self, file: Any) -> bool:
        took = False
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            self._offset += len(raw)
            self._before = (self._before + raw[-REMEMBERED_BYTES:])[-REMEMBERED_BYTES:]
            took = self._add(raw) or took
        return took

    def _add(self, raw: bytes) -> bool:
        line = parse_line(raw)
        if line is None:
            return False
        for tag, value in line.values.items():
            if self._is_wanted(tag) and (point := number(value)) is not None:
                self._points.setdefault(tag, _Points()).add(line.step, point)
        return True
