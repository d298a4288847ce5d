"""Small statistics over seeds. Pure functions; NaN is a missing value and stays one.

Shapes: A arms, N seeds, V validations, S steps. The unit of every interval is the training seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from replication.protocol.paper import LATE_CHECKPOINTS

Floats = NDArray[np.float64]

BUDGET_TOLERANCE = 0.01
"""A mean gain further from 1 does not preserve the total gradient budget (objectives/README.md, Token gain)."""


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


@dataclass(frozen=True)
class LateMean:
    """Mean of the last k validations: those asked for, or all there are."""

    value: float
    k: int


@dataclass(frozen=True)
class Budget:
    """Number of steps at which the mean gain after the clamp departs from 1."""

    n_failing: int
    n_measured: int
    share: float  # n_failing / n_measured; NaN where nothing was measured


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


def smallest_sign_flip_p(n_seeds: int) -> float:
    """The smallest two-sided p that an exact sign-flip test over n seeds can reach: 2 / 2**n; NaN without seeds."""
    return min(1.0, 2.0 / 2**n_seeds) if n_seeds > 0 else float("nan")


def late_mean(values_V: ArrayLike, k: int = LATE_CHECKPOINTS) -> LateMean:
    """Mean of the last k >= 1 validations, or of all where there are fewer; a missing one makes it NaN."""
    assert k >= 1
    last = np.asarray(values_V, dtype=np.float64)[-k:]
    return LateMean(float(last.mean()) if len(last) else float("nan"), len(last))


def last_share_mean(values_S: ArrayLike, share: float = 0.1) -> LateMean:
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
    """(common steps [C], mean [C]) of each seed's (steps [T], values [T]).

    A step that one seed lacks, or has as NaN, is left out or NaN: a mean over changing sets of seeds would jump where a
    seed ends.
    """
    if not curves:
        return np.empty(0), np.empty(0)
    common = reduce(np.intersect1d, [np.asarray(steps, dtype=np.float64) for steps, _ in curves])
    rows = [np.asarray(values, dtype=np.float64)[np.isin(np.asarray(steps), common)] for steps, values in curves]
    return common, np.mean(rows, axis=0)
