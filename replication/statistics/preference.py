"""Preference between two arms' texts: estimators over votes. Pure functions on arrays.

The estimand is a preference over seeds, prompts and judges that could have been drawn, not over these. The primary
decision is `crossed.CrossedDesign.t`; what is here stands beside it, each with its own scope.

Shapes: V votes, S seeds, leading axes [...] are experiments with the same pattern of votes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from replication.votes.record import Vote
from replication.votes.tally import chosen_arm, votes_between

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

VENDOR = "vendor "  # begins the clusters of models
WEIGHTS_AT_ONCE = 4_000_000  # resampled votes in memory


@dataclass(frozen=True, eq=False)
class Ballots:
    """Votes on one pair of arms; every array is [V]."""

    score: Floats  # 1 where the treatment was chosen, 0 where the baseline was, 0.5 for a tie or both bad
    seed: Ints
    prompt: Ints
    judge: NDArray[np.str_]
    is_human: Bools
    treatment_left: Bools
    cluster: NDArray[np.str_]  # judges that are alike are one level: a person, or all models of a vendor

    @property
    def decisive(self) -> Bools:
        return self.score != 0.5

    def __len__(self) -> int:
        return len(self.score)

    def where(self, kept: Bools) -> Ballots:
        """The votes that a mask [V] keeps."""
        return Ballots(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def ballots(votes: Iterable[Vote], baseline: str, treatment: str) -> Ballots:
    """First votes between two arms, sides undone; repeats and other pairs are left out."""
    rows = votes_between(votes, baseline, treatment)
    chosen = [chosen_arm(v) for v in rows]
    return Ballots(
        score=np.array([0.5 if arm is None else float(arm == treatment) for arm in chosen], dtype=np.float64),
        seed=np.array([v.seed for v in rows], dtype=np.int64),
        prompt=np.array([v.prompt_id for v in rows], dtype=np.int64),
        judge=np.array([v.judge_id for v in rows], dtype=np.str_),
        is_human=np.array([v.judge_kind == "human" for v in rows], dtype=np.bool_),
        treatment_left=np.array([v.arm_left == treatment for v in rows], dtype=np.bool_),
        cluster=np.array(
            [f"judge {v.judge_id}" if v.judge_kind == "human" else f"{VENDOR}{v.vendor or 'unknown'}" for v in rows],
            dtype=np.str_,
        ),
    )


def shares_by(scores: ArrayLike, groups: ArrayLike) -> Floats:
    """Share of decisive votes [..., G] of each group; of seeds for the per-seed t, conditional on prompts and judges.

    Scores are float [..., V], 0.5 a tie; groups any labels [V], sorted in the result. NaN without a decisive vote.
    """
    values = np.asarray(scores, dtype=np.float64)
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    indicator = np.eye(index.max() + 1 if len(index) else 0)[index]  # [V, G]
    with np.errstate(invalid="ignore"):
        return np.asarray(((values == 1) @ indicator) / ((values != 0.5) @ indicator))


def bootstrap_share(
    scores: ArrayLike, factors: Sequence[ArrayLike], generator: np.random.Generator, resamples: int, alpha: float = 0.05
) -> tuple[Floats, Floats]:
    """Percentile bootstrap of the share of decisive votes: seeds, prompts and judges are each drawn again.

    The levels are crossed, so a vote counts the product of how often its seed, its prompt and its judge were drawn (the
    pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1:386), which is conservative. All experiments of one
    call share the draws.

    Args:
        scores: float [..., V]; 0.5 is a tie, which counts neither above nor below the line.
        factors: labels [V] of each level: seed, prompt and judge of every vote.
        resamples: number of draws; those without a decisive vote are left out.

    Returns:
        (low [...], high [...]) of the 1 - alpha interval; NaN where the decisive votes are all the same, or none.
    """
    values = np.asarray(scores, dtype=np.float64)
    chosen, decisive = (values == 1).astype(np.float64), (values != 0.5).astype(np.float64)
    share = chosen.sum(-1) / np.maximum(decisive.sum(-1), 1)
    varies = (share > 0) & (share < 1)
    if not varies.any():
        return np.full(varies.shape, np.nan), np.full(varies.shape, np.nan)
    indices = [np.unique(np.asarray(labels), return_inverse=True)[1] for labels in factors]
    at_once = max(1, WEIGHTS_AT_ONCE // values.shape[-1])
    shares = []
    for start in range(0, resamples, at_once):
        weights = np.ones((min(at_once, resamples - start), values.shape[-1]))
        for index in indices:
            size = int(index.max()) + 1
            weights *= generator.multinomial(size, np.full(size, 1 / size), len(weights))[:, index]
        with np.errstate(invalid="ignore"):
            shares.append((chosen @ weights.T) / (decisive @ weights.T))
    low, high = np.nanquantile(np.concatenate(shares, axis=-1), [alpha / 2, 1 - alpha / 2], axis=-1)
    return np.where(varies, low, np.nan), np.where(varies, high, np.nan)


def binomial_p(chosen: ArrayLike, decisive: ArrayLike) -> Floats:
    """Exact two-sided binomial p [...] against one half; NaN without a decisive vote.

    It takes votes as independent, as the published test does. On votes themselves it is for comparison alone, because
    it counts a seed, a prompt or a judge as often as there are votes on it; on prompts or judges it is a sign test.
    """
    k, n = np.broadcast_arrays(np.asarray(chosen, dtype=np.int64), np.asarray(decisive, dtype=np.int64))
    tail = scipy_stats.binom.cdf(np.minimum(k, n - k), n, 0.5)  # symmetric, so both tails are alike
    return np.where(n > 0, np.minimum(1.0, 2 * tail), np.nan)


def chance_range(n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact range of shares that chance alone gives of n votes of an even coin; (NaN, NaN) without a vote.

    Shares are k / n of whole k, both ends within, so that `low <= k / n <= high` says whether chance would give k.
    """
    if not n:
        return float("nan"), float("nan")
    low, high = scipy_stats.binom.interval(confidence, n, 0.5)
    return float(low) / n, float(high) / n


