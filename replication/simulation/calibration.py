"""Every test of the report on experiments whose truth is known: false positives, coverage and power.

A cell of the grid is one truth; each of its experiments is drawn and judged by the functions that the report uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replication.simulation.power import Study, power
from replication.simulation.simulate import Spread, draw_scores, panel, preference_for, win_and_half
from replication.statistics.crossed import CrossedDesign, decisive_share_t
from replication.statistics.losses import (
    EQUIVALENT,
    equivalence,
    factorial,
    mean_test,
    power_of_equivalence,
    sign_flip_p,
)
from replication.statistics.preference import binomial_p, bootstrap_share, shares_by

Floats = NDArray[np.float64]

ALPHA = 0.05
AT_ONCE = 250
"""Experiments in memory at a time."""
RESAMPLES = 999
POWER_SIMULATIONS = 5
"""For the stated power, of each experiment that is to find it."""
PROMPT, JUDGE, SEED_PROMPT = 0.2, 0.1, 0.15
"""Spreads where they are on; prompts and judges are what the published votes' marginals give, rounded."""
TIES = 1 / 3
"""The published share is 397 of 1,181."""

VOTE_TESTS = {
    "crossed": "crossed t over seeds, prompts, judges: share of decisive votes (primary)",
    "crossed_half": "the same, wins and half the ties",
    "per_seed": "t over seeds, conditional on these prompts and judges",
    "sign_flip": "exact sign flip over seeds",
    "bootstrap": "three-level bootstrap",
    "naive": "binomial, votes as independent",
}
LOSS_TESTS = {
    "paired_t": "paired t over seeds",
    "sign_flip": "exact sign flip over seeds",
    "equivalence": "two one-sided tests",
    "token_gain": "2x2: token gain",
    "layer_gain": "2x2: layer gain",
    "interaction": "2x2: interaction",
}


@dataclass(frozen=True)
class VoteCell:
    """One truth about votes."""

    seeds: int
    prompts: int
    judges: int
    share: float
    """True share of decisive votes for the treatment, over all seeds, prompts and judges."""
    spread: Spread
    ties: float = TIES

    @property
    def key(self) -> str:
        """Name in files; also what the cell's random numbers start from."""
        s = self.spread
        return (
            f"votes {self.seeds}x{self.prompts}x{self.judges} share {self.share:g} seed {s.seed:g} prompt {s.prompt:g} "
            f"judge {s.judge:g} seed-prompt {s.seed_prompt:g} ties {self.ties:.3g}"
        )

    @property
    def primary(self) -> bool:
        """The cell that stands for what is expected: every spread on, seeds at .05."""
        s = self.spread
        return (s.seed, s.prompt, s.judge, s.seed_prompt) == (0.05, PROMPT, JUDGE, SEED_PROMPT)


@dataclass(frozen=True)
class LossCell:
    """One truth about paired loss differences, normal over seeds."""

    seeds: int
    sd_over_margin: float
    """Standard deviation of the differences, in margins."""
    shift_over_margin: float
    """True difference, in margins."""

    @property
    def key(self) -> str:
        return f"losses {self.seeds} seeds sd {self.sd_over_margin:g} shift {self.shift_over_margin:g} margins"


Cell = VoteCell | LossCell


def declared_grid(seeds: int = 5, prompts: int = 32, judges: int = 40) -> list[Cell]:
    """Seed spread 0, .05, .1; prompt and judge spread on and off; no effect and planted ones; and the losses' cells."""
    votes: list[Cell] = [
        VoteCell(seeds, prompts, judges, share, Spread(seed, prompt, judge, SEED_PROMPT if prompt else 0.0))
        for share, seed, prompt, judge in itertools.product(
            (0.5, 0.55, 0.6), (0.0, 0.05, 0.1), (PROMPT, 0.0), (JUDGE, 0.0)
        )
    ]
    losses: list[Cell] = [
        LossCell(n, sd, shift)
        for n, sd, shift in itertools.product((seeds, 2 * seeds), (0.25, 0.5, 1.0), (0.0, 0.5, 1.0))
    ]
    return votes + losses


# ---------------------------------------------------------------- one cell


def run_cell(cell: Cell, experiments: int, seed: int) -> dict[str, Any]:
    """Draw experiments of one truth, run every test on each.

    Args:
        cell: the truth.
        experiments: how many.
        seed: with the cell's name, the start of its random numbers: any subset of a grid gives the same.

    Returns:
        Plain JSON: key, kind, truth, experiments, and `tests`: name -> rejected (share of experiments with p < 0.05, in
        any direction), found (rejected, on the side of the true effect), coverage of the interval. None where a test
        has no such thing.
    """
    generator = np.random.default_rng([seed, *cell.key.encode()])
    run = _votes if isinstance(cell, VoteCell) else _losses
    parts = [run(cell, n, generator) for n in _chunks(experiments)]  # type: ignore[arg-type]
    tests = {name: {what: _share([part[name][what] for part in parts]) for what in parts[0][name]} for name in parts[0]}
    truth = asdict(cell) | {"predicted": _predicted(cell, POWER_SIMULATIONS * experiments, seed + 1)}
    if isinstance(cell, VoteCell):
        truth["primary"] = cell.primary
    kind = "votes" if isinstance(cell, VoteCell) else "losses"
    return {"key": cell.key, "kind": kind, "truth": truth, "experiments": experiments, "tests": tests}


