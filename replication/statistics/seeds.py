"""Tests and intervals over training seeds, the unit of every interval here. Pure functions on arrays.

Shapes: A arms, N seeds, V validations, S steps; a leading [...] is any number of experiments at once, so that a
simulation of thousands is one call. NaN is a missing value: it is left out, or makes what cannot be computed NaN.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate
from scipy import stats as scipy_stats

from replication.protocol.paper import LATE_CHECKPOINTS

Floats = NDArray[np.float64]
Number = TypeVar("Number", np.int64, np.float64)

BUDGET_TOLERANCE = 0.01
"""A mean gain further from 1 does not preserve the total gradient budget (objectives/README.md, Token gain)."""
EQUIVALENT, DIFFERENT, NOT_DECIDED = "equivalent", "different beyond the margin", "not decided"
EFFECTS = ("token gain", "layer gain", "interaction")
POWER = 0.80  # that `seeds_for_equivalence` asks for
MOST_SEEDS = 2**14  # that it looks through
MOST_SIGN_FLIPS = 40  # seeds up to which sign flips are enumerated: 2**20 sums for each half of them


@dataclass(frozen=True, eq=False)
class MeanTest:
    """A mean of paired differences, its t interval and the two-sided p of a zero mean; every array is [...]."""

    n: NDArray[np.int64]  # seeds with a value
    mean: Floats
    sd: Floats  # of the sample (n - 1); NaN below two seeds, as are low, high and p
    low: Floats
    high: Floats
    p: Floats  # NaN too where the differences do not vary: a t test has nothing to stand on


@dataclass(frozen=True)
class Paired:
    """Paired differences of one arm to the first arm."""

    n: int  # seeds that have both values
    mean: float
    sd: float  # of the sample (n - 1); NaN below two seeds, as are low and high
    low: float
    high: float
    n_positive: int
    n_negative: int
    note: str  # why there is no interval; empty where there is one


def mean_test(differences_N: ArrayLike, confidence: float = 0.95) -> MeanTest:
    """Mean over seeds with its t interval, mean -/+ t(n - 1) * sd / sqrt(n), and the t test of a zero mean.

    Args:
        differences_N: float [..., N]; NaN is a seed without a value, and left out.
        confidence: coverage of the interval.
    """
    values = _finite(differences_N)
    n = np.isfinite(values).sum(-1)
    with _no_warnings():
        mean, sd = np.nanmean(values, -1), np.nanstd(values, -1, ddof=1)
    half = scipy_stats.t.ppf(0.5 + confidence / 2, np.maximum(n - 1, 1)) * sd / np.sqrt(np.maximum(n, 1))
    return MeanTest(n, mean, sd, mean - half, mean + half, t_p(values))


def t_p(values_N: ArrayLike, null: float = 0.0, alternative: str = "two-sided") -> Floats:
    """p of scipy's one-sample t test over the last axis; NaN below two seeds, and where nothing varies."""
    values = _finite(values_N)
    with _no_warnings():
        result = scipy_stats.ttest_1samp(values, null, axis=-1, nan_policy="omit", alternative=alternative)
        varies = np.nanstd(values, -1, ddof=1) > 1e-12 * np.nan_to_num(np.abs(values)).max(-1, initial=0.0)
    return np.where(varies, np.asarray(result.pvalue, dtype=np.float64), np.nan)


