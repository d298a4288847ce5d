"""Reading what `replicate prepare` wrote: token blocks by (source, index), memory-mapped."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from replication.config import RunConfig
from replication.console import say
from replication.data.blocks import PAD, arrow_blocks
from replication.data.folder import CorpusManifest, Split, read_manifest, request_differences, request_of
from replication.data.order import Int64, MixtureOrder, validation_selection
from replication.data.tokenise import Int32
from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError

SHOWN_CHARACTERS = 72


class TokenStore:
    """A complete preparation. Holds no file open until it is read; may be pickled to loader processes."""

    def __init__(self, dir: Path, manifest: CorpusManifest):
        self.dir, self.manifest = dir, manifest
        self.source_names = list(manifest.sources)  # in the order of source numbers
        self.hash, self.vocab_size, self.end_of_text_id = manifest.hash, manifest.vocab_size, manifest.end_of_text_id
        self.block_size_tokens = manifest.block_size_tokens
        self._columns: dict[tuple[Split, int], tuple[list[Int32], Int64]] = {}

    @classmethod
    def open(cls, dir: Path | str | None) -> TokenStore:
        """Open a folder that `replicate prepare` completed; UserError for one that is missing or of another format."""
        if not dir:
            raise UserError("data.dir: is not set; give the folder that `replicate prepare --out DIR` wrote")
        dir = Path(dir)
        manifest = read_manifest(dir) if dir.is_dir() else None
        if manifest is None:
            state = "holds no complete preparation" if dir.exists() else "does not exist"
            raise UserError(f"data.dir: {dir} {state}; run `replicate prepare --out {dir}` first")
        return cls(dir, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.dir, self.manifest)

    def sizes(self, split: Split) -> list[int]:
        """Blocks of each source in a split, in the order of source_names."""
        return [source.split(split).blocks for source in self.manifest.sources.values()]

    def read(self, split: Split, source_ids: npt.ArrayLike, indices: npt.ArrayLike) -> Int32:
        """Blocks by source number (places in source_names) and index in the source, int64 [n] each.

        A fresh int32 [n, T + 1]; PAD (-1) fills the end of a source's last block.
        """
        source_ids, indices = np.asarray(source_ids), np.asarray(indices)
        blocks = np.empty((len(indices), self.block_size_tokens + 1), dtype=np.int32)
        for row, (source, index) in enumerate(zip(source_ids.tolist(), indices.tolist(), strict=True)):
            views, ends = self._column(split, source)
            assert 0 <= index < ends[-1], index
            chunk = int(np.searchsorted(ends, index, side="right"))
            blocks[row] = views[chunk][index - int(ends[chunk])]  # negative: counted from the chunk's end
        return blocks

    def _column(self, split: Split, source: int) -> tuple[list[Int32], Int64]:
        """The blocks of a source as zero-copy views of its memory-mapped Arrow batches, and where each of them ends.

        Indexing through datasets costs about a tenth of a millisecond a row (it builds a table and formats it); a view
        costs a microsecond.
        """
        if (split, source) in self._columns:
            return self._columns[split, source]
        folder, expected = self.dir / split / self.source_names[source], self.sizes(split)[source]
        remedy = "remove the data folder and prepare it again"
        try:
            files = sorted(path for path in folder.iterdir() if path.suffix == ".arrow")
            views = [blocks for path in files for blocks in arrow_blocks(path)]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: cannot be read ({error}); {remedy}") from error
        ends = np.cumsum([len(view) for view in views])
        found = int(ends[-1]) if len(ends) else 0
        if found != expected:
            raise UserError(f"{folder}: holds {found} blocks and the manifest says {expected}; {remedy}")
        self._columns[split, source] = views, ends
        return views, ends

    def valid_targets(self, split: Split, source_ids: npt.ArrayLike, indices: npt.ArrayLike) -> Int64:
        """Targets that are tokens, not padding, in each block, int64 [n]; from the manifest alone, nothing is read."""
        size = self.block_size_tokens
        blocks = np.array(self.sizes(split), dtype=np.int64)
        tokens = np.array([s.split(split).tokens for s in self.manifest.sources.values()], dtype=np.int64)
        last = tokens - 1 - (blocks - 1) * size
        source_ids, indices = np.asarray(source_ids), np.asarray(indices)
        return np.where(indices == blocks[source_ids] - 1, last[source_ids], size).astype(np.int64)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that wrote the blocks; loaded where it is first asked for."""
        text = (self.dir / "tokenizer.json").read_text(encoding="utf-8")
        return TextTokenizer(text, self.manifest.request["tokenizer"]["end_of_text"])

    def check(self, config: RunConfig) -> None:
        """Refuse a run that these data do not fit: UserError where the vocabulary differs, or by check_data."""
        if config.model.vocab_size != self.vocab_size:
            raise UserError(
                f"model.vocab_size: {config.model.vocab_size}, but the tokenizer of {self.dir} has {self.vocab_size}; "
                f"set it to {self.vocab_size}, or prepare the data again in another folder"
            )
        self.check_data(config)

    def check_data(self, config: RunConfig) -> None:
        """Refuse data (UserError) that are not those which the config describes, or shorter than one global batch."""
        different = request_differences(request_of(config.data), self.manifest.request)
        if different:
            raise UserError(
                f"data.dir: {self.dir} was prepared with another {' and '.join(different)}; set what the preparation "
                "has, or prepare the data again in another folder"
            )
        have, need = sum(self.sizes("train")), config.batch_sequences
        if have < need:
            raise UserError(
                f"training.batch_tokens: one global batch is {need} sequences and the training split has {have} "
                f"(corpus shorter than one batch); set it to {have * self.block_size_tokens} or less, or give more text"
            )


def training_order(config: RunConfig, store: TokenStore) -> MixtureOrder:
    """The order in which a run reads the training split; raises UserError where a weight is too small."""
    weights = [source.weight for source in config.data.sources]
    return MixtureOrder(store.sizes("train"), weights, config.effective_data_seed)


def validation_set(config: RunConfig, store: TokenStore) -> tuple[Int64, Int64]:
    """The fixed validation set of a run, as order.validation_selection gives it."""
    weights = [source.weight for source in config.data.sources]
    return validation_selection(store.sizes("validation"), weights, config.validation.sequences)


def show_batch(config: RunConfig, data_dir: Path, step: int, console: Console, full: bool = False) -> None:
    """Print each sequence of a step's global batch: position in the batch, source, block, and decoded text.

    Whole sequences where `full`; otherwise the beginning and the end of each, on one line. Raises UserError for a
    negative step, or data that do not fit the config (vocabulary sizes are not compared).
    """
    if step < 0:
        raise UserError(f"--show-batch: step {step} must be 0 (the first) or more")
    store = TokenStore.open(data_dir)
    store.check_data(config)
    source_ids, indices = training_order(config, store).global_batch(step, config.batch_sequences)
    tokens = store.read("train", source_ids, indices)
    say(
        console,
        f"step {step}, data seed {config.effective_data_seed}: {len(indices)} sequences of {store.block_size_tokens} "
        f"predicted tokens, data hash {store.hash[:12]}",
    )
    for position, (source, index, block) in enumerate(zip(source_ids, indices, tokens, strict=True)):
        text = repr(store.tokenizer.decode(block[block != PAD], skip_special_tokens=False))
        if not full and len(text) > SHOWN_CHARACTERS:
            half = SHOWN_CHARACTERS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        say(console, f"{position:5d}  {store.source_names[source]:<16s} block {index:<8d} {text}")
