"""Token blocks, written: a stream is cut so that every token but the first is predicted once. T = block_size_tokens.

Block b holds stream positions b*T .. b*T+T, that is T + 1 tokens: T inputs and, one later, T targets. Neighbouring
blocks share one token. The end of the last block is filled with PAD.

They are appended to Arrow files that can be gone on with after a kill, one folder a source and split. The files are
what `datasets.load_from_disk` reads, so that nothing has to be copied when the stream ends.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from replication.data.order import Int64
from replication.data.records import SPLITS, BlockState, SplitRecord, SplitState, WriterState
from replication.data.tokenise import Bool, Int32, Piece, Tokens
from replication.errors import UserError
from replication.runs.files import remove_tree, sync, write_json

if TYPE_CHECKING:
    import pyarrow

PAD = -1  # no token: whoever reads a block feeds end-of-text there and ignores the target
SHARD_BYTES = 1 << 30
BATCH_TOKENS = 1 << 20  # tokens gathered before their blocks are written, 4 MiB
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow's


def block_count(n_tokens: int, block_size_tokens: int) -> int:
    """Blocks of a stream; one of fewer than two tokens predicts nothing and has none."""
    return max(0, -(-(n_tokens - 1) // block_size_tokens))


class Cutter:
    """Cuts a stream that arrives bit by bit.

    Attributes:
        held: int32 [n], tokens that no whole block has covered yet; the first is the last target of the block before.
    """

    def __init__(self, block_size_tokens: int, held: Int32 | None = None):
        self.block_size_tokens = block_size_tokens
        self.held: Int32 = np.empty(0, dtype=np.int32) if held is None else held

    def take(self, tokens: Int32) -> Int32:
        """The whole blocks, int32 [k, T + 1], that some more tokens of the stream complete."""
        stream = np.concatenate([self.held, tokens])
        n_whole = max(0, len(stream) - 1) // self.block_size_tokens
        self.held = stream[n_whole * self.block_size_tokens :].copy()
        return self._windows(stream, n_whole)

    def rest(self) -> Int32:
        """The last block of the stream, padded: int32 [1, T + 1], or [0, T + 1] where nothing is left to predict."""
        n_blocks = block_count(len(self.held), self.block_size_tokens)
        padding = np.full(max(0, n_blocks * self.block_size_tokens + 1 - len(self.held)), PAD, dtype=np.int32)
        return self._windows(np.concatenate([self.held, padding]), n_blocks)

    def _windows(self, stream: Int32, n_blocks: int) -> Int32:
        if n_blocks == 0:
            return np.empty((0, self.block_size_tokens + 1), dtype=np.int32)
        windows = np.lib.stride_tricks.sliding_window_view(stream, self.block_size_tokens + 1)
        return np.ascontiguousarray(windows[:: self.block_size_tokens][:n_blocks], dtype=np.int32)


class BlockCounts(TypedDict):
    """A finished stream's part of its SplitRecord."""

    tokens: int
    blocks: int
    predicted_tokens: int
    sha256: str


