"""How many seeds, prompts and judges does it take? Power of the primary decision, by simulation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from replication.simulation.simulate import Spread, draw_scores, panel, preference_for, spread_between_groups
from replication.statistics.crossed import CrossedDesign, decisive_share_t
from replication.statistics.preference import Ballots

ENOUGH = 0.8
ALPHA = 0.05
AT_ONCE = 250
PUBLISHED_SHARE = 470 / 784
PUBLISHED_TIES = 397 / 1181
PUBLISHED_CELL_HOURS = 180.0
"""7.5 days for one run of about 1.2 billion parameters, 3.93 billion tokens, on one RTX 5090."""


@dataclass(frozen=True)
class Fitted:
    """What votes given say of the spreads; None where they cannot say it."""

    source: str
    prompt: float | None
    judge: float | None
    seed: float | None
    seed_prompt: float | None
    ties: float | None


@dataclass(frozen=True)
class Study:
    """One experiment that could be run."""

    seeds: int
    prompts: int
    judges: int
    spread: Spread
    share: float
    ties: float

    @property
    def key(self) -> str:
        s = self.spread
        spread = "/".join(
            f"{value:.6g}" for value in (s.seed, s.prompt, s.judge, s.seed_prompt, s.seed_judge, s.prompt_judge)
        )
        size = f"{self.seeds}x{self.prompts}x{self.judges}"
        return f"power {size} spread {spread} share {self.share:.6g} ties {self.ties:.6g}"


def fit_marginals(document: dict[str, Any], source: str) -> Fitted:
    """Spreads between prompts and between judges from counts alone, each as if the other did not vary.

    Args:
        document: the published vote file: `question_majorities.details` with a, b, tie and `judges` with a, b, ties.
        source: its name.

    Returns:
        prompt, judge and ties; a spread between seeds, or an interaction, is not in counts of one pair of models.
    """
    prompts, judges = document["question_majorities"]["details"], document["judges"]
    spreads = [
        spread_between_groups([row["b"] for row in rows], [row["a"] + row["b"] for row in rows])
        for rows in (prompts, judges)
    ]
    ties, votes = sum(row["ties"] for row in judges), sum(row["n"] for row in judges)
    known = [None if np.isnan(spread) else spread for spread in spreads]
    return Fitted(source, known[0], known[1], None, None, ties / votes if votes else None)


def fit_ballots(b: Ballots, source: str) -> Fitted:
    """All spreads from full votes, a pilot's: variance components of the decisive ones; below 0 counts as 0."""
    decisive = b.where(b.decisive)
    if len(decisive) < 2:
        return Fitted(source, None, None, None, None, None)
    components = CrossedDesign(decisive.seed, decisive.prompt, decisive.judge).t(decisive.score).components
    sd = {name: float(np.sqrt(max(0.0, float(value)))) for name, value in components.items()}
    ties = float(1 - len(decisive) / len(b))
    return Fitted(source, sd.get("prompt"), sd.get("judge"), sd.get("seed"), sd.get("seed x prompt"), ties)


def power(study: Study, simulations: int, seed: int) -> float:
    """Share of simulated experiments in which the primary decision finds the treatment preferred.

    Args:
        study: what is run, and the truth.
        simulations: experiments.
        seed: with the study's name, the start of its random numbers.
    """
    generator = np.random.default_rng([seed, *study.key.encode()])
    who = panel(study.seeds, study.prompts, study.judges)
    mean = preference_for(study.share, study.spread)
    found = 0
    for start in range(0, simulations, AT_ONCE):
        n = min(AT_ONCE, simulations - start)
        scores = draw_scores(mean, study.spread, study.ties, who, n, generator)
        t = decisive_share_t(scores, who.factors, ALPHA)
        found += int(((t.p < ALPHA) & ((t.mean > 0.5) == (study.share > 0.5))).sum())
    return found / simulations


def studies(
    spread: Spread,
    seed_spreads: Sequence[float],
    seeds: Sequence[int],
    prompts: Sequence[int],
    judges: Sequence[int],
    share: float,
    ties: float,
) -> list[Study]:
    """Every combination; the spread between seeds is swept, because one pair of models cannot tell it."""
    return [
        Study(n, p, j, replace(spread, seed=s), share, ties)
        for s, p, j, n in itertools.product(seed_spreads, prompts, judges, seeds)
    ]


def power_row(study: Study, simulations: int, seed: int) -> dict[str, Any]:
    """One study with its power, as plain JSON."""
    reached = power(study, simulations, seed)
    return asdict(study) | {
        "key": study.key,
        "power": reached,
        "simulation_error": float(np.sqrt(reached * (1 - reached) / simulations)),
        "votes": study.prompts * study.judges,
    }


def with_cost(row: dict[str, Any], cell_hours: float) -> dict[str, Any]:
    """A row with its GPU-hours: two arms are needed for the question, four for the 2x2."""
    hours = row["seeds"] * cell_hours
    return row | {"gpu_hours_2_arms": 2 * hours, "gpu_hours_4_arms": 4 * hours}


def fewest_seeds(rows: Sequence[dict[str, Any]], enough: float = ENOUGH) -> list[dict[str, Any]]:
    """For each spread between seeds, prompts and judges: the fewest of the simulated seeds that reach the power.

    None where none of them does: prompts or judges are what limits, or more seeds than were simulated are needed.
    """
    found: dict[tuple[float, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["spread"]["seed"], row["prompts"], row["judges"]), []).append(row)
    return [
        {
            "seed_spread": key[0],
            "prompts": key[1],
            "judges": key[2],
            "fewest_seeds": min((row["seeds"] for row in group if row["power"] >= enough), default=None),
            "highest_power": max(row["power"] for row in group),
        }
        for key, group in found.items()
    ]
