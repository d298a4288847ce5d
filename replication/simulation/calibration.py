"""Every test of the report on experiments whose truth is known: false positives, coverage and power.

A scenario is one truth; each of its experiments is drawn, and then tested by the functions that the report uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, cast

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from scipy import special

from replication.console import table
from replication.report.drawing import DPI, FONT_POINTS, MARKERS, WIDTH_INCHES, name_axes, save_png
from replication.runs.files import write_json, write_text
from replication.simulation.looks import LOOK_TESTS, MOST_FALSE, LookScenario, look_scenarios
from replication.simulation.panels import PANELS, Panel
from replication.simulation.power import ALPHA, ASSUMED, COLOURS, Study, power
from replication.simulation.simulate import Spread, batches, draw_scores, preference_for, vote_pattern
from replication.statistics.adjusted import equal_texts_logit
from replication.statistics.crossed import CrossedDesign, decisive_share_t
from replication.statistics.format import markdown_table, percent
from replication.statistics.preference import binomial_p, bootstrap_share, shares_by
from replication.statistics.seeds import (
    EQUIVALENT,
    equivalence,
    factorial,
    mean_test,
    power_of_equivalence,
    sign_flip_p,
)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
"""One of each experiment, [R]."""
Outcomes = dict[str, dict[str, Flags | None]]
"""Test -> what it says of each experiment; None where it says no such thing.

rejected: p < 5 %, in any direction; of an equivalence: declared. found: rejected, on the side of the true effect.
coverage: the 95 % interval holds the truth.
"""

RESAMPLES = 999
POWER_SIMULATIONS = 5
"""For the stated power, of each experiment that is to find it."""
TIES = 1 / 3
"""About the published share."""

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
LENGTH_TESTS = {
    "crossed": "crossed t of the share of decisive votes",
    "equal_texts": "the same at equal length and repetition, by a logistic regression",
}
PANEL_TESTS = {
    "verdict": "the primary decision: a vendor's models, and judges who vote alike, are one cluster",
    "by_judge": "the same, every judge taken as independent",
    "sign_flip": "exact sign flip over seeds, conditional on these prompts and judges",
    "naive": "binomial, votes as independent",
}
MEASURES = {
    "rejected": "share of experiments with p < 5 % (equivalence: declared)",
    "coverage": "coverage of the 95 % interval",
}
PRIMARY = ("crossed", "crossed_half")
"""The primary decision in both measures of preference."""

FALSE_POSITIVES = (0.0, 0.065)
COVERAGE = (0.935, 1.0)
"""Without a bound on the cautious side, whose price is power, which has a bound of its own."""
AT_THE_MARGIN = (0.03, 0.07)
EQUAL_TEXTS = 0.065
CLOSE = (-0.03, 0.03)
"""Largest distance of a measured power from the stated one."""


class Truth(TypedDict, total=False):
    """A scenario's fields, of votes, losses or lengths, and what its power was predicted to be."""

    seeds: int
    prompts: int
    judges: int
    share: float
    spread: dict[str, float]
    ties: float
    primary: bool
    sd_over_margin: float
    shift_over_margin: float
    longer: float
    seed_longer: float
    predicted: float | None
    panel: str


class Row(TypedDict):
    """One scenario, measured."""

    key: str
    kind: Literal["votes", "losses", "lengths", "looks", "panel"]
    truth: Truth
    experiments: int
    tests: dict[str, dict[str, float | None]]  # the outcomes, as shares of the experiments


class Finding(TypedDict):
    """A bound that must be kept, and the lowest and highest that was measured."""

    what: str
    measured: tuple[float, float]
    bounds: tuple[float, float]
    holds: bool


