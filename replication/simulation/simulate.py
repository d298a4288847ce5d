"""Experiments that never were: votes with known seeds', prompts' and judges' spread, to try the tests on.

Spreads are standard deviations of the chance that a decisive vote goes to the treatment, on the scale of that chance.
Shapes: R experiments, V votes of each, all experiments with the same pattern of votes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NODES = 4001


@dataclass(frozen=True)
class Spread:
    """How much the chance of a vote for the treatment varies, as standard deviations."""

    seed: float = 0.0
    """Between training seeds: pairs of models differ."""
    prompt: float = 0.0
    judge: float = 0.0
    seed_prompt: float = 0.0
    """A pair of models is better at some prompts than at others, beyond both main effects."""
    seed_judge: float = 0.0
    prompt_judge: float = 0.0

    @property
    def total(self) -> float:
        return float(np.sqrt(sum(getattr(self, field.name) ** 2 for field in fields(self))))


@dataclass(frozen=True, eq=False)
class Panel:
    """Who votes on what; every array is int64 [V]."""

    seed: Ints
    prompt: Ints
    judge: Ints

    @property
    def factors(self) -> tuple[Ints, Ints, Ints]:
        return self.seed, self.prompt, self.judge

    def __len__(self) -> int:
        return len(self.seed)


def panel(n_seeds: int, n_prompts: int, n_judges: int, votes_per_judge: int | None = None) -> Panel:
    """Every judge votes once on each prompt (or on so many of them), with seeds in rotation over prompts and judges.

    Args:
        n_seeds, n_prompts, n_judges: at least 1.
        votes_per_judge: prompts that one judge sees, consecutive ones that move on from judge to judge; None: all.
    """
    n_votes = n_prompts if votes_per_judge is None else min(votes_per_judge, n_prompts)
    judge, place = (a.ravel() for a in np.meshgrid(np.arange(n_judges), np.arange(n_votes), indexing="ij"))
    prompt = (judge * n_votes + place) % n_prompts
    return Panel((prompt + judge + judge // n_seeds) % n_seeds, prompt, judge)


def draw_scores(
    preference: float, spread: Spread, ties: float, panel_V: Panel, n: int, generator: np.random.Generator
) -> Floats:
    """Votes of n experiments.

    Chance of the treatment = preference + seed + prompt + judge + interactions, cut off at 0 and 1; every effect is
    normal and drawn anew in each experiment. A vote is a tie by a chance of its own.

    Args:
        preference: mean chance that a decisive vote goes to the treatment.
        spread: see Spread.
        ties: share of votes that are ties.
        panel_V: who votes on what.
        n: experiments, R.
        generator: of every draw.

    Returns:
        float64 [R, V]: 1 for the treatment, 0 for the baseline, 0.5 for a tie.
    """
    seed, prompt, judge = panel_V.factors
    sizes = [int(index.max()) + 1 for index in panel_V.factors]
    chance = np.full((n, len(panel_V)), preference)
    crossings = (
        (spread.seed, seed, sizes[0]),
        (spread.prompt, prompt, sizes[1]),
        (spread.judge, judge, sizes[2]),
        (spread.seed_prompt, seed * sizes[1] + prompt, sizes[0] * sizes[1]),
        (spread.seed_judge, seed * sizes[2] + judge, sizes[0] * sizes[2]),
        (spread.prompt_judge, prompt * sizes[2] + judge, sizes[1] * sizes[2]),
    )
    for sd, index, size in crossings:
        if sd:
            chance += sd * generator.standard_normal((n, size))[:, index]
    scores = (generator.random(chance.shape) < chance).astype(np.float64)
    scores[generator.random(chance.shape) < ties] = 0.5
    return scores


def true_share(preference: float, spread: Spread) -> float:
    """The treatment's share of decisive votes over all seeds, prompts and judges: the mean chance after the cut."""
    z = np.linspace(-8, 8, NODES)
    weights = scipy_stats.norm.pdf(z)
    return float((np.clip(preference + spread.total * z, 0, 1) * weights).sum() / weights.sum())


def preference_for(share: float, spread: Spread) -> float:
    """The mean before the cut at 0 and 1 that gives a true share; the share lies between 0 and 1."""
    low, high = -1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if true_share(middle, spread) < share else (low, middle)
    return (low + high) / 2


def win_and_half(share: float, ties: float) -> float:
    """The share of wins with ties as halves that a share of decisive votes comes to."""
    return 0.5 + (share - 0.5) * (1 - ties)


# ---------------------------------------------------------------- spreads from votes given


def spread_between_groups(chosen_G: ArrayLike, decisive_G: ArrayLike) -> float:
    """Standard deviation between groups' true shares, from their counts alone (the published marginals).

    One-way analysis of variance of yes/no votes: (between - within mean square) / effective group size, which takes
    off what binomial noise adds. 0 where chance alone explains the differences.

    Args:
        chosen_G: int [G], decisive votes for the treatment of each prompt, or of each judge.
        decisive_G: int [G]; groups without a decisive vote say nothing.

    Returns:
        float; NaN below two groups, or where every group has one vote.
    """
    k, n = np.asarray(chosen_G, dtype=np.float64), np.asarray(decisive_G, dtype=np.float64)
    k, n = k[n > 0], n[n > 0]
    groups, total = len(n), n.sum()
    if groups < 2 or total == groups:
        return float("nan")
    between = (n * (k / n - k.sum() / total) ** 2).sum() / (groups - 1)
    within = (k * (1 - k / n)).sum() / (total - groups)
    size = (total - (n**2).sum() / total) / (groups - 1)
    return float(np.sqrt(max(0.0, (between - within) / size)))
