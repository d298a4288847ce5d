"""A corpus that is never on disk: random tokens with the interface of data.store.TokenStore, for measuring speed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from replication.config import RunConfig


class SyntheticStore:
    """Uniformly random tokens, a pure function of (source, block); every position is valid.

    Args:
        config: its vocabulary and block size are served; it needs one source, whatever it is.
    """

    def __init__(self, config: RunConfig) -> None:
        self.vocab_size, self.block_size_tokens = config.model.vocab_size, config.data.block_size_tokens
        self.end_of_text_id = 0
        self.hash = f"synthetic-{self.vocab_size}-{self.block_size_tokens}"

    def check(self, config: RunConfig) -> None:
        """Nothing to check: the store is made from the config."""

    def sizes(self, split: str) -> list[int]:
        return [1_000_000]

    def valid_targets(
        self, split: str, source_ids: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        return np.full(len(indices), self.block_size_tokens)

    def read(
        self, split: str, source_ids: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        positions = np.arange(self.block_size_tokens + 1, dtype=np.uint64)
        x = (indices.astype(np.uint64)[:, None] << np.uint64(20)) + positions
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((x >> np.uint64(33)) % np.uint64(self.vocab_size)).astype(np.int32)