@dataclass(frozen=True)
class VoteScenario:
    """One truth about votes."""

    seeds: int
    prompts: int
    judges: int
    share: float  # true share of decisive votes for the treatment, over all seeds, prompts and judges
    spread: Spread
    ties: float = TIES

    @property
    def key(self) -> str:
        """Name in files; also the start of the scenario's random numbers."""
        s = self.spread
        return (
            f"votes {self.seeds}x{self.prompts}x{self.judges} share {self.share:g} seed {s.seed:g} prompt {s.prompt:g} "
            f"judge {s.judge:g} seed-prompt {s.seed_prompt:g} ties {self.ties:.3g}"
        )

    @property
    def primary(self) -> bool:
        """The scenario that stands for what is expected: every spread on, seeds at .05."""
        return self.spread == replace(ASSUMED, seed=0.05)

    def truth(self, simulations: int, seed: int) -> Truth:
        """Power is predicted for the primary decision in the primary scenarios alone, from other draws."""
        predicted = None
        if self.primary and self.share != 0.5:
            study = Study(self.seeds, self.prompts, self.judges, self.spread, self.share, self.ties)
            predicted = power(study, simulations, seed)
        return cast(Truth, asdict(self) | {"predicted": predicted, "primary": self.primary})

    def outcomes(self, n: int, generator: np.random.Generator) -> Outcomes:
        """Draw n experiments and run every test of votes on them."""
        who = vote_pattern(self.seeds, self.prompts, self.judges)
        scores = draw_scores(preference_for(self.share, self.spread), self.spread, self.ties, who, n, generator)
        crossed, half = decisive_share_t(scores, who.factors), CrossedDesign(*who.factors).t(scores)
        seeds = shares_by(scores, who.seed) - 0.5
        per_seed, flips = mean_test(seeds), sign_flip_p(seeds)
        low, high = bootstrap_share(scores, who.factors, generator, RESAMPLES)
        chosen, total = (scores == 1).sum(-1), (scores != 0.5).sum(-1)
        share = chosen / total
        naive = 1.96 * np.sqrt(share * (1 - share) / total)
        effect, truth = crossed.mean - 0.5, self.share
        half_truth = 0.5 + (truth - 0.5) * (1 - self.ties)  # the share of wins with ties as halves
        found = {
            "crossed": (crossed.p < ALPHA, effect, _covers(crossed.low, truth, crossed.high)),
            "crossed_half": (half.p < ALPHA, effect, _covers(half.low, half_truth, half.high)),
            "per_seed": (per_seed.p < ALPHA, per_seed.mean, _covers(per_seed.low, truth - 0.5, per_seed.high)),
            "sign_flip": (flips < ALPHA, effect, None),
            "bootstrap": ((low > 0.5) | (high < 0.5), effect, _covers(low, truth, high)),
            "naive": (binomial_p(chosen, total) < ALPHA, effect, _covers(share - naive, truth, share + naive)),
        }
        side = np.sign(truth - 0.5)
        return {
            name: {"rejected": rejected, "found": rejected & (np.sign(of) == side), "coverage": coverage}
            for name, (rejected, of, coverage) in found.items()
        }


@dataclass(frozen=True)
class LossScenario:
    """One truth about paired loss differences, normal over seeds: their standard deviation and mean, in margins."""

    seeds: int
    sd_over_margin: float
    shift_over_margin: float

    @property
    def key(self) -> str:
        return f"losses {self.seeds} seeds sd {self.sd_over_margin:g} shift {self.shift_over_margin:g} margins"

    def truth(self, simulations: int, seed: int) -> Truth:
        """Power is that of the equivalence, by its formula."""
        predicted = power_of_equivalence(self.seeds, self.sd_over_margin, 1.0, self.shift_over_margin, ALPHA)
        return cast(Truth, asdict(self) | {"predicted": float(predicted)})

    def outcomes(self, n: int, generator: np.random.Generator) -> Outcomes:
        """Draw n experiments with a margin of 1; the 2x2 has one true effect at most, the token gain's."""
        shift = self.shift_over_margin
        noise = generator.standard_normal((n, 4, self.seeds)) * self.sd_over_margin / np.sqrt(2)
        noise += generator.standard_normal((n, 1, self.seeds))  # what the arms of a seed share
        noise[:, [1, 3]] += shift
        differences = noise[:, 1] - noise[:, 0]
        t, effects = mean_test(differences), factorial(noise)
        declared = equivalence(differences, 1.0, ALPHA).verdict == EQUIVALENT
        tests: Outcomes = {
            "paired_t": {"rejected": t.p < ALPHA, "coverage": _covers(t.low, shift, t.high)},
            "sign_flip": {"rejected": sign_flip_p(differences) < ALPHA, "coverage": None},
            "equivalence": {"rejected": declared, "coverage": None},
        }
        for i, (name, true) in enumerate((("token_gain", shift), ("layer_gain", 0.0), ("interaction", 0.0))):
            covered = _covers(effects.low[:, i], true, effects.high[:, i])
            tests[name] = {"rejected": effects.p[:, i] < ALPHA, "coverage": covered}
        return tests


