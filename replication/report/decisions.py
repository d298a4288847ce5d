"""The decision of each registered question. Headline, tables, words, results.json and Study read it, and none decides.

A question is decided by its registered test, after the level of the look, after Holm's correction where it is a
secondary one; and not at all where the plan withholds it: see protocol/README.md, The verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from replication.config import AnalysisConfig
from replication.protocol.certificate import Certificate
from replication.protocol.deviations import PlanStatus
from replication.protocol.preregistration import Rules
from replication.report.carries import IDS, PreferenceEffect, PreferenceFactorial
from replication.report.comparisons import Number, Values, certified, paired
from replication.report.load import NAN, CellData
from replication.report.preference import BASELINE_PREFERRED, PREFERRED, Preference
from replication.report.questions import EFFECTS, Effect, FactorialAnswer, LossAnswer
from replication.report.sweeps import BestRates, Sweeps
from replication.runs.layout import SuiteDir
from replication.runs.ledger import Entry, append, read_ledger
from replication.statistics.format import arm_name, p_value
from replication.statistics.looks import alpha_for, look_levels
from replication.statistics.seeds import DIFFERENT, EQUIVALENT, NOT_DECIDED, MeanTest, holm, mean_test

Tested = MeanTest | LossAnswer | Effect | BestRates | PreferenceEffect
OTHER, NOT_TOLD = "other than zero", "not told from zero"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A registered question with its test, and what it comes to."""

    id: str
    name: str
    role: Literal["primary", "secondary"] = "secondary"
    n: int | None
    """Seeds in the estimate."""
    mean: Number = NAN
    low: Number = NAN
    high: Number = NAN
    level: float
    """Coverage of the interval, which no look or correction widens."""
    p: Number = NAN
    p_holm: Number = NAN
    """p after looks and Holm's correction; of a secondary question that can be decided."""
    seeds: list[int]
    """Registered seeds whose data are in, be they usable or not."""
    look_level: float | None = None
    """Of the registered look, before Holm's correction."""
    p_below: Number = NAN
    """What p must be below, after looks and Holm's correction; none where there is no verdict whatever p is."""
    outcome: str = NOT_DECIDED
    why: str = ""
    """Nothing was decided, not even that the test did not reject."""
    verdict: str = ""
    """Outcome, or why there is none, in words."""
    looks: list[str] = field(default_factory=list)
    """A sentence for each look."""


@dataclass(frozen=True)
class Panel:
    """First votes of each judge whose kind counts."""

    given: Mapping[str, int]

    def short_of(self, a: AnalysisConfig, share: float) -> str:
        """Where fewer of the registered votes are in than this share of the seeds asks for; else ""."""
        full = sorted((min(n, a.votes_per_judge) for n in self.given.values()), reverse=True)[: a.judges]
        due = math.ceil(share * a.judges * a.votes_per_judge - 1e-9)
        judges = f"by {len(self.given)} of {a.judges} judges"
        return "" if sum(full) >= due else f"the panel was closed with {sum(full)} of {due} registered votes, {judges}"


