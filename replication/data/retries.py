"""What may pass when it is tried again, and what never will: failures of reading a hub data set."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from replication.config import SourceConfig
from replication.data.render import refusal
from replication.errors import UserError, is_disk_full

PAUSES_SECONDS = (1, 2, 5, 10, 30, 60, 60, 60)  # before each further try; together a little under four minutes
PASSING_STATUS = {408, 425, 429, *range(500, 600)}

# Classes that say no, by name: they belong to packages that are imported only where the hub is read.
FINAL = {
    "DatasetNotFoundError",
    "DataFilesNotFoundError",
    "RepositoryNotFoundError",
    "GatedRepoError",
    "DisabledRepoError",
    "RevisionNotFoundError",
    "HFValidationError",
    "BadRequestError",
    "OfflineModeIsEnabled",
    "FileFormatError",
    "DatasetGenerationCastError",
    "PermissionError",
}
# What is wrong with the call or the machine, not with the line.
OURS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError, MemoryError)

T = TypeVar("T")


class Retries:
    """Tries one source's reads again, with growing pauses, until one of them makes progress."""

    def __init__(
        self,
        source: SourceConfig,
        notify: Callable[[str], None] = lambda line: None,
        pauses_seconds: tuple[float, ...] | None = (),
        sleep: Callable[[float], None] = time.sleep,
    ):
        """
        Args:
            source: whose reads these are.
            notify: gets a line for every failure that is tried again.
            pauses_seconds: the pause before each further try; none: PAUSES_SECONDS, and by default no further try.
            sleep: how to pause.
        """
        self._source, self._notify, self._sleep = source, notify, sleep
        self._pauses = PAUSES_SECONDS if pauses_seconds is None else pauses_seconds
        self._failures = 0

    def progressed(self) -> None:
        """A read succeeded: the next failure is a first one."""
        self._failures = 0

    def failed(self, error: Exception, online: bool) -> None:
        """Pause before another try, or give up.

        Args:
            error: what a read raised.
            online: whether this was a read of rows over a network: then a file that is not found is a fault that
                passes, and so is anything else that a broken line may look like.

        Raises:
            UserError: it will not pass, or did not pass.
        """
        if is_disk_full(error):
            raise error
        if is_local(self._source):
            raise self._refusal(error, "check these keys, and mend or replace the files")
        if not may_pass(error, online):
            raise self._refusal(error, "check these keys and the network, or download it and give local files")
        if self._failures >= len(self._pauses):
            if not self._pauses:
                raise self._refusal(error, "check these keys and the network, or download it and give local files")
            remedy = "what was done is kept: check the network, then run the same command again"
            raise self._refusal(error, remedy, f" {self._failures + 1} times in a row")
        pause = self._pauses[self._failures]
        self._failures += 1
        self._notify(
            f"{self._source.name}: reading failed ({describe(error)}); trying again in {pause:g} s "
            f"({self._failures} of {len(self._pauses)})"
        )
        self._sleep(pause)

    def call(self, read: Callable[[], T]) -> T:
        """The value of a read that is tried again while it fails."""
        while True:
            try:
                value = read()
            except UserError:
                raise
            except Exception as error:  # connection, permission, no such id: many classes of many packages
                self.failed(error, online=False)
            else:
                self.progressed()
                return value

    def _refusal(self, error: Exception, remedy: str, times: str = "") -> UserError:
        s = self._source
        where = f"path {s.path}, subset {s.subset}, split {s.split}, revision {s.revision}"
        refused = refusal(s, f"load_dataset failed{times} for {where} ({describe(error)})", remedy)
        refused.__cause__ = error
        return refused


def is_local(source: SourceConfig) -> bool:
    """Whether a hub source's path is a folder of this machine: what cannot be read there will not heal."""
    return source.path is not None and Path(source.path).is_dir()


def may_pass(error: BaseException, online: bool) -> bool:
    """Whether another try may succeed: dropped connections, time-outs, busy servers."""
    for cause in _chain(error):
        if FINAL & {kind.__name__ for kind in type(cause).__mro__} or "OfflineModeIsEnabled" in str(cause):
            return False
        status = getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "status", None)
        if isinstance(status, int):
            return status in PASSING_STATUS
    if online:
        return not isinstance(error, (MemoryError, TypeError, AttributeError))
    return not isinstance(error, (*OURS, FileNotFoundError))


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of another package's error, or its class: fit for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
