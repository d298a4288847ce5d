"""Latency as a person at the page meets it. Pure.

A virtual user waits for the answer before the next press, so a slow server is asked less often while it is slow, and a
plain list of latencies leaves out the presses that it prevented (coordinated omission). Two things are done about it.
A latency runs from the moment at which the person meant to press, so that one who came late counts in full,
pressing again after a lost answer included. And a latency L longer than the mean time T between presses stands for the
presses that would have come meanwhile: L - T, L - 2T, ... are counted too. What a closed loop cannot show is a crowd
that goes on growing while nobody is served; judges are not such a crowd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from virtual_users import Request

TURN = "vote and next pair"
"""The two requests of a vote together: no request of its own."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    kind: str
    n: int
    p50: float
    p95: float
    p99: float
    max: float


def quiet(requests: Sequence[Request], windows: Sequence[tuple[float, float]]) -> list[Request]:
    """Those that no window touches; windows are (from, to) in the requests' clock."""
    return [r for r in requests if not any(r.meant <= end and r.ended >= start for start, end in windows)]


def latencies(requests: Sequence[Request], seconds_between: float) -> list[Latency]:
    """One row for all requests together, then one a kind, corrected as this module says.

    Args:
        requests: of any kind.
        seconds_between: mean time from a judge's answer to their next press.
    """
    kinds = sorted({r.kind for r in requests} - {TURN})
    rows = [_row("all requests", [r for r in requests if r.kind != TURN], seconds_between)]
    rows += [_row(kind, [r for r in requests if r.kind == kind], seconds_between) for kind in kinds]
    return [*rows, _row(TURN, [r for r in requests if r.kind == TURN], seconds_between)]


def _row(kind: str, requests: Sequence[Request], seconds_between: float) -> Latency:
    seconds = [r.ended - r.meant for r in requests]
    values = 1000 * np.array(corrected(seconds, seconds_between))
    if not len(values):
        return Latency(kind, 0, *[float("nan")] * 4)
    p50, p95, p99 = np.percentile(values, (50, 95, 99), method="higher")
    return Latency(kind, len(requests), float(p50), float(p95), float(p99), float(values.max()))


def corrected(seconds: Sequence[float], seconds_between: float) -> list[float]:
    """The latencies, and those of the presses that the long ones prevented."""
    found = []
    for one in seconds:
        while one > 0:
            found.append(one)
            one -= seconds_between
    return found
