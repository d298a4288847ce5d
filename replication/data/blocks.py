"""Blocks: a stream of tokens cut so that every token but the first is predicted exactly once. T = block_size_tokens.

Block b holds stream positions b*T .. b*T+T, that is T + 1 tokens: T inputs and, one later, T targets. Neighbouring
blocks share one token. The end of the last block is filled with PAD.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

PAD = -1  # no token: whoever reads a block feeds end-of-text there and ignores the target
BATCH_TOKENS = 1 << 20  # tokens gathered before blocks are handed on, 4 MiB


def block_count(n_tokens: int, block_size_tokens: int) -> int:
    """Blocks of a stream; one of fewer than two tokens predicts nothing and has none."""
    return max(0, -(-(n_tokens - 1) // block_size_tokens))


def cut(documents: Iterable[Int32], block_size_tokens: int) -> Iterator[Int32]:
    """Cut concatenated documents (each int32 [n], end-of-text included) into arrays of blocks, int32 [k, T + 1]."""
    held: list[Int32] = []
    n_held = 0
    for document in documents:
        held.append(document)
        n_held += len(document)
        if n_held > max(BATCH_TOKENS, block_size_tokens):
            stream = np.concatenate(held)
            n_whole = (n_held - 1) // block_size_tokens
            yield _windows(stream, n_whole, block_size_tokens)
            held = [stream[n_whole * block_size_tokens :]]
            n_held = len(held[0])
    n_blocks = block_count(n_held, block_size_tokens)
    if n_blocks:
        padding = np.full(n_blocks * block_size_tokens + 1 - n_held, PAD, dtype=np.int32)
        yield _windows(np.concatenate([*held, padding]), n_blocks, block_size_tokens)


def _windows(stream: Int32, n_blocks: int, block_size_tokens: int) -> Int32:
    windows = np.lib.stride_tricks.sliding_window_view(stream, block_size_tokens + 1)
    return np.ascontiguousarray(windows[::block_size_tokens][:n_blocks], dtype=np.int32)


def uncut(blocks: Int32) -> Int32:
    """The stream (int32 [n]) that consecutive blocks int32 [k, T + 1], from the first to the last, were cut from."""
    stream = np.concatenate([blocks[:1, 0], blocks[:, 1:].ravel()])
    return stream[stream != PAD]