def asked(
    values: Values,
    certificate: Certificate,
    cells: Sequence[CellData],
    withdrawn: Collection[str],
    seeds: Sequence[int],
    rules: Rules,
    loss: LossAnswer,
    factorial: FactorialAnswer | None,
    preference: Preference | None,
    sweeps: Sweeps | None,
    carried: PreferenceFactorial | None,
) -> list[Decision]:
    """Every registered question with its test, undecided; the primary one first. `seeds` are those of `values`."""
    a, certain = rules.analysis, 1 - rules.analysis.alpha
    ended = {(c.arm, c.seed) for c in cells if c.complete or (c.failure and c.failure.diverged)}

    def over(arms: Collection[str]) -> list[int]:
        return [s for s in rules.seeds if str(s) in withdrawn or all((arm, s) in ended for arm in arms)]

    def row(name: str, words: str, t: Tested, arms: Collection[str], level: float) -> Decision:
        n, (mean, low, high, p) = int(t.n), (NAN if x is None else float(x) for x in (t.mean, t.low, t.high, t.p))
        why = "" if np.isfinite(p) else "no p: not enough to test"
        why = f"{n} of the {a.min_seeds} seeds that a verdict needs" if n < a.min_seeds else why
        return Decision(
            id=name, name=words, n=n, mean=mean, low=low, high=high, level=level, p=p, seeds=over(arms), why=why
        )

    pair, f = (loss.arm, loss.baseline), preference
    treated, plain = (arm_name(arm) for arm in pair)
    words = f"Loss of {treated} equivalent to that of {plain} within {a.margin_nats:g} nats"
    rows = [row(loss.id, words, loss, pair, loss.interval_level)]
    voted = Decision(id="preference", name="Preference", n=None, seeds=[], level=certain, why="no votes yet")
    if f is not None:
        unusable = [s for s in over(pair) if not certified(certificate, pair, [s])[0]]
        voted = replace(voted, n=f.n, mean=f.estimate, low=f.low, high=f.high, p=f.p, why=f.why)
        voted = replace(voted, seeds=sorted({*unusable, *f.seeds}.intersection(rules.seeds)))
    rows.insert(0 if a.primary == "preference" else 1, voted)
    rows[0] = replace(rows[0], role="primary")
    four = set(factorial.places.values()) if factorial else set[str]()
    for e in factorial.effects if factorial else ():
        rows.append(row(e.id, f"{e.name} on the loss", e, four, certain))
    for name, (_, effect, _) in zip(IDS, EFFECTS, strict=True) if a.preference_factorial else ():
        words = f"{effect} on the preference"
        if carried is None:
            why = "no votes on a 2x2 of arms yet"
            rows.append(Decision(id=name, name=words, n=None, seeds=[], level=certain, why=why))
            continue
        unusable = [s for s in over(four) if not certified(certificate, sorted(four), [s])[0]]
        met = sorted({*unusable, *carried.seeds}.intersection(rules.seeds))
        carries = next(effect for effect in carried.effects if effect.id == name)
        rows.append(replace(row(name, words, carries, four, certain), seeds=met))
    swept = {arm for of_sweep in (a.sweeps or {}).values() for arm in of_sweep}
    for arm in (arm for arm in certificate.arms if arm not in four.union(pair, swept)):
        t = mean_test(paired(values, certificate, arm, loss.baseline, seeds), certain)
        words = f"Loss of {arm_name(arm)} less that of {plain}"
        rows.append(row(f"loss_difference_{arm}", words, t, (arm, loss.baseline), certain))
    for best in sweeps.answers if sweeps else ():
        words = f"Loss of {best.name} less that of {best.baseline}, each at its best rate"
        rows.append(row(best.id, words, best, swept, best.level))
    return rows


def decide(
    rows: Sequence[Decision], rules: Rules, plan: PlanStatus, panel: Panel, taken: Sequence[Entry]
) -> list[Decision]:
    """The questions decided; `taken` are the looks that the folder's ledger has."""
    a, decided = rules.analysis, list[Decision]()
    withheld = {row.id: _withheld(row, rules, plan, panel) for row in rows}
    held = [replace(row, why=row.why or withheld[row.id], look_level=_look_level(row, rules, a.alpha)) for row in rows]
    family = {row.id: _whole_p(row, rules) for row in held if row.role == "secondary"}
    corrected = dict(zip(family, holm([*family.values()]), strict=True))
    for row in held:
        step = a.alpha  # Holm's, where p is below all that he does not reject of the others
        if row.role == "secondary":
            others = sorted(p for name, p in family.items() if name != row.id)
            steps = [a.alpha / (len(family) - i) for i in range(len(family))]
            step = next(alpha for p, alpha in zip([*others, 1.0], steps, strict=True) if p >= alpha)
            row = replace(row, p_holm=NAN if row.why else float(corrected[row.id]))
        row = replace(row, p_below=NAN if withheld[row.id] else _look_level(row, rules, step) or step)
        row = replace(row, outcome=NOT_DECIDED if row.why else outcome(row, row.p))
        row = _with_looks(row, rules, taken)
        decided.append(replace(row, verdict=_verdict(row, a.alpha)))
    return decided


def _whole_p(row: Decision, rules: Rules) -> float:
    """p on the scale of alpha of all looks; 1 where nothing can be decided."""
    if row.why or row.p is None or row.look_level is None:
        return 1.0 if row.why or row.p is None else row.p
    a, n = rules.analysis, len(row.seeds)
    return alpha_for(row.p, a.looks, a.looks.index(n), a.look_boundaries, _sides(row))


def _withheld(row: Decision, rules: Rules, plan: PlanStatus, panel: Panel) -> str:
    """Why no verdict may be given on what could be tested; "" where one may."""
    on = "preference" if row.id.startswith("preference") else "loss"
    if reasons := [withheld.why for withheld in plan.withheld if withheld.on in ("all", on)]:
        return f"the verdict is withheld: {'; '.join(reasons)}"
    if rules.plan is None:
        return ""
    looks, all_seeds, n = rules.analysis.looks, len(rules.seeds), len(row.seeds)
    if n < all_seeds and n not in looks:
        after = [look for look in looks if look > n]
        return f"{n} of {all_seeds} seeds; {f'the next look is with {after[0]}' if after else 'no look was registered'}"
    return panel.short_of(rules.analysis, n / all_seeds) if on == "preference" else ""