@dataclass(frozen=True)
class LengthScenario:
    """Votes that a text's length drives and nothing else: at equal length nobody prefers either arm."""

    seeds: int
    prompts: int
    judges: int
    longer: float  # mean log ratio of the treatment's length to the baseline's
    seed_longer: float  # standard deviation of it between seeds

    @property
    def key(self) -> str:
        return f"lengths {self.seeds}x{self.prompts}x{self.judges} longer {self.longer:g} seed {self.seed_longer:g}"

    def truth(self, simulations: int, seed: int) -> Truth:
        return cast(Truth, asdict(self) | {"predicted": None})

    def outcomes(self, n: int, generator: np.random.Generator) -> Outcomes:
        """Draw n experiments; the logit of a vote is 1.5 times the log ratio and effects of seed, prompt and judge."""
        seed, prompt, judge = vote_pattern(self.seeds, self.prompts, self.judges).factors
        rejected, coverage = np.zeros((2, n), dtype=np.bool_), np.zeros(n, dtype=np.bool_)
        for i in range(n):
            cell = (self.seeds, self.prompts)
            of_seed = self.longer + self.seed_longer * generator.standard_normal((self.seeds, 1))
            ratio = (of_seed + 0.5 * generator.standard_normal(cell))[seed, prompt]
            repeats = (0.1 * of_seed + 0.1 * generator.standard_normal(cell))[seed, prompt]
            logit = 1.5 * ratio + 0.3 * generator.standard_normal(cell)[seed, prompt]
            for sd, of in ((0.2, seed), (0.6, prompt), (0.4, judge)):
                logit += sd * generator.standard_normal(of.max() + 1)[of]
            score = (generator.random(len(seed)) < special.expit(logit)).astype(np.float64)
            kept = generator.random(len(seed)) >= TIES
            design = CrossedDesign(seed[kept], prompt[kept], judge[kept])
            parts = equal_texts_logit(score[kept], np.column_stack([ratio, repeats])[kept])
            equal = design.t(parts, null=0.0)
            rejected[:, i] = design.t(score[kept]).p < ALPHA, equal.p < ALPHA
            coverage[i] = equal.low <= 0 <= equal.high
        return {
            "crossed": {"rejected": rejected[0], "coverage": None},
            "equal_texts": {"rejected": rejected[1], "coverage": coverage},
        }


@dataclass(frozen=True)
class PanelScenario:
    """One truth about the votes of a panel that is not as the test assumes."""

    panel: Panel
    prompts: int
    share: float

    @property
    def key(self) -> str:
        return f"panel {self.panel.name}, {self.prompts} prompts, share {self.share:g}"

    def truth(self, simulations: int, seed: int) -> Truth:
        return Truth(panel=self.panel.name, seeds=self.panel.seeds, prompts=self.prompts, share=self.share)

    def outcomes(self, n: int, generator: np.random.Generator) -> Outcomes:
        """Draw n experiments; where the verdict is withheld nothing is rejected, and there is no interval to cover."""
        who = self.panel.pattern(self.prompts)
        scores = self.panel.scores(self.share, who, self.prompts, n, generator)
        p, low, high = self.panel.test(scores, who, generator)
        given = np.isfinite(p)
        is_related = self.panel.vendors or self.panel.copies[0]
        each = decisive_share_t(scores, who.factors).p if is_related else p
        flips = sign_flip_p(shares_by(scores, who.seed) - 0.5)
        naive = binomial_p((scores == 1).sum(-1), (scores != 0.5).sum(-1))
        coverage = _covers(low, self.share, high)[given]
        tests: Outcomes = {"verdict": {"rejected": p < ALPHA, "coverage": coverage, "given": given}}
        for name, of in (("by_judge", each), ("sign_flip", flips), ("naive", naive)):
            tests[name] = {"rejected": of < ALPHA, "coverage": None}
        return tests


Scenario = VoteScenario | LossScenario | LengthScenario | LookScenario | PanelScenario


def _covers(low: Floats, truth: float, high: Floats) -> Flags:
    return (low <= truth) & (truth <= high)


def declared_grid(seeds: int = 5, prompts: int = 32, judges: int = 40) -> list[Scenario]:
    """Seed spread 0, .05, .1; prompt and judge spread on and off; no effect and planted ones; losses; and panels."""
    votes: list[Scenario] = [
        VoteScenario(seeds, prompts, judges, share, Spread(seed, prompt, judge, ASSUMED.seed_prompt if prompt else 0.0))
        for share, seed, prompt, judge in itertools.product(
            (0.5, 0.55, 0.6), (0.0, 0.05, 0.1), (ASSUMED.prompt, 0.0), (ASSUMED.judge, 0.0)
        )
    ]
    losses = itertools.product((seeds, 2 * seeds), (0.25, 0.5, 1.0), (0.0, 0.5, 1.0))
    lengths = itertools.product((seeds, 2 * seeds), (0.0, 0.5, 1.0), (0.1, 0.4))
    return [
        *votes,
        *(LossScenario(*of) for of in losses),
        *(LengthScenario(n, prompts, judges, longer, spread) for n, longer, spread in lengths),
        *look_scenarios(),
        *(PanelScenario(panel, prompts, share) for panel in PANELS for share in (0.5, 0.6)),
    ]


