"""The order of the data: the global batch of step k as a pure function of (data seed, k).

Nothing is shuffled and stored, and nothing is remembered between steps: positions go through keyed permutations, so
no number of processes, workers or restarts can change which sequences a step sees.

    position p = step * n_sequences + i        i counts the sequences of one global batch
    slot       = p mod 1000, cycle = p div 1000
    source     = the one that owns the slot after the cycle's permutation; each source owns a fixed number of slots
    n          = how many earlier positions of the stream belong to that source
    epoch      = n div size of the source, index = the epoch's permutation of (n mod size)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from replication.errors import UserError

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

CYCLE_SLOTS = 1000  # the mixture is exact in every run of this many sequences that starts at a multiple of it
ROUNDS = 8

# First entry of a permutation's key: one value a purpose, so that no two purposes share a permutation.
SLOTS, INDICES, VALIDATION, PARTS = 0, 1, 2, 3


class KeyedPermutation:
    """A bijection on 0..size-1 that is computed, not stored: a Feistel network with cycle walking.

    The network works on pairs (left, right) of a rectangle rows x columns, as near to a square as it can be, that holds
    at least size cells; each round adds a hash of one half to the other, modulo its range. A value that lands beyond
    size goes through again until it is inside, which keeps the map a bijection. Fewer than rows cells lie beyond, so
    that is rare (a domain of a power of four would walk up to four times as long).
    """

    def __init__(self, size: int, key: tuple[int, ...]):
        """
        Args:
            size: number of elements, at least 1 and at most 2**62.
            key: any integers; each tuple gives its own permutation.
        """
        assert 1 <= size <= 1 << 62, size
        self.size = size
        rows = math.isqrt(size - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-size // rows))
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys: UInt64 = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.ArrayLike) -> Int64:
        """Map positions (int64, any shape, each in 0..size-1) to their images (int64, the same shape)."""
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.size == 0 or (positions.min() >= 0 and positions.max() < self.size)
        values = self._network(positions.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64).reshape(positions.shape)

    def _network(self, values: UInt64) -> UInt64:
        left, right = np.divmod(values, self._columns)
        for i, key in enumerate(self._round_keys):
            if i % 2 == 0:
                left = (left + _finalise(right ^ key) % self._rows) % self._rows
            else:
                right = (right + _finalise(left ^ key) % self._columns) % self._columns
        return left * self._columns + right


def _finalise(x: UInt64) -> UInt64:
    """splitmix64's finaliser: every input bit flips every output bit with probability about one half."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def largest_remainder(weights: Sequence[float], total: int) -> Int64:
    """Share `total` among weights in whole numbers that add up; ties go to the earlier entry. Returns int64 [n]."""
    assert len(weights) > 0 and min(weights) > 0, weights
    shares = np.asarray(weights, dtype=np.float64) / float(sum(weights)) * total
    counts = np.floor(shares).astype(np.int64)
    short = total - int(counts.sum())
    # Rounding makes equal weights' remainders differ in the last bits; that must not decide who gets a slot.
    counts[np.argsort(-np.round(shares - counts, 9), kind="stable")[:short]] += 1
    return counts


class MixtureOrder:
    """The training stream: sources mixed by weight, each source in a new permutation every epoch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        """
        Args:
            sizes: training sequences in each source, all positive.
            weights: relative share of each source in the stream, all positive.
            seed: the data seed.

        Raises:
            UserError: a weight is too small for one sequence in a thousand.
        """
        assert len(sizes) == len(weights) > 0 and min(sizes) > 0
        self.sizes, self.seed = [int(s) for s in sizes], int(seed)
        self.slots = largest_remainder(weights, CYCLE_SLOTS)
        self._newest: tuple[int, tuple[Int64, Int64]] | None = None  # spares work; never changes a result
        for source, slots in enumerate(self.slots):
            if slots < 1:
                raise UserError(
                    f"data.sources: weight {weights[source]:g} of source number {source + 1} is less than one sequence "
                    f"in {CYCLE_SLOTS} of the total {sum(weights):g}; raise it, or remove the source"
                )

    def global_batch(self, step: int, n_sequences: int) -> tuple[Int64, Int64]:
        """The sequences of one optimizer step, in global order, whatever the number of processes.

        Args:
            step: 0 is the first.
            n_sequences: sequences in a global batch; another number cuts the same stream into other batches.

        Returns:
            Source numbers int64 [n_sequences], and indices of blocks in their sources int64 [n_sequences].
        """
        assert step >= 0 and n_sequences > 0
        return self.stream(step * n_sequences, n_sequences)

    def stream(self, start: int, count: int) -> tuple[Int64, Int64]:
        """Source numbers and block indices (int64 [count] each) of stream positions start..start+count-1."""
        first, last = start // CYCLE_SLOTS, (start + count - 1) // CYCLE_SLOTS
        cycles = [self._cycle(cycle) for cycle in range(first, last + 1)]
        inside = slice(start - first * CYCLE_SLOTS, start - first * CYCLE_SLOTS + count)
        source_ids = np.concatenate([sources for sources, _ in cycles])[inside]
        numbers = np.concatenate([numbers for _, numbers in cycles])[inside]
        return source_ids, self._indices(source_ids, numbers)

    def _cycle(self, cycle: int) -> tuple[Int64, Int64]:
        """Source of each slot of a cycle, and how many samples of that source come before it in the stream."""
        if self._newest is not None and self._newest[0] == cycle:
            return self._newest[1]
        slots = KeyedPermutation(CYCLE_SLOTS, (SLOTS, self.seed, cycle))(np.arange(CYCLE_SLOTS))
        sources = np.searchsorted(np.cumsum(self.slots), slots, side="right").astype(np.int64)
        numbers = np.empty_like(sources)
        for source, owned in enumerate(self.slots):
            numbers[sources == source] = cycle * owned + np.arange(owned)
        self._newest = (cycle, (sources, numbers))
        return sources, numbers

    def _indices(self, source_ids: Int64, numbers: Int64) -> Int64:
        indices = np.empty_like(numbers)
        for source in np.unique(source_ids):
            size = self.sizes[source]
            mine = source_ids == source
            epochs, within = np.divmod(numbers[mine], size)
            found = np.empty_like(within)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                key = (INDICES, self.seed, int(source), int(epoch))
                found[here] = KeyedPermutation(size, key)(within[here])
            indices[mine] = found
        return indices


def validation_selection(sizes: Sequence[int], weights: Sequence[float], n_sequences: int) -> tuple[Int64, Int64]:
    """The fixed validation set: the same for every seed and arm, mixed as training is, nothing twice.

    Args:
        sizes: validation sequences in each source.
        weights: relative share of each source.
        n_sequences: length of the set.

    Returns:
        Source numbers int64 [n_sequences], ascending, and block indices int64 [n_sequences].

    Raises:
        UserError: a source has fewer validation sequences than its share.
    """
    shares = largest_remainder(weights, n_sequences)
    for source, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        if share > size:
            fits = int(size / share * n_sequences)
            raise UserError(
                f"validation.sequences: {n_sequences} takes {share} from source number {source + 1}, whose validation "
                f"split has {size}; take about {fits}, or prepare with a larger data.validation_fraction"
            )
    indices = [
        KeyedPermutation(max(1, size), (VALIDATION, source))(np.arange(share))
        for source, (share, size) in enumerate(zip(shares, sizes, strict=True))
    ]
    return np.repeat(np.arange(len(shares), dtype=np.int64), shares), np.concatenate(indices)
