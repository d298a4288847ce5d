"""The analysis plan: what is asked of a suite and how, frozen in DIR/plan.json before its first cell runs.

`freeze` writes it, every start of a cell stamps its manifest with the plan's hash, and `check_plan` says afterwards
whether the plan came before the data and in what it was departed from. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

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
    load_run,
    sampling_settings,
    scientific,
    scientific_hash,
    to_dict,
    without_seeds,
)
from replication.console import timestamp
from replication.data.prompts import find_prompts
from replication.errors import UserError
from replication.protocol.preregistration_text import exclusions, markdown, questions
from replication.runs.files import file_sha256, read_json, write_json, write_text
from replication.runs.layout import RunDir, SuiteDir, name_cells, spans
from replication.runs.provenance import git_state
from replication.runs.starts import code_of, has_logged, logged_cells, read_manifest, unlike

FORMAT = 1

State = Literal["none", "before the data", "after the data"]

# ---------------------------------------------------------------- what a plan says


def build_plan(suite: SuiteConfig, flags: Sequence[str] = (), cluster: Path | None = None) -> dict[str, Any]:
    """Everything that is decided before the data, resolved; plain JSON.

    Args:
        suite: with the seeds that will run.
        flags: the keys that will follow `replicate grid run` or `submit`; they change the cells.
        cluster: the cluster file that will be given there.

    Raises:
        UserError: an analysis key that contradicts the suite, a suite of one arm, or a config that does not load.
    """
    analysis = suite.analysis.check(suite.arms).resolved(suite.arms)
    if analysis.treatment is None:
        raise UserError(f"{suite.name}: has one arm, and a plan compares two; add another to key 'arms'")
    of_arm = {arm: load_cell(suite, arm, suite.seeds[0], flags, cluster) for arm in suite.arms}
    cells = {
        f"{arm}/seed-{seed}": scientific_hash(replace(of_arm[arm], seed=seed))
        for seed in suite.seeds
        for arm in suite.arms
    }
    asked = questions(analysis, suite.arms, len(suite.seeds), _gains(of_arm))
    return {
        "format": FORMAT,
        "suite": suite.name,
        "arms": list(suite.arms),
        "seeds": list(suite.seeds),
        "analysis": to_dict(analysis),
        "diverged": to_dict(suite.diverged),
        "questions": asked,
        "secondary": [question["id"] for question in asked if question["role"] == "secondary"],
        "exclusions": exclusions(analysis, to_dict(suite.diverged)),
        "settings": _settings(of_arm),
        "generation": _generation(of_arm[analysis.treatment]),
        "cells": cells,
        "code": {"version": __version__, "commit": git_state()["commit"]},
    }


def plan_hash(plan: Mapping[str, Any]) -> str:
    """SHA-256 of a plan's canonical JSON, 64 hex digits."""
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _gains(of_arm: Mapping[str, RunConfig]) -> dict[str, tuple[bool, bool]]:
    """Whether token gain and layer gain act in each arm."""
    return {arm: (config.token_gain.enabled, config.layer_gain.enabled) for arm, config in of_arm.items()}


def _settings(of_arm: Mapping[str, RunConfig]) -> dict[str, Any]:
    """The scientific keys but the seeds, those that all arms share once; a seed key that the suite fixes is kept."""
    by_arm = {arm: without_seeds(scientific(config)) for arm, config in of_arm.items()}
    for arm, config in of_arm.items():
        by_arm[arm] |= {k: v for k in SEED_KEYS[1:] if (v := getattr(config, k)) is not None}
    first, *others = by_arm.values()
    shared = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
    return {
        "shared": shared,
        "arms": {arm: {k: v for k, v in keys.items() if k not in shared} for arm, keys in by_arm.items()},
    }


def _generation(config: RunConfig) -> dict[str, Any]:
    """How completions are sampled (no part of a cell's hash), with the hash of the prompts."""
    prompts = config.generation.prompts
    return {
        "prompts": prompts,
        **sampling_settings(config.generation),
        "prompts_sha256": file_sha256(find_prompts(prompts)) if prompts else None,
    }


