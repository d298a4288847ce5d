"""evaluation.json in the folder of a cell: what it was scored on, and the scores. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from replication.errors import UserError
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import Manifest, read_manifest
from replication.runs.records import read_record, write_record
from replication.statistics.format import clean


@dataclass(frozen=True)
class Part:
    """One thing that a cell was scored on."""

    kind: Literal["task", "file", "distributions", "completions"]  # completions: of an earlier version, not read
    name: str
    asked: str  # hash of all that the scores depend on but for the cell: cells in which it is equal can be compared
    of: str | None  # hash of the cell's weights
    scores: Mapping[str, float | None]
    beside: str | None = None  # hash of other cells' weights, of what was compared with them
    entropies_nats: Mapping[str, float] = field(default_factory=dict)  # by temperature, of the distributions

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name

    def is_current(self, manifest: Manifest) -> bool:
        """Whether it is of the weights that the cell has now."""
        return self.of is not None and self.of == manifest.final_weights_sha256


@dataclass(frozen=True)
class Evaluation:
    parts: tuple[Part, ...] = ()


def read_parts(run: RunDir) -> dict[tuple[str, str], Part]:
    """The parts of a cell by kind and name; none where it was never scored. UserError: evaluation.json is damaged."""
    return {part.key: part for part in (read_record(run.evaluation, Evaluation) or Evaluation()).parts}


def matched_temperature(run: RunDir, baseline: RunDir, temperature: float) -> float:
    """The temperature at which a cell's mean predictive entropy is the baseline's at another one.

    UserError where either has no such entropies, or none of the measured ones is so low or so high.
    """
    own, target = _entropies(run), _entropies(baseline)
    wanted = np.interp(math.log(temperature), target[0], target[1], math.nan, math.nan)
    found = float(np.interp(wanted, own[1], own[0], math.nan, math.nan))
    if math.isnan(found):
        raise UserError(f"{run.evaluation}: no measured temperature has the baseline's entropy at {temperature:g}")
    return round(math.exp(found), 6)


def _entropies(run: RunDir) -> tuple[list[float], list[float]]:
    """(logs of temperatures, mean entropies), both ascending."""
    part = read_parts(run).get(("distributions", "validation"))
    if part is None or not part.is_current(read_manifest(run) or Manifest()):
        out = SuiteDir.of(run).root
        raise UserError(f"{run.evaluation}: has no entropies of these weights; `replicate eval {out} --distributions`")
    pairs = sorted((math.log(float(key)), nats) for key, nats in part.entropies_nats.items())
    return [at for at, _ in pairs], [nats for _, nats in pairs]


def write_parts(run: RunDir, parts: Mapping[tuple[str, str], Part]) -> None:
    write_record(run.evaluation, clean({"parts": [vars(part) for part in parts.values()]}))
