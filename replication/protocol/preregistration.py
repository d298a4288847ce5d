"""The preregistration: what is asked of a suite and how, registered in DIR/plan.json before its first cell runs.

`register` writes it, every start of a cell stamps its manifest with the plan's hash, and deviations.py says afterwards
whether the plan came before the data and was followed. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from replication import __version__
from replication.config import (
    SEED_KEYS,
    AnalysisConfig,
    DivergedRule,
    RunConfig,
    SuiteConfig,
    differences,
    flatten,
    load_cell,
    sampling_settings,
    scientific,
    scientific_hash,
    to_dict,
    without_neutral,
    without_seeds,
)
from replication.config.schema import NEUTRAL_SINCE
from replication.config.study import Study
from replication.console import timestamp
from replication.data.prompts import find_prompts
from replication.errors import UserError
from replication.protocol.questions import Question, exclusions, questions
from replication.runs.files import file_sha256, read_json, read_object, write_bytes, write_json, write_text
from replication.runs.journal import due_validations
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.ledger import append, read_ledger
from replication.runs.manifest import Git, PlanStamp, git_state
from replication.runs.records import WrongForm, from_json
from replication.runs.starts import has_logged, logged_cells, removed_cells

FORMAT = 1


@dataclass(frozen=True)
class PlannedSettings:
    """Scientific keys of the cells but their seeds."""

    shared: dict[str, object]  # equal in all arms
    arms: dict[str, dict[str, object]]


@dataclass(frozen=True)
class PlannedCode:
    version: str
    commit: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the data, resolved. It is hashed as JSON."""

    suite: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    analysis: AnalysisConfig
    diverged: DivergedRule
    questions: tuple[Question, ...]
    secondary: tuple[str, ...]  # ids of the secondary questions
    exclusions: tuple[str, ...]
    settings: PlannedSettings
    generation: dict[str, object]  # of the sampling (no part of a cell's hash), with the hash of the prompts
    cells: dict[str, str]  # arm/seed-n -> hash of its config
    code: PlannedCode
    format: int = FORMAT
    study: Study | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})  # of the panel; none: the default one


@dataclass(frozen=True)
class EarlierPlan:
    """A plan that was amended since, as the later ones name it."""

    file: str
    sha256: str
    frozen_at: str
    began_before: tuple[str, ...]
    amends: str | None


@dataclass(frozen=True)
class Preregistration:
    """DIR/plan.json."""

    plan: Plan
    sha256: str  # of the plan as it was registered
    frozen_at: str
    git: Git
    began_before: tuple[str, ...]  # cells that had logged a step by then, or were removed since they started
    amends: str | None  # why it replaced the last one of the history
    history: tuple[EarlierPlan, ...]  # oldest first


IN_EVERY_PLAN = {"baseline", "treatment", "alpha", "judges", "votes_per_judge"}
"""Keys of its section `analysis`; others may be missing from an older plan, and have their defaults."""


def plan_hash(plan: Mapping[str, Any]) -> str:
    """SHA-256 of a plan's canonical JSON, 64 hex digits."""
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(suite_dir: SuiteDir, file: str = "plan.json") -> Preregistration | None:
    """A registered plan; None where there is no such file. Raises UserError where it is another kind of file."""
    path = suite_dir.root / file
    if (tree := read_json(path)) is None:
        return None
    no_plan = f"{path}: is not a registered plan"
    try:
        record = from_json(Preregistration, tree)
    except WrongForm as error:
        raise UserError(f"{no_plan} ({error}); restore it, or remove it and register again") from None
    if lacking := IN_EVERY_PLAN - tree["plan"]["analysis"].keys():
        raise UserError(f"{no_plan} (plan.analysis lacks {', '.join(sorted(lacking))}); restore it")
    if record.plan.format > FORMAT:
        raise UserError(f"{path}: has format {record.plan.format}, this version reads up to {FORMAT}; update it")
    return record


@dataclass(frozen=True)
class Rules:
    """What a verdict goes by: the plan that was registered before the data, whatever was changed since."""

    analysis: AnalysisConfig  # resolved
    seeds: tuple[int, ...]
    plan: Plan | None = None  # none: nothing is registered, or what was is not known
    sha256: str | None = None
    file: str = ""  # that has the plan
    fault: str = ""  # why there is no verdict: what was registered is not known, or was of other arms


def registered_rules(suite_dir: SuiteDir, suite: SuiteConfig) -> Rules:
    """The rules of the newest plan that was registered before the first step of any cell; else those of the plan that
    came too late, or of the suite."""
    now = Rules(suite.analysis.resolved(suite.arms), tuple(suite.seeds))
    try:
        record = read_plan(suite_dir)
    except UserError:
        return replace(now, fault="plan.json, the registered plan, cannot be read")
    if record is None:
        return now
    versions: list[EarlierPlan | Preregistration] = [record, *reversed(record.history)]
    in_time = next((version for version in versions if not version.began_before), record)
    file = in_time.file if isinstance(in_time, EarlierPlan) else suite_dir.plan.name
    try:
        plan = from_json(Plan, own := read_object(suite_dir.root / file)["plan"])
    except (UserError, WrongForm, KeyError):
        return replace(now, fault=f"{file}, the plan of before the data, cannot be read")
    if plan_hash(own) != in_time.sha256:
        return replace(now, fault=f"{file} was edited after it was registered")
    if plan.analysis.baseline != suite.arms[0] or plan.analysis.treatment not in suite.arms:
        return replace(now, fault="the suite lacks an arm of the registered question, or begins with another")
    return Rules(plan.analysis, plan.seeds, plan, in_time.sha256, file)


