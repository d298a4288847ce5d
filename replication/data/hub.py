"""Data sets of the hub, or of a local folder in the same layout: streamed row by row, shard by shard."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replication.config import SourceConfig
from replication.data.files import is_local, place
from replication.data.render import columns_of, refusal, render, require_columns
from replication.errors import UserError, first_line, is_disk_full

if TYPE_CHECKING:
    import datasets

PAUSES_SECONDS = (1, 2, 5, 10, 30, 60, 60, 60)  # before each further try; together a little under four minutes
PASSING_STATUS = {408, 425, 429, *range(500, 600)}

# Classes that say no, by name: they belong to packages that are imported only where the hub is read.
FINAL = {
    *("DatasetNotFoundError", "DataFilesNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"),
    *("GatedRepoError", "DisabledRepoError", "PermissionError", "OfflineModeIsEnabled"),
    *("HFValidationError", "BadRequestError", "FileFormatError", "DatasetGenerationCastError"),
}
# What is wrong with the call or the machine, not with the line.
OURS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError, MemoryError)

Notify = Callable[[str], None]


def commit_of(source: SourceConfig, notify: Notify | None) -> str | None:
    """The commit that a hub source's revision means now; None for anything that is not on the hub."""
    if source.kind != "hub" or source.path is None or is_local(source):
        return None
    if source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi

    path, revision, retries = source.path, source.revision, Retries(source, notify)
    info = retries.call(lambda: HfApi().dataset_info(path, revision=revision, timeout=30))
    return str(info.sha)


def hub_parts(source: SourceConfig, notify: Notify | None, cache_dir: Path | None) -> list[HubPart]:
    """The shards of `datasets.load_dataset`, streamed: nothing is stored twice, and a local folder works as an id does.

    Raises UserError where there is no such set, subset, split or column, or no connection.
    """

    def load() -> datasets.IterableDataset:
        import datasets

        try:
            rows = datasets.load_dataset(
                str(place(source)) if is_local(source) else source.path,
                source.subset,
                split=source.split,
                revision=source.revision,
                streaming=True,
                cache_dir=str(cache_dir) if cache_dir else None,
            )
            columns = rows.column_names or list(next(iter(rows)))
        except StopIteration:  # of the line above, or of the library at a file without lines
            remedy = "check its subset and split, or take another data set"
            raise refusal(source, f"{source.path} has no rows", remedy) from None
        require_columns(source, columns, str(source.path))
        return rows.select_columns(columns_of(source))

    retries = Retries(source, notify)
    rows = retries.call(load)
    n = rows.num_shards
    return [HubPart(source, f"{source.path}:{i}", partial(rows.shard, n, i), retries) for i in range(n)]


class HubPart:
    """One shard. A dropped connection is taken up where it was lost.

    The library goes on by reading the shard from its beginning and dropping what was given before: no row is given
    twice, but those before the place travel again. Making row groups shards (`reshard`) would spare that, at the price
    of one request for every file of the set before its first row.
    """

    def __init__(
        self, source: SourceConfig, name: str, make_shard: Callable[[], datasets.IterableDataset], retries: Retries
    ):
        self.name, self._source, self._retries = name, source, retries
        self._make_shard = make_shard  # when its turn comes: a set may have thousands
        self._state: Any = None  # the library's, from which a shard goes on
        self._since = 0  # rows after that state
        self._number = 0  # rows given in all

    def rows(self, place: Any) -> Iterator[tuple[str, str | None]]:
        """The rows from a place on; None: all of them, even where some were read before."""
        self._shard = self._make_shard()  # one that has been read stands where its last reader left it
        self._state, self._number = (place["state"], place["number"]) if place else (None, 0)
        self._since = 0
        while True:
            try:
                if self._state is None:
                    self._state = self._shard.state_dict()
                self._shard.load_state_dict(self._state)
                for row in islice(self._shard, self._since, None):
                    self._since += 1
                    self._number += 1
                    self._retries.failures = 0
                    name = f"{self.name}:{self._number - 1}"
                    yield name, render(self._source, row, name)
                return
            except UserError:
                raise
            except Exception as error:  # many classes of many packages
                self._retries.failed(error, online=True)

    def place(self) -> dict[str, object]:
        """The place at which the rows stand, in plain values."""
        self._state, self._since = self._shard.state_dict(), 0
        return {"state": self._state, "number": self._number}


class Retries:
    """Tries one source's reads again, with growing pauses, until one of them makes progress.

    By hand: libraries count the attempts of one call, and here each of a stream's millions of rows begins the count
    anew.
    """

    def __init__(self, source: SourceConfig, notify: Notify | None):
        """Each further try is told to `notify`; where that is none, neither is there any."""
        self._source, self._notify = source, notify
        self.failures = 0  # since a read succeeded

    def failed(self, error: Exception, online: bool) -> None:
        """Pause before another try, or give up: UserError for what a read raised and will not pass, or did not.

        `online`: this was a read of rows over a network. Then a file that is not found is a fault that passes, and so
        is anything else that a broken line may look like.
        """
        if is_disk_full(error):
            raise error
        s, times, words = self._source, "", f"{type(error).__name__}: {first_line(error)}"
        if self._is_local():
            remedy = "check these keys, and fix or replace the files"
        elif self._notify is None or not may_pass(error, online):
            remedy = "check these keys and the network, or download it and give local files"
        elif self.failures >= len(PAUSES_SECONDS):
            times = f" {self.failures + 1} times in a row"
            remedy = "what was done is kept: check the network, then run the same command again"
        else:
            pause = PAUSES_SECONDS[self.failures]
            self.failures += 1
            count = f"{self.failures} of {len(PAUSES_SECONDS)}"
            self._notify(f"{s.name}: reading failed ({words}); trying again in {pause:g} s ({count})")
            time.sleep(pause)
            return
        where = f"path {s.path}, subset {s.subset}, split {s.split}, revision {s.revision}"
        raise refusal(s, f"load_dataset failed{times} for {where} ({words})", remedy) from error

    def call(self, read: Callable[[], Any]) -> Any:
        """The value of a read that is tried again while it fails."""
        while True:
            try:
                value = read()
                self.failures = 0
                return value
            except UserError:
                raise
            except Exception as error:  # connection, permission, no such id: many classes of many packages
                self.failed(error, online=False)

    def _is_local(self) -> bool:
        return is_local(self._source)  # what cannot be read there will not heal


def may_pass(error: BaseException, online: bool) -> bool:
    """Whether another try may succeed: dropped connections, time-outs, busy servers."""
    cause: BaseException | None = error
    seen: list[BaseException] = []
    while cause is not None and cause not in seen:
        seen.append(cause)
        if FINAL & {kind.__name__ for kind in type(cause).__mro__} or "OfflineModeIsEnabled" in str(cause):
            return False
        status = getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "status", None)
        if isinstance(status, int):
            return status in PASSING_STATUS
        cause = cause.__cause__ or cause.__context__
    if online:
        return not isinstance(error, (MemoryError, TypeError, AttributeError))
    return not isinstance(error, (*OURS, FileNotFoundError))
