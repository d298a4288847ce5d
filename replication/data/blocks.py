"""Token blocks, written: a stream is cut so that every token but the first is predicted once. T = block_size_tokens.

Block b holds stream positions b*T .. b*T+T, that is T + 1 tokens: T inputs and, one later, T targets. Neighbouring
blocks share one token. The end of the last block is filled with PAD.

They are appended to Arrow files that can be gone on with after a kill, one folder a source and split. The files are
what `datasets.load_from_disk` reads, so that nothing has to be copied when the stream ends.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from replication.config import SourceConfig
from replication.data.folder import SPLITS, ReadReport, SourceRecord, Split, SplitRecord, SplitState
from replication.data.order import Int64
from replication.data.tokenise import Int32, Piece, Tokens
from replication.errors import UserError
from replication.runs.files import sync, write_json

PAD = -1  # no token: whoever reads a block feeds end-of-text there and ignores the target
SHARD_BYTES = 1 << 30
BATCH_TOKENS = 1 << 20  # tokens gathered before their blocks are written, 4 MiB
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow's


def block_count(n_tokens: int, block_size_tokens: int) -> int:
    """Blocks of a stream; one of fewer than two tokens predicts nothing and has none."""
    return max(0, -(-(n_tokens - 1) // block_size_tokens))


def cut(stream: Int32, block_size_tokens: int, ended: bool = False) -> Int32:
    """The whole blocks of a stream, int32 [k, T + 1]; where it has ended, with the last one, padded."""
    size = block_size_tokens
    n_blocks = block_count(len(stream), size) if ended else max(0, len(stream) - 1) // size
    padded = np.pad(stream, (0, max(0, n_blocks * size + 1 - len(stream))), constant_values=PAD)
    blocks: Int32 = padded[size * np.arange(n_blocks)[:, None] + np.arange(size + 1)]
    return blocks


def arrow_blocks(path: Path) -> list[Int32]:
    """The blocks of an Arrow file, int32 [k, T + 1] a batch: views of the memory-mapped file."""
    import pyarrow as pa

    columns = [batch.column(0) for batch in pa.ipc.open_stream(pa.memory_map(str(path)))]
    return [c.flatten().to_numpy(zero_copy_only=True).reshape(len(c), -1) for c in columns]


class SplitWriter:
    """One split of one source: its blocks, up to a limit of tokens (none: without end), and what went into them.

    It goes on from a state, that of save() in another process: what the folder has beyond it is removed.
    """

    def __init__(
        self, folder: Path, block_size_tokens: int, limit_tokens: int | None = None, state: SplitState | None = None
    ):
        self.folder, self.block_size_tokens, self.limit_tokens = folder, block_size_tokens, limit_tokens
        self._state = copy.deepcopy(state) if state is not None else SplitState()
        self._written = self._state.blocks
        self._waiting = [np.array(self._written.held, dtype=np.int32)]  # tokens that no block on the disk has covered
        self._digest = hashlib.sha256()
        kept = {name for name, _ in self._written.files}
        for path in [path for path in self.folder.glob("*") if path.name not in kept]:
            path.unlink()
        is_first = True
        for name, n_bytes in self._written.files:
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found < n_bytes:
                raise UserError(
                    f"{path}: has {found} bytes, and {n_bytes} were saved; remove the unfinished folder, and run again"
                )
            os.truncate(path, n_bytes)
            for blocks in arrow_blocks(path):
                self._hash(blocks[0, : int(is_first)])
                self._hash(blocks[:, 1:])
                is_first = False
        self._hash(self._waiting[0][int(self._written.blocks > 0) :])

    def _hash(self, tokens: Int32) -> None:
        self._digest.update(tokens.astype("<i4", copy=False).tobytes())

    @property
    def tokens(self) -> int:
        """Tokens taken so far."""
        return self._written.tokens

    @property
    def full(self) -> bool:
        return self.limit_tokens is not None and self.tokens >= self.limit_tokens

    def add(self, tokens: Tokens, sizes_bytes: Int64) -> None:
        """Append documents (with the UTF-8 length of each); tokens beyond the limit are left out.

        A document of which no token fits does not count.
        """
        stream = tokens.stream[: None if self.limit_tokens is None else max(0, self.limit_tokens - self.tokens)]
        starts = np.cumsum(tokens.lengths) - tokens.lengths
        taken = int(np.searchsorted(starts, len(stream)))
        self._state.documents += taken
        self._state.text_bytes += int(sizes_bytes[:taken].sum())
        self._state.unknown_bytes += int(tokens.unknown_bytes[:taken].sum())
        self._written.tokens += len(stream)
        self._hash(stream)
        self._waiting.append(stream)
        if self.tokens - self._written.blocks * self.block_size_tokens >= BATCH_TOKENS:
            self._flush()

    def save(self) -> SplitState:
        """Bring what there is to the disk; the state from which another process goes on."""
        self._flush()
        if self._written.open:
            sync(self.folder / str(self._written.files[-1][0]))
        self._written.held = self._waiting[0].tolist()
        return copy.deepcopy(self._state)

    def finish(self) -> SplitRecord:
        """Write the last block, and the two small files by which `datasets.load_from_disk` knows the Arrow files."""
        import datasets

        self._flush()
        self._flush(ended=True)
        if self._written.open:
            self._close()
        s, w, size, sha256 = self._state, self._written, self.block_size_tokens, self._digest.hexdigest()
        # Every token but the first is a target exactly once: nothing was cut off, nothing counted twice.
        assert w.predicted_tokens == max(0, w.tokens - 1), w
        assert w.blocks == block_count(w.tokens, size), w
        if w.blocks:
            features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"), length=size + 1)})
            datasets.DatasetInfo(features=features).write_to_directory(str(self.folder))
            # By hand, because the library's save_to_disk copies every token into files of its own.
            known: dict[str, object] = dict.fromkeys(("_format_columns", "_format_type", "_split"))
            known |= {"_data_files": [{"filename": name} for name, _ in w.files], "_fingerprint": sha256[:16]}
            known |= {"_format_kwargs": {}, "_output_all_columns": False}
            write_json(self.folder / "state.json", dict(sorted(known.items())))
            # The library does not sync its file, and what is written next vouches for it.
            for path in (self.folder / "dataset_info.json", self.folder):
                sync(path)
        return SplitRecord(
            documents=s.documents,
            text_bytes=s.text_bytes,
            unknown_bytes=s.unknown_bytes,
            tokens=w.tokens,
            blocks=w.blocks,
            predicted_tokens=w.predicted_tokens,
            sha256=sha256,
        )

    def _flush(self, ended: bool = False) -> None:
        stream = np.concatenate(self._waiting)
        blocks = cut(stream, self.block_size_tokens, ended)
        if len(blocks):
            self._write(blocks)
        self._waiting = [stream[len(blocks) * self.block_size_tokens :]]

    def _write(self, blocks: Int32) -> None:
        """Append to the last file, or to a new one where there is none or it is as large as a file may get."""
        import pyarrow as pa

        w, size = self._written, self.block_size_tokens + 1
        schema = pa.schema([("tokens", pa.list_(pa.int32(), size))])
        if w.open and w.files[-1][1] >= SHARD_BYTES:
            self._close()
        if not w.open:
            self.folder.mkdir(parents=True, exist_ok=True)
            w.files.append([f"data-{len(w.files):05d}.arrow", 0])
            w.open = True
            self._append(schema.serialize())
        column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), size)
        self._append(pa.record_batch([column], schema=schema).serialize())
        w.blocks += len(blocks)
        w.predicted_tokens += int((blocks[:, 1:] != PAD).sum())

    def _append(self, data: Any) -> None:
        # Opened anew: what a file that was interrupted still held would reach the disk after its successor's writes.
        with open(self.folder / str(self._written.files[-1][0]), "ab") as file:
            file.write(data)
            self._written.files[-1][1] = file.tell()

    def _close(self) -> None:
        self._append(END_OF_STREAM)
        sync(self.folder / str(self._written.files[-1][0]))
        self._written.open = False


class SourceWriter:
    """Both splits of one source, in folder/train/name and folder/validation/name, each with a limit and a state."""

    def __init__(
        self,
        source: SourceConfig,
        folder: Path,
        block_size_tokens: int,
        limits_tokens: tuple[int | None, int | None] = (None, None),
        states: Mapping[Split, SplitState] | None = None,
    ):
        self._source, self._need = source, block_size_tokens + 1
        self.train, self.validation = (
            SplitWriter(folder / split / source.name, block_size_tokens, limit, (states or {}).get(split))
            for split, limit in zip(SPLITS, limits_tokens, strict=True)
        )

    @property
    def full(self) -> bool:
        """Whether the training split has reached its limit, and validation has a block."""
        return self.train.full and self.validation.tokens >= self._need

    def add(self, piece: Piece, tokens: Tokens) -> None:
        """Append the documents of a piece, each to its split, up to the one that makes this full.

        What comes after that one is left out of both, so that the result does not depend on how pieces are cut.
        """
        taken = np.ones(len(piece.validation), dtype=bool)
        if self.train.limit_tokens is not None:
            train = self.train.tokens + np.cumsum(np.where(piece.validation, 0, tokens.lengths))
            validation = self.validation.tokens + np.cumsum(np.where(piece.validation, tokens.lengths, 0))
            full = (train >= self.train.limit_tokens) & (validation >= self._need)
            taken[1:] = ~full[:-1]
        for split, chosen in ((self.train, taken & ~piece.validation), (self.validation, taken & piece.validation)):
            split.add(tokens.chosen(chosen), piece.sizes_bytes[chosen])

    def save(self) -> dict[Split, SplitState]:
        """Bring both splits to the disk; the states from which another process goes on."""
        return {"train": self.train.save(), "validation": self.validation.save()}

    def finish(self, report: ReadReport) -> SourceRecord:
        """Close both splits of what was read; raises UserError where one is too short for one block."""
        train, validation = self.train.finish(), self.validation.finish()
        for split, record, need in zip(SPLITS, (train, validation), (self._need, 2), strict=True):
            if record.tokens < need:
                raise UserError(
                    f"data.sources: source '{self._source.name}': its {split} split has {record.tokens} tokens, fewer "
                    f"than the {need} that one block needs; give more text, shorten data.block_size_tokens, or change "
                    "data.validation_fraction"
                )
        share = self.train.limit_tokens
        return SourceRecord(
            kind=self._source.kind,
            path=self._source.path,
            revision=self._source.revision,
            share_tokens=share,
            ended_before_its_share=share is not None and train.tokens < share,
            **asdict(report) | {"documents": train.documents + validation.documents},
            text_bytes=train.text_bytes + validation.text_bytes,
            train=train,
            validation=validation,
        )
