"""Writing token blocks: appended to Arrow files that can be gone on with after a kill, one folder a source and split.

The files are what `datasets.load_from_disk` reads, so that nothing has to be copied when the stream ends.
"""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from replication.data.blocks import PAD, Cutter, Int32, block_count
from replication.data.tokenise import Bool, Int64, Piece, Tokens
from replication.errors import UserError
from replication.runs.files import remove_tree, sync, write_json

if TYPE_CHECKING:
    import pyarrow

SPLITS = ("train", "validation")
SHARD_BYTES = 1 << 30
BATCH_TOKENS = 1 << 20  # tokens gathered before their blocks are written, 4 MiB
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow's


class BlockWriter:
    """The blocks of one stream of tokens, up to a limit.

    Attributes:
        tokens: tokens taken so far.
        blocks: whole blocks so far; finish() may add a padded one.
    """

    def __init__(
        self,
        folder: Path,
        block_size_tokens: int,
        limit_tokens: int | None = None,
        state: dict[str, Any] | None = None,
    ):
        """
        Args:
            folder: where the files go; what is in it, but not in the state, is removed.
            block_size_tokens: T; blocks hold T + 1 tokens.
            limit_tokens: tokens after which the stream is full; none: never.
            state: what save() gave in another process; none: an empty stream.
        """
        self.folder, self.limit_tokens = folder, limit_tokens
        state = state or {"tokens": 0, "blocks": 0, "predicted_tokens": 0, "held": [], "files": [], "open": False}
        self.tokens, self.blocks, self._predicted = state["tokens"], state["blocks"], state["predicted_tokens"]
        self._cutter = Cutter(block_size_tokens, np.array(state["held"], dtype=np.int32))
        self._waiting: list[Int32] = []
        self._n_waiting = 0
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None
        self._files: list[list[Any]] = [list(pair) for pair in state["files"]]
        self._restore(state["open"])

    @property
    def full(self) -> bool:
        return self.limit_tokens is not None and self.tokens >= self.limit_tokens

    def room(self, n_tokens: int) -> int:
        """How many of so many tokens the stream can still take."""
        return n_tokens if self.limit_tokens is None else max(0, min(n_tokens, self.limit_tokens - self.tokens))

    def add(self, tokens: Int32) -> None:
        """Append tokens (int32 [n]); those beyond the limit are left out."""
        tokens = tokens[: self.room(len(tokens))]
        self.tokens += len(tokens)
        self._digest.update(_bytes(tokens))
        self._waiting.append(tokens)
        self._n_waiting += len(tokens)
        if self._n_waiting >= BATCH_TOKENS:
            self._flush()

    def save(self) -> dict[str, Any]:
        """Bring what there is to the disk; the state from which another process goes on."""
        self._flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._files[-1][1] = self._file.tell()
        return {
            "tokens": self.tokens,
            "blocks": self.blocks,
            "predicted_tokens": self._predicted,
            "held": self._cutter.held.tolist(),
            "files": [list(pair) for pair in self._files],
            "open": self._file is not None,
        }

    def finish(self) -> dict[str, Any]:
        """Write the last block and close the folder.

        Returns:
            {"tokens": n, "blocks": n, "predicted_tokens": n, "sha256": of the stream's little-endian int32 bytes}.
        """
        self._flush()
        self._write(self._cutter.rest())
        self._close()
        # Every token but the first is a target exactly once: nothing was cut off, nothing counted twice.
        assert self._predicted == max(0, self.tokens - 1), (self._predicted, self.tokens)
        assert self.blocks == block_count(self.tokens, self._cutter.block_size_tokens), (self.blocks, self.tokens)
        counts = {"tokens": self.tokens, "blocks": self.blocks, "predicted_tokens": self._predicted}
        sha256 = self._digest.hexdigest()
        if self.blocks:
            _describe(self.folder, self._cutter.block_size_tokens, [name for name, _ in self._files], sha256[:16])
        return {**counts, "sha256": sha256}

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
        self.blocks += len(blocks)
        self._predicted += int((blocks[:, 1:] != PAD).sum())

    def _open_shard(self) -> None:
        """A new file to append to, where there is none or the last is as large as a file may get."""
        if self._file is not None and self._file.tell() >= SHARD_BYTES:
            self._close()
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files.append([f"data-{len(self._files):05d}.arrow", 0])
            self._file = _opened(self.folder / self._files[-1][0], "wb")
            self._append(memoryview(_schema(self._cutter.block_size_tokens + 1).serialize()))

    def _append(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        left = memoryview(data).cast("B")
        while left:
            left = left[self._file.write(left) :]  # a disk that fills up takes a part, and then raises

    def _close(self) -> None:
        if self._file is not None:
            self._append(END_OF_STREAM)
            self._files[-1][1] = self._file.tell()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _restore(self, is_open: bool) -> None:
        """Cut the files back to the state, take their tokens into the hash, and open the last one for appending."""
        if not self._files:
            remove_tree(self.folder)
        else:
            kept = {name for name, _ in self._files}
            for path in self.folder.iterdir():
                if path.name not in kept:
                    path.unlink()
        for i, (name, n_bytes) in enumerate(self._files):
            self._cut_back(self.folder / name, n_bytes)
            _hash_tokens(self._digest, self.folder / name, is_first=i == 0)
        self._digest.update(_bytes(self._cutter.held[1 if self.blocks else 0 :]))
        if is_open:
            self._file = _opened(self.folder / self._files[-1][0], "ab")

    def _cut_back(self, path: Path, n_bytes: int) -> None:
        """Remove what was written after the state was saved."""
        found = path.stat().st_size if path.is_file() else 0
        if found < n_bytes:
            raise UserError(
                f"{path}: has {found} bytes, and {n_bytes} were saved; remove the unfinished folder, and run again"
            )
        os.truncate(path, n_bytes)


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
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            column = batch.column(0)
            blocks = column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)
            digest.update(_bytes(blocks[0, :1] if is_first else blocks[0, :0]))
            digest.update(_bytes(np.ascontiguousarray(blocks[:, 1:])))
            is_first = False


