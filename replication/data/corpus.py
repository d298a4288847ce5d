"""The two ways from sources to blocks: read whole, or streamed until a budget of tokens is filled.

IngestedCorpus, without a token budget: every document is on disk, with a key, until its tokens are. What a split holds,
and in which order, depends on all documents.

StreamedCorpus, with one: no text is kept on disk.

    share       source i predicts ceil(token_budget * weight_i / sum of weights / T) * T training tokens: whole blocks,
                the last document cut off. A source that ends before its share keeps what it has, and training repeats
                it.
    validation  a document whose key, the hash of its text, is below validation_fraction * 2**64, up to
                VALIDATION_TOKENS a source; those beyond are left out of both splits. Identical documents have one key,
                so they never straddle the split. Where training is full before validation has one block, the stream is
                read on until it has.
    order       files or shards in a fixed shuffled order, and in each of them the order of its rows. Training draws
                blocks, not documents, and in an order of its own.

OUT.partial/progress/<source>.json is rewritten whenever a few seconds' work has reached the disk: where the stream
stands, and how long each file of blocks is. After a kill, what was written since is cut off and done again. The tokens
before that are read for their hash, and the rows of the part that the stream stands in are read once more to pass them.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from replication.config import DataConfig, SourceConfig
from replication.console import Meter, Reporter
from replication.data.blocks import SourceWriter
from replication.data.folder import Place, Progress, SourceRecord, read_progress, write_progress
from replication.data.order import Int64, UInt64
from replication.data.sources import DocumentStream, no_text
from replication.data.tokenise import PIECE_BYTES, PIECE_DOCUMENTS, Bool, Piece, Tokenise, Tokenised
from replication.errors import UserError
from replication.runs.files import remove_tree

UPDATE_DOCUMENTS = 500  # read between two moves of a bar
SAVE_SECONDS = 2.0  # writing that a kill costs at most, besides the pieces on their way and the way back to its place
VALIDATION_TOKENS = 1 << 21  # of one source: 1,024 sequences of 2,048
MIB = 1 << 20

Update = Callable[[int], None]  # of a bar


def text_key(raw: bytes) -> int:
    """Hash of a document's text, below 2**64: identical documents have one key."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _beginning(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """Texts up to n_bytes; the last is cut short, which only a tokenizer's training sees."""
    for text in texts:
        yield text[:n_bytes]
        n_bytes -= len(text.encode())
        if n_bytes <= 0:
            break


class Documents:
    """All documents of one source, their texts in a file; `validation` says which of them are split off."""

    validation: Bool

    def __init__(self, source: SourceConfig, work: Path, reporter: Reporter):
        self.source, self.path = source, work / f"{source.name}.documents"
        keys: list[int] = []
        sizes: list[int] = []
        stream = DocumentStream(source, notify=reporter.line, cache_dir=work / "hub")
        with reporter.bar(f"{source.name}: reading", None) as update, open(self.path, "wb") as file:
            for _, text in stream:
                file.write(raw := text.encode())
                keys.append(text_key(raw))
                sizes.append(len(raw))
                if len(keys) % UPDATE_DOCUMENTS == 0:
                    update(len(keys))
            update(len(keys))
        self.report = stream.report
        if not keys:
            raise no_text(source, self.report)
        reporter.line(f"{source.name}: {len(keys):,} documents, {sum(sizes):,} bytes{self.report.left_out()}")
        self.keys: UInt64 = np.array(keys, dtype=np.uint64)
        self.sizes_bytes: Int64 = np.array(sizes, dtype=np.int64)
        self._starts = np.cumsum(self.sizes_bytes) - self.sizes_bytes
        self._raw = np.memmap(self.path, dtype=np.uint8, mode="r")

    def text(self, number: int) -> str:
        start = self._starts[number]
        return self._raw[start : start + self.sizes_bytes[number]].tobytes().decode()

    def ordered(self, chosen: Bool) -> Int64:
        """Numbers of the chosen documents by key: a fixed order in which neighbouring files are not neighbours."""
        numbers = np.flatnonzero(chosen)
        return numbers[np.argsort(self.keys[numbers], kind="stable")]

    def smallest_keys(self, fraction: float) -> UInt64:
        """Keys of the documents of smallest key that hold a fraction of the bytes."""
        order = np.argsort(self.keys, kind="stable")
        held = np.cumsum(self.sizes_bytes[order])
        return self.keys[order[: int(np.searchsorted(held, fraction * held[-1])) + 1]]

    def pieces(self) -> Iterator[Piece]:
        """The training documents by key, then the validation documents by key."""
        left = np.concatenate([self.ordered(~self.validation), self.ordered(self.validation)])
        while len(left):
            within = np.searchsorted(np.cumsum(self.sizes_bytes[left[:PIECE_DOCUMENTS]]), PIECE_BYTES, side="right")
            numbers, left = np.split(left, [max(1, int(within))])
            texts = [self.text(number) for number in numbers]
            yield Piece(texts, self.sizes_bytes[numbers], self.validation[numbers])


class IngestedCorpus:
    """All sources of a corpus without a token budget.

    The validation documents are those of smallest key that hold validation_fraction of each source's bytes. A rule by
    key, so that identical documents never straddle the split, not even when two sources share them; and by bytes, so
    that a source of few documents has a validation split too, on every machine.
    """

    def __init__(self, data: DataConfig, folder: Path, reporter: Reporter):
        """Read every source; the text lies in folder/work until close().

        Raises UserError for a source that cannot be read, or all of whose documents fall to validation.
        """
        self._data, self._folder, self._reporter, self._work = data, folder, reporter, folder / "work"
        self._work.mkdir()
        self._sources = [Documents(source, self._work, reporter) for source in data.sources]
        taken = np.unique(np.concatenate([s.smallest_keys(data.validation_fraction) for s in self._sources]))
        for s in self._sources:
            s.validation = np.isin(s.keys, taken)
            if s.validation.all():
                raise UserError(
                    f"data.sources: source '{s.source.name}': its {len(s.keys)} document(s) all fall to validation, "
                    "which is split off by whole documents; give more documents (cut a long file into several), or "
                    "lower data.validation_fraction"
                )

    def tokenizer_texts(self, n_bytes: int) -> Iterator[str]:
        """Training documents up to n_bytes in all, each source in proportion to its training bytes."""
        available = [int(s.sizes_bytes[~s.validation].sum()) for s in self._sources]
        share = min(1.0, n_bytes / sum(available))
        for s, of_source in zip(self._sources, available, strict=True):
            texts = (s.text(number) for number in s.ordered(~s.validation))
            yield from _beginning(texts, round(share * of_source))

    def write(self, number: int, tokenise: Tokenise) -> SourceRecord:
        """Write the blocks of a source's splits."""
        s, done = self._sources[number], 0
        writer = SourceWriter(s.source, self._folder, self._data.block_size_tokens)
        with self._reporter.bar(f"{s.source.name}: tokenising", len(s.keys)) as update:
            for piece, tokens in tokenise(s.pieces()):
                writer.add(piece, tokens)
                update(done := done + len(piece.texts))
        s.path.unlink()
        return writer.finish(s.report)

    def close(self) -> None:
        remove_tree(self._work)


