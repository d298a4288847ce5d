"""Submit cells to SLURM, each once; find their jobs again; take them out of the queue.

OUT/launch/0001-train-seed-1/     one call of sbatch, numbered
    job.sbatch                    what was submitted
    plan.txt                      the cells, one a line: element i of the array works on line i (from 0)
    submitted.json                the job's id; missing where sbatch did not answer
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from replication.errors import UserError
from replication.grid import slurm
from replication.grid.jobs import Job, JobStage, arguments, plain_name, script
from replication.grid.plan import Cell
from replication.grid.site import Site
from replication.rundir import RunDir, SuiteDir, lead_seconds_needed, read_json, remove_tree, write_json, write_text

# ---------------------------------------------------------------- what was submitted


@dataclass(frozen=True)
class Submission:
    """One numbered folder of OUT/launch."""

    folder: Path
    name: str  # the job's
    stage: JobStage
    cells: tuple[str, ...]
    job_id: str | None


def submissions(suite_dir: SuiteDir) -> list[Submission]:
    """Every submission of an output folder, oldest first."""
    found = []
    for path in sorted(suite_dir.launch.glob("*/job.json")):
        facts, answer = read_json(path), read_json(path.with_name("submitted.json")) or {}
        found.append(Submission(path.parent, facts["name"], facts["stage"], tuple(facts["cells"]), answer.get("id")))
    return found


def jobs_of_cells(
    earlier: Sequence[Submission], queue: Sequence[slurm.Queued]
) -> dict[str, dict[JobStage, slurm.Queued]]:
    """What is in the queue for each cell (a folder relative to OUT), by stage; links of chains included."""
    by_name = {s.name: s for s in earlier}
    found: dict[str, dict[JobStage, slurm.Queued]] = {}
    for job in queue:
        submission = by_name.get(job.name) or by_name.get(job.name.removesuffix(f".{job.index}"))
        if submission is not None and job.index is not None:
            found.setdefault(submission.cells[job.index], {})[submission.stage] = job
    return found


def last_elements(earlier: Sequence[Submission]) -> dict[str, str]:
    """For each cell the element (123_4) of the latest array that trains it."""
    trains = [s for s in earlier if s.stage == "train" and s.job_id is not None]
    return {cell: f"{s.job_id}_{i}" for s in trains for i, cell in enumerate(s.cells)}


def note_cancelled(suite_dir: SuiteDir, cells: Sequence[str]) -> None:
    """Add to each cell's jobs.jsonl that it was taken out of the queue by us."""
    note = {"event": "cancelled", "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    for cell in cells:
        with open(RunDir(suite_dir.root / cell).jobs, "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def suite_prefix(suite_name: str, suite_dir: SuiteDir) -> str:
    """The beginning of the names of all jobs of an output folder, and of no other folder's."""
    return f"{plain_name(suite_name)}-{hashlib.sha256(str(suite_dir.root.resolve()).encode()).hexdigest()[:6]}"


# ---------------------------------------------------------------- planning


@dataclass(frozen=True)
class Step:
    """A job to submit, and the earlier steps whose end or success it waits for."""

    job: Job
    after_end_of: tuple[int, ...] = ()  # positions in the list of steps
    after_success_of: tuple[int, ...] = ()  # element by element
    after_ids: tuple[str, ...] = ()  # jobs that are in the queue already


def plan_steps(
    prefix: str, number: int, cells: Sequence[Cell], untrained: Sequence[Cell], queued: Sequence[slurm.Queued]
) -> list[Step]:
    """Seed block by seed block an array that trains and one that generates, then the report.

    As many blocks side by side as cluster.slurm.concurrent_cells holds whole ones; a block waits for the end of the one
    that many before it, so that an early end leaves whole pairs.

    Args:
        prefix: of the jobs' names.
        number: of the first submission.
        cells: to submit, in the plan's order.
        untrained: those of them that must be trained first.
        queued: the suite's jobs that are in the queue.
    """
    steps: list[Step] = []
    trained_at: list[int] = []  # positions of the arrays that train
    suite_jobs = ("REPLICATION_SUITE_JOBS", prefix)

    def name(what: str) -> str:
        return f"{prefix}.{number + len(steps):04d}-{what}"

    for seed in dict.fromkeys(cell.seed for cell in cells):
        block = [c for c in cells if c.seed == seed]
        train = tuple(c.folder for c in block if c in untrained)
        trained = tuple(c.folder for c in block if c not in untrained)
        lanes = max(1, block[0].config.cluster.slurm.concurrent_cells // len(block))
        if train:
            behind = tuple(trained_at[-lanes:][:1]) if len(trained_at) >= lanes else ()
            trained_at.append(len(steps))
            steps.append(Step(Job(name(f"train-seed-{seed}"), "train", train, block[0].config), after_end_of=behind))
            if block[0].config.generation.prompts:
                setting = (("REPLICATION_TRAIN_JOB", steps[-1].job.name),)
                job = Job(name(f"generate-seed-{seed}"), "generate", train, block[0].config, setting)
                steps.append(Step(job, after_success_of=(len(steps) - 1,)))
        if trained:
            steps.append(Step(Job(name(f"generate-seed-{seed}-trained"), "generate", trained, block[0].config)))
    if steps:
        everything = tuple(range(len(steps)))
        job = Job(name("report"), "report", (), steps[0].job.config, (suite_jobs,))
        steps.append(Step(job, after_end_of=everything, after_ids=tuple(dict.fromkeys(_whole(q.id) for q in queued))))
    return steps


def _whole(id: str) -> str:
    """The job of an element."""
    return id.split("_")[0]


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
            write_json(folder / "job.json", facts)
            try:
                id = slurm.submit(folder / "job.sbatch", given, _dependency(step, ids))
            except UserError:
                remove_tree(folder)  # refused: it never was a submission
                raise
            ids.append(id)
            write_json(folder / "submitted.json", {"id": id, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
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
    conditions = []
    if step.after_success_of:
        conditions += [f"aftercorr:{':'.join(ids[i] for i in step.after_success_of)}"]
    ended = [*(ids[i] for i in step.after_end_of), *step.after_ids]
    if ended:
        conditions += [f"afterany:{':'.join(ended)}"]
    return [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"] if conditions else []


@contextmanager
def one_at_a_time(suite_dir: SuiteDir) -> Iterator[None]:
    """Hold the output folder, so that two calls cannot submit the same cell.

    Raises:
        UserError: another call holds it.
    """
    suite_dir.root.mkdir(parents=True, exist_ok=True)
    with open(suite_dir.root / ".submit.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{suite_dir.root}: another process is submitting this suite; wait for it") from None
        yield


def adopt_unanswered(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> list[Submission]:
    """Settle submissions whose call of sbatch ended without an answer: by name in the queue, or never taken."""
    settled = []
    for submission in earlier:
        id = submission.job_id
        if id is None:
            id = next((_whole(q.id) for q in queue if q.name == submission.name), None)
            if id is not None:
                write_json(submission.folder / "submitted.json", {"id": id, "found_in_queue": True})
        settled.append(Submission(submission.folder, submission.name, submission.stage, submission.cells, id))
    return settled


def next_number(earlier: Sequence[Submission]) -> int:
    return max((int(s.folder.name.split("-")[0]) for s in earlier), default=0) + 1


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
                f"{json.dumps(read_json(cell.run.times))} for a step and a save; set at least {needed}"
            )
