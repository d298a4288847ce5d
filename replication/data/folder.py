"""A folder that appears when it is complete, not before: OUT.partial, locked, renamed to OUT at the end."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from replication.data.records import (
    ORIGINS,
    PROGRESS,
    SPLITS,
    Request,
    changed_sources,
    progress_file,
    read_origins,
    request_differences,
)
from replication.errors import UserError, is_disk_full
from replication.runs.files import HELD, read_object, remove_tree, sync, without_locks, write_json
from replication.runs.records import write_record

LOCK = ".lock"
REQUEST = "request.json"
_REMEDIES = {
    True: "what was done is kept; free space, then run the same command again",
    False: "the partial folder was removed; free space or choose another --out",
}


@contextmanager
def written_whole(out: Path, request: Request | None, notify: Callable[[str], None]) -> Iterator[Path]:
    """Give OUT.partial to write into; on success it becomes OUT.

    Without a request it is empty, and on any failure it is removed. With one, what lies in OUT.partial/progress marks
    work that a later call with an equal request finds again, after a failure or a kill; without such a mark it is
    removed as well. Where the requests differ in the keys of some sources alone, the other sources' work is found.

    Args:
        out: the folder that appears when it is complete.
        request: everything on which the work depends.
        notify: gets a line for every source that is begun anew.

    Raises:
        UserError: a live process writes there, it holds the work of another request, the place cannot be written, or
            the disk is full.
    """
    partial = out.with_name(out.name + ".partial")
    with closing(_claimed(out, partial)):
        _make_free(partial, request, notify)
        try:
            if request is not None:
                write_json(partial / REQUEST, request)
            yield partial
            _sync(partial)
            os.rename(partial, out)
        except BaseException as error:
            kept = request is not None and _has_work(partial)
            if not kept:
                remove_tree(partial)
            if is_disk_full(error):
                raise UserError(f"disk full while writing {partial}: {_REMEDIES[kept]}") from error
            raise
        # Harmless where a kill leaves them, so they go last: before the rename they are what a later call needs.
        remove_tree(out / PROGRESS)
        for left in (REQUEST, LOCK):
            (out / left).unlink(missing_ok=True)


def _claimed(out: Path, partial: Path) -> IO[str]:
    """Lock OUT.partial for this process; returns the open lock file."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held until the folder is complete
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"disk full while writing {partial}: {_REMEDIES[False]}") from error
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        # A record lock, not flock: worker processes would inherit that, and one that outlives a killed parent keep it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (partial / LOCK).stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
    except FileNotFoundError:
        pass  # another process completed the folder between our open and our lock
    except OSError as error:
        if error.errno not in HELD:
            lock.close()
            raise UserError(without_locks(partial, error)) from error
    lock.close()
    raise UserError(f"{partial}: another process is preparing this corpus; wait for it, or end it, then run again")


def _has_work(partial: Path) -> bool:
    return (partial / REQUEST).is_file() and any((partial / PROGRESS).glob("*.json"))


def _make_free(partial: Path, request: Request | None, notify: Callable[[str], None]) -> None:
    """Remove what OUT.partial holds, unless it is work of this request; of sources that were corrected, theirs alone.

    Raises:
        UserError: it holds the work of another request; names the keys.
    """
    if not _has_work(partial):
        for left in partial.iterdir():
            if left.name != LOCK:
                remove_tree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return
    found = read_object(partial / REQUEST)
    changed = changed_sources(request, found) if request is not None else []
    for name in changed:
        progress_file(partial, name).unlink(missing_ok=True)
        write_record(partial / ORIGINS, {other: o for other, o in read_origins(partial).items() if other != name})
        for split in SPLITS:
            remove_tree(partial / split / name)
        notify(f"{name}: its keys have changed since; begun anew, what the other sources have is kept")
    if changed or found == request:
        return
    if request is None:
        difference = f"a data.token_budget of {found['token_budget']:,}, and this config has none"
    else:
        keys = request_differences(request, found)
        difference = "another " + " and ".join(key.replace("data.packages.", "version of ") for key in keys[:3])
    raise UserError(
        f"{partial}: holds unfinished work with {difference}; set what it has and go on, or remove the folder, or "
        "choose another --out"
    )


def _sync(folder: Path) -> None:
    """Bring every file to the disk before the rename, so that a power cut cannot leave a complete-looking half."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
