"""Power of the primary decision, by simulation: the seeds, prompts and judges that a preference takes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console

from replication.console import table
from replication.errors import UserError
from replication.protocol.paper import VOTES
from replication.runs.files import write_json, write_text
from replication.runs.records import read_record
from replication.simulation.figures import draw_power
from replication.simulation.simulate import Spread, batches, draw_scores, preference_for, vote_pattern
from replication.statistics.crossed import CrossedDesign, decisive_share_t
from replication.statistics.format import MISSING, count, markdown_table, percent
from replication.statistics.losses import POWER
from replication.statistics.preference import Ballots, ballots
from replication.votes.record import read_votes

ALPHA = 0.05
VOTE_FILE = "phase3_ab_preference.json"
SEED_SPREADS = (0.0, 0.05, 0.1)
"""Swept where none is given: one pair of models cannot tell how much pairs differ."""
GIVEN = ("prompt", "judge", "seed_prompt", "seed_judge", "prompt_judge")
"""The spreads that may be given, besides the seeds'."""
ASSUMED = Spread(prompt=0.2, judge=0.1, seed_prompt=0.15)
"""Prompts and judges are what the published votes' marginals give, rounded."""


# ---------------------------------------------------------------- spreads from votes given


@dataclass(frozen=True)
class Fitted:
    """Spreads estimated from votes; None where the votes cannot say it."""

    source: str
    prompt: float | None = None
    judge: float | None = None
    seed: float | None = None
    seed_prompt: float | None = None
    ties: float | None = None


@dataclass(frozen=True)
class _Counts:
    """Votes on a prompt, or of a judge: baseline, treatment and ties."""

    a: int
    b: int
    ties: int = 0


@dataclass(frozen=True)
class _Prompts:
    details: tuple[_Counts, ...]


@dataclass(frozen=True)
class Marginals:
    """The part that is read of the published file of votes, or of a panel's marginals.json."""

    judges: tuple[_Counts, ...]
    question_majorities: _Prompts


def fit(path: Path) -> Fitted:
    """Spreads of a folder of the published files, an output folder with votes.csv, or such a file.

    Raises:
        UserError: no such file, another schema, or votes on more than one pair of arms.
    """
    document = path if path.is_file() and path.suffix == ".json" else path / VOTE_FILE
    marginals = read_record(document, Marginals) if document.is_file() else None
    if marginals is not None:
        return fit_marginals(marginals, str(document))
    file = path if path.is_file() else path / "votes.csv"
    if not file.is_file():
        raise UserError(f"--votes: {path} holds neither votes.csv nor {VOTE_FILE}; name such a folder or a votes.csv")
    votes = read_votes(file)
    pairs = sorted({tuple(sorted((vote.arm_left, vote.arm_right))) for vote in votes})
    if len(pairs) != 1:
        found = "no votes" if not pairs else f"votes on {len(pairs)} pairs of arms"
        raise UserError(f"{file}: holds {found}; power needs those of one pair")
    return fit_ballots(ballots(votes, *pairs[0]), str(file))


def fit_marginals(marginals: Marginals, source: str) -> Fitted:
    """Prompts, judges and ties from counts alone, prompts and judges each as if the other did not vary.

    A spread between seeds, or an interaction, is not in counts of one pair of models.
    """
    rows = marginals.question_majorities.details, marginals.judges
    prompt, judge = (spread_between_groups([r.b for r in of], [r.a + r.b for r in of]) for of in rows)
    ties = sum(row.ties for row in marginals.judges)
    votes = ties + sum(row.a + row.b for row in marginals.judges)
    return Fitted(source, _known(prompt), _known(judge), ties=ties / votes if votes else None)


def _known(spread: float) -> float | None:
    return None if np.isnan(spread) else spread


def fit_ballots(b: Ballots, source: str) -> Fitted:
    """All spreads from full votes, a pilot's: variance components of the decisive ones; below 0 counts as 0."""
    decisive = b.where(b.decisive)
    if len(decisive) < 2:
        return Fitted(source)
    components = CrossedDesign(decisive.seed, decisive.prompt, decisive.judge).t(decisive.score).components
    sd = {name: float(np.sqrt(max(0.0, float(value)))) for name, value in components.items()}
    ties = float(1 - len(decisive) / len(b))
    return Fitted(source, sd.get("prompt"), sd.get("judge"), sd.get("seed"), sd.get("seed x prompt"), ties)


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


