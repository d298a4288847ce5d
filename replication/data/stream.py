"""Corpora with a token budget: every source is streamed until it has its share, and no text is kept on disk.

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

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from replication.config import DataConfig, SourceConfig
from replication.console import Meter, Reporter
from replication.data.folder import PROGRESS
from replication.data.report import ReadReport, counts_of, left_out
from replication.data.retries import Retries
from replication.data.sources import DocumentStream, no_text
from replication.data.spool import text_key
from replication.data.tokenise import PIECE_BYTES, PIECE_DOCUMENTS, Piece, Pool
from replication.data.writer import SourceWriter
from replication.errors import UserError
from replication.runs.files import read_json, write_json

SAVE_SECONDS = 2.0  # writing that a kill costs at most, besides the pieces on their way and the way back to its place
VALIDATION_TOKENS = 1 << 21  # of one source: 1,024 sequences of 2,048
MIB = 1 << 20


def share_blocks(data: DataConfig) -> list[int]:
    """Training blocks of each source's share of the token budget."""
    assert data.token_budget is not None
    total = sum(source.weight for source in data.sources)
    exact = [data.token_budget * source.weight / total / data.block_size_tokens for source in data.sources]
    return [int(np.ceil(round(blocks, 6))) for blocks in exact]  # rounded: a float's last digit is no block


