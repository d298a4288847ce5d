"""Judges who vote alike beyond chance: one judge under two names, or copied votes. Pure functions on arrays.

Shapes: V votes, U units that can be shared, J judges, three choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from replication.statistics.preference import Ballots

ALIKE_LEVEL = 0.01
"""For all pairs of judges together."""
ALIKE_SHARE = 0.8
"""Of the votes that both gave; judges of one mind about good texts agree beyond chance, but less."""


@dataclass(frozen=True)
class Alike:
    """Two judges whose votes are the same too often."""

    judges: tuple[str, str]
    where: str
    same: int
    shared: int
    p: float
    """Corrected for the number of pairs of judges, and for both ways of comparing them (Bonferroni)."""


def alike_judges(b: Ballots) -> list[Alike]:
    """Pairs of judges whose votes agree beyond chance on what both judged, or side by side in the order of their votes.

    Chance is what the others' votes on the same models and prompt, and each judge's own share of ties, make of it: that
    everybody prefers the better text makes nobody suspect. The number of agreements is held against a binomial, which
    has wider tails than the sum of unequal chances that it is (Hoeffding 1956).
    """
    names, judge = np.unique(b.judge, return_inverse=True)
    order = np.argsort(judge, kind="stable")
    place = np.empty(len(judge), dtype=np.int64)
    place[order] = np.arange(len(judge)) - np.searchsorted(judge[order], judge[order])
    side = np.where(b.decisive, (b.score == 1) == b.treatment_left, 2).astype(np.int64)
    pairs = np.unique(np.stack([b.seed, b.prompt]), axis=1, return_inverse=True)[1].ravel()
    ways = (("on the same pairs", (2 * b.score).astype(np.int64), pairs), ("in the same order", side, place))
    found: dict[tuple[str, str], Alike] = {}
    for where, choice, unit in ways if len(names) > 1 else ():
        same, shared, expected = (np.triu(of, 1) for of in _agreements(choice, unit, judge))
        chance, tests = np.minimum(expected / np.maximum(shared, 1), 1), 2 * np.count_nonzero(shared)
        could = tests * chance**shared < ALIKE_LEVEL  # if all that they share were the same
        for i, j in np.argwhere((same >= ALIKE_SHARE * shared) & (shared > 0) & could):
            n, k = int(shared[i, j]), int(same[i, j])
            p = min(1.0, tests * float(scipy_stats.binom.sf(k - 1, n, chance[i, j])))
            if p < ALIKE_LEVEL:
                key = str(names[i]), str(names[j])
                found.setdefault(key, Alike(key, where, k, n, p))
    return [found[key] for key in sorted(found)]


def as_one(b: Ballots, alike: list[Alike]) -> Ballots:
    """The votes with judges who vote alike in one cluster."""
    cluster = b.cluster.copy()
    for pair in alike:
        first, second = (cluster[b.judge == name][0] for name in pair.judges)
        cluster[cluster == second] = first
    return Ballots(**{**vars(b), "cluster": cluster})


def _agreements(
    choice: NDArray[np.int64], unit: NDArray[np.int64], judge: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(same votes, shared units, same votes by chance) of every pair of judges, [J, J]; choices are 0, 1 and 2."""
    chosen = np.full((unit.max() + 1, judge.max() + 1), -1)
    chosen[unit, judge] = choice
    is_chosen = (chosen == np.arange(3)[:, None, None]).astype(np.float64)  # [3, U, J]
    of_judge = is_chosen.sum(1)
    overall = (of_judge.sum(1) + 1) / (of_judge.sum() + 3)  # [3]
    own = (of_judge + 3 * overall[:, None]) / (of_judge.sum(0) + 3)  # [3, J]
    others = is_chosen.sum(2, keepdims=True) - is_chosen + overall[:, None, None]  # with one vote more, as all vote
    chance = others * (own / overall[:, None])[:, None]
    chance *= (chosen >= 0) / chance.sum(0)
    flat, by_chance, there = (of.reshape(-1, of.shape[-1]) for of in (is_chosen, chance, is_chosen.sum(0)))
    return flat.T @ flat, there.T @ there, by_chance.T @ by_chance
