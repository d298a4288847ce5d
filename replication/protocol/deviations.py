"""Whether a registered plan came before the data, and every deviation from it by name. Reads files, writes none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from replication.config import (
    SEED_KEYS,
    SuiteConfig,
    differences,
    flatten,
    load_run,
    neutral_values,
    scientific,
    to_dict,
)
from replication.config.study import load_study
from replication.console import plural
from replication.errors import UserError
from replication.protocol.anchor import anchor_sentence
from replication.protocol.contradictions import contradictions, grouped
from replication.protocol.panel_records import panel_contradictions
from replication.protocol.preregistration import (
    EarlierPlan,
    Plan,
    Preregistration,
    Rules,
    listed,
    plan_differences,
    plan_hash,
    read_plan,
    registered_rules,
)
from replication.runs.files import read_object
from replication.runs.layout import RunDir, SuiteDir, name_cells, spans
from replication.runs.manifest import Manifest, PlanStamp, find_manifest
from replication.runs.starts import LoggedCell, code_of, has_logged, unlike
from replication.runs.withdrawn import read_withdrawals
from replication.votes.record import counted_votes, read_note
from replication.votes.tally import votes_per_judge

State = Literal["none", "before the data", "after the data"]


@dataclass(frozen=True)
class Withheld:
    """Why no verdict is given: on any question, or on the preference or the loss alone."""

    why: str
    on: Literal["all", "preference", "loss"] = "all"


@dataclass(frozen=True)
class PlanStatus:
    """Whether a plan was registered before the data, and whether it was followed."""

    state: State
    sha256: str | None  # of the plan as it was registered
    frozen_at: str | None
    deviations: tuple[str, ...]  # one line each, those of `unfinished` last; empty where there is no plan
    unfinished: tuple[str, ...] = ()  # those that more cells or votes would mend: what is planned and not there
    notes: tuple[str, ...] = ()  # for the reader: by which rules the verdict is, amendments before the first step
    withheld: tuple[Withheld, ...] = ()  # what the verdict is withheld for; each is a deviation too
    anchor: str = ""  # whether an outside clock vouches for the plan, in a sentence

    @property
    def followed(self) -> bool:
        """Whether there is a plan, of before the data, and no deviation from it."""
        return self.state == "before the data" and not self.deviations

    @property
    def sentences(self) -> tuple[str, ...]:
        """The first lines of a report; the deviations are to follow them, a line each."""
        if self.state == "none":
            return ("No analysis plan was registered before the data: every result here is exploratory.",)
        named = f"The analysis plan {(self.sha256 or '')[:16]} was registered at {self.frozen_at}, {self.state}"
        if self.state == "after the data":
            named += ", so it makes no result confirmatory"
        if not self.deviations:
            outcome = "The plan was followed: no deviation from it was found."
        elif self.deviations == self.unfinished:
            outcome = "The plan is unfinished, and no other deviation from it was found:"
        else:
            outcome = f"The plan was not followed in {plural(len(self.deviations), 'point')}:"
        return (f"{named}. {self.anchor}".strip(), *self.notes, outcome)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON as in results.json, `followed` and `sentences` included."""
        plain = to_dict(self)
        plain["departures"] = plain.pop("deviations")  # the key that results.json has always had
        return plain | {"followed": self.followed, "sentences": list(self.sentences)}