def build_plan(
    suite: SuiteConfig, flags: Sequence[str] = (), cluster: Path | None = None, study: Study | None = None
) -> Plan:
    """The plan of a suite.

    Args:
        suite: with the seeds that will run.
        flags: the keys that will follow `replicate grid run` or `submit`; they change the cells.
        cluster: the cluster file that will be given there.

    Raises UserError: an analysis key that contradicts the suite, a suite of one arm, or a config that does not load.
    """
    analysis = suite.analysis.check(suite.arms).resolved(suite.arms)
    if analysis.treatment is None:
        raise UserError(f"{suite.name}: has one arm, and a plan compares two; add another to key 'arms'")
    if analysis.looks and analysis.looks[-1] != len(suite.seeds):
        last, n = analysis.looks[-1], len(suite.seeds)
        raise UserError(f"analysis.looks: ends with {last} seeds, and the suite has {n}; the last look is with all")
    of_arm = {arm: load_cell(suite, arm, suite.seeds[0], flags, cluster) for arm in suite.arms}
    refuse_other_sweeps(analysis, of_arm)
    plain = {arm: config for arm, config in of_arm.items() if not config.is_control}
    gains = {arm: (config.token_gain.enabled, config.layer_gain.enabled) for arm, config in plain.items()}
    asked = questions(analysis, suite.arms, len(suite.seeds), gains)
    generation = of_arm[analysis.treatment].generation
    prompts = {"prompts_sha256": file_sha256(find_prompts(generation)) if generation.prompts else None}
    cells = ((arm, seed) for seed in suite.seeds for arm in suite.arms)
    return Plan(
        suite=suite.name,
        arms=tuple(suite.arms),
        seeds=tuple(suite.seeds),
        analysis=analysis,
        diverged=suite.diverged,
        questions=asked,
        secondary=tuple(question.id for question in asked if question.role == "secondary"),
        exclusions=exclusions(analysis, suite.diverged, study),
        settings=_settings(of_arm),
        generation={"prompts": generation.prompts, **sampling_settings(generation), **prompts},
        cells={f"{arm}/seed-{seed}": scientific_hash(replace(of_arm[arm], seed=seed)) for arm, seed in cells},
        code=PlannedCode(__version__, git_state().commit),
        study=study,
    )


def _settings(of_arm: Mapping[str, RunConfig]) -> PlannedSettings:
    by_arm = {arm: without_seeds(scientific(config)) for arm, config in of_arm.items()}
    for arm, config in of_arm.items():  # a seed key that the suite fixes is kept
        by_arm[arm] |= {k: v for k in SEED_KEYS[1:] if (v := getattr(config, k)) is not None}
    first, *others = by_arm.values()
    shared = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
    own = {arm: {k: v for k, v in keys.items() if k not in shared} for arm, keys in by_arm.items()}
    return PlannedSettings(shared, own)