class StreamedCorpus:
    """All sources of a corpus with a token budget."""

    def __init__(self, data: DataConfig, folder: Path, reporter: Reporter):
        """
        Args:
            data: sources, weights and budget; hub sources at their commits.
            folder: of the preparation, with what an earlier call of it has done.
            reporter: where to report.

        Raises:
            UserError: the disk has no room for the tokens that are missing, or a source cannot be opened, or its first
                document not be rendered.
        """
        self._data, self._folder, self._reporter = data, folder, reporter
        self.names = [source.name for source in data.sources]
        size = data.block_size_tokens
        self._limits = [n * size + 1 for n in share_blocks(data)]
        self._validation_limit = max(1, VALIDATION_TOKENS // size) * size + 1
        self._states = [read_json(self._state_path(source)) or {} for source in data.sources]
        self._check_disk()
        # All before the first is read: a mistake in the last source's keys is not one to find after hours.
        pairs = zip(data.sources, self._states, strict=True)
        self._opened = {source.name: self._stream(source, None) for source, state in pairs if not state}
        for opened in self._opened.values():
            opened.check_first()

    def _state_path(self, source: SourceConfig) -> Path:
        return self._folder / PROGRESS / f"{source.name}.json"

    def _check_disk(self) -> None:
        done = [_training_tokens(state) for state in self._states]
        missing = sum(max(0, limit - have) for limit, have in zip(self._limits, done, strict=True))
        need, free = missing * 4 * (1 + 1 / self._data.block_size_tokens), shutil.disk_usage(self._folder).free
        if need > free:
            raise UserError(
                f"data.token_budget: the tokens that are missing need {need / MIB:,.1f} MiB and {self._folder} has "
                f"{free / MIB:,.1f} MiB free; free space, choose another --out, or lower the budget"
            )

    def tokenizer_texts(self, n_bytes: int) -> Iterator[str]:
        """Training documents from the beginning of each stream, up to n_bytes in all, shared by weight."""
        total = sum(source.weight for source in self._data.sources)
        for source in self._data.sources:
            left = round(n_bytes * source.weight / total)
            for _, text in self._stream(source, None):
                raw = text.encode()
                if not self._is_validation(raw):
                    yield text[:left]  # a sample: only the tokenizer's training sees a document cut short
                    left -= len(raw)
                if left <= 0:
                    break

    def write(self, number: int, pool: Pool) -> dict[str, Any]:
        """Stream a source from where it stands until it has its share; its entry in the manifest.

        Raises:
            UserError: the source cannot be read, or is too short for one block.
        """
        source, state = self._data.sources[number], self._states[number]
        if "entry" in state:
            return dict(state["entry"])
        limit = self._limits[number]
        limits = (limit, self._validation_limit)
        place = state.get("place")
        if place is not None:
            done = f"{_training_tokens(state):,} of {limit:,} training tokens"
            self._reporter.line(f"{source.name}: goes on after {done}, and reads up to there once more first")
        writer = SourceWriter(source.name, self._folder, self._data.block_size_tokens, limits, state.get("writer"))
        label = f"{source.name} ({number + 1} of {len(self._data.sources)})"
        whole = self._whole if len(self._data.sources) > 1 else None
        with self._reporter.tokens_bar(label, limit, writer.tokens, whole) as update:
            report = self._fill(source, writer, place, pool, update)
        self._whole.skip(limit - writer.tokens)
        entry = self._entry(source, writer, report, limit)
        write_json(self._state_path(source), {"entry": entry})
        return entry

    @cached_property
    def _whole(self) -> Meter:
        """Of the training tokens of all sources, from when the first of this call is begun."""
        return Meter(sum(self._limits), sum(_training_tokens(state) for state in self._states))

    def _fill(
        self,
        source: SourceConfig,
        writer: SourceWriter,
        place: dict[str, Any] | None,
        pool: Pool,
        update: Callable[[int], None],
    ) -> dict[str, Any]:
        """Write until the share is reached or the stream ends; the report of what was read for it.

        Nothing is saved on the way out of an interruption or a failed write: the writer may then hold half a piece, and
        what was saved SAVE_SECONDS ago at most is whole.
        """
        saved_at = time.monotonic()
        tokenised = pool.tokenise(self._pieces(source, place))
        try:
            while not writer.full:
                try:
                    found = next(tokenised, None)
                except Exception:  # of the source: the writer is between two pieces
                    with suppress(OSError):  # a full disk, say: then what was saved before counts
                        self._save(source, writer, place)
                    raise
                if found is None:
                    break
                piece, tokens = found
                had_share = writer.has_share
                writer.add(piece, tokens)
                if writer.has_share and not had_share and not writer.full:
                    self._reporter.line(f"{source.name}: has its share; reads on until validation has one block")
                place = piece.place
                update(writer.tokens)
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    self._save(source, writer, place)
                    saved_at = time.monotonic()
        finally:
            tokenised.close()
        assert place is not None or writer.tokens == 0
        return place["report"] if place is not None else {}

    def _save(self, source: SourceConfig, writer: SourceWriter, place: dict[str, Any] | None) -> None:
        if place is not None:
            write_json(self._state_path(source), {"place": place, "writer": writer.save()})

    def _entry(self, source: SourceConfig, writer: SourceWriter, report: dict[str, Any], limit: int) -> dict[str, Any]:
        found = ReadReport(**report)
        if not found.documents:
            raise no_text(source, found)
        splits = writer.finish()
        ended = splits["train"]["tokens"] < limit
        if ended:
            self._reporter.line(
                f"{source.name}: ended after {splits['train']['tokens']:,} of its share of {limit:,} training tokens; "
                "training repeats it (lower its weight, or data.token_budget, if that is too often)"
            )
        self._reporter.line(
            f"{source.name}: {splits['train']['documents']:,} training documents, "
            f"{splits['validation']['documents']:,} for validation{left_out(found)}"
        )
        return {
            "kind": source.kind,
            "path": source.path,
            "revision": source.revision,
            "share_tokens": limit,
            "ended_before_its_share": ended,
            "documents": sum(split["documents"] for split in splits.values()),
            **counts_of(found),
            "text_bytes": sum(split["text_bytes"] for split in splits.values()),
            **splits,
        }

    def _stream(self, source: SourceConfig, place: dict[str, Any] | None) -> DocumentStream:
        retries = Retries(source, self._reporter.line, None)
        return DocumentStream(source, place=place, shuffled=True, retries=retries, cache_dir=self._folder / "hub")

    def _pieces(self, source: SourceConfig, place: dict[str, Any] | None) -> Iterator[Piece]:
        stream = (self._opened.pop(source.name, None) if place is None else None) or self._stream(source, place)
        texts: list[str] = []
        sizes: list[int] = []
        validation: list[bool] = []
        n_bytes = 0
        for _, text in stream:
            raw = text.encode()
            texts.append(text)
            sizes.append(len(raw))
            n_bytes += len(raw)
            validation.append(self._is_validation(raw))
            if len(texts) >= PIECE_DOCUMENTS or n_bytes >= PIECE_BYTES:
                yield Piece(texts, np.array(sizes), np.array(validation), stream.place())
                texts, sizes, validation, n_bytes = [], [], [], 0
        yield Piece(texts, np.array(sizes, dtype=np.int64), np.array(validation, dtype=bool), stream.place())

    def _is_validation(self, raw: bytes) -> bool:
        return text_key(raw) < self._data.validation_fraction * 2**64

    def close(self) -> None:
        """Nothing but tokens is on disk."""
        shutil.rmtree(self._folder / "hub", ignore_errors=True)


def _training_tokens(state: dict[str, Any]) -> int:
    """Training tokens that a source's state holds already."""
    if "entry" in state:
        return int(state["entry"]["share_tokens"])  # ended or full: it will write no more
    return int(state["writer"]["train"]["blocks"]["tokens"]) if "writer" in state else 0