def _look_level(row: Decision, rules: Rules, alpha: float) -> float | None:
    """The level of the registered look that the question is at, where all looks together have alpha; None where none
    is registered, or between two."""
    a, n = rules.analysis, len(row.seeds)
    looks = a.looks if rules.plan else ()
    if n not in looks:
        return None
    return look_levels(looks, alpha, a.look_boundaries, _sides(row))[looks.index(n)]


def _sides(row: Decision) -> int:
    return 1 if row.id == "loss_equivalence" else 2


def outcome(row: Decision, p: Number) -> str:
    """What the question comes to by a p: its own, or that of another set of cells."""
    p, below = 1.0 if p is None else p, row.p_below or NAN
    if row.id == "loss_equivalence":
        return EQUIVALENT if p < below else DIFFERENT if 1 - p < below else NOT_DECIDED
    if row.id == "preference":
        better = PREFERRED if (row.mean or 0.0) > 0.5 else BASELINE_PREFERRED
        return better if p < below else NOT_DECIDED
    return OTHER if p < below else NOT_TOLD


def _verdict(row: Decision, alpha: float) -> str:
    if row.why:
        return f"{NOT_DECIDED}: {row.why}"
    if row.outcome != NOT_DECIDED:
        return row.outcome
    return (
        "not shown to be equivalent" if row.id == "loss_equivalence" else f"{NOT_DECIDED}: {not_rejected(row, alpha)}"
    )


def not_rejected(row: Decision, alpha: float) -> str:
    """Why a test that could be made did not reject, of p before and after looks and correction."""
    if row.p is None or not row.p < alpha:
        return "the interval holds one half, no preference" if row.id == "preference" else f"p {p_value(row.p)}"
    if row.look_level is not None and row.p >= row.look_level:
        return f"p {p_value(row.p)} is not below {row.look_level:.4g}, the level of this look"
    return f"p {p_value(row.p)} is {p_value(row.p_holm)} after Holm's correction"


def _with_looks(row: Decision, rules: Rules, taken: Sequence[Entry]) -> Decision:
    """The question with what earlier looks at it found, the first of which that decided decides for good."""
    lines, looks, n = list[str](), rules.analysis.looks if rules.plan else (), len(row.seeds)
    own = [entry for entry in taken if entry.facts["question"] == row.id]
    for entry in own:
        then, level, outcome = len(entry.facts["seeds"]), entry.facts.get("level"), entry.facts["outcome"]
        if entry.facts["seeds"] == row.seeds:
            continue
        found = f"{entry.at}, with {then} of {len(rules.seeds)} seeds: p {p_value(entry.facts['p'])}"
        if level is None:
            lines.append(f"The results were seen at {found}. No look was registered there, and none decided.")
            continue
        lines.append(f"Look at {found}, level {level:.4g}: {outcome}.")
        if outcome not in (NOT_DECIDED, NOT_TOLD) and "withheld" not in row.why:
            lines.append(f"That look decided, for good: {outcome}.")
            return replace(row, outcome=outcome, why="", looks=lines)
    seen = {len(entry.facts["seeds"]) for entry in own}
    if skipped := [str(look) for look in looks if look < n and look not in seen]:
        lines.append(f"Registered looks that were not taken: with {', '.join(skipped)} seeds.")
    if row.look_level is not None:
        level = row.look_level if row.why else row.p_below
        held = f"p {p_value(row.p)} is held against {level:.4g}; the interval is not widened for looks"
        lines.append(
            f"This is look {looks.index(n) + 1} of {len(looks)}, with {n} of {len(rules.seeds)} seeds: {held}."
        )
    return replace(row, looks=lines)


def looks_taken(suite_dir: SuiteDir) -> list[Entry]:
    """Those of the ledger that name a question, its seeds, p and outcome."""
    needed = {"question", "seeds", "p", "outcome"}
    return [entry for entry in read_ledger(suite_dir).of("look") if needed <= entry.facts.keys()]


def record_looks(suite_dir: SuiteDir, decisions: Sequence[Decision], **of: str) -> None:
    """Add a line to the ledger for each question that was looked at with seeds at which it was not before; `of` are
    hashes that say what was looked at."""
    known: list[Mapping[str, Any]] = [entry.facts for entry in looks_taken(suite_dir)]
    for d in decisions:
        if d.p is not None and not any(f["question"] == d.id and f["seeds"] == d.seeds for f in known):
            seen = {"question": d.id, "seeds": d.seeds, "p": d.p, "level": d.look_level, "outcome": d.outcome}
            append(suite_dir, "look", None, **seen, **of)
