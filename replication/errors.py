"""The one kind of error that is the user's to fix; full disks and lost ranks, told from our own faults."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

CHECKOUT = where if (where := Path(__file__).parents[1]).joinpath("pyproject.toml").is_file() else None
"""The checkout that this package lies in; None where it was installed from a wheel."""
SHIPPED = CHECKOUT or Path(__file__).parent
"""The folder of configs/ and launch/."""

NO_ROOM = "make room there, then run the same command again"
REMEDIES = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EFBIG: NO_ROOM,
    errno.EROFS: "choose a path on a file system that can be written",
    errno.EIO: "the disk, or the network that it is on, is failing: see the machine's log before running again",
    errno.ESTALE: "the folder was removed or its server restarted: mount it again, then run the same command again",
    errno.ENAMETOOLONG: "choose a shorter path",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TORCH_ARCHIVE = ("PytorchStreamWriter failed writing", "inline_container.cc", "unexpected pos")  # torch.save, cut short
FULL_TEXT = re.compile(
    "|".join(map(re.escape, (*(os.strerror(code) for code in sorted(FULL)), *TORCH_ARCHIVE, "disk is full"))),
    re.IGNORECASE,
)
LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|remote process exited|peer .*closed|Broken pipe|Connection was likely closed",
    re.IGNORECASE,
)


class UserError(ValueError):
    """A mistake that the person at the keyboard can fix.

    The message is one line: it names the key or the file, and the remedy. The command line prints it without a
    traceback and exits with code 2. Anything else that is raised is our own fault and keeps its traceback.
    """


class Diverged(UserError):
    """The training left the numbers that can be computed with: an outcome of the cell, which a retry only repeats."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it wraps, is a full disk, quota or file size limit.

    Arrow, datasets, torch and worker processes wrap the OSError; sometimes only a text of their own comes back.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, Exception) and not isinstance(error, UserError) and FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def told(error: Exception) -> str | None:
    """One line, with the remedy, about an error of the disk or of a path; None where it is a fault of ours."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; {REMEDIES.get(error.errno or 0, 'choose another path')}"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{error.strerror}: {REMEDIES[error.errno]}"
    if is_disk_full(error):  # wrapped by a library, or in words of its own
        return f"no room on the disk ({first_line(error)}); {NO_ROOM}"
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run has ended: that one says why."""
    return isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of another package's error, or its class: fit for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def require(extra: str, *packages: str) -> None:
    """Raise UserError where a package of an extra is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"the package {package} is missing; {install(extra)}")


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """`; did you mean NAME?`, or nothing where no name is near."""
    near = difflib.get_close_matches(word, list(names), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def install(extra: str = "") -> str:
    """The command that installs this package, with an extra, where it runs."""
    if CHECKOUT:
        return f"launch/install.sh {extra}".strip()
    return f"pip install 'replication[{extra}]'" if extra else "pip install --force-reinstall replication"