def _chunks(n: int) -> Iterator[int]:
    for start in range(0, n, AT_ONCE):
        yield min(AT_ONCE, n - start)


def _share(parts: Sequence[Any]) -> float | None:
    return None if parts[0] is None else float(np.concatenate(parts).mean())


def _votes(cell: VoteCell, n: int, generator: np.random.Generator) -> dict[str, dict[str, Any]]:
    """For each test of votes, bool [n] of each question."""
    who = panel(cell.seeds, cell.prompts, cell.judges)
    scores = draw_scores(preference_for(cell.share, cell.spread), cell.spread, cell.ties, who, n, generator)
    decisive = scores != 0.5
    crossed, half = decisive_share_t(scores, who.factors), CrossedDesign(*who.factors).t(scores)
    seeds = shares_by(scores, who.seed) - 0.5
    per_seed, flips = mean_test(seeds), sign_flip_p(seeds)
    low, high = bootstrap_share(scores, who.factors, generator, RESAMPLES)
    chosen, total = (scores == 1).sum(-1), decisive.sum(-1)
    share = chosen / total
    naive = 1.96 * np.sqrt(share * (1 - share) / total)
    effect, truth = crossed.mean - 0.5, cell.share
    return {
        "crossed": _judged(crossed.p < ALPHA, effect, crossed.low, crossed.high, truth, cell),
        "crossed_half": _judged(half.p < ALPHA, effect, half.low, half.high, win_and_half(truth, cell.ties), cell),
        "per_seed": _judged(per_seed.p < ALPHA, per_seed.mean, per_seed.low, per_seed.high, truth - 0.5, cell),
        "sign_flip": _judged(flips < ALPHA, effect, None, None, truth, cell),
        "bootstrap": _judged((low > 0.5) | (high < 0.5), effect, low, high, truth, cell),
        "naive": _judged(binomial_p(chosen, total) < ALPHA, effect, share - naive, share + naive, truth, cell),
    }


def _judged(
    rejected: Any, effect: Floats, low: Floats | None, high: Floats | None, truth: float, cell: VoteCell
) -> dict[str, Any]:
    covers = None if low is None or high is None else (low <= truth) & (truth <= high)
    return {
        "rejected": rejected,
        "found": rejected & (np.sign(effect) == np.sign(cell.share - 0.5)),
        "coverage": covers,
    }


def _losses(cell: LossCell, n: int, generator: np.random.Generator) -> dict[str, dict[str, Any]]:
    """For each test of losses, bool [n]; the margin is 1. The 2x2 has one true effect at most: the token gain's."""
    noise = generator.standard_normal((n, 4, cell.seeds)) * cell.sd_over_margin / np.sqrt(2)
    noise += generator.standard_normal((n, 1, cell.seeds))  # what the arms of a seed share
    noise[:, [1, 3]] += cell.shift_over_margin
    differences = noise[:, 1] - noise[:, 0]
    t, tost, effects = mean_test(differences), equivalence(differences, 1.0, ALPHA), factorial(noise)
    covered = (t.low <= cell.shift_over_margin) & (cell.shift_over_margin <= t.high)
    tests: dict[str, dict[str, Any]] = {
        "paired_t": {"rejected": t.p < ALPHA, "coverage": covered},
        "sign_flip": {"rejected": sign_flip_p(differences) < ALPHA, "coverage": None},
        "equivalence": {"rejected": tost.verdict == EQUIVALENT, "coverage": None},
    }
    for i, name in enumerate(("token_gain", "layer_gain", "interaction")):
        true = cell.shift_over_margin if i == 0 else 0.0
        inside = (effects.low[:, i] <= true) & (true <= effects.high[:, i])
        tests[name] = {"rejected": effects.p[:, i] < ALPHA, "coverage": inside}
    return tests


def _predicted(cell: Cell, simulations: int, seed: int) -> float | None:
    """What the power of the report says of a cell: an equivalence's by its formula, a preference's by other draws.

    Only the primary decision on the primary spreads is asked; elsewhere None.
    """
    if isinstance(cell, LossCell):
        return float(power_of_equivalence(cell.seeds, cell.sd_over_margin, 1.0, cell.shift_over_margin, ALPHA))
    if cell.share == 0.5 or not cell.primary:
        return None
    study = Study(cell.seeds, cell.prompts, cell.judges, cell.spread, cell.share, cell.ties)
    return power(study, simulations, seed)
