"""Submit cells to SLURM, each once: seed blocks that train, then generate, then the report."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from replication.config import ClusterConfig
from replication.console import say, timestamp
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.cells import Cell, claim_folder
from replication.grid.jobs import Job, JobStage, arguments, check_accelerator, plain_name, script
from replication.grid.ready import Grid, make_ready, tell_before
from replication.grid.site import Site
from replication.grid.status import RETRIED, STYLE, statuses
from replication.grid.submissions import (
    Submission,
    adopt_unanswered,
    jobs_of_cells,
    next_number,
    queue_of,
    still_queued,
    submissions,
)
from replication.processes.preemption import grace_seconds_needed
from replication.runs.files import hold_lock, read_json, remove_tree, write_json, write_text
from replication.runs.layout import SuiteDir, name_cells
from replication.runs.manifest import is_trained
from replication.runs.starts import LoggedCell


def submit_cells(grid: Grid, site: Site, console: Console, dry: bool = False, again: bool = False) -> None:
    """Submit the cells that are neither queued, running, complete nor failed, each with what follows it.

    Args:
        grid: the suite.
        site: the site file's.
        console: for what is done, or would be.
        dry: print every script and command, write and submit nothing.
        again: the failed, preempted, interrupted and cancelled cells instead, and none waits for training that is in
            the queue.

    Raises:
        UserError: no scheduler, or it refuses a job; a cell that cannot run; another call that submits.
    """
    if not dry:
        slurm.queue()  # before anything is written: raises where there is no scheduler
    with nullcontext() if dry else one_at_a_time(grid.dir):
        begun: dict[str, LoggedCell] = {}
        if not dry:
            begun = claim_folder(grid.suite, grid.dir, grid.cells)
            tell_before(grid, begun, console)
        steps = _steps(grid, begun, console, dry, again)
        submit_steps(steps, grid.dir, site, console, dry)
    if not steps:
        say(console, "nothing to submit")


@contextmanager
def one_at_a_time(suite_dir: SuiteDir) -> Iterator[None]:
    """Hold the output folder, so that two calls cannot submit the same cell.

    Raises:
        UserError: another call holds it.
    """
    with hold_lock(suite_dir.root, "another process is submitting this suite; wait for it", ".submit.lock"):
        yield


def _steps(grid: Grid, begun: Mapping[str, LoggedCell], console: Console, dry: bool, again: bool) -> list[Step]:
    """The jobs to submit; unless this is a dry run, their cells are ready to run when this returns."""
    earlier, queue = submissions(grid.dir), queue_of(grid.dir, console, needed=not dry) or []
    if not dry:
        earlier = adopt_unanswered(earlier, queue)
    states = {row.name: row.state for row in statuses(grid.suite.diverged, grid.cells, earlier, queue)}
    taken, jobs = (*RETRIED, "trained") if again else ("pending", "trained"), jobs_of_cells(earlier, queue)
    wanted = [c for c in grid.cells if states[c.name] in taken and c.folder not in jobs]
    for state in STYLE:
        names = [c.name for c in grid.cells if c not in wanted and states[c.name] == state]
        hint = "; `replicate grid retry` submits it again" if state in RETRIED else ""
        if names:
            say(console, f"{name_cells(names)}: {state}, left as it is{hint}")
    check_accelerator([c.config for c in wanted])
    check_grace_period(wanted)
    if not dry:
        make_ready(grid, wanted, begun, console)
        for cell in wanted:  # what it failed of before says nothing of what is submitted now
            cell.run.failed.unlink(missing_ok=True)
    waiting = still_queued(earlier, queue)
    return plan_steps(
        suite_prefix(grid.suite.name, grid.dir),
        next_number(grid.dir),
        grid.cells[0],
        wanted,
        trained=[c for c in wanted if is_trained(c.run)],
        waiting=waiting,
        unfollowed=find_unfollowed(waiting, grid.cells),
        behind=not again,
    )


def check_grace_period(cells: Sequence[Cell]) -> None:
    """Compare the grace period, cluster.slurm.lead_seconds, with what cells of this suite took to stop.

    Raises:
        UserError: a measured step and save take longer; names what would do.
    """
    for cell in cells:
        given, needed = cell.config.cluster.slurm.lead_seconds, grace_seconds_needed(cell.run)
        if needed is not None and needed > given:
            raise UserError(
                f"cluster.slurm.lead_seconds: {given} is too short, {cell.name} took up to "
                f"{json.dumps(read_json(cell.run.times))} for a step and a save; set at least "
                f"--cluster.slurm.lead_seconds={needed}"
            )


# ---------------------------------------------------------------- the jobs, and what each waits for


def suite_prefix(suite_name: str, suite_dir: SuiteDir) -> str:
    """The beginning of the names of all jobs of an output folder, and of no other folder's."""
    return f"{plain_name(suite_name)}-{hashlib.sha256(str(suite_dir.root.resolve()).encode()).hexdigest()[:6]}"


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


def submit_steps(steps: Sequence[Step], suite_dir: SuiteDir, site: Site, console: Console, dry: bool) -> None:
    """Write each step's folder, then ask sbatch, in order; or only show both.

    Raises:
        UserError: sbatch refuses one; those before it stay submitted, and a second call goes on behind them.
    """
    ids: list[str] = []
    out = suite_dir.root.resolve()
    for step in steps:
        job, folder = step.job, out / "launch" / step.job.name.partition(".")[2]
        text = script(job, site, folder, job.config.cluster.slurm.concurrent_cells)
        cells = "".join(f"{cell}\n" for cell in job.cells)
        given, waits = arguments(job, folder, out), _dependency(step, ids)
        if dry:
            ids.append(f"<{folder.name}>")
            command = shlex.join(slurm.submit_command(folder / "job.sbatch", given, waits))
            for title, shown in (
                (folder / "job.sbatch", text),
                (folder / "plan.txt", cells[:-1]),
                ("command", command),
            ):
                if shown:
                    say(console, f"# {title}", style="bold")
                    say(console, shown)
            say(console, "")
            continue
        write_text(folder / "job.sbatch", text)
        write_text(folder / "plan.txt", cells)
        facts = {"name": job.name, "stage": job.stage, "cells": job.cells}
        write_json(folder / "job.json", facts | {"out": str(out), "user": slurm.user_name()})
        try:
            id = slurm.submit(folder / "job.sbatch", given, waits)
        except slurm.Refused:
            remove_tree(folder)  # it never was a submission
            raise
        ids.append(id)
        write_json(folder / "submitted.json", {"id": id, "at": timestamp()})
        n = len(job.cells)
        say(console, f"job {id}: {folder.name}{f', {n} cell(s)' if n else ''}")


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
