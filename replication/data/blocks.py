"""Blocks: a stream of tokens cut so that every token but the first is predicted exactly once. T = block_size_tokens.

Block b holds stream positions b*T .. b*T+T, that is T + 1 tokens: T inputs and, one later, T targets. Neighbouring
blocks share one token. The end of the last block is filled with PAD.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

PAD = -1  # no token: whoever reads a block feeds end-of-text there and ignores the target


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
        return _windows(stream, n_whole, self.block_size_tokens)

    def rest(self) -> Int32:
        """The last block of the stream, padded: int32 [1, T + 1], or [0, T + 1] where nothing is left to predict."""
        n_blocks = block_count(len(self.held), self.block_size_tokens)
        padding = np.full(max(0, n_blocks * self.block_size_tokens + 1 - len(self.held)), PAD, dtype=np.int32)
        return _windows(np.concatenate([self.held, padding]), n_blocks, self.block_size_tokens)


def _windows(stream: Int32, n_blocks: int, block_size_tokens: int) -> Int32:
    if n_blocks == 0:
        return np.empty((0, block_size_tokens + 1), dtype=np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(stream, block_size_tokens + 1)
    return np.ascontiguousarray(windows[::block_size_tokens][:n_blocks], dtype=np.int32)


def uncut(blocks: Int32) -> Int32:
    """The stream (int32 [n]) that consecutive blocks int32 [k, T + 1], from the first to the last, were cut from."""
    stream = np.concatenate([blocks[:1, 0], blocks[:, 1:].ravel()])
    return stream[stream != PAD]
