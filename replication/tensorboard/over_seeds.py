"""Curves over seeds: means with bands, and paired differences to the first arm. Pure functions on points by step.

A mean is over one set of seeds at all of its steps, because a mean over changing sets jumps where a seed ends. So it
stands at the steps that all counted seeds share, and grows as the slowest of them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from replication.statistics.seeds import mean_test
from replication.tensorboard.live import Curve
from replication.tensorboard.tags import COUNTED, band_tag

Curves = Mapping[str, Curve]


def shared(curves: Sequence[Curve]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(steps [T] that all have, values [N, T]) of at least one curve."""
    steps = reduce(np.intersect1d, (s for s, _ in curves))
    return steps, np.stack([values[np.searchsorted(s, steps)] for s, values in curves])


def mean_runs(
    cells: Sequence[Curves], tags: Iterable[str], banded: Iterable[str], prefix: str = ""
) -> dict[str, dict[str, Curve]]:
    """The runs mean, low and high of one arm.

    Args:
        cells: the curves of each counted seed.
        tags: what to average. A seed counts for a tag from its first value of it on.
        banded: those that the mean's own run repeats as a band.
        prefix: of the tags in the runs; "difference/" for differences.

    Returns:
        Run -> tag -> curve. No low and high below two seeds; no curve where the seeds share no step.
    """
    runs: dict[str, dict[str, Curve]] = {"mean": {}, "low": {}, "high": {}}
    counts = {tag: name for name, tag in COUNTED.items()}
    for tag in tags:
        there = [curves[tag] for curves in cells if tag in curves]
        if not there:
            continue
        steps, values_NT = shared(there)
        over_N = mean_test(values_NT.T)
        for which, values in (("mean", over_N.mean), ("low", over_N.low), ("high", over_N.high)):
            if np.isnan(values_NT).any() or np.isnan(values).any() or not len(steps):
                continue
            runs[which][prefix + tag] = steps, values
            if tag in banded:
                runs["mean"][band_tag(tag, which, bool(prefix))] = steps, values
        if tag in counts and len(steps):
            runs["mean"][counts[tag]] = steps, np.full(len(steps), float(len(there)))
    return runs


def differences(arm: Curves, baseline: Curves, tags: Iterable[str]) -> dict[str, Curve]:
    """One seed's arm minus its baseline, at the steps that both have."""
    found = {}
    for tag in tags:
        if tag in arm and tag in baseline:
            steps, (ours, theirs) = shared([arm[tag], baseline[tag]])
            found[tag] = steps, ours - theirs
    return {tag: curve for tag, curve in found.items() if len(curve[0])}
