"""A folder that is written whole or not at all: OUT.partial, locked, renamed to OUT at the end."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from replication.errors import UserError, is_disk_full
from replication.rundir import remove_tree

LOCK = ".lock"


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Give an empty OUT.partial to write into; on success it becomes OUT, on any failure it is removed.

    What a killed process left in OUT.partial is removed first.

    Raises:
        UserError: a live process writes there, the place cannot be written, or the disk is full.
    """
    partial = out.with_name(out.name + ".partial")
    lock = None
    try:
        lock = _claim(out, partial)
        yield partial
        _sync(partial)
        os.rename(partial, out)
        (out / LOCK).unlink()
    except BaseException as error:
        if lock is not None:
            remove_tree(partial)
        if is_disk_full(error):
            raise UserError(
                f"disk full while writing {partial}: the partial folder was removed; free space or choose another --out"
            ) from error
        raise
    finally:
        if lock is not None:
            lock.close()


def _claim(out: Path, partial: Path) -> IO[str]:
    """Lock OUT.partial for this process and empty it; returns the open lock file."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / LOCK, "a+")  # noqa: SIM115 - held until the folder is complete
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        # A record lock, not flock: worker processes would inherit that, and one that outlives a killed parent keep it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = (partial / LOCK).stat().st_ino == os.fstat(lock.fileno()).st_ino
    except FileNotFoundError:
        same = False  # another process completed the folder between our open and our lock
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            lock.close()
            raise UserError(f"{partial}: cannot be locked ({error.strerror}); choose another --out") from error
        same = False
    if not same:
        lock.close()
        raise UserError(f"{partial}: another process is preparing this corpus; wait for it, or end it, then run again")
    for left in partial.iterdir():
        if left.name != LOCK:
            remove_tree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return lock


def _sync(folder: Path) -> None:
    """Bring every file to the disk before the rename, so that a power cut cannot leave a complete-looking half."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
