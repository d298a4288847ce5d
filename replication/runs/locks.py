"""A folder that one process holds."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replication.errors import UserError

HELD = (errno.EAGAIN, errno.EACCES)
"""What the system answers where another process has the lock; anything else says nothing about one."""


@contextmanager
def hold_lock(folder: Path, message: str, name: str = ".lock") -> Iterator[None]:
    """Hold a folder for one process, by the file `name` in it.

    Raises:
        UserError: another live process holds it; says `message`. Or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "ab+") as file:
        for attempt in range(20):  # a status table probes the lock for an instant; a run holds it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in HELD:
                    raise UserError(without_locks(folder, error)) from None
                if attempt == 19:
                    raise UserError(f"{folder}: {message}") from None
                time.sleep(0.05)
        yield


def without_locks(folder: Path, error: OSError) -> str:
    """What to say where a lock can be neither had nor refused."""
    return (
        f"{folder}: this file system has no locks ({error.strerror}), and without one two processes could write the "
        "same files; mount it with them (Lustre: -o flock; NFS: with its lock daemon), or choose another --out"
    )