def _finite(values: ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Too few values, or equal ones, give NaN, which callers handle."""
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        yield


def differences_to_first(values_AN: ArrayLike) -> Floats:
    """Each arm minus the first arm, seed by seed: [A, N] -> [A - 1, N], NaN where either value is missing."""
    values = np.asarray(values_AN, dtype=np.float64)
    return values[1:] - values[:1]


def summarize_paired(differences_N: ArrayLike, confidence: float = 0.95) -> Paired:
    """`mean_test` of one quantity's differences [N], with their signs; no interval, and a note, below two seeds."""
    values = np.asarray(differences_N, dtype=np.float64)
    values = values[np.isfinite(values)]
    test = mean_test(values, confidence)
    mean, sd, low, high = (float(x) for x in (test.mean, test.sd, test.low, test.high))
    note = "" if test.n > 1 else "one seed: no interval" if test.n else "no seed has both values"
    return Paired(int(test.n), mean, sd, low, high, int((values > 0).sum()), int((values < 0).sum()), note)


@dataclass(frozen=True, eq=False)
class Equivalence(MeanTest):
    """Two one-sided tests of |mean| < margin; p is the larger of both.

    Low and high bound the 1 - 2 alpha interval: the arms are equivalent where it lies within the margin.
    """

    p_lower: Floats  # of 'mean <= -margin'
    p_upper: Floats  # of 'mean >= margin'
    verdict: NDArray[np.str_]  # equivalent, different beyond the margin (the interval lies wholly outside), not decided


@dataclass(frozen=True)
class SeedsForPower:
    """The seeds that equivalence takes in a new study, if the true difference is zero."""

    sd: float  # that the differences had
    seeds: int | None  # for 80 % power at that sd; None: unknown, or too many
    sd_upper: float  # its upper 80 % bound: few seeds say little of a standard deviation
    seeds_upper: int | None  # at that bound


def equivalence(differences_N: ArrayLike, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t tests (Schuirmann 1987): is the mean of differences [..., N] within +/- margin?

    The margin, above 0 and in their unit, is stated in advance. Alpha is the level of each test, and so of the whole;
    the interval has coverage 1 - 2 alpha. Below two seeds, or where the differences do not vary, there is no p and the
    verdict is `not decided`.
    """
    assert margin > 0 and 0 < alpha < 0.5
    values = np.asarray(differences_N, dtype=np.float64)
    test = mean_test(values, 1 - 2 * alpha)
    p_lower, p_upper = t_p(values, -margin, "greater"), t_p(values, margin, "less")
    p = np.maximum(p_lower, p_upper)
    outside = np.isfinite(p) & ((test.low > margin) | (test.high < -margin))
    verdict = np.where(p < alpha, EQUIVALENT, np.where(outside, DIFFERENT, NOT_DECIDED))
    return Equivalence(test.n, test.mean, test.sd, test.low, test.high, p, p_lower, p_upper, verdict)


def power_of_equivalence(
    n: ArrayLike, sd: ArrayLike, margin: ArrayLike, shift: ArrayLike = 0.0, alpha: float = 0.05
) -> Floats:
    """Probability that `equivalence` says equivalent: exact for normal differences.

    Both tests reject where |mean| < margin - t(1 - alpha, n - 1) s / sqrt(n). Given the sample's standard deviation s
    this is a normal probability; s sqrt(n - 1) / sd has a chi distribution, over which it is integrated (the bivariate
    noncentral t of Owen 1965 in another form).

    Args:
        n, sd, margin, shift: seeds, true standard deviation and true mean (shift) of the differences; broadcast.
        alpha: level of each test.

    Returns:
        float64 [...]; NaN below two seeds.
    """
    n, sd, margin, shift = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (n, sd, margin, shift)))
    df = np.where(n >= 2, n - 1, np.nan)
    critical = scipy_stats.t.ppf(1 - alpha, df)
    se = sd / np.sqrt(n)
    most = margin / (critical * se)  # s / sd beyond which no mean is within the margin
    low, high = (scipy_stats.chi.ppf(q, df) / np.sqrt(df) for q in (1e-12, 1 - 1e-12))
    high = np.maximum(np.minimum(high, most), low)

    def integrand(x: Floats) -> Floats:
        ratio = low[..., None] + (high - low)[..., None] * x  # s / sd [..., nodes]
        room = (margin / se)[..., None] - critical[..., None] * ratio
        off = (shift / se)[..., None]
        inside = scipy_stats.norm.cdf(room - off) - scipy_stats.norm.cdf(-room - off)
        root = np.sqrt(df)[..., None]
        return inside * scipy_stats.chi.pdf(ratio * root, df[..., None]) * root * (high - low)[..., None]

    return np.asarray(integrate.fixed_quad(integrand, 0.0, 1.0, n=200)[0], dtype=np.float64)


def seeds_for_equivalence(sd: float, margin: float, alpha: float = 0.05) -> int | None:
    """The fewest seeds at which `equivalence` has its power at no true difference; None without a positive sd, or
    where MOST_SEEDS are too few."""
    if not (np.isfinite(sd) and sd > 0 and margin > 0):
        return None
    numbers = range(2, MOST_SEEDS + 1)  # power grows with them
    i = bisect_left(numbers, POWER, key=lambda n: float(power_of_equivalence(n, sd, margin, alpha=alpha)))
    return numbers[i] if i < len(numbers) else None


def sd_upper_bound(sd: float, n: int, confidence: float = 0.80) -> float:
    """One-sided upper bound of a standard deviation that n normal values had; NaN below two values."""
    return float(sd * np.sqrt((n - 1) / scipy_stats.chi2.ppf(1 - confidence, n - 1))) if n >= 2 else float("nan")


def seeds_for_power(n: int, sd: float, margin: float, alpha: float = 0.05) -> SeedsForPower:
    """Seeds of a study whose differences have the sd that n differences had, with the power at no true difference."""
    upper = sd_upper_bound(sd, n)
    seeds, seeds_upper = (seeds_for_equivalence(s, margin, alpha) for s in (sd, upper))
    return SeedsForPower(float(sd), seeds, upper, seeds_upper)


def factorial_contrasts(values_4N: ArrayLike) -> Floats:
    """Main effects and interaction [..., 3, N] of the 2x2 within each seed.

    Of values [..., 4, N], rows neither, token gain alone, layer gain alone, both: what the token gain adds, mean over
    layer gain off and on; what the layer gain adds, mean over token gain off and on; and the interaction, what the
    token gain adds with the layer gain less what it adds without. NaN where one of a seed's four values is missing.
    """
    neither, token, layer, both = np.moveaxis(np.asarray(values_4N, dtype=np.float64), -2, 0)
    token_gain, layer_gain = (token - neither + both - layer) / 2, (layer - neither + both - token) / 2
    return np.stack([token_gain, layer_gain, both - token - layer + neither], axis=-2)


def factorial(values_4N: ArrayLike, confidence: float = 0.95) -> MeanTest:
    """The 2x2 blocked by seed: a t test over seeds of each contrast [..., 3], so that what seeds share cancels.

    Equal to the repeated-measures analysis of variance with the seed as subject (its F is the square of this t), where
    each contrast has its own error. In the order of EFFECTS.
    """
    return mean_test(factorial_contrasts(values_4N), confidence)


def smallest_sign_flip_p(n_seeds: int) -> float:
    """The smallest two-sided p that an exact sign-flip test over n seeds can reach: 2 / 2**n; NaN without seeds."""
    return min(1.0, 2.0 / 2**n_seeds) if n_seeds > 0 else float("nan")


def sign_flip_p(differences_N: ArrayLike) -> Floats:
    """Exact two-sided sign-flip test of the mean: the share of all 2**n sign patterns whose |sum| is as large.

    Assumes of the differences only that each is as likely as its negative. With n seeds the smallest p is 2 / 2**n.
    All patterns are counted, by the sums of either half of the seeds. Zeros are kept. NaN without seeds, and above 40
    seeds, where the patterns are too many to count.
    """
    values = np.asarray(differences_N, dtype=np.float64)
    rows = values.reshape(-1, values.shape[-1])
    return np.array([_sign_flip_p(row[np.isfinite(row)]) for row in rows]).reshape(values.shape[:-1])


def _sign_flip_p(values_n: Floats) -> float:
    n = len(values_n)
    if not 0 < n <= MOST_SIGN_FLIPS:
        return float("nan")
    halves = []
    for half in (values_n[: n // 2], values_n[n // 2 :]):
        sums = np.zeros(1)  # [2**h]: of h values under every pattern of signs
        for value in half:
            sums = np.concatenate([sums - value, sums + value])
        halves.append(sums)
    first, second = halves[0], np.sort(halves[1])
    extreme = abs(values_n.sum()) - 1e-9 * np.abs(values_n).sum()  # sums that differ by rounding alone are tied
    if extreme <= 0:
        return 1.0
    larger = len(second) - np.searchsorted(second, extreme - first, side="left")
    return float(2 * larger.sum() / 2.0**n)  # the patterns are symmetric: as many are as small


def holm(p_Q: ArrayLike) -> Floats:
    """Holm's adjusted p [Q] of several questions: below alpha where Holm's procedure rejects; without a p none, NaN."""
    p = np.asarray(p_Q, dtype=np.float64)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def chosen_on_others(losses_RN: ArrayLike) -> NDArray[np.int64]:
    """For each seed the rate whose mean over the other seeds is lowest: of finite losses [..., R, N] [..., N]."""
    losses = np.asarray(losses_RN, dtype=np.float64)
    return (losses.sum(-1, keepdims=True) - losses).argmin(-2)


@dataclass(frozen=True, eq=False)
class AtBestRates:
    """Two sweeps compared at the best rate of each; every array is [...] but the first."""

    held_out: Floats  # [..., N] second less first at each seed, at the rates that the other seeds chose
    mean: Floats  # of these
    low: Floats  # of the intervals of both tests together: zero lies outside where p is below 1 - confidence
    high: Floats
    p: Floats


def at_best_rates(first_RN: ArrayLike, second_RN: ArrayLike, confidence: float = 0.95) -> AtBestRates:
    """Losses of two sweeps, R rates at the same N >= 2 seeds, each sweep at its best rate.

    A rate that is chosen by the very losses it is then compared at looks better than it is, and the more so the flatter
    a sweep is. So each seed's difference is taken at the rates whose mean over the other seeds is lowest. But these
    choices share seeds, so that their t test alone rejects too often (up to 23 % at 5 %). Both errors go with each
    other's remedy: p is the larger one of that test and of the t test at the rates that are best over all seeds, and 1
    where the two means differ in sign. Of finite losses [..., R, N] with normal noise: 6 % at most
    (tests/statistics/test_rates.py).
    """
    tables = [np.asarray(losses, dtype=np.float64) for losses in (first_RN, second_RN)]

    def difference(chosen: Callable[[Floats], NDArray[np.int64]]) -> Floats:
        first, second = (np.take_along_axis(of, chosen(of)[..., None, :], -2)[..., 0, :] for of in tables)
        return second - first

    held_out = difference(chosen_on_others)
    over_all = difference(lambda of: np.repeat(of.sum(-1).argmin(-1)[..., None], of.shape[-1], -1))
    one, two = mean_test(held_out, confidence), mean_test(over_all, confidence)
    p = np.where(one.mean * two.mean > 0, np.maximum(one.p, two.p), np.where(np.isnan(one.p + two.p), np.nan, 1.0))
    return AtBestRates(held_out, one.mean, np.minimum(one.low, two.low), np.maximum(one.high, two.high), p)


@dataclass(frozen=True)
class Budget:
    """Number of steps at which the mean gain after the clamp departs from 1."""

    n_failing: int
    n_measured: int
    share: float  # n_failing / n_measured; NaN where nothing was measured


def late_mean(values_V: ArrayLike, k: int = LATE_CHECKPOINTS) -> float:
    """Mean of the last k >= 1 validations, or of all where there are fewer; a missing one makes it NaN."""
    assert k >= 1
    last = np.asarray(values_V, dtype=np.float64)[-k:]
    return float(last.mean()) if len(last) else float("nan")


def last_share_mean(values_S: ArrayLike, share: float = 0.1) -> float:
    """Mean over the last share in (0, 1] of steps, at least one, for what is kept at every step; see late_mean."""
    values = np.asarray(values_S)
    return late_mean(values, max(1, round(share * len(values))))


def budget_departure(mean_gain_T: ArrayLike, tolerance: float = BUDGET_TOLERANCE) -> Budget:
    """Number of logged steps at which 'the total gradient budget is preserved' fails: further than tolerance from 1.

    Args:
        mean_gain_T: float [T], mean gain over the step's tokens after the clamp; NaN entries are not measured.
    """
    values = np.asarray(mean_gain_T, dtype=np.float64)
    values = values[np.isfinite(values)]
    failing = int((np.abs(values - 1) > tolerance).sum())
    return Budget(failing, len(values), failing / len(values) if len(values) else float("nan"))


def window_means(values_S: ArrayLike, size: int) -> tuple[Floats, Floats]:
    """Means over consecutive windows of `size` steps, so that a curve of many noisy steps can be read.

    Returns:
        (last step of each window [W], mean over the values there are [W]). Entry k of the values is step k + 1; the
        last window may be shorter, and one without any value is NaN.
    """
    assert size >= 1
    values = _finite(values_S)
    n_windows = -(-len(values) // size)
    windows = np.pad(values, (0, n_windows * size - len(values)), constant_values=np.nan).reshape(-1, size)
    ends = np.minimum(np.arange(1, n_windows + 1) * size, len(values)).astype(np.float64)
    with _no_warnings():
        return ends, np.nanmean(windows, 1)


def mean_over_seeds(curves: Sequence[tuple[ArrayLike, ArrayLike]]) -> tuple[Floats, Floats]:
    """(shared steps [T], mean [T]) of each seed's (steps, values); a value that is NaN makes the mean NaN."""
    if not curves:
        return np.empty(0), np.empty(0)
    steps, values_NT = shared_steps([(np.asarray(s, np.float64), np.asarray(v, np.float64)) for s, v in curves])
    return steps, values_NT.mean(0)


def shared_steps(curves: Sequence[tuple[NDArray[Number], Floats]]) -> tuple[NDArray[Number], Floats]:
    """(steps [T] that all have, values [N, T]) of one curve or more, whose steps ascend.

    A mean over changing sets of seeds would jump where a seed ends.
    """
    steps = reduce(np.intersect1d, (s for s, _ in curves))
    return steps, np.stack([values[np.searchsorted(s, steps)] for s, values in curves])
