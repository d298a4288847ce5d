"""Corpora that are read whole before they are tokenised: every document on disk, with a key, until its tokens are.

What a split holds, and in which order, then depends on all documents; so it does not fit what is streamed (stream.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from replication.config import DataConfig, SourceConfig
from replication.console import Reporter
from replication.data.report import ReadReport, counts_of, left_out
from replication.data.retries import Retries
from replication.data.sources import DocumentStream, no_text
from replication.data.tokenise import PIECE_BYTES, PIECE_DOCUMENTS, Bool, Int64, Piece, Pool
from replication.data.writer import SourceWriter
from replication.errors import UserError
from replication.runs.files import remove_tree

if TYPE_CHECKING:
    import datasets

BATCH_DOCUMENTS = 512
BATCH_BYTES = 8 << 20


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


def text_key(raw: bytes) -> int:
    """Hash of a document's text, below 2**64: identical documents have one key."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def spool(source: SourceConfig, work: Path, update: Callable[[int], None], retries: Retries | None = None) -> Spool:
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
        stream = DocumentStream(source, report, retries=retries, cache_dir=work / "hub")
        for batch in _batches(iter(stream), keys, sizes):
            writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
            update(len(keys))
    if not keys:
        raise no_text(source, report)
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
        keys.append(text_key(raw))
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


class SpooledCorpus:
    """All sources of a corpus without a token budget."""

    def __init__(self, data: DataConfig, folder: Path, reporter: Reporter):
        """Read every source.

        Args:
            data: sources and split; hub sources at their commits.
            folder: of the preparation; the text lies in folder/work until close().
            reporter: where to report.

        Raises:
            UserError: a source that cannot be read, or all of whose documents fall to validation.
        """
        self._data, self._folder, self._reporter = data, folder, reporter
        self.names = [source.name for source in data.sources]
        self._work = folder / "work"
        self._work.mkdir()
        self._spools = [self._read(source) for source in data.sources]
        self._validation = validation_documents(self._spools, data.validation_fraction)
        _check_split(self._spools, self._validation)

    def _read(self, source: SourceConfig) -> Spool:
        with self._reporter.bar(f"{source.name}: reading", None) as update:
            found = spool(source, self._work, update, Retries(source, self._reporter.line, None))
        text = f"{source.name}: {found.report.documents:,} documents, {int(found.sizes_bytes.sum()):,} bytes"
        self._reporter.line(text + left_out(found.report))
        return found

    def tokenizer_texts(self, n_bytes: int) -> Iterator[str]:
        """Training documents up to n_bytes in all, each source in proportion to its training bytes."""
        pairs = list(zip(self._spools, self._validation, strict=True))
        available = [int(s.sizes_bytes[~chosen].sum()) for s, chosen in pairs]
        share = min(1.0, n_bytes / sum(available))
        for (s, chosen), n_source in zip(pairs, available, strict=True):
            left = round(share * n_source)
            for number in s.ordered(~chosen):
                if left <= 0:
                    break
                text = s.texts[int(number)]["text"]
                yield text[:left]  # a sample: only the tokenizer's training sees a document cut short
                left -= int(s.sizes_bytes[number])

    def write(self, number: int, pool: Pool) -> dict[str, Any]:
        """Write the blocks of a source's splits; its entry in the manifest."""
        s, chosen = self._spools[number], self._validation[number]
        name, report = s.source.name, s.report
        writer = SourceWriter(name, self._folder, self._data.block_size_tokens)
        with self._reporter.bar(f"{name}: tokenising", len(s.keys)) as update:
            done = 0
            for piece, tokens in pool.tokenise(_pieces(s, chosen)):
                writer.add(piece, tokens)
                update(done := done + len(piece.texts))
        entry = {
            "kind": s.source.kind,
            "path": s.source.path,
            "revision": s.source.revision,
            "documents": report.documents,
            **counts_of(report),
            "text_bytes": int(s.sizes_bytes.sum()),
            **writer.finish(),
        }
        for left in self._work.glob(f"{name}.*"):
            left.unlink()
        return entry

    def close(self) -> None:
        """Remove the text."""
        remove_tree(self._work)


def _check_split(spools: Sequence[Spool], validation: Sequence[Bool]) -> None:
    for s, chosen in zip(spools, validation, strict=True):
        if chosen.all():
            raise UserError(
                f"data.sources: source '{s.source.name}': its {len(chosen)} document(s) all fall to validation, which "
                "is split off by whole documents; give more documents (cut a long file into several), or lower "
                "data.validation_fraction"
            )


def _pieces(s: Spool, chosen: Bool) -> Iterator[Piece]:
    """The training documents by key, then the validation documents by key."""
    order = np.concatenate([s.ordered(~chosen), s.ordered(chosen)])
    start = 0
    while start < len(order):
        numbers = order[start : start + PIECE_DOCUMENTS]
        n = max(1, int(np.searchsorted(np.cumsum(s.sizes_bytes[numbers]), PIECE_BYTES, side="right")))
        numbers = numbers[:n]
        yield Piece(list(s.texts[numbers.tolist()]["text"]), s.sizes_bytes[numbers], chosen[numbers])
        start += n
