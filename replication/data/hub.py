"""Data sets of the hub, or of a local folder in the same layout: streamed row by row, shard by shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replication.config import SourceConfig
from replication.data.render import columns_of, refusal, render, require_columns
from replication.data.retries import Retries, is_local
from replication.errors import UserError

if TYPE_CHECKING:
    import datasets

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_SECONDS = 30


def commit_of(source: SourceConfig, retries: Retries) -> str | None:
    """The commit that a hub source's revision means now; None for anything that is not on the hub.

    Raises:
        UserError: no such set or revision, no permission, or no connection.
    """
    if source.kind != "hub" or source.path is None or is_local(source):
        return None
    if source.revision is not None and COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi

    path, revision = source.path, source.revision
    info = retries.call(lambda: HfApi().dataset_info(path, revision=revision, timeout=TIMEOUT_SECONDS))
    return str(info.sha)


def hub_parts(source: SourceConfig, retries: Retries, cache_dir: Path | None) -> list[HubPart]:
    """The shards of `datasets.load_dataset`, streamed: nothing is stored twice, and a local folder works as an id does.

    Raises:
        UserError: no such set, subset, split or column, or no connection.
    """
    rows = retries.call(lambda: _load(source, cache_dir))
    n = rows.num_shards
    return [HubPart(source, f"{source.path}:{i}", partial(rows.shard, n, i), retries) for i in range(n)]


def _load(source: SourceConfig, cache_dir: Path | None) -> datasets.IterableDataset:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path,
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


class HubPart:
    """One shard. A dropped connection is taken up where it was lost.

    The library goes on by reading the shard from its beginning and dropping what was given before: no row is given
    twice, but those before the place travel again. Making row groups shards (`reshard`) would spare that, at the price
    of one request for every file of the set before its first row.
    """

    def __init__(
        self, source: SourceConfig, name: str, shard: Callable[[], datasets.IterableDataset], retries: Retries
    ):
        self.name, self._source, self._make_shard, self._retries = name, source, shard, retries
        self._state: dict[str, Any] | None = None  # the library's, from which a shard goes on
        self._since = 0  # rows after that state
        self._number = 0  # rows given in all

    @cached_property
    def _shard(self) -> datasets.IterableDataset:
        """Made when its turn comes: a set may have thousands."""
        return self._make_shard()

    def rows(self, place: Any) -> Iterator[tuple[str, str | None]]:
        self.__dict__.pop("_shard", None)  # one that has been read stands where its last reader left it
        self._state, self._since = (place["state"], 0) if place else (None, 0)
        self._number = place["number"] if place else 0
        while True:
            try:
                for row in self._remaining():
                    self._since += 1
                    self._number += 1
                    self._retries.progressed()
                    name = f"{self.name}:{self._number - 1}"
                    yield name, render(self._source, row, name)
                return
            except UserError:
                raise
            except Exception as error:  # many classes of many packages
                self._retries.failed(error, online=True)

    def _remaining(self) -> Iterator[dict[str, Any]]:
        """The rows that have not been given yet, read from the last state that is known to be good."""
        if self._state is None:
            self._state = self._shard.state_dict()
        self._shard.load_state_dict(self._state)
        return islice(self._shard, self._since, None)

    def place(self) -> dict[str, Any]:
        self._state, self._since = self._shard.state_dict(), 0
        return {"state": self._state, "number": self._number}
