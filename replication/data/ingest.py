"""Corpora that are read whole before they are tokenised: every document on disk, with a key, until its tokens are.

What a split holds, and in which order, then depends on all documents; so it does not fit what is streamed (stream.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from replication.config import DataConfig, SourceConfig
from replication.console import Reporter
from replication.data.blocks import SourceWriter
from replication.data.hub import Retries
from replication.data.order import Int64, UInt64
from replication.data.records import ReadReport, SourceRecord
from replication.data.sources import DocumentStream, no_text
from replication.data.tokenise import PIECE_BYTES, PIECE_DOCUMENTS, Bool, Piece, Pool, batches
from replication.errors import UserError
from replication.runs.files import remove_tree

if TYPE_CHECKING:
    import datasets

BATCH_DOCUMENTS = 512
BATCH_BYTES = 8 << 20


@dataclass
class Documents:
    """All documents of one source."""

    source: SourceConfig
    report: ReadReport
    texts: datasets.Dataset
    """Column `text`, memory-mapped, in reading order."""
    keys: UInt64
    """Hash of each document's text: identical documents have one key."""
    sizes_bytes: Int64
    """UTF-8 length of each document."""

    def ordered(self, chosen: Bool) -> Int64:
        """Numbers of the chosen documents by key: a fixed order in which neighbouring files are not neighbours."""
        numbers = np.flatnonzero(chosen)
        return numbers[np.argsort(self.keys[numbers], kind="stable")]

    def smallest_keys(self, fraction: float) -> UInt64:
        """Keys of the documents of smallest key that hold a fraction of the bytes."""
        order = np.argsort(self.keys, kind="stable")
        held = np.cumsum(self.sizes_bytes[order])
        n = int(np.searchsorted(held, fraction * held[-1], side="left")) + 1
        return self.keys[order[:n]]

    def pieces(self, validation: Bool) -> Iterator[Piece]:
        """The training documents by key, then the validation documents by key."""
        order = np.concatenate([self.ordered(~validation), self.ordered(validation)])
        start = 0
        while start < len(order):
            numbers = order[start : start + PIECE_DOCUMENTS]
            n = max(1, int(np.searchsorted(np.cumsum(self.sizes_bytes[numbers]), PIECE_BYTES, side="right")))
            numbers = numbers[:n]
            yield Piece(list(self.texts[numbers.tolist()]["text"]), self.sizes_bytes[numbers], validation[numbers])
            start += n


def text_key(raw: bytes) -> int:
    """Hash of a document's text, below 2**64: identical documents have one key."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def ingest(
    source: SourceConfig, work: Path, update: Callable[[int], None], retries: Retries | None = None
) -> Documents:
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
        for batch in batches((text for _, text in stream), BATCH_DOCUMENTS, BATCH_BYTES):
            keys += [text_key(raw) for _, raw in batch]
            sizes += [len(raw) for _, raw in batch]
            writer.write_batch(pa.record_batch([pa.array([t for t, _ in batch], pa.large_string())], schema=schema))
            update(len(keys))
    if not keys:
        raise no_text(source, report)
    texts = datasets.Dataset.from_file(str(path))
    return Documents(source, report, texts, np.array(keys, dtype=np.uint64), np.array(sizes, dtype=np.int64))


def validation_documents(sources: Sequence[Documents], fraction: float) -> list[Bool]:
    """The validation documents: those of smallest key that hold `fraction` of each source's bytes.

    A rule by key, so that identical documents never straddle the split, not even when two sources share them; and by
    bytes, so that a source of few documents has a validation split too, on every machine.

    Returns:
        One bool [documents] for each source.

    Raises:
        UserError: all documents of a source fall to validation.
    """
    taken = np.unique(np.concatenate([s.smallest_keys(fraction) for s in sources]))
    chosen = [np.isin(s.keys, taken) for s in sources]
    for s, of_source in zip(sources, chosen, strict=True):
        if of_source.all():
            raise UserError(
                f"data.sources: source '{s.source.name}': its {len(of_source)} document(s) all fall to validation, "
                "which is split off by whole documents; give more documents (cut a long file into several), or lower "
                "data.validation_fraction"
            )
    return chosen


class IngestedCorpus:
    """All sources of a corpus without a token budget."""

    def __init__(self, data: DataConfig, folder: Path, reporter: Reporter):
        """Read every source, at its commit where it is on the hub; the text lies in folder/work until close().

        Raises:
            UserError: a source that cannot be read, or all of whose documents fall to validation.
        """
        self._data, self._folder, self._reporter = data, folder, reporter
        self.names = [source.name for source in data.sources]
        self._work = folder / "work"
        self._work.mkdir()
        self._sources = [self._read(source) for source in data.sources]
        self._validation = validation_documents(self._sources, data.validation_fraction)

    def _read(self, source: SourceConfig) -> Documents:
        with self._reporter.bar(f"{source.name}: reading", None) as update:
            found = ingest(source, self._work, update, Retries(source, self._reporter.line, None))
        text = f"{source.name}: {found.report.documents:,} documents, {int(found.sizes_bytes.sum()):,} bytes"
        self._reporter.line(text + found.report.left_out())
        return found

    def tokenizer_texts(self, n_bytes: int) -> Iterator[str]:
        """Training documents up to n_bytes in all, each source in proportion to its training bytes."""
        pairs = list(zip(self._sources, self._validation, strict=True))
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

    def write(self, number: int, pool: Pool) -> SourceRecord:
        """Write the blocks of a source's splits."""
        s, chosen = self._sources[number], self._validation[number]
        name = s.source.name
        writer = SourceWriter(name, self._folder, self._data.block_size_tokens)
        with self._reporter.bar(f"{name}: tokenising", len(s.keys)) as update:
            done = 0
            for piece, tokens in pool.tokenise(s.pieces(chosen)):
                writer.add(piece, tokens)
                update(done := done + len(piece.texts))
        train, validation = writer.finish()
        for left in self._work.glob(f"{name}.*"):
            left.unlink()
        return SourceRecord(
            kind=s.source.kind,
            path=s.source.path,
            revision=s.source.revision,
            **asdict(s.report),
            text_bytes=int(s.sizes_bytes.sum()),
            train=train,
            validation=validation,
        )

    def close(self) -> None:
        """Remove the text."""
        remove_tree(self._work)