@dataclass(frozen=True)
class Agreement:
    """Do two groups of judges lean alike, prompt by prompt?"""

    n_prompts: int  # on which both groups voted
    same_majority: int  # prompts on which both have the same majority; an even split is a majority of neither
    pearson: float  # of both groups' shares of decisive votes; NaN below three prompts, or where one does not vary
    n_pearson: int  # prompts with a decisive vote of both


def agreement(first: Ballots, second: Ballots) -> Agreement:
    """Compare two groups' votes by prompt; seeds are pooled."""
    prompts = np.intersect1d(first.prompt, second.prompt)
    sides, shares = [], []
    for prompt in prompts:
        wins = [(g.score[(g.prompt == prompt) & g.decisive] == 1) for g in (first, second)]
        sides.append([np.sign(2 * w.sum() - len(w)) for w in wins])
        if all(len(w) for w in wins):
            shares.append([w.mean() for w in wins])
    x, y = np.array(shares, dtype=np.float64).reshape(-1, 2).T
    varies = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    pearson = float(scipy_stats.pearsonr(x, y).statistic) if varies else float("nan")
    return Agreement(len(prompts), sum(a == b != 0 for a, b in sides), pearson, len(x))


def krippendorff_alpha(values: ArrayLike, units: ArrayLike, ordered: bool = True) -> float:
    """Krippendorff's alpha: 1 for perfect agreement of judges on units, 0 for what chance gives.

    Computed from the coincidences within units (Krippendorff 2011, Computing Krippendorff's alpha-reliability).

    Args:
        values: float [V], such as scores of 0, 0.5 and 1.
        units: [V], what was judged: here a seed's pair of models at one prompt.
        ordered: whether values have distances (interval), or only differ (nominal).

    NaN where no unit has two votes, or all votes are the same.
    """
    levels, value_index = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    unit_index = np.unique(np.asarray(units), return_inverse=True)[1]
    if not len(levels):
        return float("nan")
    counts = np.zeros((unit_index.max() + 1, len(levels)))
    np.add.at(counts, (unit_index, value_index), 1)
    counts = counts[counts.sum(1) > 1]
    per_unit = counts.sum(1, keepdims=True)
    weights = counts / (per_unit - 1)
    coincidences = weights.T @ counts - np.diag(weights.sum(0))
    distance = (levels[:, None] - levels) ** 2 if ordered else 1.0 - np.eye(len(levels))
    totals = coincidences.sum(0)
    expected = (np.outer(totals, totals) * distance).sum() / max(totals.sum() - 1, 1)
    return float(1 - (coincidences * distance).sum() / expected) if expected > 0 else float("nan")


def self_consistency(votes: Sequence[Vote]) -> tuple[int, int]:
    """(repeats that chose the same arm, or a tie again; repeats whose first vote is there)."""
    by_id = {vote.vote_id: vote for vote in votes}
    pairs = [(vote, by_id[vote.repeat_of]) for vote in votes if vote.repeat_of in by_id]
    return sum(chosen_arm(vote) == chosen_arm(first) for vote, first in pairs), len(pairs)
