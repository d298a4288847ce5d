"""The mean of votes when seeds, prompts and judges are each a sample of those there could be.

Every vote belongs to one seed, one prompt and one judge, and votes that share one of them are alike. The model is

    value = mean + seed + prompt + judge + seed x prompt + rest

with independent random effects. The variance of the mean follows from the variance components, which come from sums of
squares by Henderson's first method (Henderson 1953, Biometrics 9:226; Searle, Casella & McCulloch 1992, chapter 5),
so that any pattern of missing votes will do. Degrees of freedom are Satterthwaite's (1946, Biometrics Bulletin 2:110),
made fewer where few levels say little of a variance (`degrees`). Judges who are related are one level: see
preference.Ballots.

Shapes: V votes, leading axes [...] are experiments with the same pattern of votes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FACTORS = ("seed", "prompt", "judge")
LARGEST_TABLE = 4_000_000
"""Pairs of levels that are counted in a table; more are sorted."""
MOST_DEGREES = 2
"""Times the degrees of freedom of the factor with the fewest levels."""


@dataclass(frozen=True, eq=False)
class CrossedT:
    """A mean with what it may vary by; every array is float64 [...]."""

    mean: Floats
    se: Floats
    """Standard error of the mean over seeds, prompts and judges; NaN where nothing varies."""
    df: Floats
    """Satterthwaite's, corrected."""
    p: Floats
    """Two-sided, against the null given; NaN without a standard error."""
    low: Floats
    high: Floats
    """Bounds of the t interval."""
    components: dict[str, Floats]
    """Estimated variance of each effect, which chance may take below 0; seed, prompt, judge, seed x prompt, rest."""
    conditional_on: tuple[str, ...]
    """Factors of which there is one level: nothing is said beyond it."""


class CrossedDesign:
    """Which seed, prompt and judge each vote belongs to, with everything that does not depend on the votes' values."""

    def __init__(self, seed: ArrayLike, prompt: ArrayLike, judge: ArrayLike) -> None:
        """Compute the coefficients of the sums of squares.

        Args:
            seed, prompt, judge: int [V], any labels; V is at least 2.
        """
        labels = {name: _levels(values) for name, values in zip(FACTORS, (seed, prompt, judge), strict=True)}
        self.n = len(labels["seed"])
        assert self.n >= 2
        self.conditional_on = tuple(name for name in FACTORS if labels[name].max() == 0)
        labels["seed x prompt"] = _levels(labels["seed"] * (labels["prompt"].max() + 1) + labels["prompt"])
        self.effects = _distinct(labels, self.n)
        self.main = [name for name in FACTORS if name in self.effects]
        counts = [np.bincount(labels[name]) for name in self.effects]
        self._orders = [np.argsort(labels[name], kind="stable") for name in self.effects]
        self._starts = [np.concatenate([[0], np.cumsum(c)[:-1]]) for c in counts]
        self._counts = counts
        self._levels = np.array([len(c) - 1 for c in counts], dtype=np.float64)
        self._expected = self._expected_squares([labels[name] for name in self.effects], counts)
        self._share = np.array(
            [*((c**2).sum() / self.n**2 for c in counts), 1 / self.n]
        )  # of each variance in the mean's
        self._weights = np.linalg.lstsq(self._expected.T, self._share, rcond=None)[0]

    def _expected_squares(self, labels: list[Ints], counts: list[Ints]) -> Floats:
        """E[sum of squares of effect a] = sum over effects b of matrix[a, b] * variance of b; the last is the rest."""
        size = len(labels) + 1
        matrix = np.empty((size, size))
        for a, n_rows in enumerate(counts):
            for b, n_columns in enumerate(counts):
                row, shared = _shared(labels[a], labels[b], len(n_rows), len(n_columns))
                matrix[a, b] = (shared**2 / n_rows[row]).sum() - (n_columns**2).sum() / self.n
            matrix[a, -1] = len(n_rows) - 1
            matrix[-1, a] = self.n - (n_rows**2).sum() / self.n
        matrix[-1, -1] = self.n - 1
        return matrix

    def t(self, values: ArrayLike, null: float = 0.5, alpha: float = 0.05) -> CrossedT:
        """Mean, interval and test.

        The variance of the mean is never taken below what the clusters of one factor alone would give it: an
        estimated interaction or rest that chance made large must not subtract what the seeds show.

        Args:
            values: float [..., V], without NaN.
            null: the mean under no effect.
            alpha: of the two-sided test; the interval covers 1 - alpha.
        """
        values_V = np.asarray(values, dtype=np.float64)
        mean = values_V.mean(-1)
        squares = self._squares(values_V - mean[..., None])
        alone = np.stack([
            self._share[i] * squares[..., i] / self._expected[i, i] for i in range(len(self.main))
        ], axis=-1) if self.main else np.zeros((*mean.shape, 1))  # fmt: skip
        variance = np.maximum(squares @ self._weights, alone.max(-1))
        variance = np.where(squares[..., -1] > 1e-12 * self.n, variance, np.nan)  # every vote is the same
        with np.errstate(divide="ignore", invalid="ignore"):
            levels = self._levels[: len(self.main)]
            df = degrees(variance, alone, levels, self.n) if self.main else np.full(variance.shape, self.n - 1.0)
            se = np.sqrt(variance)
            p = 2 * scipy_stats.t.sf(np.abs(mean - null) / se, df)
        half = scipy_stats.t.ppf(1 - alpha / 2, df) * se
        components = np.linalg.lstsq(self._expected, squares.reshape(-1, len(self._share)).T, rcond=None)[0]
        named = {
            name: row.reshape(mean.shape)
            for name, row in zip([*self.effects, "rest"], components, strict=True)
        }  # fmt: skip
        return CrossedT(mean, se, df, p, mean - half, mean + half, named, self.conditional_on)

    def _squares(self, centred: Floats) -> Floats:
        """Sums of squares between the levels of each effect, and in all; float64 [..., effects + 1]."""
        flat = centred.reshape(-1, self.n)
        between = [
            (np.add.reduceat(flat[:, order], starts, axis=1) ** 2 / counts).sum(-1)
            for order, starts, counts in zip(self._orders, self._starts, self._counts, strict=True)
        ]
        return np.stack([*between, (flat**2).sum(-1)], axis=-1).reshape(*centred.shape[:-1], -1)


