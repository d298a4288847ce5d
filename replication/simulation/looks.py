"""Experiments that are looked at before their last seed: how often all looks together reject, and with which seeds.

Seeds come in one after another, and at a look there are the votes, or losses, on those that are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from replication.simulation.simulate import Spread, VotePattern, draw_scores, vote_pattern
from replication.statistics.crossed import decisive_share_t
from replication.statistics.looks import look_levels
from replication.statistics.seeds import equivalence

Floats = NDArray[np.float64]
ALPHA = 0.05
LOOK_TESTS = {
    "haybittle_peto": "Haybittle and Peto's boundaries",
    "obrien_fleming": "O'Brien and Fleming's, by alpha spending",
    "naive": "p < 5 % at any look",
}
MOST_FALSE = 0.06
"""False rejections over all looks that are allowed."""


def votes_at_looks(scores: Floats, who: VotePattern, looks: Sequence[int]) -> tuple[Floats, Floats]:
    """(p, share) [R, looks] of the decisive votes on the first seeds, for scores [R, V]."""
    found = []
    for n_seeds in looks:
        kept = who.seed < n_seeds
        t = decisive_share_t(scores[:, kept], [labels[kept] for labels in who.factors], ALPHA)
        found.append((t.p, t.mean))
    p, share = np.stack(found, axis=-1)
    return p, share


def first_below(p: Floats, levels: Sequence[float]) -> NDArray[np.int64]:
    """[R]: the first look whose p [R, looks] is below its level; the number of looks where none is."""
    below = p < np.array(levels)
    return np.where(below.any(-1), below.argmax(-1), len(levels))


@dataclass(frozen=True)
class LookScenario:
    """One truth in which nothing is to be found: no preference, or a loss that differs by exactly the margin."""

    of: str  # votes or loss
    seed_spread: float  # of votes on the logit scale; of the loss, its sd over the margin
    looks: tuple[int, ...] = (5, 8, 12)
    prompts: int = 32
    judges: int = 40

    @property
    def key(self) -> str:
        spread = "seed spread {} (logit)" if self.of == "votes" else "sd {} margins, shift 1"
        numbers = ", ".join(map(str, self.looks))
        size = f", {self.prompts} prompts, {self.judges} judges" if self.of == "votes" else ""
        return f"looks with {numbers} seeds: {self.of}, {spread.format(f'{self.seed_spread:g}')}{size}"

    def outcomes(self, n: int, generator: np.random.Generator) -> dict[str, dict[str, NDArray[np.bool_] | None]]:
        """Draw n experiments; `rejected`: at any of the looks."""
        if self.of == "votes":
            who = vote_pattern(self.looks[-1], self.prompts, self.judges)
            spread = Spread(seed=self.seed_spread, prompt=0.8, judge=0.4, seed_prompt=0.6)
            p, _ = votes_at_looks(draw_scores(0.0, spread, 1 / 3, who, n, generator, logit=True), who, self.looks)
        else:
            losses = 1 + self.seed_spread * generator.standard_normal((n, self.looks[-1]))
            p = np.stack([equivalence(losses[:, :k], 1.0, ALPHA).p for k in self.looks], axis=-1)
        sides = 2 if self.of == "votes" else 1
        last, planned = len(self.looks), ("haybittle_peto", "obrien_fleming")
        levels = {"naive": (ALPHA,) * last} | {name: look_levels(self.looks, ALPHA, name, sides) for name in planned}
        return {name: {"rejected": first_below(p, levels[name]) < last, "coverage": None} for name in LOOK_TESTS}


def look_scenarios() -> list[LookScenario]:
    votes = [LookScenario("votes", spread) for spread in (0.2, 0.4, 0.8)]
    return votes + [LookScenario("loss", sd) for sd in (0.25, 0.5, 1.0)]
