"""Submit cells to SLURM, each once; find their jobs again; take them out of the queue.

OUT/launch/0001-train-seed-1/     one call of sbatch, numbered
    job.sbatch                    what was submitted
    plan.txt                      the cells, one a line: element i of the array works on line i (from 0)
    job.json                      its name, stage and cells, the output folder and who submits
    submitted.json                the job's id; missing where sbatch did not answer
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from replication.config import ClusterConfig
from replication.console import timestamp
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.cells import Cell
from replication.grid.jobs import Job, JobStage, arguments, plain_name, script
from replication.grid.site import Site
from replication.grid.status import read_notes
from replication.runs.files import read_json, read_object, remove_tree, write_json, write_text
from replication.runs.grace_period import lead_seconds_needed
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.locks import hold_lock
from replication.runs.manifest import is_trained

# ---------------------------------------------------------------- what was submitted


@dataclass(frozen=True)
class Submission:
    """One numbered folder of OUT/launch."""

    folder: Path
    name: str  # the job's
    stage: JobStage
    cells: tuple[str, ...]
    job_id: str | None
    user: str = ""  # who submitted it
    out: str | None = None  # the output folder, as the job knows it


def submissions(suite_dir: SuiteDir) -> list[Submission]:
    """Every submission of an output folder, oldest first; where it is a copy of another folder, not that one's."""
    found = []
    for path in _records(suite_dir):
        facts, answer = read_object(path), read_object(path.with_name("submitted.json"))
        if not {"name", "stage", "cells"} <= facts.keys():
            raise UserError(f"{path}: does not say what was submitted; restore it, or remove {path.parent}")
        out, user = facts.get("out"), facts.get("user") or slurm.user_name(path.stat().st_uid)
        there = Path(out or "", "launch", path.parent.name)
        elsewhere = out is not None and there.is_dir() and not suite_dir.root.samefile(out)
        if elsewhere and read_object(there / "submitted.json") == answer:  # else another suite in our old place
            continue
        cells = tuple(facts["cells"])
        found.append(Submission(path.parent, facts["name"], facts["stage"], cells, answer.get("id"), user, out))
    return found


def _records(suite_dir: SuiteDir) -> list[Path]:
    """job.json of every numbered folder; a person's copy under another name is none of them."""
    paths = sorted(suite_dir.launch.glob("*/job.json"))
    return [path for path in paths if re.fullmatch(r"\d+-[\w.-]+", path.parent.name)]


def moved_from(waiting: Sequence[Submission]) -> list[str]:
    """Where jobs look for their output folder and do not find it, because it was moved since."""
    return sorted({s.out for s in waiting if s.out and not Path(s.out, "launch").is_dir()})