def degrees(variance: Floats, alone: Floats, levels: Floats, n: int) -> Floats:
    """Satterthwaite's, with two corrections that keep the level at few or skewed seeds (simulation/README.md).

    By chance a variance estimated from few levels often comes out small, and then counts for too little here: its
    square is taken 1 + 2 / df times, as much as chance adds to the square of a variance on average. And there are
    at most twice the degrees of freedom of the factor with the fewest levels.

    Args:
        variance: [...] of the mean.
        alone: [..., F], what it would be by the clusters of each factor alone.
        levels: [F] of each factor, less one.
        n: votes.
    """
    satterthwaite = variance**2 / (alone**2 * (1 + 2 / levels) / levels).sum(-1)
    return np.clip(satterthwaite, levels.min(), min(n - 1, MOST_DEGREES * levels.min()))


def _levels(labels: ArrayLike) -> Ints:
    """Labels as 0, 1, ... in sorted order."""
    return np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int64)


def _distinct(labels: dict[str, Ints], n: int) -> list[str]:
    """Effects whose variance can be told from that of the others; main effects first.

    One level has no variance. Where every vote is a level of its own, the effect is part of the rest; where two effects
    group the votes alike, the first stands for both. Either way the variance of the mean stays the same.
    """
    kept: list[str] = []
    for name, levels in labels.items():
        n_levels = int(levels.max()) + 1
        alike = any(
            len(np.unique(levels * n + labels[other])) == n_levels == labels[other].max() + 1 for other in kept
        )  # fmt: skip
        if 1 < n_levels < n and not alike:
            kept.append(name)
    return kept


def _shared(rows: Ints, columns: Ints, n_rows: int, n_columns: int) -> tuple[Ints, Ints]:
    """(row, votes) of every pair of levels of two effects that share votes."""
    pairs = rows * n_columns + columns
    if n_rows * n_columns <= LARGEST_TABLE:
        table = np.bincount(pairs)
        found = np.flatnonzero(table)
        return found // n_columns, table[found]
    found, votes = np.unique(pairs, return_counts=True)
    return found // n_columns, votes


def decisive_share_t(scores: ArrayLike, factors: Sequence[ArrayLike], alpha: float = 0.05) -> CrossedT:
    """Share of decisive votes for the treatment, the primary decision: a design of the decisive votes alone.

    A tie says nothing of the share, so a seed or a judge of nothing but ties is no evidence, and adds no degrees of
    freedom. Seeds count by their decisive votes, as in the published share.

    Args:
        scores: float [R, V] of R experiments: 1, 0, or 0.5 for a tie. They differ in their ties, so each has its own
            design.
        factors: labels [V] of seed, prompt and judge.
        alpha: see CrossedDesign.t.

    Returns:
        As CrossedDesign.t, arrays [R], without components; NaN below two decisive votes, and where one factor has one
        level, beyond which nothing can be said.
    """
    seed, prompt, judge = (np.asarray(labels) for labels in factors)
    names = ("mean", "se", "df", "p", "low", "high")
    table = np.full((len(names), len(np.asarray(scores))), np.nan)
    for i, row in enumerate(np.asarray(scores, dtype=np.float64)):
        kept = row != 0.5
        if kept.sum() > 1:
            t = CrossedDesign(seed[kept], prompt[kept], judge[kept]).t(row[kept], alpha=alpha)
            table[:, i] = [float(getattr(t, name)) for name in names]
            table[3:, i] = np.nan if t.conditional_on else table[3:, i]
    mean, se, df, p, low, high = table
    return CrossedT(mean, se, df, p, low, high, {}, ())
