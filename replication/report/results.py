"""results.json: every number and sentence of the report in one typed record, which templates and figures read.

A missing number is NaN while it is computed, null in the file, and None in what is read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from replication.config import AnalysisConfig, SuiteConfig
from replication.errors import UserError
from replication.protocol.certificate import Certificate, PairCertificate
from replication.protocol.deviations import PlanStatus, check_plan
from replication.protocol.preregistration import Rules
from replication.report import comparisons, description, questions
from replication.report.beside_loss import BesideLoss, beside_loss
from replication.report.carries import PreferenceFactorial, preference_factorial
from replication.report.comparisons import Number, QuantityRow, Row
from replication.report.completions import Robustness, clearest_pairs, completion_rows, judged_texts, robustness
from replication.report.decisions import Decision, Panel, asked, decide, looks_taken, not_rejected
from replication.report.description import Noise
from replication.report.load import NAN, CellData
from replication.report.preference import NOT_DECIDED, Preference, analyse_votes, surveys, usable_votes
from replication.report.questions import FactorialAnswer, LossAnswer
from replication.report.sweeps import Sweeps, compare_sweeps
from replication.runs.files import read_object, write_json
from replication.runs.layout import SuiteDir
from replication.runs.records import from_json, to_json
from replication.runs.withdrawn import read_withdrawals
from replication.statistics.format import clean
from replication.statistics.seeds import smallest_sign_flip_p
from replication.votes.record import Vote
from replication.votes.tally import votes_per_judge

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SuiteSummary:
    name: str
    arms: list[str]
    seeds: list[int]
    baseline: str
    cells_total: int
    cells_complete: int
    cells_not_complete: int
    parameters: int | None
    tokens: int | None
    n_paired: int
    """Seeds of the arm that has most certified pairs."""
    smallest_sign_flip_p: Number
    two_by_two: bool


@dataclass(frozen=True)
class UsedPair:
    """An arm that is compared with the baseline at a seed."""

    arm: str
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One figure on disk and the words that go with it."""

    file: str
    """Name inside DIR/figures."""
    title: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Results:
    format: int
    suite: SuiteSummary
    plan: PlanStatus
    analysis: AnalysisConfig
    preference: Preference | None
    certificate: Certificate
    pairs_used: list[UsedPair]
    pairs_refused: list[PairCertificate]
    cells: list[Row]
    failures: list[Row]
    diverged: list[Row]
    late: Row
    quantities: list[QuantityRow]
    divergence: Row
    gain: list[Row]
    warnings: list[str]
    config: Row
    fidelity: Row | None
    data: Row | None
    data_hashes: list[Row]
    noise: Noise | None
    machines: list[Row]
    generation: list[Row]
    samples: list[Row]
    reproduce: list[str]
    loss: LossAnswer | None
    factorial: FactorialAnswer | None
    decisions: list[Decision]
    """Of every registered question, the primary one first; none in a suite of one arm."""
    published: Row
    votes_note: Row | None = None
    verdict: Row | None = None
    methods: list[str] = field(default_factory=list)
    figures: list[Drawn] = field(default_factory=list)
    evaluations: list[QuantityRow] = field(default_factory=list)
    """Scores of `replicate eval`; the file has no key for them where there are none."""
    completions: list[QuantityRow] = field(default_factory=list)
    """What is counted in them; the file has no key for them where there are none."""
    robustness: Robustness | None = None
    beside_loss: BesideLoss | None = None
    sweeps: Sweeps | None = None
    preference_factorial: PreferenceFactorial | None = None
    clearest: list[Row] = field(default_factory=list)
    """Judged pairs with their texts and votes; the file has no key for them where there are none."""
    made_from: str | None = None
    """Hash of the files that were read."""

    @property
    def secondary(self) -> list[Decision]:
        return self.decisions[1:]

    def decision(self, name: str) -> Decision:
        return next(decision for decision in self.decisions if decision.id == name)

    def quantity(self, key: str) -> QuantityRow:
        return next(row for row in self.quantities if row.key == key)


