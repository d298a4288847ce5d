"""The documents of one source on disk, in reading order, with a key for each; and which of them are validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from replication.config import SourceConfig
from replication.data.sources import ReadReport, documents
from replication.errors import UserError

if TYPE_CHECKING:
    import datasets

BATCH_DOCUMENTS = 512
BATCH_BYTES = 8 << 20

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


@dataclass
class Spool:
    """One source, read once."""

    source: SourceConfig
    report: ReadReport
    texts: datasets.Dataset
    """Column `text`, memory-mapped, in reading order."""
    keys: npt.NDArray[np.uint64]
    """Hash of each document's text: identical documents have one key."""
    sizes_bytes: Int64
    """UTF-8 length of each document."""

    def ordered(self, chosen: Bool) -> Int64:
        """Numbers of the chosen documents by key: a fixed order in which neighbouring files are not neighbours."""
        numbers = np.flatnonzero(chosen)
        return numbers[np.argsort(self.keys[numbers], kind="stable")]


def spool(source: SourceConfig, work: Path, update: Callable[[int], None]) -> Spool:
    """Read a source into an Arrow file under work.

    Raises:
        UserError: the source cannot be read, or holds no text.
    """
    import datasets
    import pyarrow as pa

    report, path = ReadReport(), work / f"{source.name}.documents.arrow"
    keys: list[int] = []
    sizes: list[int] = []
    schema = pa.schema([("text", pa.large_string())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(documents(source, report, work / "hub"), keys, sizes):
            writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
            update(len(keys))
    if not keys:
        raise UserError(
            f"data.sources: source '{source.name}': no document holds text ({report.empty} empty, {report.undecodable} "
            "undecodable); check its kind and path"
        )
    return Spool(
        source,
        report,
        datasets.Dataset.from_file(str(path)),
        np.array(keys, dtype=np.uint64),
        np.array(sizes, dtype=np.int64),
    )


def _batches(texts: Iterator[tuple[str, str]], keys: list[int], sizes: list[int]) -> Iterator[list[str]]:
    """Texts in batches bounded in number and bytes; each one's key and size are appended as it passes."""
    batch: list[str] = []
    n_bytes = 0
    for _, text in texts:
        raw = text.encode()
        keys.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
        sizes.append(len(raw))
        batch.append(text)
        n_bytes += len(raw)
        if len(batch) >= BATCH_DOCUMENTS or n_bytes >= BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def validation_documents(spools: Sequence[Spool], fraction: float) -> list[Bool]:
    """Which documents of each source are validation: those of smallest key that hold `fraction` of its bytes.

    A rule by key, so that identical documents never straddle the split, not even when two sources share them; and by
    bytes, so that a source of few documents has a validation split too, on every machine.

    Returns:
        One bool [documents] for each source.
    """
    keys = [_smallest_keys(s, fraction) for s in spools]
    taken = np.unique(np.concatenate(keys))
    return [np.isin(s.keys, taken) for s in spools]


def _smallest_keys(s: Spool, fraction: float) -> npt.NDArray[np.uint64]:
    order = np.argsort(s.keys, kind="stable")
    held = np.cumsum(s.sizes_bytes[order])
    n = int(np.searchsorted(held, fraction * held[-1], side="left")) + 1
    return s.keys[order[:n]]
