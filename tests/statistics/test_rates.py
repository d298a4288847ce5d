"""Sweeps compared at the best rate of each: the level holds whatever the curves, and what is there is found."""

from __future__ import annotations

import numpy as np
import pytest

from replication.statistics.seeds import at_best_rates, chosen_on_others, t_p

FLAT, BOWL, STEEP, SLOPE = np.zeros(5), np.linspace(-1, 1, 5) ** 2, 5 * np.linspace(-1, 1, 5) ** 2, np.arange(5) / 2


def losses(curve: np.ndarray, n_seeds: int, rng: np.random.Generator, shared: np.ndarray | float = 0.0) -> np.ndarray:
    """[2000, R, N]: what a seed shares over all its cells, and noise of one nat in each."""
    return curve[:, None] + shared + rng.standard_normal((2000, len(curve), n_seeds))


@pytest.mark.parametrize("n_seeds", [5, 6, 12])
@pytest.mark.parametrize(("a", "b"), [(FLAT, FLAT), (BOWL, BOWL), (STEEP, FLAT), (STEEP, BOWL), (SLOPE, FLAT)])
def test_the_level_holds_where_the_best_rates_are_equal(a, b, n_seeds):
    rng = np.random.default_rng(n_seeds)
    shared = 2 * rng.standard_normal((2000, 1, n_seeds))
    found = at_best_rates(losses(a, n_seeds, rng, shared), losses(b, n_seeds, rng, shared))
    assert (found.p < 0.05).mean() < 0.065


def test_the_held_out_test_alone_rejects_too_often():
    """What the second test is there for: with flat sweeps the choices that seeds share look like an effect."""
    rng = np.random.default_rng(0)
    found = at_best_rates(losses(FLAT, 8, rng), losses(FLAT, 8, rng))
    assert (t_p(found.held_out) < 0.05).mean() > 0.15


def test_a_difference_is_found_and_its_interval_agrees_with_p():
    rng = np.random.default_rng(1)
    found = at_best_rates(losses(STEEP, 6, rng), losses(STEEP + 3, 6, rng))
    assert (found.p < 0.05).mean() > 0.8 and found.mean.mean() == pytest.approx(3, abs=0.1)
    small = at_best_rates(losses(STEEP, 6, rng), losses(STEEP + 1, 6, rng))
    assert np.array_equal(small.p < 0.05, (small.low > 0) | (small.high < 0))


def test_no_seed_chooses_its_own_rate():
    table = np.array([[1.0, 1.0, 0.0], [0.9, 0.9, 9.0]])
    assert chosen_on_others(table).tolist() == [0, 0, 1]