def own_jobs(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> Iterator[tuple[slurm.Queued, Submission]]:
    """What is in the queue of an output folder, links of chains included, each with its submission."""
    by_name = {s.name: s for s in earlier}
    for job in queue:
        submission, link_of = by_name.get(job.name), by_name.get(job.name.removesuffix(f".{job.index}"))
        if submission is not None and submission.job_id in (None, job.id.split("_")[0]):
            yield job, submission
        elif submission is None and link_of is not None:
            yield job, link_of


def jobs_of_cells(
    earlier: Sequence[Submission], queue: Sequence[slurm.Queued]
) -> dict[str, dict[JobStage, slurm.Queued]]:
    """What is in the queue for each cell (a folder relative to OUT), by stage; links of chains included."""
    found: dict[str, dict[JobStage, slurm.Queued]] = {}
    for job, submission in own_jobs(earlier, queue):
        if job.index is not None:
            found.setdefault(submission.cells[job.index], {})[submission.stage] = job
    return found


def last_elements(earlier: Sequence[Submission]) -> dict[str, dict[JobStage, tuple[str, Submission]]]:
    """For each cell and stage the element (123_4) of the latest array that worked on it."""
    found: dict[str, dict[JobStage, tuple[str, Submission]]] = {}
    for s in earlier:
        for i, cell in enumerate(s.cells):
            if s.job_id is not None:
                found.setdefault(cell, {})[s.stage] = f"{s.job_id}_{i}", s
    return found


def hidden_jobs(suite_dir: SuiteDir, earlier: Sequence[Submission]) -> list[slurm.Queued]:
    """Where the cluster hides other users' jobs: what may be in the queue of what they submitted, having no end."""
    me, found = slurm.user_name(), []
    if all(s.user in ("", me) for s in earlier) or not slurm.hides_others():
        return []
    for cell, stages in last_elements(earlier).items():
        run = RunDir(suite_dir.root / cell)
        event = (read_notes(run) or [{}])[-1].get("event")
        over = run.complete.is_file() or event in ("ended", "cancelled")
        for stage, (id, s) in stages.items():
            if s.user != me and not over and not (stage == "train" and is_trained(run)):
                why = f"hidden: this cluster shows only {s.user} what became of job {id}"
                found.append(slurm.Queued(id, int(id.split("_")[1]), s.name, slurm.HIDDEN, why, 0, s.user))
    return found


def note_cancelled(suite_dir: SuiteDir, cells: Sequence[str]) -> None:
    """Add to each cell's jobs.jsonl that it was taken out of the queue by us."""
    note = {"event": "cancelled", "at": timestamp()}
    for cell in cells:
        with open(RunDir(suite_dir.root / cell).jobs, "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def still_queued(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> list[Submission]:
    """The submissions of which something is in the queue, links of chains included."""
    found = {submission for _, submission in own_jobs(earlier, queue)}
    return [s for s in earlier if s in found]


def suite_prefix(suite_name: str, suite_dir: SuiteDir) -> str:
    """The beginning of the names of all jobs of an output folder, and of no other folder's."""
    return f"{plain_name(suite_name)}-{hashlib.sha256(str(suite_dir.root.resolve()).encode()).hexdigest()[:6]}"


# ---------------------------------------------------------------- planning


@dataclass(frozen=True)
class Step:
    """A job to submit, and what it waits for: ids of jobs, or positions of earlier steps, which have no id yet."""

    job: Job
    after_end_of: tuple[int | str, ...] = ()
    after_success_of: int | str | None = None  # element by element


def plan_steps(
    prefix: str,
    number: int,
    one: Cell,
    cells: Sequence[Cell],
    trained: Collection[Cell] = (),
    waiting: Sequence[Submission] = (),
    unfollowed: Mapping[Submission, Cell] | None = None,
    behind: bool = False,
) -> list[Step]:
    """Seed block by seed block an array that trains and one that generates, then the report.

    As many blocks side by side as cluster.slurm.concurrent_cells holds whole ones; a block waits for the end of the one
    that many before it, so that an early end leaves whole pairs.

    Args:
        prefix: of the jobs' names.
        number: of the first submission.
        one: any cell of the suite: the report runs where it does.
        cells: to submit, in the plan's order.
        trained: those of them that only lack their completions.
        waiting: the suite's submissions that are in the queue, oldest first.
        unfollowed: those of them that train and whose completions an earlier call did not come to submit; a cell each.
        behind: whether the first blocks wait for training that is in the queue, as those that follow them do.
    """
    steps: list[Step] = []

    def add(stage: JobStage, what: str, folders: Sequence[str], of: Cell, after: str = "", **waits: Any) -> int:
        name = f"{prefix}.{number + len(steps):04d}-{what}"
        steps.append(Step(Job(name, stage, tuple(folders), of.config, after), **waits))
        return len(steps) - 1

    for s, cell in (unfollowed or {}).items():
        add("generate", f"generate-seed-{cell.seed}", s.cells, cell, s.name, after_success_of=s.job_id)
    blocks = _blocks([c for c in cells if c not in trained])
    largest = max((len(block) for block in blocks), default=1)
    earlier: list[tuple[int | str, str]] = []  # (position or id, name) of every array that trains
    if behind:
        earlier += [(s.job_id, s.name) for s in waiting if s.stage == "train" and s.job_id]
    for block in blocks:
        lanes = max(1, block[0].config.cluster.slurm.concurrent_cells // largest)
        before, name = earlier[-lanes] if len(earlier) >= lanes else (None, "")
        ended, folders = () if before is None else (before,), [c.folder for c in block]
        at = add("train", f"train-seed-{block[0].seed}", folders, block[0], name, after_end_of=ended)
        earlier.append((at, steps[at].job.name))
        if block[0].config.generation.prompts:
            add(
                "generate", f"generate-seed-{block[0].seed}", folders, block[0], steps[at].job.name, after_success_of=at
            )
    for block in _blocks(list(trained)):
        add("generate", f"generate-seed-{block[0].seed}", [c.folder for c in block], block[0])
    if steps or (waiting and not any(s.stage == "report" for s in waiting)):
        ids = [s.job_id for s in waiting if s.stage != "report" and s.job_id]
        add("report", "report", (), one, prefix, after_end_of=(*range(len(steps)), *ids))
    return steps


def find_unfollowed(waiting: Sequence[Submission], cells: Sequence[Cell]) -> dict[Submission, Cell]:
    """Submissions that train, whose completions are wanted and not in the queue, each with one of its cells."""
    of = {c.folder: c for c in cells}
    followed = {cell for s in waiting if s.stage == "generate" for cell in s.cells}
    found = {}
    for s in waiting:
        cell = of.get(s.cells[0]) if s.stage == "train" and s.job_id and not followed.intersection(s.cells) else None
        if cell is not None and cell.config.generation.prompts:
            found[s] = cell
    return found


def _blocks(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one seed that ask for the same machine, in the plan's order."""
    blocks: dict[tuple[int, ClusterConfig], list[Cell]] = {}
    for cell in cells:
        blocks.setdefault((cell.seed, cell.config.cluster), []).append(cell)
    return list(blocks.values())


# ---------------------------------------------------------------- submitting


class Submitter:
    """Writes each step's folder, then asks sbatch; or only shows both."""

    def __init__(self, suite_dir: SuiteDir, site: Site, console: Console, dry: bool) -> None:
        self.suite_dir, self.site, self.console, self.dry = suite_dir, site, console, dry
        self.out = suite_dir.root.resolve()

    def submit(self, steps: Sequence[Step]) -> None:
        """Every step in order.

        Raises:
            UserError: sbatch refuses one; those before it stay submitted, and a second call goes on behind them.
        """
        ids: list[str] = []
        for step in steps:
            folder = self.out / "launch" / step.job.name.partition(".")[2]
            at_once = step.job.config.cluster.slurm.concurrent_cells
            text = script(step.job, self.site, folder, at_once)
            given = arguments(step.job, folder, self.out)
            if self.dry:
                ids.append(f"<{folder.name}>")
                self._show(folder, text, step.job.cells, given, _dependency(step, ids))
                continue
            write_text(folder / "job.sbatch", text)
            write_text(folder / "plan.txt", "".join(f"{cell}\n" for cell in step.job.cells))
            facts = {"name": step.job.name, "stage": step.job.stage, "cells": step.job.cells}
            write_json(folder / "job.json", facts | {"out": str(self.out), "user": slurm.user_name()})
            try:
                id = slurm.submit(folder / "job.sbatch", given, _dependency(step, ids))
            except slurm.Refused:
                remove_tree(folder)  # it never was a submission
                raise
            ids.append(id)
            write_json(folder / "submitted.json", {"id": id, "at": timestamp()})
            n = len(step.job.cells)
            self.console.print(f"job {id}: {folder.name}{f', {n} cell(s)' if n else ''}", soft_wrap=True)

    def _show(self, folder: Path, text: str, cells: Sequence[str], given: list[str], depends: list[str]) -> None:
        command = slurm.submit_command(folder / "job.sbatch", given, depends)
        out = self.console
        for title, lines in ((folder / "job.sbatch", text), (folder / "plan.txt", "\n".join(cells))):
            if lines:
                out.print(f"[bold]# {title}[/bold]", soft_wrap=True, highlight=False)
                out.print(lines, soft_wrap=True, highlight=False, markup=False)
        out.print("[bold]# command[/bold]", highlight=False)
        out.print(f"{shlex.join(command)}\n", soft_wrap=True, highlight=False, markup=False)


def _dependency(step: Step, ids: Sequence[str]) -> list[str]:
    """The options of sbatch, with the ids of the steps before it."""

    def id_of(one: int | str) -> str:
        return ids[one] if isinstance(one, int) else one

    conditions = []
    if step.after_success_of is not None:
        conditions += [f"aftercorr:{id_of(step.after_success_of)}"]
    if step.after_end_of:
        conditions += [f"afterany:{':'.join(id_of(one) for one in step.after_end_of)}"]
    return [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"] if conditions else []


@contextmanager
def one_at_a_time(suite_dir: SuiteDir) -> Iterator[None]:
    """Hold the output folder, so that two calls cannot submit the same cell.

    Raises:
        UserError: another call holds it.
    """
    with hold_lock(suite_dir.root, "another process is submitting this suite; wait for it", ".submit.lock"):
        yield


def adopt_unanswered(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> list[Submission]:
    """Settle submissions whose call of sbatch ended without an answer: by name in the queue, or never taken."""
    settled = []
    for submission in earlier:
        id = submission.job_id
        if id is None:
            id = next((q.id.split("_")[0] for q in queue if q.name == submission.name), None)
            if id is not None:
                write_json(submission.folder / "submitted.json", {"id": id, "found_in_queue": True})
        settled.append(replace(submission, job_id=id))
    return settled


def next_number(suite_dir: SuiteDir) -> int:
    """Of the next submission: after all that are there, a copied folder's too."""
    return max((int(p.parent.name.split("-")[0]) for p in _records(suite_dir)), default=0) + 1


def check_lead_time(cells: Sequence[Cell]) -> None:
    """Compare cluster.slurm.lead_seconds, and the time limit, with what cells of this suite took to stop.

    Raises:
        UserError: a measured step and save take longer than the lead; names what would do.
    """
    for cell in cells:
        slurm_config, needed = cell.config.cluster.slurm, lead_seconds_needed(cell.run)
        if needed is not None and needed > slurm_config.lead_seconds:
            raise UserError(
                f"cluster.slurm.lead_seconds: {slurm_config.lead_seconds} is too short, {cell.name} took up to "
                f"{json.dumps(read_json(cell.run.times))} for a step and a save; set at least "
                f"--cluster.slurm.lead_seconds={needed}"
            )
