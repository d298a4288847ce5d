"""The data order: a bijection, well mixed, exact in its mixture, and the same for ever."""

import numpy as np
import pytest
from scipy import stats

from replication.data.order import (
    CYCLE_SLOTS,
    KeyedPermutation,
    MixtureOrder,
    largest_remainder,
    validation_selection,
)
from replication.errors import UserError

SIZES, WEIGHTS = [1122, 4725, 30036], [0.1, 0.5, 0.4]
GOLDEN_SOURCES = [1, 2, 1, 1, 2, 2, 1, 0, 1, 2, 1, 1, 2, 1, 1, 2]
GOLDEN_INDICES = [4615, 6657, 3073, 4500, 11917, 5990, 2033, 1120, 3022, 19757, 4452, 2192, 3337, 3683, 3740, 27175]


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 127, 1000, 4096, 4097, 65537])
def test_a_permutation_is_a_bijection(size):
    for key in ((0,), (1, 2, 3), (-5, 2**70)):
        assert np.array_equal(np.sort(KeyedPermutation(size, key)(np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", [10**9 + 7, 2**40 + 1, 2**62])
def test_a_large_permutation_repeats_nothing(size):
    positions = np.unique(np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000)]))
    images = KeyedPermutation(size, (7,))(positions)
    assert len(np.unique(images)) == len(positions)
    assert images.min() >= 0 and images.max() < size
    # Neighbours are thrown apart over the whole range.
    assert stats.kstest(images / size, "uniform").pvalue > 1e-4


def test_a_permutation_keeps_the_shape_and_takes_nothing():
    permutation = KeyedPermutation(100, (3,))
    grid = np.arange(12).reshape(3, 4)
    assert np.array_equal(permutation(grid).ravel(), permutation(grid.ravel()))
    assert permutation(np.empty(0, dtype=np.int64)).shape == (0,)
    assert permutation(grid).dtype == np.int64


@pytest.mark.parametrize("size", [2, 3, 5, 16, 100, 1000])
def test_images_are_uniform_over_keys(size):
    n_keys = max(3000, 10 * size)
    for position in {0, size // 2, size - 1}:
        images = [int(KeyedPermutation(size, (key, 1))([position])[0]) for key in range(n_keys)]
        assert stats.chisquare(np.bincount(images, minlength=size)).pvalue > 1e-4


def test_pairs_of_images_are_uniform_over_keys():
    images = np.array([KeyedPermutation(4, (key,))(np.arange(4)) for key in range(6_000)])
    codes = images @ np.array([64, 16, 4, 1])
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24, "some of the 24 permutations of 4 elements never occur"
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_global_batch_is_what_it_has_always_been():
    """A change here changes every run's data: never to be regenerated without saying so."""
    sources, indices = MixtureOrder(SIZES, WEIGHTS, seed=1337).global_batch(step=500, n_sequences=16)
    assert sources.dtype == indices.dtype == np.int64
    assert sources.tolist() == GOLDEN_SOURCES
    assert indices.tolist() == GOLDEN_INDICES


def test_a_step_needs_no_history_and_another_batch_size_cuts_the_same_stream():
    order = MixtureOrder(SIZES, WEIGHTS, seed=3)
    by_16 = [order.global_batch(k, 16) for k in range(200)]
    stream = [np.concatenate(part) for part in zip(*by_16, strict=True)]
    for n_sequences in (1, 5, 64, 1000, 3200):
        for step in (3200 // n_sequences - 1, 0):
            fresh = MixtureOrder(SIZES, WEIGHTS, seed=3).global_batch(step, n_sequences)
            expected = slice(step * n_sequences, (step + 1) * n_sequences)
            assert all(np.array_equal(a, b[expected]) for a, b in zip(fresh, stream, strict=True))
    # Asked backwards, and again: nothing is remembered that changes a result.
    for k in (199, 7, 63, 62, 0):
        assert all(np.array_equal(a, b) for a, b in zip(order.global_batch(k, 16), by_16[k], strict=True))


def test_slices_of_ranks_make_up_the_global_batch():
    order = MixtureOrder(SIZES, WEIGHTS, seed=3)
    whole = order.global_batch(11, 64)
    for ranks in (1, 2, 4, 8):
        of_each = [MixtureOrder(SIZES, WEIGHTS, seed=3).global_batch(11, 64)[1] for _ in range(ranks)]
        share = 64 // ranks
        joined = np.concatenate([of_each[r][r * share : (r + 1) * share] for r in range(ranks)])
        assert np.array_equal(joined, whole[1])


def test_the_mixture_is_exact_in_every_cycle_and_differs_between_cycles():
    order = MixtureOrder(SIZES, WEIGHTS, seed=0)
    cycles = [order.stream(c * CYCLE_SLOTS, CYCLE_SLOTS)[0] for c in range(5)]
    for sources in cycles:
        assert np.bincount(sources).tolist() == [100, 500, 400]
    assert not np.array_equal(cycles[0], cycles[1])


def test_an_epoch_sees_every_block_once_and_the_next_in_another_order():
    sizes = [7, 130, 1001]
    sources, indices = MixtureOrder(sizes, [1, 2, 3], seed=5).stream(0, 9000)
    for source, size in enumerate(sizes):
        mine = indices[sources == source]
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(epochs) >= 2
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert not np.array_equal(epochs[0], epochs[1])


def test_seeds_give_unrelated_streams():
    first, second = (MixtureOrder([10_000], [1.0], seed).stream(0, 10_000)[1] for seed in (1, 2))
    assert (first == second).sum() < 10  # one match is expected by chance
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def test_largest_remainder():
    assert largest_remainder([1, 1, 1], 1000).tolist() == [334, 333, 333]
    assert largest_remainder([0.1, 0.5, 0.4], 128).tolist() == [13, 64, 51]
    assert largest_remainder([5.0], 3).tolist() == [3]


def test_a_weight_without_a_slot_is_refused():
    with pytest.raises(UserError, match=r"data\.sources: weight 0\.0001 of source number 2"):
        MixtureOrder([10, 10], [1.0, 0.0001], seed=0)


def test_the_validation_set_is_fixed_mixed_and_without_repetition():
    sizes = [31, 103, 649]
    sources, indices = validation_selection(sizes, WEIGHTS, 128)
    assert np.bincount(sources).tolist() == [13, 64, 51]
    assert len({*zip(sources.tolist(), indices.tolist(), strict=True)}) == 128
    assert all(index < sizes[source] for source, index in zip(sources, indices, strict=True))
    again = validation_selection(sizes, WEIGHTS, 128)
    assert np.array_equal(indices, again[1])
    whole = validation_selection([5, 5], [1, 1], 10)
    assert sorted(whole[1].tolist()) == sorted([0, 1, 2, 3, 4] * 2)


def test_a_validation_set_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"validation\.sequences: 128 takes 13 from source number 1.*has 12"):
        validation_selection([12, 103, 649], WEIGHTS, 128)
    with pytest.raises(UserError, match=r"validation\.sequences"):
        validation_selection([0, 103, 649], WEIGHTS, 128)