def _describe(folder: Path, block_size_tokens: int, names: list[str], fingerprint: str) -> None:
    """The two small files by which `datasets.load_from_disk` knows the Arrow files beside them."""
    import datasets

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"), length=block_size_tokens + 1)})
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    description: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", description)
    # The library does not sync its file, and what is written next vouches for it.
    for path in (folder / "dataset_info.json", folder):
        sync(path)


class SplitWriter:
    """One split of one source: its blocks, and what went into them."""

    def __init__(
        self, folder: Path, block_size_tokens: int, limit_tokens: int | None = None, state: dict[str, Any] | None = None
    ):
        """The arguments of BlockWriter; the state is this class's own."""
        self.blocks = BlockWriter(folder, block_size_tokens, limit_tokens, state["blocks"] if state else None)
        self._documents: int = state["documents"] if state else 0
        self._text_bytes: int = state["text_bytes"] if state else 0
        self._unknown_bytes: int = state["unknown_bytes"] if state else 0

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
        self._documents += taken
        self._text_bytes += int(sizes_bytes[:taken].sum())
        self._unknown_bytes += int(unknown_bytes[:taken].sum())
        self.blocks.add(tokens)

    def _counts(self) -> dict[str, int]:
        return {"documents": self._documents, "text_bytes": self._text_bytes, "unknown_bytes": self._unknown_bytes}

    def save(self) -> dict[str, Any]:
        return {**self._counts(), "blocks": self.blocks.save()}

    def finish(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        return {**self._counts(), **self.blocks.finish()}


class SourceWriter:
    """Both splits of one source."""

    def __init__(
        self,
        name: str,
        folder: Path,
        block_size_tokens: int,
        limits_tokens: tuple[int | None, int | None] = (None, None),
        state: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: of the source.
            folder: of the preparation; the splits go to folder/train/name and folder/validation/name.
            block_size_tokens: T.
            limits_tokens: of the training and of the validation split; none: no limit.
            state: what save() gave in another process.
        """
        self._name, self._need = name, block_size_tokens + 1
        states: dict[str, Any] = state or {}
        self._splits = {
            split: SplitWriter(folder / split / name, block_size_tokens, limit, states.get(split))
            for split, limit in zip(SPLITS, limits_tokens, strict=True)
        }

    @property
    def has_share(self) -> bool:
        """Whether the training split has reached its limit."""
        return self._splits["train"].blocks.full

    @property
    def full(self) -> bool:
        """Whether the training split has reached its limit, and validation has a block."""
        return self.has_share and self._splits["validation"].blocks.tokens >= self._need

    @property
    def tokens(self) -> int:
        """Training tokens so far."""
        return self._splits["train"].blocks.tokens

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
            ("train", ~is_validation, ~of_validation),
            ("validation", is_validation, of_validation),
        ):
            if documents.any():
                part = stream if documents.all() else stream[positions]
                self._splits[split].add(part, lengths[documents], sizes_bytes[documents], unknown_bytes[documents])

    def _until_full(self, is_validation: Bool, lengths: Int64) -> int:
        """How many of some documents are taken until this is full; all of them where it will not be."""
        limit = self._splits["train"].blocks.limit_tokens
        if limit is None:
            return len(lengths)
        train = self.tokens + np.cumsum(np.where(is_validation, 0, lengths))
        validation = self._splits["validation"].blocks.tokens + np.cumsum(np.where(is_validation, lengths, 0))
        return int(np.searchsorted((train >= limit) & (validation >= self._need), True)) + 1

    def save(self) -> dict[str, Any]:
        """Bring both splits to the disk; the state from which another process goes on."""
        return {split: writer.save() for split, writer in self._splits.items()}

    def finish(self) -> dict[str, Any]:
        """Close both splits; their entries in the manifest.

        Raises:
            UserError: a split is too short for one block.
        """
        entries = {split: writer.finish() for split, writer in self._splits.items()}
        for split, entry in entries.items():
            need = self._need if split == "train" else 2
            if entry["tokens"] < need:
                raise UserError(
                    f"data.sources: source '{self._name}': its {split} split has {entry['tokens']} tokens, fewer than "
                    f"the {need} that one block needs; give more text, shorten data.block_size_tokens, or change "
                    "data.validation_fraction"
                )
        return entries