def plan_differences(a: Plan, b: Plan) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two plans differ; what follows from others (the words, the cells' hashes) only where no
    other key does, and the code's commit never: another commit is no other plan."""
    changed = differences(flatten(to_dict(a)), flatten(to_dict(b)))
    changed = {k: v for k, v in changed.items() if not k.startswith("code.")}
    follows = ("questions", "exclusions", "secondary", "cells.")
    return {k: v for k, v in changed.items() if not k.startswith(follows)} or changed


def listed(changed: Mapping[str, tuple[Any, Any]], most: int = 5) -> str:
    """Keys that differ on one line: key: before -> after."""
    shown = [f"{k}: {a} -> {b}" for k, (a, b) in list(changed.items())[:most]]
    return "; ".join([*shown, *([f"and {len(changed) - most} more"] if len(changed) > most else [])])


@dataclass(frozen=True)
class Registered:
    """The outcome of registering."""

    record: Preregistration
    is_new: bool  # False where the same plan was registered already, and nothing was changed


def register(
    suite_dir: SuiteDir,
    suite: SuiteConfig,
    flags: Sequence[str] = (),
    cluster: Path | None = None,
    amend: str | None = None,
    study: Study | None = None,
) -> Registered:
    """Write DIR/plan.json and DIR/plan.md, in a folder that is made where it is not there; see build_plan.

    The same plan twice is registered once, whatever the code's commit by then; a plan.md that is gone is written again.

    Args:
        amend: why the plan that is there is replaced; it is kept as plan-1.json (the next one as plan-2.json).
        study: of the panel; none: that of the plan that is there, or the default one.

    Raises UserError: another plan is there and `amend` is none; or see build_plan.
    """
    earlier = read_plan(suite_dir)
    plan = build_plan(suite, flags, cluster, study or (earlier.plan.study if earlier else None))
    amend, history = (amend or "").strip() or None, tuple[EarlierPlan, ...]()
    if earlier is not None:
        changed = plan_differences(earlier.plan, plan)
        if not changed:
            page = suite_dir.plan_md  # registering may have ended between its two files
            if not page.is_file() or earlier.sha256 not in page.read_text(encoding="utf-8", errors="replace"):
                write_text(page, markdown(earlier))
            return Registered(earlier, is_new=False)
        if amend is None:
            raise UserError(
                f"{suite_dir.plan}: another plan is registered ({listed(changed)}); keep to it, or give the reason: "
                '`replicate preregistration register ... --amend "why"`, which the report will quote'
            )
        kept = suite_dir.plan.with_name(f"plan-{len(earlier.history) + 1}.json")
        write_bytes(kept, suite_dir.plan.read_bytes())
        entry = EarlierPlan(kept.name, earlier.sha256, earlier.frozen_at, earlier.began_before, earlier.amends)
        history = (*earlier.history, entry)
    refuse_early_window(plan)
    sha256, now, git = plan_hash(without_neutral(plan)), timestamp(), git_state()
    began = list(logged_cells(suite_dir.runs))  # last: a cell that logs meanwhile began before the plan was there
    began += [name for _, name, _ in removed_cells(suite_dir, read_ledger(suite_dir)) if name not in began]
    record = Preregistration(plan, sha256, now, git, tuple(began), amend if history else None, history)
    append(suite_dir, "amendment" if history else "registration", sha256=sha256, frozen_at=now, amends=record.amends)
    write_json(suite_dir.plan, without_neutral(record))  # first: a folder with a page and no plan is somebody else's
    write_text(suite_dir.plan_md, markdown(record))
    return Registered(record, is_new=True)


def refuse_early_window(plan: Plan) -> None:
    """Raise UserError where the late mean would begin before the last half of training: an average of most of the run
    says little of what was reached."""
    keys = plan.settings.shared
    steps, every, k = keys.get("training.steps"), keys.get("validation.every_steps"), plan.analysis.late_validations
    if plan.analysis.loss != "late_val_loss" or not isinstance(steps, int) or not isinstance(every, int):
        return
    at = sorted(due_validations(steps, every))
    if at[-k:][0] < steps / 2:
        fits = sum(step >= steps / 2 for step in at)
        raise UserError(
            f"analysis.late_validations: the mean of the last {k} validations begins at step {at[-k:][0]} of {steps}, "
            f"before the last half of training; set it to {fits}, or validation.every_steps to "
            f"{max(1, steps // (2 * k))}"
        )


def refuse_other_sweeps(a: AnalysisConfig, of_arm: Mapping[str, RunConfig]) -> None:
    """Raise UserError where arms of one sweep differ in more than their learning rate, or share one."""
    for name, (first, *others) in (a.sweeps or {}).items():
        keys = {arm: without_seeds(scientific(of_arm[arm])) for arm in (first, *others)}
        rates = {of_arm[arm].training.learning_rate for arm in keys}
        free = {"arm", "training.learning_rate", "training.muon_learning_rate"}
        more = {key for arm in others for key in differences(keys[first], keys[arm])} - free
        if more or len(rates) < len(keys):
            what = f"differ in {', '.join(sorted(more))} too" if more else "share a training.learning_rate"
            raise UserError(
                f"analysis.sweeps: arms of {name} {what}; they may differ in the rate alone, and must in it"
            )


def plan_stamp(run: RunDir) -> PlanStamp | None:
    """The stamp of the plan in a cell's output folder; None where it lies in none, or nothing is registered."""
    suite_dir = SuiteDir.around(run)
    record = read_plan(suite_dir) if suite_dir else None
    return None if record is None else PlanStamp(sha256=record.sha256, frozen_at=record.frozen_at)


def first_stamp(run: RunDir, earlier: PlanStamp | None, stamp: PlanStamp | None) -> tuple[PlanStamp | None, bool]:
    """(the stamp at the top of a cell's manifest, at every start; whether a start before this one logged a step).

    It is that of the first start that logged one: what the manifest has (`earlier`), or `plan_stamp` now. Before a step
    is logged there are no data, and a plan is in time; one that is registered after it came too late.
    """
    logged = has_logged(run)
    return (earlier if logged else stamp), logged


def markdown(record: Preregistration) -> str:
    """plan.md: the plan for a reader."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # what only reads a plan answers at once

    loader = PackageLoader("replication.protocol")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    escaped = str.maketrans({"|": "\\|", "\n": "\\n"})
    environment.filters["cell"] = lambda value: str(value).translate(escaped)
    return environment.get_template("plan.md.j2").render(record=record, plan=record.plan)
