"""Files that are written whole, folders with a COMPLETE marker or a lock, and JSON that may be damaged."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from replication.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none of it: a temporary neighbour is synced, then renamed into place, and so is its name.

    What is no file, such as /dev/stdout, is written to as it is. After an OSError, which names the file, the temporary
    is gone.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it, as UTF-8; half a surrogate pair, which is no text, as its escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the name of the file that a person knows: that of fsync has none, that of a temporary is gone."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; a file system that cannot sync folders is let be."""
    with naming(path):
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
                raise


def remove_temporaries(folder: Path, held: bool = False) -> None:
    """Remove what killed writers left of write_bytes; where we do not hold the folder, no live process's file."""
    for path in folder.glob(".*.*"):
        pid = path.name.rpartition(".")[2]
        if pid.isdecimal() and path.is_file() and (held or not _is_alive(int(pid))):
            with suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return pid > 0


def read_json(path: Path) -> Any:
    """The parsed file, or None where it does not exist. Raises UserError where it is no JSON, or cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it, or move it away") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it, or remove it and run again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where it does not exist. Raises UserError where the file holds something else."""
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; restore it, or remove it and run again")
    return value or {}


def number(value: Any) -> float | None:
    """A value of a file as a finite float; None for anything else, NaN and infinity included."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:  # a whole number beyond what a float holds
        return None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileFacts(NamedTuple):
    """What COMPLETE says of a file."""

    n_bytes: int
    sha256: str


def mark_complete(
    folder: Path, extra: dict[str, Any] | None = None, known: Mapping[str, FileFacts] | None = None
) -> None:
    """Write folder/COMPLETE: every file's size and SHA-256, so that damage is found by name.

    The marker must not reach the disk before what it vouches for: files first, then the names in each folder. `known`
    are files, by their path in the folder, that were hashed while they were written.
    """
    inside = sorted(p for p in folder.rglob("*") if not p.name.startswith(".") and p.name != "COMPLETE")
    files = [p for p in inside if p.is_file()]
    for path in [*files, *(p for p in inside if p.is_dir()), folder]:
        sync(path)
    listed = {}
    for path in files:
        name = str(path.relative_to(folder))
        n_bytes, sha256 = (known or {}).get(name) or (path.stat().st_size, file_sha256(path))
        listed[name] = {"bytes": n_bytes, "sha256": sha256}
    marker = (extra or {}) | {"files": listed}
    write_json(folder / "COMPLETE", marker | {"marker_sha256": _marker_sha256(marker)})


def _marker_sha256(marker: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True, default=str).encode()).hexdigest()


def narrowed_marker(folder: Path, names: Collection[str], **more: Any) -> dict[str, Any]:
    """The COMPLETE that a folder would have with these of its files alone, and with more keys; as read, not checked.

    UserError where there is none that lists them.
    """
    marker = read_object(folder / "COMPLETE")
    try:
        files = {name: marker["files"][name] for name in names}
    except (KeyError, TypeError):
        raise UserError(f"{folder}: has no COMPLETE that lists {', '.join(names)}; it is left as it is") from None
    marker = {key: value for key, value in marker.items() if key != "marker_sha256"} | more | {"files": files}
    return marker | {"marker_sha256": _marker_sha256(marker)}


def damage(folder: Path) -> str | None:
    """The first fault of a folder that mark_complete closed, in words; None where all is well."""
    if not (folder / "COMPLETE").is_file():
        return "has no COMPLETE marker (it was interrupted while being written)"
    try:
        marker = read_object(folder / "COMPLETE")
        recorded = marker.pop("marker_sha256", None)  # checkpoints of earlier versions have none
        listed = {name: (facts["bytes"], facts["sha256"]) for name, facts in marker["files"].items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return "has an unreadable COMPLETE marker"
    if recorded is not None and recorded != _marker_sha256(marker):
        return "has a COMPLETE marker with another checksum"
    for name, (n_bytes, sha256) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"lacks the file {name}"
        if path.stat().st_size != n_bytes:
            return f"has {name} with {path.stat().st_size} bytes instead of {n_bytes}"
        try:
            if file_sha256(path) != sha256:
                return f"has {name} with another checksum"
        except OSError as error:
            return f"has {name}, which cannot be read ({error.strerror})"
    return None


def parse_objects(content: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one a line; what is torn, damaged or something else is passed over."""
    for line in content.splitlines():
        try:
            value = json.loads(line.strip(b"\0"))
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def remove_tree(path: Path) -> None:
    """Remove a folder that may not exist."""
    shutil.rmtree(path, ignore_errors=True)


HELD = (errno.EAGAIN, errno.EACCES)  # answers where another process has the lock; others say nothing about one


@contextmanager
def hold_lock(folder: Path, message: str, name: str = ".lock", seconds: float = 1.0) -> Iterator[None]:
    """Hold a folder for one process, by the file `name` in it, for which others are waited so many seconds.

    Raises UserError where another live process holds it, which says `message`, or where its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "ab+") as file:
        deadline = time.monotonic() + seconds
        while True:  # a status table probes the lock for an instant; a run holds it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in HELD:
                    raise UserError(without_locks(folder, error)) from None
                if time.monotonic() >= deadline:
                    raise UserError(f"{folder}: {message}") from None
                time.sleep(0.05)
        yield


def without_locks(folder: Path, error: OSError) -> str:
    """The error of a file system where a lock can be neither had nor refused, in words."""
    return (
        f"{folder}: this file system has no locks ({error.strerror}), and without one two processes could write the "
        "same files; mount it with them (Lustre: -o flock; NFS: with its lock daemon), or choose another --out"
    )