def check_plan(suite_dir: SuiteDir, suite: SuiteConfig | None = None) -> PlanStatus:
    """Hold a folder, votes included, against its plan: for the check, the report and exports alike.

    Damaged or missing files are deviations; a damaged withdrawn.json alone raises.

    Args:
        suite_dir: the output folder.
        suite: what DIR/suite.yaml says now; none, before the first cell: nothing is compared with it.
    """
    started, unreadable = dict[str, LoggedCell](), list[str]()  # by arm/seed-n, planned or not
    for arm, seed, run in suite_dir.cells():
        name, manifest = f"{arm}/seed-{seed}", find_manifest(run)
        if manifest is not None:
            started[name] = LoggedCell(run, manifest)
        elif run.manifest.exists() or has_logged(run):
            unreadable.append(name)
    cells = {name: cell for name, cell in started.items() if has_logged(cell.run)}
    try:
        record = read_plan(suite_dir)
    except UserError as error:
        return PlanStatus("none", None, None, (str(error),), withheld=(Withheld("the plan cannot be read"),))
    found = contradictions(suite_dir, cells, record)
    of_votes = tuple(panel_contradictions(suite_dir))
    untrue = (*(Withheld(line) for line in found.withholding), *(Withheld(line, "preference") for line in of_votes))
    if record is None:
        stamps = ((name, cell.manifest.plan) for name, cell in started.items() if cell.manifest.plan)
        words = "plan.json is gone, whose hash {} these cells carry"
        gone, withheld = _grouped(_Fault(words.format(str(stamp.sha256)[:16]), name, "all") for name, stamp in stamps)
        return PlanStatus("none", None, None, (*gone, *found.lines, *of_votes), withheld=(*withheld, *untrue))
    plan = record.plan
    rules = registered_rules(suite_dir, suite) if suite else None
    unstamped = [name for name, cell in cells.items() if _is_early(cell, record)]
    earlier_plans = {entry.sha256 for entry in record.history}
    amended = {
        name for name, cell in cells.items() if cell.manifest.plan and cell.manifest.plan.sha256 in earlier_plans
    }
    before_plans = record.history[0].began_before if record.history else record.began_before
    unplanned = sorted({*before_plans, *unstamped} - amended)
    deviations, now = list[str](), plan_hash(read_object(suite_dir.plan)["plan"])  # an older file lacks later keys
    if now != record.sha256:
        was = record.sha256[:16]
        deviations.append(f"plan.json was edited after it was registered: it hashes to {now[:16]}, then to {was}")
    late_amendments, notes = _amendments(suite_dir, record)
    if plan.analysis.margin_reason is None:
        notes.append(f"No reason was registered for the margin of {plan.analysis.margin_nats:g} nats.")
    deviations += late_amendments
    if unplanned:
        deviations.append(f"cells that started before the plan was registered: {name_cells(unplanned)}")
    if suite is not None:
        deviations += _changes_of_suite(plan, suite)
    planned = {name: cell for name, cell in cells.items() if name not in unplanned}
    judged_by = (rules and rules.plan) or plan  # an amendment after the data makes no cell the registered one
    faults, withheld = _grouped([*_under_another_plan(record, planned), *_of_another_config(judged_by, cells)])
    deviations += faults
    code = unlike({name: code_of(cell.manifest) for name, cell in cells.items()})
    hashes = {name: cell.manifest.data.hash for name, cell in cells.items() if cell.manifest.data.hash}
    data = unlike({name: [{"the data's hash": str(hash)[:16]}] for name, hash in hashes.items()})
    found_unlike = (("ran other code", code), ("on other data", data))
    deviations += [f"cells {what}: {line}" for what, line in found_unlike if line]
    if unreadable:
        deviations.append(f"cells whose manifest.json cannot be read: {name_cells(unreadable)}")
    if rules and rules.fault:
        withheld = (Withheld(rules.fault), *withheld)
    elif rules and suite:
        notes += _rules_kept(rules, record, suite)
    panel, of_panel, unfinished = _panel(suite_dir, judged_by)
    missing = [s for s in plan.seeds if not all(suite_dir.cell(arm, s).complete.is_file() for arm in plan.arms)]
    done = f"{len(plan.seeds) - len(missing)} of {len(plan.seeds)} planned seeds are complete in every planned arm"
    lacking = [f"{done}; not: {', '.join(spans(missing))}"] if missing else []
    state: State = "after the data" if record.began_before or unstamped else "before the data"
    return PlanStatus(
        state,
        record.sha256,
        record.frozen_at,
        (*deviations, *panel, *found.lines, *of_votes, *lacking, *unfinished),
        (*lacking, *unfinished),
        tuple(notes),
        (*withheld, *of_panel, *untrue),
        anchor_sentence(suite_dir, record, found.began),
    )


def _rules_kept(rules: Rules, record: Preregistration, suite: SuiteConfig) -> list[str]:
    """A sentence where the verdict goes by what was registered, and not by what was changed since."""
    if rules.sha256 != record.sha256:
        return [f"The verdict goes by {rules.file}, which was registered before the data, not by the later amendment."]
    changed = _changes({"analysis": rules.analysis}, {"analysis": suite.analysis.resolved(suite.arms)})
    kept = ", ".join(f"{key} {here}" for key, (here, _) in changed.items())
    return [f"The verdict goes by what was registered ({kept}), not by what suite.yaml says now."] if kept else []


