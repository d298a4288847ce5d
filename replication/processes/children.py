"""Processes that this one starts: they end with it, however it ends, and can be ended by it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

GRACE_SECONDS = 10.0
"""Time that processes have to end by themselves once told to, before they are killed."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_owner: int | None = None  # identity of the thread inside tethered()
_forked_by_owner = False


def _before_fork() -> None:
    global _forked_by_owner
    _forked_by_owner = _owner == threading.get_ident()


def _after_fork() -> None:
    # Linux sends the signal when the forking *thread* ends. A pool replaces a dead worker from a thread that ends
    # before the pool does, and a worker killed while it waits for work takes a lock with it that the pool's end needs.
    if _forked_by_owner and _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


@contextmanager
def tethered() -> Iterator[None]:
    """Processes that this thread forks inside the block are killed when it dies (Linux; elsewhere nothing changes).

    A pool's workers, and the manager process that `datasets` starts beside them, outlive a killed parent for good, and
    with them the memory and the disk space of the files that they hold open.
    """
    global _owner
    before, _owner = _owner, threading.get_ident()
    try:
        yield
    finally:
        _owner = before


def end(processes: Sequence[subprocess.Popen[bytes]], seconds: float | None = None) -> None:
    """Tell every process that is left to end, and kill what has not within `seconds` (default GRACE_SECONDS)."""
    for process in processes:  # SIGTERM acts as Ctrl-C, but is heard in the background too, where SIGINT is ignored
        process.send_signal(signal.SIGTERM)  # does nothing to one that has ended
    for process in still_running(processes, GRACE_SECONDS if seconds is None else seconds):
        process.kill()
        process.wait()


def still_running(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[subprocess.Popen[bytes]]:
    """Wait for processes to end by themselves; those that have not in time."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if process.poll() is None]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