# ---------------------------------------------------------------- freezing


@dataclass(frozen=True)
class Frozen:
    """What freezing did."""

    record: dict[str, Any]
    """plan.json."""
    is_new: bool
    """False where the same plan was frozen already, and nothing was changed."""


def freeze(
    suite_dir: SuiteDir,
    suite: SuiteConfig,
    flags: Sequence[str] = (),
    cluster: Path | None = None,
    amend: str | None = None,
) -> Frozen:
    """Write DIR/plan.json and DIR/plan.md.

    The same plan twice is frozen once, whatever the code's commit by then; a plan.md that is gone is written again.

    Args:
        suite_dir: the output folder; made where it is not there.
        suite: see build_plan.
        flags: see build_plan.
        cluster: see build_plan.
        amend: why the plan that is there is replaced; it is kept as plan-1.json (the next one as plan-2.json).

    Raises:
        UserError: another plan is there and `amend` is none; or see build_plan.
    """
    plan = build_plan(suite, flags, cluster)
    earlier = read_plan(suite_dir)
    history: list[dict[str, Any]] = []
    if earlier is not None:
        changed = plan_differences(earlier["plan"], plan)
        if not changed:
            _mend_page(suite_dir, earlier)
            return Frozen(earlier, is_new=False)
        if not (amend or "").strip():
            raise UserError(
                f"{suite_dir.plan}: another plan is frozen ({_listed(changed)}); keep to it, or give the reason: "
                '`replicate plan freeze ... --amend "why"`, which the report will quote'
            )
        history = _put_aside(suite_dir, earlier)
    record = {
        "plan": plan,
        "sha256": plan_hash(plan),
        "frozen_at": timestamp(),
        "git": git_state(),
        "began_before": begun_cells(suite_dir),
        "amends": (amend or "").strip() or None if history else None,
        "history": history,
    }
    write_json(suite_dir.plan, record)  # first: a folder with a page and no plan is somebody else's
    write_text(suite_dir.plan_md, markdown(record))
    return Frozen(record, is_new=True)


def _mend_page(suite_dir: SuiteDir, record: Mapping[str, Any]) -> None:
    """Write plan.md where it is missing or of another plan: a freeze may end between its two files."""
    page = suite_dir.plan_md
    if not page.is_file() or record["sha256"] not in page.read_text(encoding="utf-8", errors="replace"):
        write_text(page, markdown(record))