@dataclass(frozen=True)
class Assumptions:
    """The truth that a power calculation starts from."""

    spread: Spread
    """Without the seeds', which are swept."""
    seed_spreads: tuple[float, ...]
    ties: float
    words: list[str] = field(default_factory=list)
    """The source of each spread."""


def assume(
    given: Mapping[str, float | None], seed_spreads: Sequence[float] | None, ties: float | None, fitted: Fitted | None
) -> Assumptions:
    """Each spread as given, else as fitted, else as calibrated; the same for the share of ties.

    Args:
        given: each of GIVEN; None where nobody gave it.
        seed_spreads: to sweep; None: SEED_SPREADS and a pilot's own.
        ties: share; None: the votes', or the published one.
        fitted: what votes say; None without votes.
    """
    votes = fitted or Fitted("")
    spread, words = Spread(), []
    for name, value in given.items():
        estimate = getattr(votes, name, None)
        choices = ((value, "given"), (estimate, f"fitted to {votes.source}"), (getattr(ASSUMED, name), "an assumption"))
        sd, source = next((sd, source) for sd, source in choices if sd is not None)
        spread = replace(spread, **{name: sd})
        words.append(f"{name.replace('_', ' x ')} spread {sd:.3f} ({source})")
    pilot = "an assumption" if votes.seed is None else f"the pilot's is {votes.seed:.3f}"
    words.append("seed spread swept (an assumption)" if votes.seed is None else f"seed spread swept, {pilot}")
    if seed_spreads is None:
        seed_spreads = [*SEED_SPREADS, *([] if votes.seed is None else [round(votes.seed, 4)])]
    shares = (ties, votes.ties, VOTES.tie_share)
    return Assumptions(spread, tuple(sorted(set(seed_spreads))), next(t for t in shares if t is not None), words)


# ---------------------------------------------------------------- power


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
        """Name in files; also the start of the study's random numbers."""
        spread = "/".join(f"{sd:.6g}" for sd in astuple(self.spread))
        size = f"{self.seeds}x{self.prompts}x{self.judges}"
        return f"power {size} spread {spread} share {self.share:.6g} ties {self.ties:.6g}"


class PowerRow(TypedDict):
    """A study, its power and what it costs."""

    key: str
    seeds: int
    prompts: int
    judges: int
    spread: dict[str, float]
    share: float
    ties: float
    power: float
    simulation_error: float
    votes: int
    gpu_hours_2_arms: NotRequired[float]
    """For the question; four arms are for the 2x2."""
    gpu_hours_4_arms: NotRequired[float]


class FewestSeeds(TypedDict):
    """For one spread between seeds, prompts and judges: the fewest simulated seeds that reach the power."""

    seed_spread: float
    prompts: int
    judges: int
    fewest_seeds: int | None
    """None where none does: prompts or judges are what limits, or more seeds than were simulated are needed."""
    highest_power: float


def power(study: Study, simulations: int, seed: int) -> float:
    """Share of simulated experiments in which the primary decision finds the treatment preferred.

    Args:
        study: what is run, and the truth.
        simulations: experiments.
        seed: with the study's key, the start of its random numbers.
    """
    generator = np.random.default_rng([seed, *study.key.encode()])
    who = vote_pattern(study.seeds, study.prompts, study.judges)
    mean = preference_for(study.share, study.spread)
    found = 0
    for n in batches(simulations):
        t = decisive_share_t(draw_scores(mean, study.spread, study.ties, who, n, generator), who.factors, ALPHA)
        found += int(((t.p < ALPHA) & ((t.mean > 0.5) == (study.share > 0.5))).sum())
    return found / simulations


def studies(
    assumed: Assumptions, seeds: Sequence[int], prompts: Sequence[int], judges: Sequence[int], share: float
) -> list[Study]:
    """Every combination."""
    return [
        Study(n, p, j, replace(assumed.spread, seed=s), share, assumed.ties)
        for s, p, j, n in itertools.product(assumed.seed_spreads, prompts, judges, seeds)
    ]


