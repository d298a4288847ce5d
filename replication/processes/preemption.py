"""The request to stop: a signal to this process, kept as a flag until it is safe to act on it. Imports no torch.

A scheduler that wants its nodes back, or a time limit that draws near, sends cluster.stop_signal. It need not reach
every process of a run: `training.stopping` asks all ranks at each optimizer boundary whether any of them got it. How
long before a limit it must come, the longest save and step so far say.
"""

from __future__ import annotations

import math
import signal
from contextlib import suppress
from dataclasses import astuple, dataclass
from types import FrameType

from replication.errors import UserError
from replication.runs.layout import RunDir
from replication.runs.records import read_record, write_record

PREEMPTED = 75
"""Exit code of every process of a run that saved and stopped because it was told to (sysexits' EX_TEMPFAIL)."""

_requested = False


class Preempted(Exception):
    """The run was told to stop, and has saved what a later start goes on from; no failure."""


class StoppedEarly(KeyboardInterrupt):
    """Told to stop where nobody listens yet, or nothing has to be saved: ends as Ctrl-C does, but with PREEMPTED."""


def hold(name: str) -> None:
    """Keep the signal of that name ("USR2") back, in this process and those it starts, until one listens."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[f"SIG{name}"]])


def listen(name: str) -> None:
    """From now on, and for a signal that was held back, keep it as a flag instead of ending at it."""
    signum = signal.Signals[f"SIG{name}"]
    signal.signal(signum, _remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])


def _remember(signum: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return _requested


@dataclass(frozen=True)
class Times:
    """times.json: the longest that a cell has taken."""

    save_seconds: float  # until the checkpoint stands
    step_seconds: float  # a validation included
    stall_seconds: float = 0.0  # of a save: until training went on


def record_times(run: RunDir, new: Times) -> None:
    """Keep the longest of each; a file that cannot be read is begun anew, one that cannot be written let be."""
    kept = _times(run) or Times(0.0, 0.0)
    longest = (round(max(pair), 3) for pair in zip(astuple(kept), astuple(new), strict=True))
    with suppress(OSError):
        write_record(run.times, Times(*longest))


def grace_seconds_needed(run: RunDir) -> int | None:
    """How long before a limit to stop; None: nothing is noted yet.

    Half as much again as the longest step, a save, and what another save that has just begun is written in.
    """
    if (times := _times(run)) is None:
        return None
    return math.ceil(1.5 * (times.step_seconds + 2 * times.save_seconds - times.stall_seconds))


def _times(run: RunDir) -> Times | None:
    with suppress(UserError):
        return read_record(run.times, Times)
    return None
