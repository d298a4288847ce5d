"""Whether a registered plan came before the data, and every deviation from it by name. Reads files, writes none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from replication.config import SEED_KEYS, SuiteConfig, differences, flatten, load_run, scientific, to_dict
from replication.errors import UserError
from replication.protocol.preregistration import (
    EarlierPlan,
    Plan,
    Preregistration,
    listed,
    plan_differences,
    plan_hash,
    read_plan,
)
from replication.runs.files import read_object
from replication.runs.layout import RunDir, SuiteDir, name_cells, spans
from replication.runs.manifest import PlanStamp, find_manifest
from replication.runs.starts import LoggedCell, code_of, has_logged, unlike

State = Literal["none", "before the data", "after the data"]


@dataclass(frozen=True)
class PlanStatus:
    """Whether a plan was registered before the data, and whether it was followed."""

    state: State
    sha256: str | None
    """Of the plan as it was registered."""
    frozen_at: str | None
    deviations: tuple[str, ...]
    """One line each, those of `unfinished` last; empty where there is no plan."""
    unfinished: tuple[str, ...] = ()
    """Of the deviations those that more cells or votes would mend: what is planned and not there."""
    notes: tuple[str, ...] = ()
    """For the reader, and no deviation: an amendment before the first step of any cell."""

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
            return (f"{named}.", *self.notes, "It was followed: no deviation from it was found.")
        if self.deviations == self.unfinished:
            return (f"{named}.", *self.notes, "It is unfinished, and no other deviation from it was found:")
        n = len(self.deviations)
        return (f"{named}.", *self.notes, f"It was not followed in {n} {'point' if n == 1 else 'points'}:")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON as in results.json, `followed` and `sentences` included."""
        plain = to_dict(self)
        plain["departures"] = plain.pop("deviations")  # the key that results.json has always had
        return plain | {"followed": self.followed, "sentences": list(self.sentences)}


def check_plan(
    suite_dir: SuiteDir, suite: SuiteConfig | None = None, votes: Mapping[str, int] | None = None
) -> PlanStatus:
    """Hold a folder against its plan.

    Args:
        suite_dir: the output folder.
        suite: what DIR/suite.yaml says now; none, before the first cell: nothing is compared with it.
        votes: {judge: number of their votes}, all kinds of judges that count; none: votes are not looked at.

    Returns:
        The status. Files that are damaged, or missing, are deviations; nothing is raised for them.
    """
    cells, unreadable = _read_cells(suite_dir)
    try:
        record = read_plan(suite_dir)
    except UserError as error:
        return PlanStatus("none", None, None, (str(error),))
    if record is None:
        gone = _grouped((f"plan.json is gone, whose hash {str(cell.manifest.plan.sha256)[:16]} these cells carry", name)
                        for name, cell in cells.items() if cell.manifest.plan)  # fmt: skip
        return PlanStatus("none", None, None, tuple(gone))
    plan = record.plan
    cells = {name: cell for name, cell in cells.items() if has_logged(cell.run)}
    early = sorted({*record.began_before, *(name for name, cell in cells.items() if _is_early(cell, record))})
    earlier_plans = {entry.sha256 for entry in record.history}
    unplanned = [name for name in early if name not in cells or _stamp(cells[name]).sha256 not in earlier_plans]
    amendments, notes = _amendments(suite_dir, record)
    deviations, now = list[str](), plan_hash(read_object(suite_dir.plan)["plan"])  # an older file lacks later keys
    if now != record.sha256:
        was = record.sha256[:16]
        deviations.append(f"plan.json was edited after it was registered: it hashes to {now[:16]}, then to {was}")
    deviations += amendments
    if unplanned:
        deviations.append(f"cells that started before the plan was registered: {name_cells(unplanned)}")
    if suite is not None:
        deviations += _changes_of_suite(plan, suite)
    deviations += _under_another_plan(record, {n: c for n, c in cells.items() if n not in unplanned})
    deviations += _of_another_config(plan, cells)
    deviations += _not_alike(cells)
    if unreadable:
        deviations.append(f"cells whose manifest.json cannot be read: {name_cells(unreadable)}")
    if votes is not None and len(votes) > plan.analysis.judges:
        deviations.append(f"{len(votes)} judges voted, {plan.analysis.judges} are planned")
    unfinished = tuple(_shortfall(suite_dir, plan, votes))
    return PlanStatus(
        "after the data" if early else "before the data",
        record.sha256,
        record.frozen_at,
        (*deviations, *unfinished),
        unfinished,
        notes=tuple(f"{line[0].upper()}{line[1:]}." for line in notes),
    )


