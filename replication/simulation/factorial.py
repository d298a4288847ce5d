"""Panels of four arms that never were: power to find main effects and the interaction of preference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TypedDict

import numpy as np
from rich.console import Console

from replication.console import table
from replication.judging.design import Design
from replication.runs.files import write_json, write_text
from replication.simulation.power import ALPHA, Study
from replication.simulation.simulate import Floats, Ints, Spread, VotePattern, batches, true_share
from replication.statistics.factorial import contrast, effects_t
from replication.statistics.format import markdown_table, percent

ARMS = ((False, False), (False, True), (True, False), (True, True))  # whether (token gain, layer gain) act
PAIRS = tuple(itertools.combinations(range(len(ARMS)), 2))
CONTRASTS = np.array([contrast(ARMS[a], ARMS[b]) for a, b in PAIRS])
"""[6, 3]"""


@dataclass(frozen=True)
class FactorialStudy:
    """A panel of four arms; the token gain and the interaction have an effect of share - 1/2, the layer gain none."""

    study: Study
    votes_per_judge: int

    @property
    def key(self) -> str:
        return f"factorial {self.study.key} votes {self.votes_per_judge}"


class FactorialRow(TypedDict):
    """What was found in simulated panels."""

    key: str
    seeds: int
    prompts: int
    judges: int
    votes_per_judge: int
    spread: dict[str, float]
    effect: float
    main_effect: float
    """Share of the panels that found it; of no effect: that found one of either sign."""
    interaction: float
    absent: float
    """Share that found the layer gain's effect, which is none."""
    coverage: list[float]
    """Share of the intervals that hold the truth, of both main effects and the interaction."""


def draw_votes(
    effects: Floats, spread: Spread, ties: float, who: VotePattern, pair_V: Ints, n: int, generator: np.random.Generator
) -> Floats:
    """Votes of n panels [R, V]: 1 for the second arm of the pair, 0 for the first, 0.5 for a tie.

    Each arm has its own normal effects of seed, prompt, judge and so on, so that the chance of a vote between any two
    arms has the given spreads: an arm's are smaller by the root of two.
    """
    levels = dict(zip(("seed", "prompt", "judge"), who.factors, strict=True))
    first, second = np.array(PAIRS)[pair_V].T
    chance = np.broadcast_to(0.5 + CONTRASTS[pair_V] @ effects, (n, len(who))).copy()
    for field, sd in zip(fields(Spread), astuple(spread), strict=True):
        if sd:
            labels = np.stack([levels[name] for name in field.name.split("_")])
            index = np.unique(labels, axis=1, return_inverse=True)[1]
            drawn = sd / np.sqrt(2) * generator.standard_normal((n, int(index.max()) + 1, len(ARMS)))
            chance += drawn[:, index, second] - drawn[:, index, first]
    scores = (generator.random(chance.shape) < chance).astype(np.float64)
    scores[generator.random(chance.shape) < ties] = 0.5
    return scores


def factorial_row(of: FactorialStudy, simulations: int, seed: int) -> FactorialRow:
    """Simulate one panel so often; the key and `seed` start its random numbers."""
    study, generator = of.study, np.random.default_rng([seed, *of.key.encode()])
    effect = study.share - 0.5
    wanted = np.array([effect, 0.0, effect])
    effects = wanted.copy()
    for _ in range(20):  # chances cut off at 0 and 1 make the true effects, least squares of shares, smaller
        shares = np.array([true_share(0.5 + mean, study.spread) for mean in CONTRASTS @ effects])
        effects += wanted - np.linalg.lstsq(CONTRASTS, shares - 0.5, rcond=None)[0]
    found, held = np.zeros(3), np.zeros(3)
    for n in batches(simulations):
        secret = f"{seed}/{generator.integers(2**32)}"  # of a real panel, as which it deals
        design = Design(study.prompts, study.seeds, 1, 1, secret, len(ARMS))
        hands = enumerate(design.deal([of.votes_per_judge] * study.judges))
        rows = [(cell.seed, cell.prompt, judge, PAIRS.index(cell.arms)) for judge, hand in hands for cell in hand]
        *factors, pair_V = np.array(rows).T
        who = VotePattern(*factors)
        for scores in draw_votes(effects, study.spread, study.ties, who, pair_V, n, generator):
            kept = scores != 0.5
            t = effects_t(scores[kept], CONTRASTS[pair_V[kept]], [index[kept] for index in who.factors], ALPHA)
            if t is not None:
                found += (t.p < ALPHA) & ((t.mean > 0) | (wanted == 0))
                held += (t.low <= wanted) & (wanted <= t.high)
    main_effect, absent, interaction = (found / simulations).tolist()
    return FactorialRow(
        key=of.key,
        seeds=study.seeds,
        prompts=study.prompts,
        judges=study.judges,
        votes_per_judge=of.votes_per_judge,
        spread=asdict(study.spread),
        effect=effect,
        main_effect=main_effect,
        interaction=interaction,
        absent=absent,
        coverage=(held / simulations).tolist(),
    )


def write_factorial(rows: Sequence[FactorialRow], words: Sequence[str], folder: Path, console: Console) -> list[Path]:
    """Print the table; write factorial.json and factorial.md, the paths that come back."""
    effect = percent(rows[0]["effect"], 1).replace(" %", " points")
    title = f"Power to find effects of {effect} of the share of decisive votes, by a panel of four arms"
    names = ("seed spread", "seeds", "prompts", "judges", "votes each", "main effect", "interaction", "no effect")
    columns, lines = [f">{name}" for name in names], []
    for row in rows:
        sizes = (str(row[k]) for k in ("seeds", "prompts", "judges", "votes_per_judge"))
        found = (percent(row[k], 1) for k in ("main_effect", "interaction", "absent"))
        lines.append([f"{row['spread']['seed']:g}", *sizes, *found])
    paths = [folder / "factorial.json", folder / "factorial.md"]
    write_json(paths[0], {"assumptions": words, "rows": rows})
    text = [f"# {title}", "", *(f"- {source}" for source in words), "", *markdown_table(columns, lines), ""]
    write_text(paths[1], "\n".join(text))
    console.print(table(title, columns, lines))
    for line in words:
        console.print(line, soft_wrap=True)
    return paths
