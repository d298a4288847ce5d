"""How long a cell needs to save and stop, from the longest save and step it has taken."""

from __future__ import annotations

import math
from contextlib import suppress

from replication.errors import UserError
from replication.runs.files import number, read_object, write_json
from replication.runs.layout import RunDir


def record_times(run: RunDir, save_seconds: float, step_seconds: float) -> None:
    """Keep the longest save and the longest step (a validation included) that a cell has taken.

    It is a convenience: a file that cannot be read is begun anew, one that cannot be written is let be.
    """
    kept = _times(run) or (0.0, 0.0)
    now = [round(max(pair), 3) for pair in zip(kept, (save_seconds, step_seconds), strict=True)]
    with suppress(OSError):
        write_json(run.times, dict(zip(TIMES, now, strict=True)))


TIMES = ("save_seconds", "step_seconds")


def _times(run: RunDir) -> tuple[float, float] | None:
    try:
        save, step = (number(read_object(run.times).get(key)) for key in TIMES)
    except UserError:
        return None
    return None if save is None or step is None else (save, step)


def lead_seconds_needed(run: RunDir) -> int | None:
    """How long before a time limit a run must be told to stop: half as much again as its longest step and save.

    None where it has saved nothing yet, or what it noted cannot be read.
    """
    times = _times(run)
    return math.ceil(1.5 * sum(times)) if times else None
