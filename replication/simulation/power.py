"""Power of the primary decision, by simulation: the seeds, prompts and judges that a preference takes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from numpy.typing import ArrayLike
from rich.console import Console

from replication.config import load_suite
from replication.console import table
from replication.errors import UserError
from replication.protocol.paper import VOTES
from replication.protocol.preregistration import registered_rules
from replication.report.drawing import DPI, FONT_POINTS, MARKERS, WIDTH_INCHES, name_axes, save_png
from replication.runs.files import write_json, write_text
from replication.runs.layout import SuiteDir
from replication.runs.records import read_record
from replication.runs.withdrawn import read_withdrawals
from replication.simulation.looks import ALPHA, first_below, votes_at_looks
from replication.simulation.simulate import Spread, batches, draw_scores, preference_for, vote_pattern
from replication.statistics.crossed import CrossedDesign
from replication.statistics.format import MISSING, count, markdown_table, percent
from replication.statistics.looks import look_levels
from replication.statistics.preference import Ballots, ballots
from replication.statistics.seeds import POWER, power_of_equivalence, seeds_for_equivalence
from replication.votes.record import counted_votes

VOTE_FILE = "phase3_ab_preference.json"
SEED_SPREADS = (0.0, 0.05, 0.1)
"""Swept where none is given: one pair of models cannot tell how much pairs differ."""
GIVEN = ("prompt", "judge", "seed_prompt", "seed_judge", "prompt_judge")
"""The spreads that may be given, besides the seeds'."""
ASSUMED = Spread(prompt=0.2, judge=0.1, seed_prompt=0.15)
"""Of the truths of the calibration. Prompts and judges are what the published votes' marginals give, rounded."""
SEED_PROMPT_SHARES = (0.25, 0.5, 0.75)
"""Swept: of the variance between the prompts of one pair of models, what another pair would not share."""
LOSS_SDS = (0.005, 0.01, 0.02, 0.04)
"""Standard deviations over seeds of a difference in loss, nats; swept without a pilot."""
COLOURS = ("#000000", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#D55E00")  # Okabe and Ito
NOTE = (
    f"'more': none of these numbers of seeds reaches {percent(POWER)}. Where power hardly grows with seeds, prompts "
    "or judges are what limits: take more of them."
)


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

    Of votes on several pairs of arms those on the folder's registered one count. Raises UserError where there is no
    such file, or it has another schema, or several pairs without a suite that names one.
    """
    document = path if path.is_file() and path.suffix == ".json" else path / VOTE_FILE
    marginals = read_record(document, Marginals) if document.is_file() else None
    if marginals is not None:
        return fit_marginals(marginals, str(document))
    file = path if path.is_file() else path / "votes.csv"
    if not file.is_file():
        raise UserError(f"--votes: {path} holds neither votes.csv nor {VOTE_FILE}; name such a folder or a votes.csv")
    suite_dir = SuiteDir(file.parent)
    gone = read_withdrawals(suite_dir).of("seed")
    votes = [vote for vote in counted_votes(file) if str(vote.seed) not in gone]
    pairs = sorted({tuple(sorted((vote.arm_left, vote.arm_right))) for vote in votes})
    if len(pairs) > 1 and suite_dir.suite.is_file():
        rules = registered_rules(suite_dir, load_suite(suite_dir.suite)).analysis
        pairs = [pair for pair in pairs if {*pair} == {rules.baseline, rules.treatment}]
    if len(pairs) != 1:
        found = f"votes on {len(pairs)} pairs of arms" if pairs else "no votes on the pair of the primary question"
        raise UserError(f"{file}: holds {found}; put it beside the suite.yaml of its arms, or keep those of one pair")
    return fit_ballots(ballots(votes, *pairs[0]), str(file))


def fit_marginals(marginals: Marginals, source: str) -> Fitted:
    """Prompts, judges and ties from counts alone, prompts and judges each as if the other did not vary.

    A spread between seeds, or an interaction, is not in counts of one pair of models.
    """
    rows = marginals.question_majorities.details, marginals.judges
    spreads = (spread_between_groups([r.b for r in of], [r.a + r.b for r in of]) for of in rows)
    prompt, judge = (None if np.isnan(spread) else spread for spread in spreads)
    ties = sum(row.ties for row in marginals.judges)
    votes = ties + sum(row.a + row.b for row in marginals.judges)
    return Fitted(source, prompt, judge, ties=ties / votes if votes else None)


def fit_ballots(b: Ballots, source: str) -> Fitted:
    """All spreads from full votes, a pilot's: variance components of the decisive ones; below 0 counts as 0."""
    decisive = b.where(b.decisive)
    if len(decisive) < 2:
        return Fitted(source)
    components = CrossedDesign(decisive.seed, decisive.prompt, decisive.cluster).t(decisive.score).components
    sd = {name: float(np.sqrt(max(0.0, float(value)))) for name, value in components.items()}
    ties = float(1 - len(decisive) / len(b))
    return Fitted(source, sd.get("prompt"), sd.get("judge"), sd.get("seed"), sd.get("seed x prompt"), ties)


def spread_between_groups(chosen_G: ArrayLike, decisive_G: ArrayLike) -> float:
    """Standard deviation between groups' true shares, from their counts alone (the published marginals).

    One-way analysis of variance of yes/no votes: (between - within mean square) / effective group size, which takes
    off what binomial noise adds. 0 where chance alone explains the differences; NaN below two groups, or where every
    group has one vote.

    Args:
        chosen_G: int [G], decisive votes for the treatment of each prompt, or of each judge.
        decisive_G: int [G]; groups without a decisive vote say nothing.
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
class Study:
    """One experiment that could be run."""

    seeds: int
    prompts: int
    judges: int
    spread: Spread
    share: float
    ties: float
    looks: tuple[int, ...] = ()
    boundaries: str = "haybittle_peto"
    votes_per_judge: int | None = None
    """None: one on every prompt."""

    @property
    def key(self) -> str:
        """Name in files; also the start of the study's random numbers."""
        spread = "/".join(f"{sd:.6g}" for sd in astuple(self.spread))
        size = f"{self.seeds}x{self.prompts}x{self.judges}"
        looks = f" looks {'/'.join(map(str, self.looks))} {self.boundaries}" if self.looks else ""
        votes = "" if self.votes_per_judge is None else f" votes {self.votes_per_judge}"
        return f"power {size} spread {spread} share {self.share:.6g} ties {self.ties:.6g}{looks}{votes}"


def studies(
    given: Mapping[str, float | None],
    seed_spreads: Sequence[float] | None,
    ties: float | None,
    votes: Fitted,
    sizes: tuple[Sequence[int], Sequence[int], Sequence[int]],
    share: float,
    looks: tuple[int, ...] = (),
    boundaries: str = "haybittle_peto",
    seed_prompt_shares: Sequence[float] = SEED_PROMPT_SHARES,
    votes_per_judge: int | None = None,
) -> tuple[list[Study], list[str]]:
    """Every combination, each spread as given, else as fitted, else as calibrated; and the sources of these, in words.

    Votes on one pair of models show prompts vary by what is theirs and by what is theirs with this pair alone. Where
    nobody knows the latter, the variance is split between both, by each of the shares: neither counts it twice.

    Args:
        given: each of GIVEN; None where nobody gave it.
        seed_spreads: to sweep; None: SEED_SPREADS and a pilot's own.
        ties: their share; None: the votes', or the published one.
        votes: what they say, if there are any.
        sizes: numbers of seeds, of prompts, of judges.
        share: of decisive votes, to be found.
        looks: numbers of seeds at which the study may end, the last in place of those in `sizes`.
        seed_prompt_shares: of the variance between prompts, where the interaction is neither given nor fitted.
        votes_per_judge: see Study.
    """
    spread, splits, words = Spread(), list[Spread](), []
    for name, value in given.items():
        estimate = getattr(votes, name, None)
        choices = ((value, "given"), (estimate, f"fitted to {votes.source}"), (getattr(ASSUMED, name), "an assumption"))
        sd, source = next((sd, source) for sd, source in choices if sd is not None)
        spread = replace(spread, **{name: sd})
        if name == "seed_prompt" and source == "an assumption":
            splits = [
                replace(spread, prompt=spread.prompt * (1 - of) ** 0.5, seed_prompt=spread.prompt * of**0.5)
                for of in seed_prompt_shares
            ]
            parts = ", ".join(percent(of) for of in seed_prompt_shares)
            words.append(f"of the prompts' variance {parts} is taken to be seed x prompt (an assumption, swept)")
            continue
        words.append(f"{name.replace('_', ' x ')} spread {sd:.3f} ({source})")
    pilot = [] if votes.seed is None else [round(votes.seed, 4)]
    words.append("seed spread swept" + (f", the pilot's is {votes.seed:.3f}" if pilot else " (an assumption)"))
    swept = sorted({*SEED_SPREADS, *pilot} if seed_spreads is None else set(seed_spreads))
    shown = next(t for t in (ties, votes.ties, VOTES.tie_share) if t is not None)
    seeds, prompts, judges = sizes
    other = {name: getattr(spread, name) for name in ("seed_judge", "prompt_judge")}
    seeds = looks[-1:] or seeds
    every = itertools.product(swept, splits or [spread], prompts, judges, seeds)
    return [
        Study(n, p, j, replace(split, seed=s, **other), share, shown, looks, boundaries, votes_per_judge)
        for s, split, p, j, n in every
    ], words


class PowerRow(TypedDict):
    """A study and its power."""

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
    looks: Sequence[int]
    expected_seeds: float


def power(study: Study, simulations: int, seed: int) -> float:
    """Share of simulated experiments in which the primary decision finds the treatment preferred."""
    return simulate(study, simulations, seed)[0]


def simulate(study: Study, simulations: int, seed: int) -> tuple[float, float]:
    """(power, expected number of seeds), which is below that of the study where it may end at a look.

    Seed and the study's key start its random numbers.
    """
    generator = np.random.default_rng([seed, *study.key.encode()])
    who = vote_pattern(study.seeds, study.prompts, study.judges, study.votes_per_judge)
    mean, looks = preference_for(study.share, study.spread), study.looks or (study.seeds,)
    levels = look_levels(looks, ALPHA, study.boundaries, sides=2) if study.looks else (ALPHA,)
    found, used = 0, 0
    for n in batches(simulations):
        p, share = votes_at_looks(draw_scores(mean, study.spread, study.ties, who, n, generator), who, looks)
        ended = first_below(p, levels)
        at = np.minimum(ended, len(looks) - 1)
        is_right = (share[np.arange(n), at] > 0.5) == (study.share > 0.5)
        found += int(((ended < len(looks)) & is_right).sum())
        used += int(np.array(looks)[at].sum())
    return found / simulations, used / simulations


def power_row(study: Study, simulations: int, seed: int) -> PowerRow:
    reached, expected = simulate(study, simulations, seed)
    error = float(np.sqrt(reached * (1 - reached) / simulations))
    votes = min(study.votes_per_judge or study.prompts, study.prompts) * study.judges
    own = asdict(study) | {"key": study.key, "power": reached, "simulation_error": error, "votes": votes}
    return cast(PowerRow, own | {"expected_seeds": expected})


def fewest_seeds(rows: Sequence[PowerRow]) -> list[dict[str, float | None]]:
    """For one spread between seeds, prompts and judges: the fewest simulated seeds that reach the power.

    None where none does: prompts or judges are what limits, or more seeds than were simulated are needed.
    """
    found = []
    for group in _groups(rows):
        own: dict[str, float | None] = {f"{s}_spread": group[0]["spread"][s] for s in ("seed", "prompt", "seed_prompt")}
        own |= {"prompts": group[0]["prompts"], "judges": group[0]["judges"]}
        own |= {"fewest_seeds": _enough(group), "highest_power": max(row["power"] for row in group)}
        found.append(own)
    return found


def _enough(group: Sequence[PowerRow]) -> int | None:
    return next((row["seeds"] for row in group if row["power"] >= POWER), None)


def _groups(rows: Sequence[PowerRow]) -> list[list[PowerRow]]:
    """Rows that differ in their seeds alone, in the order of these."""
    found: dict[tuple[float, ...], list[PowerRow]] = {}
    for row in sorted(rows, key=lambda row: row["seeds"]):
        found.setdefault((*row["spread"].values(), row["prompts"], row["judges"]), []).append(row)
    return list(found.values())


def loss_lines(seeds: Sequence[int], sds: Sequence[float], margin: float) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, rows): exact power to show that two losses are equivalent where they are, before any data."""
    columns = [">sd over seeds, nats", *(f">{n} seeds" for n in seeds), f">seeds for {percent(POWER)}"]
    rows = []
    for sd in sds:
        powers = (percent(float(power_of_equivalence(n, sd, margin, alpha=ALPHA))) for n in seeds)
        rows.append([f"{sd:.2g}", *powers, str(seeds_for_equivalence(sd, margin, ALPHA) or MISSING)])
    return f"Power to show losses equivalent within {margin:g} nats that do not differ", columns, rows


def write_power(
    rows: Sequence[PowerRow],
    words: Sequence[str],
    have: int,
    cell_hours: float,
    losses: tuple[str, list[str], list[list[str]]],
    folder: Path,
    console: Console,
) -> list[Path]:
    """Print the table; write power.json, power.md and power.png, the paths that come back.

    `words` say where each spread comes from; `have` seeds are there already; one arm at one seed takes so many hours of
    a GPU. Two arms answer the question, four are for the 2x2.
    """
    paths = [folder / f"power.{end}" for end in ("json", "md", "png")]
    prices = ({f"gpu_hours_{n}_arms": n * row["seeds"] * cell_hours for n in (2, 4)} for row in rows)
    priced = [{**row, **price} for row, price in zip(rows, prices, strict=True)]
    write_json(paths[0], {"assumptions": words, "fewest_seeds": fewest_seeds(rows), "rows": priced})
    title = f"Power to find {percent(rows[0]['share'], 1)} of decisive votes, {percent(rows[0]['ties'], 1)} ties"
    sizes = [f"{n} seeds" for n in sorted({row["seeds"] for row in rows})]
    looks = rows[0].get("looks") or ()
    if looks:
        title += f", looked at with {', '.join(map(str, looks))} seeds"
    expected = ["expected seeds"] if looks else []
    spreads = ("seed", "prompt", "seed_prompt")
    heads = (s.replace("_", " x ") for s in spreads)
    names = (*heads, "prompts", "judges", *sizes, *expected, "seeds for 80 %", "GPU-h, 2 arms", "4 arms")
    columns, lines = [f">{name}" for name in names], []
    for group in _groups(rows):
        enough, needed, hours = _enough(group), "more", [MISSING] * 2
        if enough is not None:
            needed = f"{enough} ({max(0, enough - have)} more)" if have else f"{enough}"
            hours = [count(arms * enough * cell_hours) for arms in (2, 4)]
        own = group[0]
        size = [*(f"{own['spread'][s]:.2g}" for s in spreads), f"{own['prompts']}", f"{own['judges']}"]
        ends = [f"{group[-1]['expected_seeds']:.1f}"] if looks else []
        lines.append([*size, *(percent(row["power"]) for row in group), *ends, needed, *hours])
    sources = [f"- {source}" for source in words]
    loss, loss_columns, of_loss = losses
    text = [f"# {title}", "", *sources, "", *markdown_table(columns, lines), "", NOTE, "", f"# {loss}", ""]
    write_text(paths[1], "\n".join([*text, *markdown_table(loss_columns, of_loss), ""]))
    draw_power(rows, paths[2])
    console.print(table(title, columns, lines))
    for line in (*words, NOTE):
        console.print(line, soft_wrap=True)
    console.print(table(loss, loss_columns, of_loss))
    return paths


def draw_power(rows: Sequence[PowerRow], path: Path) -> None:
    """Power over seeds: a panel for each number of prompts, a line for each spread of seeds (dashed: most judges).

    Of several splits of the prompts' variance the one in the middle is drawn.
    """
    seeds, prompts, judges = (sorted({row[of] for row in rows}) for of in ("seeds", "prompts", "judges"))
    splits = sorted({row["spread"]["seed_prompt"] for row in rows})
    rows = [row for row in rows if row["spread"]["seed_prompt"] == splits[len(splits) // 2]]
    figure = Figure(figsize=(WIDTH_INCHES * 1.1, 2.6 * len(prompts) + 1.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(prompts), 1, squeeze=False, sharex=True)[:, 0]
    for panel, n_prompts in zip(panels, prompts, strict=True):
        for i, spread in enumerate(sorted({row["spread"]["seed"] for row in rows})):
            for n_judges, line in {judges[-1]: "--", judges[0]: "-"}.items():
                own = (n_prompts, n_judges, spread)
                cells = [r for r in rows if (r["prompts"], r["judges"], r["spread"]["seed"]) == own]
                x, y = np.array(sorted((row["seeds"], row["power"]) for row in cells)).T
                label = f"seed spread {spread:g}, {n_judges} judges"
                panel.plot(x, y, line, marker=MARKERS[i], color=COLOURS[i], markersize=5, label=label)
        panel.axhline(0.8, color="#777777", linewidth=1)
        panel.set_ylim(0, 1.02)
        panel.set_xscale("log")
        panel.set_xticks(seeds, [str(n) for n in seeds])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        name_axes(panel, f"{n_prompts} prompts", "power", "training seeds" if panel is panels[-1] else "")
    lines = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=2, fontsize=FONT_POINTS - 2.5, frameon=False
    )
    save_png(figure, path)
