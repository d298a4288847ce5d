"""Corpora that are read whole before they are tokenised: every document on disk, with a key, until its tokens are.

What a split holds, and in which order, then depends on all documents; so it does not fit what is streamed (stream.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from replication.data.tokenise import PIECE_BYTES, PIECE_DOCUMENTS, Bool, Piece, Tokenise, batches
from replication.errors import UserError
from replication.runs.files import remove_tree

if TYPE_CHECKING:
    import datasets

BATCH_DOCUMENTS = 512
BATCH_BYTES = 8 << 20


def text_key(raw: bytes) -> int:
    """Hash of a document's text, below 2**64: identical documents have one key."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


@dataclass
class Documents:
    """All documents of one source."""

    source: SourceConfig
    report: ReadReport
    texts: datasets.Dataset  # column `text`, memory-mapped, in reading order
    keys: UInt64
    sizes_bytes: Int64  # UTF-8 length of each

    def ordered(self, chosen: Bool) -> Int64:
        """Numbers of the chosen documents by key: a fixed order in which neighbouring files are not neighbours."""
        numbers = np.flatnonzero(chosen)
        return numbers[np.argsort(self.keys[numbers], kind="stable")]

    def smallest_keys(self, fraction: float) -> UInt64:
        """Keys of the documents of smallest key that hold a fraction of the bytes."""
        order = np.argsort(self.keys, kind="stable")
        held = np.cumsum(self.sizes_bytes[order])
        return self.keys[order[: int(np.searchsorted(held, fraction * held[-1])) + 1]]

    def pieces(self, validation: Bool) -> Iterator[Piece]:
        """The training documents by key, then the validation documents by key."""
        left = np.concatenate([self.ordered(~validation), self.ordered(validation)])
        while len(left):
            within = np.searchsorted(np.cumsum(self.sizes_bytes[left[:PIECE_DOCUMENTS]]), PIECE_BYTES, side="right")
            numbers, left = np.split(left, [max(1, int(within))])
            yield Piece(list(self.texts[numbers.tolist()]["text"]), self.sizes_bytes[numbers], validation[numbers])


def ingest(source: SourceConfig, work: Path, update: Callable[[int], None], retries: Retries) -> Documents:
    """Read a source into an Arrow file under work; raises UserError where it cannot be read, or holds no text."""
    import datasets
    import pyarrow as pa

    path, stream = (
        work / f"{source.name}.documents.arrow",
        DocumentStream(source, retries=retries, cache_dir=work / "hub"),
    )
    keys: list[int] = []
    sizes: list[int] = []
    schema = pa.schema([("text", pa.large_string())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches((text for _, text in stream), BATCH_DOCUMENTS, BATCH_BYTES):
            keys += [text_key(raw) for _, raw in batch]
            sizes += [len(raw) for _, raw in batch]
            writer.write_batch(pa.record_batch([pa.array([t for t, _ in batch], pa.large_string())], schema=schema))
            update(len(keys))
    if not keys:
        raise no_text(source, stream.report)
    texts = datasets.Dataset.from_file(str(path))
    return Documents(source, stream.report, texts, np.array(keys, dtype=np.uint64), np.array(sizes, dtype=np.int64))


class IngestedCorpus:
    """All sources of a corpus without a token budget.

    The validation documents are those of smallest key that hold validation_fraction of each source's bytes. A rule by
    key, so that identical documents never straddle the split, not even when two sources share them; and by bytes, so
    that a source of few documents has a validation split too, on every machine.
    """

    def __init__(self, data: DataConfig, folder: Path, reporter: Reporter):
        """Read every source, at its commit where it is on the hub; the text lies in folder/work until close().

        Raises:
            UserError: a source that cannot be read, or all of whose documents fall to validation.
        """
        self._data, self._folder, self._reporter, self._work = data, folder, reporter, folder / "work"
        self._work.mkdir()
        self._sources: list[Documents] = []
        for source in data.sources:
            with reporter.bar(f"{source.name}: reading", None) as update:
                found = ingest(source, self._work, update, Retries(source, reporter.line))
            text = f"{source.name}: {found.report.documents:,} documents, {int(found.sizes_bytes.sum()):,} bytes"
            reporter.line(text + found.report.left_out())
            self._sources.append(found)
        taken = np.unique(np.concatenate([s.smallest_keys(data.validation_fraction) for s in self._sources]))
        self._validation: list[Bool] = [np.isin(s.keys, taken) for s in self._sources]
        for s, of_source in zip(self._sources, self._validation, strict=True):
            if of_source.all():
                raise UserError(
                    f"data.sources: source '{s.source.name}': its {len(of_source)} document(s) all fall to validation, "
                    "which is split off by whole documents; give more documents (cut a long file into several), or "
                    "lower data.validation_fraction"
                )

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
                yield s.texts[int(number)]["text"][:left]  # a sample: only this training sees a document cut short
                left -= int(s.sizes_bytes[number])

    def write(self, number: int, tokenise: Tokenise) -> SourceRecord:
        """Write the blocks of a source's splits."""
        s, done = self._sources[number], 0
        writer = SourceWriter(s.source, self._folder, self._data.block_size_tokens)
        with self._reporter.bar(f"{s.source.name}: tokenising", len(s.keys)) as update:
            for piece, tokens in tokenise(s.pieces(self._validation[number])):
                writer.add(piece, tokens)
                update(done := done + len(piece.texts))
        for left in self._work.glob(f"{s.source.name}.*"):
            left.unlink()
        return writer.finish(s.report)

    def close(self) -> None:
        """Remove the text."""
        remove_tree(self._work)