class BlockWriter:
    """The blocks of one stream of tokens, up to a limit."""

    def __init__(
        self, folder: Path, block_size_tokens: int, limit_tokens: int | None = None, state: BlockState | None = None
    ):
        """
        Args:
            folder: where the files go; whatever is in it, but not in the state, is removed.
            block_size_tokens: T.
            limit_tokens: after which the stream is full; none: never.
            state: from save() in another process; none: an empty stream.
        """
        self.folder, self.limit_tokens = folder, limit_tokens
        self._state = replace(state, files=[*state.files]) if state is not None else BlockState()
        self._cutter = Cutter(block_size_tokens, np.array(self._state.held, dtype=np.int32))
        self._waiting: list[Int32] = []
        self._n_waiting = 0
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None
        self._restore()

    @property
    def tokens(self) -> int:
        """Tokens taken so far."""
        return self._state.tokens

    @property
    def full(self) -> bool:
        return self.limit_tokens is not None and self.tokens >= self.limit_tokens

    def room(self, n_tokens: int) -> int:
        """The number of so many tokens that the stream can still take."""
        return n_tokens if self.limit_tokens is None else max(0, min(n_tokens, self.limit_tokens - self.tokens))

    def add(self, tokens: Int32) -> None:
        """Append tokens (int32 [n]); those beyond the limit are left out."""
        tokens = tokens[: self.room(len(tokens))]
        self._state.tokens += len(tokens)
        self._digest.update(_bytes(tokens))
        self._waiting.append(tokens)
        self._n_waiting += len(tokens)
        if self._n_waiting >= BATCH_TOKENS:
            self._flush()

    def save(self) -> BlockState:
        """Bring what there is to the disk; the state from which another process goes on."""
        self._flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._note_length()
        held, files = self._cutter.held.tolist(), [*self._state.files]
        return replace(self._state, held=held, files=files, open=self._file is not None)

    def finish(self) -> BlockCounts:
        """Write the last block and close the folder."""
        self._flush()
        self._write(self._cutter.rest())
        self._close()
        s, sha256 = self._state, self._digest.hexdigest()
        # Every token but the first is a target exactly once: nothing was cut off, nothing counted twice.
        assert s.predicted_tokens == max(0, s.tokens - 1), s
        assert s.blocks == block_count(s.tokens, self._cutter.block_size_tokens), s
        if s.blocks:
            _describe(self.folder, self._cutter.block_size_tokens, [name for name, _ in s.files], sha256[:16])
        return {"tokens": s.tokens, "blocks": s.blocks, "predicted_tokens": s.predicted_tokens, "sha256": sha256}

    def _flush(self) -> None:
        if self._waiting:
            self._write(self._cutter.take(np.concatenate(self._waiting)))
            self._waiting, self._n_waiting = [], 0

    def _write(self, blocks: Int32) -> None:
        import pyarrow as pa

        if not len(blocks):
            return
        size = self._cutter.block_size_tokens + 1
        column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), size)
        self._open_shard()
        self._append(memoryview(pa.record_batch([column], schema=_schema(size)).serialize()))
        self._state.blocks += len(blocks)
        self._state.predicted_tokens += int((blocks[:, 1:] != PAD).sum())

    def _open_shard(self) -> None:
        """A new file to append to, where there is none or the last is as large as a file may get."""
        if self._file is not None and self._file.tell() >= SHARD_BYTES:
            self._close()
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"data-{len(self._state.files):05d}.arrow"
            self._state.files.append([name, 0])
            self._file = _opened(self.folder / name, "wb")
            self._append(memoryview(_schema(self._cutter.block_size_tokens + 1).serialize()))

    def _append(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        left = memoryview(data).cast("B")
        while left:
            left = left[self._file.write(left) :]  # a disk that fills up takes a part, and then raises

    def _close(self) -> None:
        if self._file is not None:
            self._append(END_OF_STREAM)
            self._note_length()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _note_length(self) -> None:
        assert self._file is not None
        self._state.files[-1] = [self._state.files[-1][0], self._file.tell()]

    def _restore(self) -> None:
        """Cut the files back to the state, take their tokens into the hash, and open the last one for appending."""
        files = dict(self._state.files)
        if not files:
            remove_tree(self.folder)
        else:
            for path in self.folder.iterdir():
                if path.name not in files:
                    path.unlink()
        for i, (name, n_bytes) in enumerate(files.items()):
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found < n_bytes:
                raise UserError(
                    f"{path}: has {found} bytes, and {n_bytes} were saved; remove the unfinished folder, and run again"
                )
            os.truncate(path, n_bytes)
            _hash_tokens(self._digest, path, is_first=i == 0)
        self._digest.update(_bytes(self._cutter.held[1 if self._state.blocks else 0 :]))
        if self._state.open:
            self._file = _opened(self.folder / self._state.files[-1][0], "ab")


def _opened(path: Path, mode: Literal["wb", "ab"]) -> FileIO:
    """A file without a buffer: what one that was interrupted still held would reach the disk after its successor's."""
    return open(path, mode, buffering=0)


def _bytes(tokens: Int32) -> bytes:
    return tokens.astype("<i4", copy=False).tobytes()


def _schema(n_tokens: int) -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema([("tokens", pa.list_(pa.int32(), n_tokens))])


def _hash_tokens(digest: hashlib._Hash, path: Path, is_first: bool) -> None:
    """Take the tokens of a file of whole blocks into a hash; the first block of the first file gives its own first."""
    for blocks in arrow_blocks(path):
        digest.update(_bytes(blocks[0, :1] if is_first else blocks[0, :0]))
        digest.update(_bytes(np.ascontiguousarray(blocks[:, 1:])))
        is_first = False


def arrow_blocks(path: Path) -> list[Int32]:
    """The blocks of an Arrow file, int32 [k, T + 1] a batch: views of the memory-mapped file."""
    import pyarrow as pa

    columns = [batch.column(0) for batch in pa.ipc.open_stream(pa.memory_map(str(path)))]
    return [c.flatten().to_numpy(zero_copy_only=True).reshape(len(c), -1) for c in columns]


def _describe(folder: Path, block_size_tokens: int, names: list[str], fingerprint: str) -> None:
    """The two small files by which `datasets.load_from_disk` knows the Arrow files beside them.

    state.json is written by hand because the library's `save_to_disk` copies every token into files of its own.
    """
    import datasets

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"), length=block_size_tokens + 1)})
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    unset = dict.fromkeys(("_format_columns", "_format_type", "_split"))
    files = [{"filename": name} for name in names]
    set_ = {"_data_files": files, "_fingerprint": fingerprint, "_format_kwargs": {}, "_output_all_columns": False}
    write_json(folder / "state.json", dict(sorted((unset | set_).items())))
    # The library does not sync its file, and what is written next vouches for it.
    for path in (folder / "dataset_info.json", folder):
        sync(path)


class SplitWriter:
    """One split of one source: its blocks, and what went into them."""

    def __init__(
        self, folder: Path, block_size_tokens: int, limit_tokens: int | None = None, state: SplitState | None = None
    ):
        """The arguments of BlockWriter; the state is this class's own."""
        self._state = replace(state) if state is not None else SplitState()
        self.blocks = BlockWriter(folder, block_size_tokens, limit_tokens, self._state.blocks)

    def add(self, tokens: Int32, lengths: Int64, sizes_bytes: Int64, unknown_bytes: Int64) -> None:
        """Append documents; one of which no token fits does not count.

        Args:
            tokens: int32 [n], documents end to end.
            lengths: int64 [documents], tokens of each.
            sizes_bytes: int64 [documents], UTF-8 length of each.
            unknown_bytes: int64 [documents], of each, what the tokenizer does not know.
        """
        starts = np.cumsum(lengths) - lengths
        taken = int(np.searchsorted(starts, self.blocks.room(len(tokens)), side="left"))
        self._state.documents += taken
        self._state.text_bytes += int(sizes_bytes[:taken].sum())
        self._state.unknown_bytes += int(unknown_bytes[:taken].sum())
        self.blocks.add(tokens)

    def save(self) -> SplitState:
        return replace(self._state, blocks=self.blocks.save())

    def finish(self) -> SplitRecord:
        s = self._state
        counts = {"documents": s.documents, "text_bytes": s.text_bytes, "unknown_bytes": s.unknown_bytes}
        return SplitRecord(**counts, **self.blocks.finish())


class SourceWriter:
    """Both splits of one source."""

    def __init__(
        self,
        name: str,
        folder: Path,
        block_size_tokens: int,
        limits_tokens: tuple[int | None, int | None] = (None, None),
        state: WriterState | None = None,
    ):
        """As of BlockWriter; the splits go to folder/train/name and folder/validation/name, and have a limit each."""
        self._name, self._need = name, block_size_tokens + 1
        state = state or WriterState()
        self._train, self._validation = (
            SplitWriter(folder / split / name, block_size_tokens, limit, of_split)
            for split, limit, of_split in zip(SPLITS, limits_tokens, (state.train, state.validation), strict=True)
        )

    @property
    def has_share(self) -> bool:
        """Whether the training split has reached its limit."""
        return self._train.blocks.full

    @property
    def full(self) -> bool:
        """Whether the training split has reached its limit, and validation has a block."""
        return self.has_share and self._validation.blocks.tokens >= self._need

    @property
    def tokens(self) -> int:
        """Training tokens so far."""
        return self._train.blocks.tokens

    def add(self, piece: Piece, tokens: Tokens) -> None:
        """Append the documents of a piece, each to its split, up to the one that makes this full.

        What comes after that one is left out of both, so that the result does not depend on how pieces are cut.
        """
        n = self._until_full(piece.validation, tokens.lengths)
        lengths, sizes_bytes, is_validation = tokens.lengths[:n], piece.sizes_bytes[:n], piece.validation[:n]
        unknown_bytes = tokens.unknown_bytes[:n]
        stream = tokens.stream[: int(lengths.sum())]
        of_validation = np.repeat(is_validation, lengths)
        for split, documents, positions in (
            (self._train, ~is_validation, ~of_validation),
            (self._validation, is_validation, of_validation),
        ):
            if documents.any():
                part = stream if documents.all() else stream[positions]
                split.add(part, lengths[documents], sizes_bytes[documents], unknown_bytes[documents])

    def _until_full(self, is_validation: Bool, lengths: Int64) -> int:
        """The number of some documents that are taken until this is full; all of them where it will not be."""
        limit = self._train.blocks.limit_tokens
        if limit is None:
            return len(lengths)
        train = self.tokens + np.cumsum(np.where(is_validation, 0, lengths))
        validation = self._validation.blocks.tokens + np.cumsum(np.where(is_validation, lengths, 0))
        return int(np.searchsorted((train >= limit) & (validation >= self._need), True)) + 1

    def save(self) -> WriterState:
        """Bring both splits to the disk; the state from which another process goes on."""
        return WriterState(self._train.save(), self._validation.save())

    def finish(self) -> tuple[SplitRecord, SplitRecord]:
        """Close both splits.

        Raises:
            UserError: a split is too short for one block.
        """
        records = self._train.finish(), self._validation.finish()
        for split, record, need in zip(SPLITS, records, (self._need, 2), strict=True):
            if record.tokens < need:
                raise UserError(
                    f"data.sources: source '{self._name}': its {split} split has {record.tokens} tokens, fewer than "
                    f"the {need} that one block needs; give more text, shorten data.block_size_tokens, or change "
                    "data.validation_fraction"
                )
        return records