def compute_results(
    suite_dir: SuiteDir,
    suite: SuiteConfig,
    cells: Sequence[CellData],
    certificate: Certificate,
    votes: Sequence[Vote],
    rules: Rules,
) -> Results:
    """All numbers of the report; a missing one is None.

    `cells` are all of arms x seeds. The suite's first arm is the baseline, and pairs that the certificate does not let
    pass are left out of every difference.
    Registered questions are answered by the rules, over their seeds alone.
    """
    a = rules.analysis
    compared = comparisons.quantities(a.late_validations)
    rows = {q.key: comparisons.compare(q, suite, cells, certificate) for q in compared}
    of_place, used = questions.places(cells, suite), rows[a.loss]
    held = [UsedPair(pair.arm, pair.seed) for pair in certificate.pairs if pair.state == "holds"]
    baseline = a.baseline or suite.arms[0]
    good = {arm: comparisons.certified(certificate, (arm, baseline), suite.seeds) for arm in suite.arms}
    seeds = {arm: np.array(suite.seeds)[holds].tolist() for arm, holds in good.items() if arm != baseline}
    categories = {s.prompt_id: str(s.category) for c in cells for s in c.samples if isinstance(s.prompt_id, int)}
    seeds = {arm: sorted({*of}.intersection(rules.seeds)) for arm, of in seeds.items()}
    preference = analyse_votes(votes, suite.name, a, seeds, categories, suite_dir.plan.is_file(), surveys(suite_dir))
    carried = preference_factorial(votes, suite.name, a, seeds, of_place)
    registered = {
        arm: [value if seed in rules.seeds else NAN for seed, value in zip(suite.seeds, of, strict=True)]
        for arm, of in used.values.items()
    }
    loss = questions.loss_answer(registered, used.name, certificate, suite.seeds, a)
    factorial = questions.factorial_answer(registered, certificate, suite.seeds, of_place, a)
    diverged = list(comparisons.diverged_rows(suite_dir, suite, cells))
    sweeps = compare_sweeps(registered, certificate, replace(suite, analysis=a), cells, diverged, 1 - a.alpha)
    plan, decisions, p_below = check_plan(suite_dir, suite), list[Decision](), NAN
    if loss is not None:
        withdrawn, panel = read_withdrawals(suite_dir).of("seed"), Panel(votes_per_judge(votes, a.judge_kinds))
        undecided = asked(
            registered, certificate, cells, withdrawn, suite.seeds, rules, loss, factorial, preference, sweeps, carried
        )
        decisions = decide(undecided, rules, plan, panel, looks_taken(suite_dir))
        found = {decision.id: decision for decision in decisions}
        loss = replace(loss, verdict=found[loss.id].outcome)
        if preference is not None:
            voted = found["preference"]
            why = voted.why or ("" if voted.outcome != NOT_DECIDED else not_rejected(voted, a.alpha))
            preference = replace(preference, decision=voted.outcome, why=why)
            p_below = NAN if voted.why else voted.p_below or NAN  # with a reason whatever p is, votes change nothing
    counted = usable_votes(votes, suite.name, a, seeds)[0] if preference else []
    texts = judged_texts(suite_dir, cells) if preference else {}
    scored, unlike = comparisons.evaluations(suite, cells, certificate)
    summary = _suite(suite, cells, held, of_place is not None)
    sizes = (summary.tokens, summary.parameters)
    results = Results(
        format=FORMAT,
        suite=summary,
        plan=plan,
        analysis=a,
        preference=preference,
        certificate=certificate,
        pairs_used=held,
        pairs_refused=[pair for pair in certificate.pairs if pair.state != "holds"],
        cells=[comparisons.cell_row(cell, compared) for cell in cells],
        failures=[Row(arm=c.arm, seed=c.seed, error=c.failure.error, step=c.failure.step) for c in cells if c.failure],
        diverged=diverged,
        late=comparisons.late_window(cells, a.late_validations),
        quantities=list(rows.values()),
        divergence=comparisons.divergences(cells, suite.arms),
        gain=[comparisons.gain_row(cell) for cell in cells if len(cell.train.steps)],
        warnings=[*description.warnings(suite_dir, suite, cells, certificate), *unlike],
        config=description.config_summary(suite, cells),
        fidelity=description.fidelity(suite_dir, suite, cells),
        data=description.data_summary(suite_dir, cells),
        data_hashes=description.data_hashes(cells),
        noise=description.noise_summary(suite_dir, cells, a.loss),
        machines=description.machines(cells),
        generation=description.generations(cells),
        samples=description.side_by_side(suite, cells),
        reproduce=description.reproduce(suite_dir, suite, cells),
        loss=loss,
        beside_loss=beside_loss(loss, registered, cells, certificate, suite, *sizes, diverged, found[loss.id])
        if loss
        else None,
        factorial=factorial,
        preference_factorial=carried,
        sweeps=sweeps,
        decisions=decisions,
        published=comparisons.beside_published(rows, suite.arms),
        evaluations=scored,
        completions=completion_rows(suite, cells, certificate),
        robustness=robustness(counted, a, texts, preference.alike, p_below) if preference else None,
        clearest=clearest_pairs(counted, a, texts) if preference else [],
    )
    return parse(to_tree(results))


def _suite(suite: SuiteConfig, cells: Sequence[CellData], held: Sequence[UsedPair], two_by_two: bool) -> SuiteSummary:
    n_complete = sum(cell.complete for cell in cells)
    n_paired = max(sum(pair.arm == arm for pair in held) for arm in suite.arms)
    recorded = list(description.manifests(cells))
    return SuiteSummary(
        name=suite.name,
        arms=list(suite.arms),
        seeds=list(suite.seeds),
        baseline=suite.arms[0],
        cells_total=len(cells),
        cells_complete=n_complete,
        cells_not_complete=len(cells) - n_complete,
        parameters=description.one_value(manifest.parameters for _, manifest in recorded),
        tokens=description.one_value(manifest.tokens for cell, manifest in recorded if cell.complete),
        n_paired=n_paired,
        smallest_sign_flip_p=smallest_sign_flip_p(n_paired),
        two_by_two=two_by_two,
    )


def to_tree(results: Results) -> dict[str, Any]:
    """The plain JSON of results.json, without NaN and without characters that no page can hold."""
    derived = {"plan": results.plan.to_dict(), "certificate": results.certificate.to_dict()}
    derived["secondary"] = to_json(results.secondary)
    tree: dict[str, Any] = clean(to_json(results) | derived)
    optional = ("made_from", "evaluations", "completions", "clearest")
    return {key: value for key, value in tree.items() if value or key not in optional}


def parse(tree: dict[str, Any]) -> Results:
    """Results from plain JSON."""
    plan = tree["plan"] | {"deviations": tree["plan"]["departures"]}
    return from_json(Results, tree | {"plan": plan})


def write_results(path: Path, results: Results) -> None:
    write_json(path, to_tree(results))


def read_results(path: Path) -> Results:
    """The record in a file. Raises UserError where there is none."""
    tree = read_object(path)
    if not tree:
        raise UserError(f"{path}: no such file; run `replicate report` on the folder")
    return parse(tree)
