"""The estimators for losses, against statsmodels, scipy, closed forms and a hand-worked example."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from replication.statistics.seeds import (
    DIFFERENT,
    EQUIVALENT,
    NOT_DECIDED,
    equivalence,
    factorial,
    factorial_contrasts,
    holm,
    mean_test,
    power_of_equivalence,
    sd_upper_bound,
    seeds_for_equivalence,
    seeds_for_power,
    sign_flip_p,
)

NAN = float("nan")

# ---------------------------------------------------------------- equivalence


def test_equivalence_by_hand() -> None:
    """-1, 0, 1 and margin 3: se 1/sqrt(3), t = 3 sqrt(3) = 5.196 with 2 df; the 90 % interval is +/- 2.92 / sqrt(3)."""
    found = equivalence([-1.0, 0.0, 1.0], 3.0)
    t = 3 * math.sqrt(3)
    by_hand = 0.5 * (1 - t / math.sqrt(2 + t * t))  # the t distribution with 2 df in closed form
    assert (float(found.p_lower), float(found.p_upper)) == pytest.approx((by_hand, by_hand), rel=1e-12)
    assert float(found.high) == pytest.approx(2.919986 / math.sqrt(3), abs=1e-6)
    assert float(found.low) == -float(found.high)
    assert found.verdict == EQUIVALENT


@pytest.mark.parametrize(
    ("mean", "n", "verdict"), [(0.0, 12, EQUIVALENT), (0.03, 12, DIFFERENT), (0.015, 4, NOT_DECIDED)]
)
def test_equivalence_is_statsmodels(mean: float, n: int, verdict: str) -> None:
    values = np.random.default_rng(n).normal(0, 0.005, n)
    values += mean - values.mean()
    p, (t_lower, p_lower, _), (t_upper, p_upper, _) = DescrStatsW(values).ttost_mean(-0.02, 0.02)
    found = equivalence(np.append(values, NAN), 0.02)
    assert [float(x) for x in (found.p, found.p_lower, found.p_upper)] == pytest.approx([p, p_lower, p_upper], rel=1e-9)
    assert t_lower > t_upper and found.verdict == verdict
    interval = DescrStatsW(values).tconfint_mean(alpha=0.1)
    assert (float(found.low), float(found.high)) == pytest.approx(interval, rel=1e-9)


def test_the_verdict_is_where_the_interval_lies() -> None:
    """Both forms of the test agree in thousands of samples: p < alpha exactly where the interval is inside."""
    found = equivalence(np.random.default_rng(0).normal(0.01, 0.01, (4000, 6)), 0.02)
    inside = (found.low > -0.02) & (found.high < 0.02)
    np.testing.assert_array_equal(found.verdict == EQUIVALENT, inside)
    np.testing.assert_array_equal(found.verdict == DIFFERENT, (found.low > 0.02) | (found.high < -0.02))
    assert set(found.verdict.tolist()) == {EQUIVALENT, DIFFERENT, NOT_DECIDED}


@pytest.mark.parametrize("values", [[], [NAN], [0.001], [0.001, NAN], [0.0, 0.0, 0.0], [0.1] * 3, [0.003] * 6])
def test_nothing_is_decided_from_nothing(values: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = equivalence(values, 0.02)
    assert found.verdict == NOT_DECIDED
    assert math.isnan(float(found.p)) and math.isnan(float(mean_test(values).p))


# ---------------------------------------------------------------- power


def test_power_is_what_simulation_finds() -> None:
    """Also the level: at a shift of the margin itself equivalence is declared in no more than alpha."""
    n_tried = 20_000
    rng = np.random.default_rng(1)
    for n, sd, shift in ((4, 0.01, 0.0), (8, 0.02, 0.005), (6, 0.005, 0.02)):
        declared = (equivalence(rng.normal(shift, sd, (n_tried, n)), 0.02).verdict == EQUIVALENT).mean()
        expected = float(power_of_equivalence(n, sd, 0.02, shift))
        assert abs(declared - expected) < 4 * math.sqrt(expected * (1 - expected) / n_tried)
    assert float(power_of_equivalence(6, 0.005, 0.02, 0.02)) == pytest.approx(0.05, abs=1e-4)


def test_power_with_two_seeds_in_closed_form() -> None:
    """With 1 df s / sd is half normal; a dense sum over it is another way to the same number."""
    ratio = np.linspace(0, 12, 400_001)[1:]
    root2 = math.sqrt(2)
    room = np.maximum(0.1 * root2 - scipy_stats.t.ppf(0.95, 1) * ratio * 0.02, 0) / 0.02
    inside = 2 * scipy_stats.norm.cdf(room) - 1
    dense = (inside * scipy_stats.halfnorm.pdf(ratio)).sum() * (ratio[1] - ratio[0])
    assert float(power_of_equivalence(2, 0.02, 0.1)) == pytest.approx(dense, abs=1e-4)


def test_power_broadcasts_and_ends_in_nothing() -> None:
    table = power_of_equivalence(np.arange(1, 40)[:, None], [0.005, 0.02], 0.02)
    assert table.shape == (39, 2) and np.isnan(table[0]).all()
    assert (np.diff(table[1:], axis=0) > -1e-9).all() and (table[1:, 0] >= table[1:, 1]).all()
    assert table[-1, 0] == pytest.approx(1, abs=1e-6)
    assert float(power_of_equivalence(2, 1.0, 1e-6)) == pytest.approx(0, abs=1e-6)


def test_seeds_for_power_are_the_fewest_that_suffice() -> None:
    wanted = seeds_for_equivalence(0.03, 0.02)
    assert wanted is not None
    assert float(power_of_equivalence(wanted, 0.03, 0.02)) >= 0.8 > float(power_of_equivalence(wanted - 1, 0.03, 0.02))
    study = seeds_for_power(4, 0.03, 0.02)
    assert study.seeds == wanted
    assert study.sd_upper == pytest.approx(0.03 * math.sqrt(3 / scipy_stats.chi2.ppf(0.2, 3)))
    assert study.seeds_upper is not None and study.seeds_upper > wanted


@pytest.mark.parametrize(("sd", "margin"), [(NAN, 0.02), (0.0, 0.02), (100.0, 0.02)])
def test_no_number_of_seeds_is_made_up(sd: float, margin: float) -> None:
    assert seeds_for_equivalence(sd, margin) is None


def test_the_bound_of_the_sd_holds_as_often_as_it_says() -> None:
    sds = np.random.default_rng(2).normal(size=(4_000, 5)).std(1, ddof=1)
    assert np.mean([sd_upper_bound(sd, 5) >= 1 for sd in sds]) == pytest.approx(0.8, abs=0.025)
    assert math.isnan(sd_upper_bound(0.1, 1))


# ---------------------------------------------------------------- the 2x2


def test_factorial_by_hand() -> None:
    """Neither 4, token 5, layer 7, both 10: token adds 1 and 3, layer adds 3 and 5, the interaction is 2."""
    np.testing.assert_array_equal(factorial_contrasts([[4.0], [5.0], [7.0], [10.0]]), [[2.0], [4.0], [2.0]])
    assert np.isnan(factorial_contrasts([[4.0], [NAN], [7.0], [10.0]])).all()


def test_factorial_is_the_repeated_measures_anova() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(4, 0.02, (4, 7)) + rng.normal(0, 1, 7) + np.array([[0], [0.01], [0.03], [0.08]])
    rows = [
        {"seed": seed, "token": arm in (1, 3), "layer": arm in (2, 3), "loss": values[arm, seed]}
        for arm in range(4)
        for seed in range(7)
    ]
    table = AnovaRM(pd.DataFrame(rows), "loss", "seed", within=["token", "layer"]).fit().anova_table
    found = factorial(values)
    assert found.p == pytest.approx(table["Pr > F"].to_numpy(), rel=1e-6)
    assert (found.mean / found.sd * math.sqrt(7)) ** 2 == pytest.approx(table["F Value"].to_numpy(), rel=1e-6)


def test_factorial_takes_many_experiments_and_leaves_out_incomplete_seeds() -> None:
    values = np.random.default_rng(4).normal(size=(50, 4, 5))
    values[7, 2, 1] = NAN
    found = factorial(values)
    assert found.p.shape == (50, 3) and found.n[7].tolist() == [4, 4, 4] and found.n[8].tolist() == [5, 5, 5]
    alone = factorial(np.delete(values[7], 1, axis=1))
    np.testing.assert_allclose(found.p[7], alone.p)
    np.testing.assert_allclose(found.low[7], alone.low)


# ---------------------------------------------------------------- sign flips and Holm


@pytest.mark.parametrize("n", [2, 5, 10])
def test_sign_flips_are_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.5, 1, n)
    reference = scipy_stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert float(sign_flip_p(np.append(values, NAN))) == pytest.approx(min(1.0, reference.pvalue), abs=1e-12)


def test_sign_flips_by_hand() -> None:
    """1, 2, 3: of eight sums only +6 and -6 are as far out. 1, 1, -1: every pattern but none is nearer than 1."""
    assert sign_flip_p([[1.0, 2.0, 3.0], [1.0, 1.0, -1.0]]).tolist() == [0.25, 1.0]
    assert float(sign_flip_p([0.3])) == 1 and float(sign_flip_p(np.full(32, 0.1))) == 2 / 2**32
    assert math.isnan(float(sign_flip_p([NAN]))) and math.isnan(float(sign_flip_p(np.ones(41))))


def test_holm_by_hand() -> None:
    """0.01 x 3, 0.02 x 2, 0.5 x 1; a missing p is no question."""
    np.testing.assert_allclose(holm([0.02, NAN, 0.01, 0.5]), [0.04, NAN, 0.03, 0.5])
    assert np.isnan(holm([NAN])).all() and holm([]).shape == (0,)


def test_holm_is_statsmodels(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, equal p and ones above 1 / n among them."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # which each call of theirs does: a second in a full worker
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        for _ in range(20):
            p = rng.choice([0.0, 1.0, *rng.random(6) ** 3], n)
            assert (holm(p) == multipletests(p, method="holm")[1]).all()
