"""The time a cell needs to save and stop, from the longest save and step it has taken."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

from replication.errors import UserError
from replication.runs.layout import RunDir
from replication.runs.records import read_record, write_record


@dataclass(frozen=True)
class Times:
    """times.json: the longest that a cell has taken."""

    save_seconds: float
    step_seconds: float
    """A validation included."""


def record_times(run: RunDir, save_seconds: float, step_seconds: float) -> None:
    """Keep the longest save and the longest step.

    It is a convenience: a file that cannot be read is begun anew, one that cannot be written is let be.
    """
    kept = _times(run) or Times(0.0, 0.0)
    longest = Times(
        round(max(kept.save_seconds, save_seconds), 3),
        round(max(kept.step_seconds, step_seconds), 3),
    )
    with suppress(OSError):
        write_record(run.times, longest)


def _times(run: RunDir) -> Times | None:
    with suppress(UserError):
        return read_record(run.times, Times)
    return None


def grace_seconds_needed(run: RunDir) -> int | None:
    """Time before a limit at which a run must be told to stop: half as much again as its longest step and save.

    None where it has saved nothing yet, or what it noted cannot be read.
    """
    times = _times(run)
    return math.ceil(1.5 * (times.save_seconds + times.step_seconds)) if times else None