def power_row(study: Study, simulations: int, seed: int) -> PowerRow:
    """One study with its power."""
    reached = power(study, simulations, seed)
    error = float(np.sqrt(reached * (1 - reached) / simulations))
    votes = study.prompts * study.judges
    own = asdict(study) | {"key": study.key, "power": reached, "simulation_error": error, "votes": votes}
    return cast(PowerRow, own)


def with_cost(row: PowerRow, cell_hours: float) -> PowerRow:
    """A row with its GPU-hours, given those of one arm at one seed."""
    hours = row["seeds"] * cell_hours
    return {**row, "gpu_hours_2_arms": 2 * hours, "gpu_hours_4_arms": 4 * hours}


def fewest_seeds(rows: Sequence[PowerRow], enough: float = POWER) -> list[FewestSeeds]:
    """For each spread between seeds, prompts and judges: the fewest of the simulated seeds that reach the power."""
    return [
        FewestSeeds(
            seed_spread=spread,
            prompts=prompts,
            judges=judges,
            fewest_seeds=min((row["seeds"] for row in group if row["power"] >= enough), default=None),
            highest_power=max(row["power"] for row in group),
        )
        for (spread, prompts, judges), group in _groups(rows).items()
    ]


def _groups(rows: Sequence[PowerRow]) -> dict[tuple[float, int, int], list[PowerRow]]:
    """Rows that differ in their seeds alone, by seed spread, prompts and judges."""
    found: dict[tuple[float, int, int], list[PowerRow]] = {}
    for row in rows:
        found.setdefault((row["spread"]["seed"], row["prompts"], row["judges"]), []).append(row)
    return found


# ---------------------------------------------------------------- the report

NOTE = (
    f"'more': none of these numbers of seeds reaches {percent(POWER)}. Where power hardly grows with seeds, prompts "
    "or judges are what limits: take more of them."
)


def write_power(
    rows: Sequence[PowerRow], assumptions: Sequence[str], have: int, folder: Path, console: Console
) -> list[Path]:
    """Print the table; write power.json, power.md and power.png.

    Args:
        rows: with their cost.
        assumptions: where each spread comes from, in words.
        have: seeds that there are already.
        folder: made where it does not exist.
        console: for the table.

    Returns:
        The paths.
    """
    paths = [folder / f"power.{end}" for end in ("json", "md", "png")]
    fewest = fewest_seeds(rows)
    write_json(paths[0], {"assumptions": assumptions, "fewest_seeds": fewest, "rows": rows})
    title = f"Power to find {percent(rows[0]['share'], 1)} of decisive votes, {percent(rows[0]['ties'], 1)} ties"
    sizes = [f"{n} seeds" for n in sorted({row["seeds"] for row in rows})]
    names = ("seed spread", "prompts", "judges", *sizes, "seeds for 80 %", "GPU-h, 2 arms", "4 arms")
    columns = [f">{name}" for name in names]
    groups = _groups(rows).values()
    lines = [_line(entry, group, have) for entry, group in zip(fewest, groups, strict=True)]
    words = [f"- {words}" for words in assumptions]
    write_text(paths[1], "\n".join([f"# {title}", "", *words, "", *markdown_table(columns, lines), "", NOTE, ""]))
    draw_power(rows, paths[2])
    console.print(table(title, columns, lines))
    for line in (*assumptions, NOTE):
        console.print(line, soft_wrap=True)
    return paths


def _line(entry: FewestSeeds, group: Sequence[PowerRow], have: int) -> list[str]:
    """One combination of seed spread, prompts and judges."""
    reached = [percent(row["power"]) for row in sorted(group, key=lambda row: row["seeds"])]
    n = entry["fewest_seeds"]
    costs = [(row["gpu_hours_2_arms"], row["gpu_hours_4_arms"]) for row in group if row["seeds"] == n]
    hours = [count(cost) for cost in costs[0]] if costs else [MISSING] * 2
    words = "more" if n is None else f"{n} ({max(0, n - have)} more)" if have else f"{n}"
    return [f"{entry['seed_spread']:g}", str(entry["prompts"]), str(entry["judges"]), *reached, words, *hours]