def _panel(suite_dir: SuiteDir, plan: Plan) -> tuple[list[str], list[Withheld], list[str]]:
    """(deviations; what withholds a verdict; what more votes would mend), of votes and of what was withdrawn."""
    gone = read_withdrawals(suite_dir).entries
    faults, withheld, unfinished = [f"{entry.kind} {entry.name} was {entry}" for entry in gone], list[Withheld](), []
    for entry in gone:
        cells = (suite_dir.cell(arm, int(entry.name)) for arm in plan.arms if entry.kind == "seed")
        if entry.kind == "seed" and all(cell.complete.is_file() for cell in cells):
            withheld.append(Withheld(f"seed {entry.name} was withdrawn, whose losses were there to be seen", "loss"))
    try:
        votes, note = counted_votes(suite_dir.votes), read_note(suite_dir.votes_note, suite_dir.votes)
    except UserError as error:
        return [*faults, str(error)], [*withheld, Withheld("the votes cannot be read", "preference")], []
    if note and note.warning:
        faults.append(note.warning)
        withheld.append(Withheld("the votes are not those that the panel was locked with", "preference"))
    if not votes:
        return faults, withheld, []
    locked_at = note.note.locked_at if note else None
    for entry in gone:
        if locked_at is None or datetime.fromisoformat(entry.at) > datetime.fromisoformat(locked_at):
            why = f"{entry.kind} {entry.name} was withdrawn when the votes had been opened"
            withheld.append(Withheld(why, "preference"))
    if note and note.note.locked_early_because:
        reason = note.note.locked_early_because
        faults.append(f'the panel was locked before all planned votes were in; reason given: "{reason}"')
    if note and note.note.study_sha256 not in (None, (plan.study or load_study()).sha256):
        faults.append("the panel's study, what judges were told and asked, is not the plan's")
        if note.note.excluded:
            withheld.append(Withheld("judges were excluded by rules that the plan does not have", "preference"))
    given, rules = votes_per_judge(votes, plan.analysis.judge_kinds), plan.analysis
    if len(given) > rules.judges:
        faults.append(f"{len(given)} judges voted, {rules.judges} are planned")
    if len(given) < rules.judges:
        unfinished.append(f"{len(given)} of {rules.judges} planned judges voted")
    if few := sum(n < rules.votes_per_judge for n in given.values()):
        unfinished.append(f"{few} of {len(given)} judges gave fewer than {rules.votes_per_judge} votes")
    return faults, withheld, unfinished


def other_commits(suite_dir: SuiteDir) -> list[str]:
    """A line for each cell that was begun or trained at other commits than the plan was registered at, or than other
    cells where that is not known. No deviation by itself: what computes is compared by its hash."""
    record, others = None, dict[str, list[str]]()
    with suppress(UserError):  # a plan that cannot be read is a deviation of its own
        record = read_plan(suite_dir)
    planned = record.plan.code.commit if record else None
    for arm, seed, run in suite_dir.cells():
        starts = (find_manifest(run) or Manifest()).all_starts
        commits = dict.fromkeys(start.git.commit for start in starts if start.git.commit)
        if set(commits) - {planned}:
            others[f"{arm}/seed-{seed}"] = [commit[:12] for commit in commits]
    if planned is None and len({commit for commits in others.values() for commit in commits}) < 2:
        return []
    beside = f"; the plan was registered at {planned[:12]}" if planned else ""
    return [f"{name}: trained at commit {', then '.join(commits)}{beside}" for name, commits in others.items()]


class _Fault(NamedTuple):
    words: str
    cell: str
    withholds: Literal["all", "preference"] | None = None


def _grouped(faults: Iterable[_Fault]) -> tuple[tuple[str, ...], tuple[Withheld, ...]]:
    """A line for each fault, with the names of all cells that have it; and those that withhold a verdict."""
    every = list(faults)
    withheld = {fault.words: Withheld(fault.words, fault.withholds) for fault in every if fault.withholds}
    return tuple(grouped((fault.words, fault.cell) for fault in every)), tuple(withheld.values())


def _amendments(suite_dir: SuiteDir, record: Preregistration) -> tuple[list[str], list[str]]:
    """(deviations, notes): of amendments after the first step of a cell and earlier plans that are lost; of others."""
    deviations, notes, plans = list[str](), list[str](), list[Plan | None]()
    for entry in record.history:
        try:
            earlier = read_plan(suite_dir, entry.file)
        except UserError:
            earlier = None
        if earlier is None:
            deviations.append(f"{entry.file} cannot be read")
        plans.append(earlier.plan if earlier else None)
    versions: list[EarlierPlan | Preregistration] = [*record.history, record]
    for (before, after), new in zip(pairwise([*plans, record.plan]), versions[1:], strict=True):
        changed = f" ({listed(plan_differences(before, after))})" if before and after else ""
        said = f'{changed}; reason given: "{new.amends}"'
        if new.began_before:
            deviations.append(f"the plan was amended at {new.frozen_at}, after the first step of a cell{said}")
        else:
            notes.append(f"The plan was amended at {new.frozen_at}, before the first step of any cell{said}.")
    return deviations, notes


