"""evaluation.json in the folder of a cell: what it was scored on, and the scores. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from replication.runs.layout import RunDir
from replication.runs.manifest import Manifest
from replication.runs.records import read_record, write_record
from replication.statistics.format import clean


@dataclass(frozen=True)
class Part:
    """One thing that a cell was scored on."""

    kind: Literal["task", "file", "completions"]
    name: str
    asked: str  # hash of all that the scores depend on but for the cell: cells in which it is equal can be compared
    of: str | None  # hash of the cell's part in it: its weights, or its completions
    scores: Mapping[str, float | None]

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name

    def is_current(self, manifest: Manifest) -> bool:
        """Whether it is of the weights, or of the completions, that the cell has now."""
        now = manifest.generation.get("samples_sha256") if self.kind == "completions" else manifest.final_weights_sha256
        return self.of is not None and self.of == now


@dataclass(frozen=True)
class Evaluation:
    parts: tuple[Part, ...] = ()


def read_parts(run: RunDir) -> dict[tuple[str, str], Part]:
    """The parts of a cell by kind and name; none where it was never scored. UserError: evaluation.json is damaged."""
    return {part.key: part for part in (read_record(run.evaluation, Evaluation) or Evaluation()).parts}


def write_parts(run: RunDir, parts: Mapping[tuple[str, str], Part]) -> None:
    write_record(run.evaluation, clean({"parts": [vars(part) for part in parts.values()]}))
