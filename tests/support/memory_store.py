"""A token store in memory with the interface of the one on disk: the same fixed tokens everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAD = -1


class MemoryStore:
    """Blocks of a noisy counting language: learnable, and a pure function of (source, block, position).

    The last training block of source 0 is padded after a few tokens, as the last block of a real source is.
    """

    def __init__(self, vocab_size: int = 64, block_size_tokens: int = 16, blocks: Sequence[int] = (40, 24)) -> None:
        self.vocab_size, self.block_size_tokens = vocab_size, block_size_tokens
        self.blocks = {"train": list(blocks), "validation": [8] * len(blocks)}
        self.source_names = [f"source_{i}" for i in range(len(blocks))]
        self.end_of_text_id = 0
        self.hash = f"memory-{vocab_size}-{block_size_tokens}-{list(blocks)}"
        self.last_targets = 5

    def check(self, config: object) -> None:
        """Nothing to check: the tests build config and store together."""

    def sizes(self, split: str) -> list[int]:
        return self.blocks[split]

    def valid_targets(self, split: str, source_ids: np.ndarray, indices: np.ndarray) -> np.ndarray:
        last = (split == "train") & (source_ids == 0) & (indices == self.blocks["train"][0] - 1)
        return np.where(last, self.last_targets, self.block_size_tokens)

    def read(self, split: str, source_ids: np.ndarray, indices: np.ndarray) -> np.ndarray:
        positions = np.arange(self.block_size_tokens + 1)
        start = (source_ids * 7919 + indices * 104729 + (split == "validation") * 15485863)[:, None]
        noise = ((start + positions) * 2654435761 % 2**32) >> 29
        tokens = 1 + (start + positions * (1 + source_ids[:, None]) + (noise == 0) * noise.cumsum(1)) % (
            self.vocab_size - 1
        )
        keep = self.valid_targets(split, source_ids, indices)[:, None] >= positions
        return np.where(keep, tokens, PAD).astype(np.int32)