def _grouped(faults: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each fault, with the names of all cells that have it."""
    cells: dict[str, list[str]] = {}
    for fault, name in faults:
        cells.setdefault(fault, []).append(name)
    return [f"{fault}: {name_cells(names)}" for fault, names in cells.items()]


def _amendments(suite_dir: SuiteDir, record: Preregistration) -> tuple[list[str], list[str]]:
    """(deviations, notes): a line for each amendment, which came after the first step of a cell, or before it; and for
    each earlier plan that is lost."""
    kept: list[Plan | None] = []
    for entry in record.history:
        try:
            earlier = read_plan(suite_dir, entry.file)
        except UserError:
            earlier = None
        kept.append(earlier.plan if earlier else None)
    lost = [f"{entry.file} cannot be read" for entry, plan in zip(record.history, kept, strict=True) if plan is None]
    versions: list[tuple[Plan | None, EarlierPlan | Preregistration]]
    versions = [*zip(kept, record.history, strict=True), (record.plan, record)]
    late, early = lost, list[str]()
    for (before, _), (after, new) in pairwise(versions):
        changed = f" ({listed(plan_differences(before, after))})" if before and after else ""
        when = "after the first step of a cell" if new.began_before else "before the first step of any cell"
        line = f'the plan was amended at {new.frozen_at}, {when}{changed}; reason given: "{new.amends}"'
        (late if new.began_before else early).append(line)
    return late, early


def _changes_of_suite(plan: Plan, suite: SuiteConfig) -> list[str]:
    """Arms, seeds, analysis and diverged rule of suite.yaml that are not the plan's."""
    lines = []
    for word, planned, now in (("arm", plan.arms, suite.arms), ("seed", plan.seeds, suite.seeds)):
        lines += [f"{word} {x} was added to the suite after the plan" for x in now if x not in planned]
        lines += [f"{word} {x} of the plan is not in the suite" for x in planned if x not in now]
    here = {"analysis": suite.analysis.resolved(suite.arms), "diverged": suite.diverged}
    there = {"analysis": plan.analysis, "diverged": plan.diverged}
    changed = differences(flatten(to_dict(there)), flatten(to_dict(here)))
    return [*lines, *(f"{key}: {a} in the plan, {b} now" for key, (a, b) in changed.items())]


def _read_cells(suite_dir: SuiteDir) -> tuple[dict[str, LoggedCell], list[str]]:
    """Every cell of the folder that has started, planned or not, by arm/seed-n; and those that cannot be read."""
    cells, unreadable = {}, []
    for arm, seed, run in suite_dir.cells():
        name, manifest = f"{arm}/seed-{seed}", find_manifest(run)
        if manifest is not None:
            cells[name] = LoggedCell(run, manifest)
        elif run.manifest.exists() or has_logged(run):
            unreadable.append(name)
    return cells, unreadable


def _stamp(cell: LoggedCell) -> PlanStamp:
    """Of the first start that logged a step; empty where no plan was registered then."""
    return cell.manifest.plan or PlanStamp()


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


def _under_another_plan(record: Preregistration, cells: Mapping[str, LoggedCell]) -> list[str]:
    kept = {entry.sha256: entry.file for entry in record.history}

    def fault(sha: str | None, at: str | None) -> str:
        if sha is None:
            return "started without a plan in their folder, though later than it was registered"
        if sha in kept:
            return f"started under an earlier plan ({kept[sha]})"
        if sha != record.sha256:
            return f"carry the hash of another plan ({sha[:16]})"
        return "" if at == record.frozen_at else f"carry another time of registration ({at})"

    stamps = {name: _stamp(cell) for name, cell in cells.items()}
    faults = ((fault(stamp.sha256, stamp.frozen_at), name) for name, stamp in stamps.items())
    return _grouped((f"cells that {why}", name) for why, name in faults if why)


def _of_another_config(plan: Plan, cells: Mapping[str, LoggedCell]) -> list[str]:
    """Cells outside the plan, of another scientific config, or sampled in another way; with the keys."""
    faults = []
    for name, cell in cells.items():
        if name not in plan.cells:
            faults.append(("cells outside the plan", name))
            continue
        if cell.manifest.config_hash != plan.cells[name]:
            faults.append((f"cells trained under another config{_other_keys(plan, name, cell.run)}", name))
        sampled = dict(cell.manifest.generation)
        changed = differences(plan.generation, sampled) if sampled else {}
        # prompts by their hash: a name is not a text
        changed = {k: pair for k, pair in changed.items() if k in plan.generation and k != "prompts"}
        if changed:
            faults.append((f"cells sampled in another way ({listed(changed)})", name))
    return _grouped(faults)


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


def _not_alike(cells: Mapping[str, LoggedCell]) -> list[str]:
    """Code, package versions and data in which cells differ, of one seed or of several, or two starts of one cell."""
    code = unlike({name: code_of(cell.manifest) for name, cell in cells.items()})
    hashes = {n: c.manifest.data.hash for n, c in cells.items() if c.manifest.data.hash}
    data = unlike({name: [{"the data's hash": str(hash)[:16]}] for name, hash in hashes.items()})
    return [f"cells {what}: {line}" for what, line in (("ran other code", code), ("on other data", data)) if line]


def _shortfall(suite_dir: SuiteDir, plan: Plan, votes: Mapping[str, int] | None) -> list[str]:
    """Seeds that are not complete in every planned arm; judges and votes that are not as many as planned."""
    lines = []
    lacking = [s for s in plan.seeds if not all(suite_dir.cell(arm, s).complete.is_file() for arm in plan.arms)]
    if lacking:
        lines.append(
            f"{len(plan.seeds) - len(lacking)} of {len(plan.seeds)} planned seeds are complete in every planned arm; "
            f"not: {', '.join(spans(lacking))}"
        )
    judges, votes_each = plan.analysis.judges, plan.analysis.votes_per_judge
    if votes is not None and len(votes) < judges:
        lines.append(f"{len(votes)} of {judges} planned judges voted")
    few = sum(n < votes_each for n in (votes or {}).values())
    if few:
        lines.append(f"{few} of {len(votes or {})} judges gave fewer than {votes_each} votes")
    return lines