def share_blocks(data: DataConfig) -> list[int]:
    """Training blocks of each source's share of the token budget."""
    assert data.token_budget is not None
    total = sum(source.weight for source in data.sources)
    exact = [data.token_budget * source.weight / total / data.block_size_tokens for source in data.sources]
    return [int(np.ceil(round(blocks, 6))) for blocks in exact]  # rounded: a float's last digit is no block


class StreamedCorpus:
    """All sources of a corpus with a token budget."""

    def __init__(self, data: DataConfig, folder: Path, reporter: Reporter):
        """Open every source, with what an earlier call has done in the folder.

        Raises UserError where the disk has no room for the tokens that are missing, or a source cannot be opened, or
        its first document not be rendered.
        """
        self._data, self._folder, self._reporter = data, folder, reporter
        size = data.block_size_tokens
        self._limits = [n * size + 1 for n in share_blocks(data)]
        self._validation_limit = max(1, VALIDATION_TOKENS // size) * size + 1
        self._progress = [read_progress(folder, source.name) for source in data.sources]
        pairs = zip(self._limits, self._progress, strict=True)
        missing = sum(max(0, limit - done.training_tokens) for limit, done in pairs)
        need, free = missing * 4 * (1 + 1 / size), shutil.disk_usage(folder).free
        if need > free:
            raise UserError(
                f"data.token_budget: the tokens that are missing need {need / MIB:,.1f} MiB and {folder} has "
                f"{free / MIB:,.1f} MiB free; free space, choose another --out, or lower the budget"
            )
        # All before the first is read: a mistake in the last source's keys is not one to find after hours.
        begun = zip(data.sources, self._progress, strict=True)
        self._opened = {source.name: self._stream(source) for source, done in begun if done == Progress()}
        for stream in self._opened.values():
            stream.check_first()

    def tokenizer_texts(self, n_bytes: int) -> Iterator[str]:
        """Training documents from the beginning of each stream, up to n_bytes in all, shared by weight."""
        total = sum(source.weight for source in self._data.sources)
        for source in self._data.sources:
            texts = (text for _, text in self._stream(source) if not self._is_validation(text.encode()))
            yield from _beginning(texts, round(n_bytes * source.weight / total))

    def write(self, number: int, tokenise: Tokenise) -> SourceRecord:
        """Stream a source from where it stands until it has its share.

        Raises UserError where the source cannot be read, or is too short for one block.
        """
        source, done, limit = self._data.sources[number], self._progress[number], self._limits[number]
        if done.entry is not None:
            return done.entry
        say = self._reporter.line
        if done.place is not None:
            so_far = f"{done.training_tokens:,} of {limit:,} training tokens"
            say(f"{source.name}: goes on after {so_far}, and reads up to there once more first")
        limits = (limit, self._validation_limit)
        writer = SourceWriter(source, self._folder, self._data.block_size_tokens, limits, done.writer)
        label = f"{source.name} ({number + 1} of {len(self._data.sources)})"
        whole = self._whole if len(self._data.sources) > 1 else None
        with (
            self._reporter.tokens_bar(label, limit, writer.train.tokens, whole) as update,
            closing(tokenise(self._pieces(source, done.place))) as tokenised,
        ):
            report = self._fill(source, writer, done.place, tokenised, update).report
        self._whole.skip(limit - writer.train.tokens)
        if not report.documents:
            raise no_text(source, report)
        entry = writer.finish(report)
        if entry.ended_before_its_share:
            say(
                f"{source.name}: ended after {entry.train.tokens:,} of its share of {limit:,} training tokens; "
                "training repeats it (lower its weight, or data.token_budget, if that is too often)"
            )
        documents = f"{entry.train.documents:,} training documents, {entry.validation.documents:,} for validation"
        say(f"{source.name}: {documents}{report.left_out()}")
        write_progress(self._folder, source.name, Progress(entry=entry))
        return entry

    @cached_property
    def _whole(self) -> Meter:
        """Of the training tokens of all sources, from when the first of this call is begun."""
        return Meter(sum(self._limits), sum(done.training_tokens for done in self._progress))

    def _fill(
        self, source: SourceConfig, writer: SourceWriter, place: Place | None, tokenised: Tokenised, update: Update
    ) -> Place:
        """Write until the share is reached or the stream ends; the place where that was.

        Nothing is saved on the way out of an interruption or a failed write: the writer may then hold half a piece, and
        what was saved SAVE_SECONDS ago at most is whole.
        """

        def save() -> None:
            if place is not None:
                write_progress(self._folder, source.name, Progress(place=place, writer=writer.save()))

        saved_at = time.monotonic()
        while not writer.full:
            try:
                found = next(tokenised, None)
            except Exception:  # of the source: the writer is between two pieces
                with suppress(OSError):  # a full disk, say: then what was saved before counts
                    save()
                raise
            if found is None:
                break
            piece, tokens = found
            had_share = writer.train.full
            writer.add(piece, tokens)
            if writer.train.full and not had_share and not writer.full:
                self._reporter.line(f"{source.name}: has its share; reads on until validation has one block")
            place = piece.place
            update(writer.train.tokens)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
        assert place is not None  # a stream without documents gives one piece of none
        return place

    def _stream(self, source: SourceConfig, place: Place | None = None) -> DocumentStream:
        return DocumentStream(source, place, shuffled=True, notify=self._reporter.line, cache_dir=self._folder / "hub")

    def _pieces(self, source: SourceConfig, place: Place | None) -> Iterator[Piece]:
        """The documents from a place on, bounded in number and bytes; the last piece, of what is left, may be empty."""

        def piece() -> Piece:
            sizes = np.array([len(raw) for _, raw in batch], dtype=np.int64)
            validation = np.array([self._is_validation(raw) for _, raw in batch], dtype=bool)
            return Piece([text for text, _ in batch], sizes, validation, stream.place())

        stream = (self._opened.pop(source.name, None) if place is None else None) or self._stream(source, place)
        batch: list[tuple[str, bytes]] = []
        n_bytes = 0
        for _, text in stream:
            batch.append((text, text.encode()))
            n_bytes += len(batch[-1][1])
            if len(batch) >= PIECE_DOCUMENTS or n_bytes >= PIECE_BYTES:
                yield piece()
                batch, n_bytes = [], 0
        yield piece()

    def _is_validation(self, raw: bytes) -> bool:
        return text_key(raw) < self._data.validation_fraction * 2**64

    def close(self) -> None:
        remove_tree(self._folder / "hub")