def plan_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two plans differ; what follows from others (the words, the cells' hashes) only where no
    other key does, and the code's commit never: another commit is no other plan."""
    follows = ("questions", "exclusions", "secondary", "cells.", "code.")
    changed = differences(*(flatten({**plan, "analysis": _analysis(plan)}) for plan in (a, b)))
    changed = {k: v for k, v in changed.items() if not k.startswith("code.")}
    causes = {k: v for k, v in changed.items() if not k.startswith(follows)}
    return causes or changed


def _analysis(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's section of that name; keys that came later than the plan have their defaults."""
    section = plan.get("analysis")
    return to_dict(AnalysisConfig()) | (section if isinstance(section, dict) else {})


def unplanned_cells(record: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """Of the cells that are about to run, {arm/seed-n: config hash}, those that the plan has not, or has otherwise."""
    return [name for name, hash in hashes.items() if record["plan"]["cells"].get(name) != hash]


def begun_cells(suite_dir: SuiteDir) -> list[str]:
    """Cells of a folder that have logged a step, as arm/seed-n."""
    return list(logged_cells(suite_dir.runs))


def _put_aside(suite_dir: SuiteDir, earlier: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep a plan that is being replaced under the next free number; the whole history, oldest first."""
    number = len(earlier["history"]) + 1
    kept = suite_dir.plan.with_name(f"plan-{number}.json")
    write_json(kept, earlier)
    entry = {"file": kept.name, **{k: earlier[k] for k in ("sha256", "frozen_at", "began_before", "amends")}}
    return [*earlier["history"], entry]


def _listed(changed: Mapping[str, tuple[Any, Any]], most: int = 5) -> str:
    shown = [f"{k}: {a} -> {b}" for k, (a, b) in list(changed.items())[:most]]
    return "; ".join([*shown, *([f"and {len(changed) - most} more"] if len(changed) > most else [])])


# ---------------------------------------------------------------- reading


def read_plan(suite_dir: SuiteDir) -> dict[str, Any] | None:
    """DIR/plan.json, or None where no plan is frozen.

    Raises:
        UserError: the file is not one that `freeze` writes.
    """
    record = read_json(suite_dir.plan)
    if record is None:
        return None
    if not _has_form(record, RECORD_FORM):
        raise UserError(f"{suite_dir.plan}: is no frozen plan; restore it, or remove it and freeze again")
    return dict(record)


OF_A_FREEZE: dict[Any, Any] = {"sha256": str, "frozen_at": str, "began_before": [str], "amends": str | None}
PLAN_FORM: dict[Any, Any] = {
    "suite": str,
    "arms": [str],
    "seeds": [int],
    "analysis": {
        "baseline": str,
        "treatment": str,
        "alpha": int | float,
        "judges": int,
        "votes_per_judge": int,
    },
    "diverged": dict,
    "questions": [{"id": str, "role": str, "question": str, "test": str, "beside": [str]}],
    "secondary": [str],
    "exclusions": [str],
    "settings": {"shared": dict, "arms": {str: dict}},
    "generation": dict,
    "cells": {str: str},
    "code": {"version": str},
}
RECORD_FORM: dict[Any, Any] = {
    **OF_A_FREEZE,
    "plan": PLAN_FORM,
    "git": {"commit": str | None, "dirty": bool | None},
    "history": [{"file": str, **OF_A_FREEZE}],
}
"""What is read of plan.json: [form] is a list of them, {str: form} an object of them under any names."""


def _has_form(value: Any, form: Any) -> bool:
    """Whether parsed JSON has everything that a form names, each of its type; more is allowed."""
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return isinstance(value, form)
    if not isinstance(value, dict):
        return False
    if str in form:
        return all(_has_form(item, form[str]) for item in value.values())
    return all(key in value and _has_form(value[key], kind) for key, kind in form.items())


def plan_stamp(run: RunDir) -> dict[str, str] | None:
    """What a cell's manifest says of the plan at a start: {"sha256", "frozen_at"} of its output folder's plan.

    None where no plan is frozen, or the cell lies in no output folder.
    """
    if run.root.parent.parent.name != "runs":
        return None
    record = read_plan(SuiteDir(run.root.parent.parent.parent))
    return None if record is None else {k: record[k] for k in ("sha256", "frozen_at")}


def first_stamp(run: RunDir, earlier: Mapping[str, Any], stamp: Mapping[str, str] | None) -> dict[str, Any]:
    """What a cell's manifest says at its top of the plan, at every start: that of the first start that logged a step.

    Before a step is logged there are no data, and a plan is in time; one that is frozen after it came too late.

    Args:
        run: the cell.
        earlier: its manifest so far; empty at the first start.
        stamp: `plan_stamp` now.

    Returns:
        {"plan", "logged_before": whether a start before this one logged a step; it stays, where the journal begins
        anew for want of a checkpoint}.
    """
    logged = has_logged(run)
    return {"plan": earlier.get("plan") if logged else stamp, "logged_before": logged}


# ---------------------------------------------------------------- was it followed?


@dataclass(frozen=True)
class PlanStatus:
    """Whether a plan was frozen before the data, and whether it was followed."""

    state: State
    sha256: str | None
    """Of the plan as it was frozen."""
    frozen_at: str | None
    departures: tuple[str, ...]
    """One line each, those of `unfinished` last; empty where there is no plan."""
    unfinished: tuple[str, ...] = ()
    """Of the departures those that more cells or votes would mend: what is planned and not there."""
    notes: tuple[str, ...] = ()
    """What a reader should know and is no departure: an amendment before the first step of any cell."""

    @property
    def followed(self) -> bool:
        """Whether there is a plan, of before the data, and no departure from it."""
        return self.state == "before the data" and not self.departures

    @property
    def sentences(self) -> tuple[str, ...]:
        """The first lines of a report; the departures are to follow them, a line each."""
        if self.state == "none":
            return ("There is no analysis plan of before the data: every result here is exploratory.",)
        named = f"The analysis plan {(self.sha256 or '')[:16]} was frozen at {self.frozen_at}, {self.state}"
        if self.state == "after the data":
            named += ", so it makes no result confirmatory"
        if not self.departures:
            return (f"{named}.", *self.notes, "It was followed: no departure from it was found.")
        if self.departures == self.unfinished:
            return (f"{named}.", *self.notes, "It is unfinished, and no other departure from it was found:")
        n = len(self.departures)
        return (f"{named}.", *self.notes, f"It was not followed in {n} {'point' if n == 1 else 'points'}:")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, `followed` and `sentences` included."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain | {"followed": self.followed, "sentences": list(self.sentences)}


def check_plan(
    suite_dir: SuiteDir, suite: SuiteConfig | None = None, votes: Mapping[str, int] | None = None
) -> PlanStatus:
    """Hold a folder against its plan; reads files, writes none.

    Args:
        suite_dir: the output folder.
        suite: what DIR/suite.yaml says now; none, before the first cell: nothing is compared with it.
        votes: {judge: number of their votes}, all kinds of judges that count; none: votes are not looked at.

    Returns:
        The status. Files that are damaged, or missing, are departures; nothing is raised for them.
    """
    cells, unreadable = _read_cells(suite_dir)
    try:
        record = read_plan(suite_dir)
    except UserError as error:
        return PlanStatus("none", None, None, (str(error),))
    if record is None:
        return PlanStatus("none", None, None, tuple(_plan_is_gone(cells)))
    plan = record["plan"]
    cells = {name: cell for name, cell in cells.items() if has_logged(cell.run)}
    early = sorted({*record["began_before"], *(name for name, cell in cells.items() if _is_early(cell, record))})
    unplanned = [name for name in early if not _has_earlier_plan(cells.get(name), record)]
    departures = [*_edits(record), *_lost_plans(suite_dir, record), *_amendments(suite_dir, record, early=True)]
    if unplanned:
        departures.append(f"cells that started before the plan was frozen: {name_cells(unplanned)}")
    if suite is not None:
        departures += _changes_of_suite(plan, suite)
    departures += _cells_under_another_plan(record, {n: c for n, c in cells.items() if n not in unplanned})
    departures += _cells_of_another_config(plan, cells)
    departures += _cells_not_alike(cells)
    if unreadable:
        departures.append(f"cells whose manifest.json cannot be read: {name_cells(unreadable)}")
    unfinished = _shortfall(suite_dir, plan, votes)
    if votes is not None and len(votes) > plan["analysis"]["judges"]:
        departures.append(f"{len(votes)} judges voted, {plan['analysis']['judges']} are planned")
    state: State = "after the data" if early else "before the data"
    notes = tuple(f"{line[0].upper()}{line[1:]}." for line in _amendments(suite_dir, record, early=False))
    return PlanStatus(
        state, record["sha256"], record["frozen_at"], (*departures, *unfinished), tuple(unfinished), notes
    )


# ---------------------------------------------------------------- the plan itself


def _edits(record: Mapping[str, Any]) -> list[str]:
    now = plan_hash(record["plan"])
    if now == record["sha256"]:
        return []
    return [f"plan.json was edited after it was frozen: it hashes to {now[:16]}, frozen was {record['sha256'][:16]}"]


def _amendments(suite_dir: SuiteDir, record: Mapping[str, Any], early: bool) -> list[str]:
    """A line for each amendment; early chooses those that came after the first step of a cell, or else before it."""
    lines = []
    versions = [*record["history"], record]
    for old, new in pairwise(versions):
        if bool(new["began_before"]) != early:
            continue
        before, after = ((v.get("plan") or _kept_plan(suite_dir, v["file"])) for v in (old, new))
        changed = f" ({_listed(plan_differences(before, after))})" if before and after else ""
        when = "after the first step of a cell" if early else "before the first step of any cell"
        reason = f'reason given: "{new["amends"]}"'
        lines.append(f"the plan was amended at {new['frozen_at']}, {when}{changed}; {reason}")
    return lines


def _lost_plans(suite_dir: SuiteDir, record: Mapping[str, Any]) -> list[str]:
    files = [entry["file"] for entry in record["history"]]
    return [f"{name} cannot be read" for name in files if _kept_plan(suite_dir, name) is None]


def _kept_plan(suite_dir: SuiteDir, name: str) -> dict[str, Any] | None:
    """The plan that an amendment put aside; None where its file is missing or cannot be read."""
    try:
        kept = read_json(suite_dir.root / name)
    except (UserError, OSError):
        return None
    return kept["plan"] if isinstance(kept, dict) and isinstance(kept.get("plan"), dict) else None


def _changes_of_suite(plan: Mapping[str, Any], suite: SuiteConfig) -> list[str]:
    """Arms, seeds, analysis and diverged rule of suite.yaml that are not the plan's."""
    lines = []
    for word, planned, now in (("arm", plan["arms"], suite.arms), ("seed", plan["seeds"], suite.seeds)):
        lines += [f"{word} {x} was added to the suite after the plan" for x in now if x not in planned]
        lines += [f"{word} {x} of the plan is not in the suite" for x in planned if x not in now]
    here = {
        "analysis": to_dict(suite.analysis.resolved(suite.arms)),
        "diverged": to_dict(suite.diverged),
    }
    there = {"analysis": _analysis(plan), "diverged": to_dict(DivergedRule()) | plan["diverged"]}
    lines += [f"{key}: {a} in the plan, {b} now" for key, (a, b) in differences(flatten(there), flatten(here)).items()]
    return lines


# ---------------------------------------------------------------- the cells


@dataclass(frozen=True)
class _Cell:
    """What a cell that has a manifest says of itself."""

    run: RunDir
    manifest: dict[str, Any]

    @property
    def stamp(self) -> dict[str, Any]:
        """Of the first start that logged a step; empty where no plan was frozen then."""
        stamp = self.manifest.get("plan")
        return stamp if isinstance(stamp, dict) else {}


def _read_cells(suite_dir: SuiteDir) -> tuple[dict[str, _Cell], list[str]]:
    """Every cell of the folder that has started, planned or not, by arm/seed-n; and those that cannot be read."""
    cells, unreadable = {}, []
    for arm, seed, run in suite_dir.cells():
        name, manifest = f"{arm}/seed-{seed}", read_manifest(run)
        if manifest is not None:
            cells[name] = _Cell(run, manifest)
        elif run.manifest.exists() or has_logged(run):
            unreadable.append(name)
    return cells, unreadable


def _plan_is_gone(cells: Mapping[str, _Cell]) -> list[str]:
    """A line for each plan that cells carry the hash of, where none is in the folder."""
    carried: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if cell.stamp:
            carried.setdefault(str(cell.stamp.get("sha256"))[:16], []).append(name)
    return [f"plan.json is gone, whose hash {sha} these cells carry: {name_cells(n)}" for sha, n in carried.items()]


def _has_earlier_plan(cell: _Cell | None, record: Mapping[str, Any]) -> bool:
    """Whether a cell first started under a plan that was amended since."""
    return cell is not None and cell.stamp.get("sha256") in [entry["sha256"] for entry in record["history"]]


def _is_early(cell: _Cell, record: Mapping[str, Any]) -> bool:
    """Whether a cell's first start was before the freeze: it has no hash of it, whatever the clocks say of those that
    have."""
    return not cell.stamp and not _is_later(cell.manifest.get("started_at"), record["frozen_at"])


def _is_later(time: Any, other: str) -> bool:
    """Whether one written time is after another; False where one of them cannot be read."""
    try:
        return datetime.fromisoformat(str(time)) > datetime.fromisoformat(other)
    except (ValueError, TypeError):
        return False


def _cells_under_another_plan(record: Mapping[str, Any], cells: Mapping[str, _Cell]) -> list[str]:
    kept = {entry["sha256"]: entry["file"] for entry in record["history"]}
    faults: dict[str, list[str]] = {}
    for name, cell in cells.items():
        sha, at = cell.stamp.get("sha256"), cell.stamp.get("frozen_at")
        if sha is None:
            why = "started without a plan in their folder, though later than the freeze"
        elif sha in kept and sha != record["sha256"]:
            why = f"started under an earlier plan ({kept[sha]})"
        elif sha != record["sha256"]:
            why = f"carry the hash of another plan ({str(sha)[:16]})"
        elif at != record["frozen_at"]:
            why = f"carry another time of freezing ({at})"
        else:
            continue
        faults.setdefault(why, []).append(name)
    return [f"cells that {why}: {name_cells(names)}" for why, names in faults.items()]


def _cells_of_another_config(plan: Mapping[str, Any], cells: Mapping[str, _Cell]) -> list[str]:
    """Cells outside the plan, of another scientific config, or sampled in another way; with the keys."""
    faults: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if name not in plan["cells"]:
            faults.setdefault("cells outside the plan", []).append(name)
            continue
        if cell.manifest.get("config_hash") != plan["cells"][name]:
            keys = _other_keys(plan, name, cell.run)
            faults.setdefault(f"cells trained under another config{keys}", []).append(name)
        changed = _other_sampling(plan["generation"], cell.manifest.get("generation"))
        if changed:
            faults.setdefault(f"cells sampled in another way ({_listed(changed)})", []).append(name)
    return [f"{what}: {name_cells(names)}" for what, names in faults.items()]


def _cells_not_alike(cells: Mapping[str, _Cell]) -> list[str]:
    """Code, package versions and data in which cells differ, of one seed or of several, or two starts of one cell."""
    code = unlike({name: code_of(cell.manifest) for name, cell in cells.items()})
    hashes = {n: data.get("hash") for n, c in cells.items() if isinstance(data := c.manifest.get("data"), dict)}
    data = unlike({name: [{"the data's hash": str(hash)[:16]}] for name, hash in hashes.items()})
    return [f"cells {what}: {line}" for what, line in (("ran other code", code), ("on other data", data)) if line]


def _other_sampling(planned: Mapping[str, Any], done: Any) -> dict[str, tuple[Any, Any]]:
    """In which keys completions were sampled otherwise; prompts by their hash: a name is not a text."""
    if not isinstance(done, dict):
        return {}
    return {k: pair for k, pair in differences(dict(planned), done).items() if k in planned and k != "prompts"}


def _other_keys(plan: Mapping[str, Any], name: str, run: RunDir) -> str:
    """In brackets, the keys in which a cell's config.yaml is not as planned; "" where none can be named."""
    try:
        config = load_run([run.config])
    except (UserError, OSError):
        return ""
    arm, _, seed = name.partition("/seed-")
    planned = plan["settings"]["shared"] | plan["settings"]["arms"].get(arm, {})
    planned = {k: int(seed) for k in SEED_KEYS} | planned
    changed = differences(planned, json.loads(json.dumps(scientific(config))))
    return f" ({_listed(changed)})" if changed else ""


# ---------------------------------------------------------------- how much there is


def _shortfall(suite_dir: SuiteDir, plan: Mapping[str, Any], votes: Mapping[str, int] | None) -> list[str]:
    """Seeds that are not complete in every planned arm; judges and votes that are not as many as planned."""
    lines = []
    seeds, analysis = plan["seeds"], plan["analysis"]
    lacking = [s for s in seeds if not all(suite_dir.cell(arm, s).complete.is_file() for arm in plan["arms"])]
    if lacking:
        lines.append(
            f"{len(seeds) - len(lacking)} of {len(seeds)} planned seeds are complete in every planned arm; "
            f"not: {', '.join(spans(lacking))}"
        )
    if votes is not None:
        if len(votes) < analysis["judges"]:
            lines.append(f"{len(votes)} of {analysis['judges']} planned judges voted")
        few = sum(n < analysis["votes_per_judge"] for n in votes.values())
        if few:
            lines.append(f"{few} of {len(votes)} judges gave fewer than {analysis['votes_per_judge']} votes")
    return lines
