"""The request to stop: a signal to this process, kept as a flag until it is safe to act on it. Imports no torch.

A scheduler that wants its nodes back, or a time limit that draws near, sends cluster.stop_signal. It need not reach
every process of a run: `training.stopping` asks all ranks at each optimizer boundary whether any of them got it.
"""

from __future__ import annotations

import signal
from types import FrameType

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