def _changes_of_suite(plan: Plan, suite: SuiteConfig) -> list[str]:
    """Arms, seeds, analysis and diverged rule of suite.yaml that are not the plan's."""
    lines = []
    for word, planned, now in (("arm", plan.arms, suite.arms), ("seed", plan.seeds, suite.seeds)):
        lines += [f"{word} {x} was added to the suite after the plan" for x in now if x not in planned]
        lines += [f"{word} {x} of the plan is not in the suite" for x in planned if x not in now]
    here = {"analysis": suite.analysis.resolved(suite.arms), "diverged": suite.diverged}
    changed = _changes({"analysis": plan.analysis, "diverged": plan.diverged}, here)
    return [*lines, *(f"{key}: {a} in the plan, {b} now" for key, (a, b) in changed.items())]


def _changes(there: Mapping[str, object], here: Mapping[str, object]) -> dict[str, tuple[Any, Any]]:
    return differences(flatten(to_dict(there)), flatten(to_dict(here)))


def _is_early(cell: LoggedCell, record: Preregistration) -> bool:
    """Whether a cell first started before the plan was registered: it has no hash of it, whatever the clocks say of
    those that have. A time that cannot be read is no later one."""
    if cell.manifest.plan:
        return False
    try:
        started = datetime.fromisoformat(str(cell.manifest.started_at))
        return started <= datetime.fromisoformat(record.frozen_at)
    except (ValueError, TypeError):
        return True


def _under_another_plan(record: Preregistration, cells: Mapping[str, LoggedCell]) -> Iterator[_Fault]:
    """Cells that carry another plan's hash or time, or none."""
    kept = {entry.sha256: entry.file for entry in record.history}
    for name, cell in cells.items():
        stamp = cell.manifest.plan or PlanStamp()  # of the first start that logged a step
        sha256, frozen_at = stamp.sha256, stamp.frozen_at
        if sha256 is None:
            yield _Fault(
                "cells that started without a plan in their folder, though later than it was registered", name, "all"
            )
        elif sha256 == record.sha256:  # first: a plan that was amended back has an earlier one's hash
            if frozen_at != record.frozen_at:
                yield _Fault(f"cells that carry another time of registration ({frozen_at})", name)
        elif sha256 in kept:
            yield _Fault(f"cells that started under an earlier plan ({kept[sha256]})", name)
        else:
            yield _Fault(f"cells that carry the hash of another plan ({sha256[:16]})", name, "all")


def _of_another_config(plan: Plan, cells: Mapping[str, LoggedCell]) -> Iterator[_Fault]:
    """Cells outside the plan, of another scientific config, or sampled in another way; with keys."""
    for name, cell in cells.items():
        if name not in plan.cells:
            yield _Fault("cells outside the plan", name)
            continue
        if cell.manifest.config_hash != plan.cells[name]:
            yield _Fault(f"cells trained under another config{_other_keys(plan, name, cell.run)}", name, "all")
        sampled = cell.manifest.generation
        changed = differences(plan.generation, dict(sampled)) if sampled else {}
        # prompts by their hash: a name is not a text
        planned = {*plan.generation, *(k.removeprefix("generation.") for k in neutral_values())}
        changed = {k: pair for k, pair in changed.items() if k in planned and k != "prompts"}
        if changed:
            yield _Fault(f"cells sampled in another way ({listed(changed)})", name, "preference")


def _other_keys(plan: Plan, name: str, run: RunDir) -> str:
    """In brackets, the keys in which a cell's config.yaml is not as planned; "" where none can be named."""
    try:
        config = load_run([run.config])
    except (UserError, OSError):
        return ""
    arm, _, seed = name.partition("/seed-")
    planned = dict.fromkeys(SEED_KEYS, int(seed)) | plan.settings.shared | plan.settings.arms.get(arm, {})
    changed = differences(planned, to_dict(scientific(config)))
    return f" ({listed(changed)})" if changed else ""
