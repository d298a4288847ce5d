"""Worker processes that end with the process that started them, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
_tethered = False
_libc: ctypes.CDLL | None = None


def _after_fork() -> None:
    if _tethered and _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def tethered() -> Iterator[None]:
    """Processes forked inside the block are killed when this one dies (Linux; elsewhere nothing changes).

    A pool's workers, and the manager process that `datasets` starts beside them, outlive a killed parent for good, and
    with them the memory and the disk space of the files that they hold open.
    """
    global _tethered, _libc
    if sys.platform == "linux" and _libc is None:
        _libc = ctypes.CDLL(None)
    _tethered = True
    try:
        yield
    finally:
        _tethered = False