def measure(scenario: Scenario, experiments: int, seed: int) -> Row:
    """Draw so many experiments of one truth, run every test on each.

    Seed and the scenario's key start its random numbers: any subset of a grid gives the same.
    """
    generator = np.random.default_rng([seed, *scenario.key.encode()])
    parts = [scenario.outcomes(n, generator) for n in batches(experiments)]
    tests: dict[str, dict[str, float | None]] = {}
    for name, whats in parts[0].items():
        flags = {what: [of for part in parts if (of := part[name][what]) is not None] for what in whats}
        tests[name] = {w: float(np.concatenate(of).mean()) if any(map(len, of)) else None for w, of in flags.items()}
    return Row(
        key=scenario.key,
        kind=scenario.key.split()[0],  # type: ignore[typeddict-item]
        truth={} if isinstance(scenario, LookScenario) else scenario.truth(POWER_SIMULATIONS * experiments, seed + 1),
        experiments=experiments,
        tests=tests,
    )


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The bounds that the primary decision and the equivalence must keep, each with what was measured."""

    def values(of: Sequence[Row], tests: Sequence[str], what: str) -> list[float]:
        found = (row["tests"][name][what] for row in of for name in tests)
        return [value for value in found if value is not None]

    def less_predicted(of: Sequence[Row], test: str, what: str) -> list[float]:
        predicted = [(row, row["truth"]["predicted"]) for row in of]
        return [values([row], [test], what)[0] - stated for row, stated in predicted if stated is not None]

    votes = [row for row in rows if row["kind"] == "votes"]
    losses = [row for row in rows if row["kind"] == "losses"]
    panels = [row for row in rows if row["kind"] == "panel"]
    no_preference = [row for row in panels if row["truth"]["share"] == 0.5]
    primary = [row for row in votes if row["truth"]["primary"]]
    null = [row for row in votes if row["truth"]["share"] == 0.5]
    looks = [row for row in rows if row["kind"] == "looks"]
    at_margin = [row for row in losses if row["truth"]["shift_over_margin"] == 1.0]
    no_shift = [row for row in losses if row["truth"]["shift_over_margin"] == 0.0]
    checks = [
        *(("false positives in the primary scenario", values([row], PRIMARY, "rejected"), FALSE_POSITIVES)
          for row in primary if row in null),
        *((f"coverage in the primary scenario at share {row['truth']['share']:g}",
           values([row], PRIMARY, "coverage"), COVERAGE) for row in primary),
        ("planted preference found, less the stated power", less_predicted(votes, "crossed", "found"), CLOSE),
        ("false positives anywhere on the grid, at most", [max(values(null, PRIMARY, "rejected"))],
         FALSE_POSITIVES),
        ("false rejections over all looks, at most",
         [max(values(looks, ("haybittle_peto", "obrien_fleming"), "rejected"))], (0.0, MOST_FALSE)),
        ("equivalence declared at a shift of the margin", values(at_margin, ["equivalence"], "rejected"),
         AT_THE_MARGIN),
        ("false positives at equal length where length drives the votes, at most",
         [max(values([row for row in rows if row["kind"] == "lengths"], ["equal_texts"], "rejected"))],
         (0.0, EQUAL_TEXTS)),
        ("equivalence at no shift, less the predicted power", less_predicted(no_shift, "equivalence", "rejected"),
         CLOSE),
        ("false positives of any panel", values(no_preference, ["verdict"], "rejected"), FALSE_POSITIVES),
        ("coverage in any panel with a verdict", values(panels, ["verdict"], "coverage"), COVERAGE),
    ]  # fmt: skip
    return [
        Finding(what=what, measured=(min(of), max(of)), bounds=(low, high), holds=low <= min(of) and max(of) <= high)
        for what, of, (low, high) in checks
    ]


def write_calibration(rows: Sequence[Row], found: Sequence[Finding], folder: Path, console: Console) -> list[Path]:
    """Print the tables; write calibration.json, calibration.md and calibration.png, the paths that come back."""
    paths = [folder / f"calibration.{end}" for end in ("json", "md", "png")]
    write_json(paths[0], {"findings": found, "rows": rows})
    lines = [f"# Calibration: {rows[0]['experiments']:,} experiments of each truth", ""]
    lines += [f"- {'holds' if finding['holds'] else '**fails**'}: {_words(finding)}" for finding in found]
    kinds = ("votes", "losses", "lengths", "looks", "panel")
    for kind, tests in zip(kinds, (VOTE_TESTS, LOSS_TESTS, LENGTH_TESTS, LOOK_TESTS, PANEL_TESTS), strict=True):
        lines += ["", f"## {kind.capitalize()}", "", *(f"- `{key}`: {words}" for key, words in tests.items())]
        own, columns = [row for row in rows if row["kind"] == kind], ["truth", *(f">{name}" for name in tests)]
        for what, words in MEASURES.items():
            if kind == "looks" and what == "coverage":
                continue
            title = f"{kind.capitalize()}: {words}"
            cells = [[_truth(row), *(percent(row["tests"][name].get(what), 1) for name in tests)] for row in own]
            lines += ["", f"{title}:", "", *markdown_table(columns, cells)]
            console.print(table(title, columns, cells))
    note = "\\* The primary scenario. Spreads are standard deviations of the chance of a vote."
    write_text(paths[1], "\n".join([*lines, "", note, ""]))
    draw_calibration([row for row in rows if row["kind"] == "votes"], paths[2])
    for finding in found:
        mark = "[green]holds[/green]" if finding["holds"] else "[red]fails[/red]"
        console.print(f"{mark}  {_words(finding)}", soft_wrap=True)
    return paths


def _words(finding: Finding) -> str:
    low, high = (percent(value, 1) for value in finding["measured"])
    allowed = " to ".join(percent(bound, 1) for bound in finding["bounds"])
    return f"{finding['what']}: {low if low == high else f'{low} to {high}'} (allowed: {allowed})"


def _truth(row: Row) -> str:
    t = row["truth"]
    if row["kind"] == "looks":
        return row["key"]
    if row["kind"] == "panel":
        return f"{t['share']:g}: {t['panel']}{'' if row['tests']['verdict']['given'] else ' (verdict withheld)'}"
    if row["kind"] == "losses":
        return f"{t['seeds']} seeds, sd {t['sd_over_margin']:g}, shift {t['shift_over_margin']:g} margins"
    if row["kind"] == "lengths":
        return f"{t['seeds']} seeds, log ratio of lengths {t['longer']:g}, sd over seeds {t['seed_longer']:g}"
    s, star = t["spread"], " *" if t["primary"] else ""
    return f"{t['share']:g}: seed {s['seed']:g}, prompt {s['prompt']:g}, judge {s['judge']:g}{star}"


def draw_calibration(rows: Sequence[Row], path: Path) -> None:
    """False-positive rate and interval coverage of every test of votes, a column of marks for each truth."""
    figure = Figure(figsize=(WIDTH_INCHES * 1.25, 8.6), dpi=DPI, layout="constrained")
    null = [row for row in rows if row["truth"]["share"] == 0.5]
    shown: tuple[tuple[str, Sequence[Row], tuple[float, float], float, str], ...] = (
        (
            "rejected",
            null,
            FALSE_POSITIVES,
            0.05,
            "False positives where nobody prefers either arm (grey: at most 6.5 %)",
        ),
        ("coverage", rows, COVERAGE, 0.95, "Coverage of the 95 % interval (grey: at least 93.5 %)"),
    )
    panels = figure.subplots(2, 1)
    for panel, (what, of, band, nominal, title) in zip(panels, shown, strict=True):
        for i, (key, words) in enumerate(VOTE_TESTS.items()):
            there = [(x, y) for x, row in enumerate(of) if (y := row["tests"][key][what]) is not None]
            if there:
                x, y = np.array(there).T
                place = x + (i - len(VOTE_TESTS) / 2) * 0.11
                panel.plot(place, y, MARKERS[i], color=COLOURS[i], markersize=6, label=words, mec="white", mew=0.5)
        panel.set_xticks(range(len(of)), [_tick(row["truth"]) for row in of], fontsize=FONT_POINTS - 5, rotation=90)
        panel.grid(axis="y", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.axhspan(*band, color="#dddddd", zorder=0)
        panel.axhline(nominal, color="#777777", linewidth=1)
        name_axes(panel, title, "share of experiments")
    panels[1].set_ylim(min(0.4, panels[1].get_ylim()[0]), 1.01)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=FONT_POINTS - 2, frameon=False)
    save_png(figure, path)


def _tick(truth: Truth) -> str:
    spread = truth["spread"]
    share = f"share {truth['share']:g}, " if truth["share"] != 0.5 else ""
    return f"{share}s {spread['seed']:g} p {spread['prompt']:g} j {spread['judge']:g}"
