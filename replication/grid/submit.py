"""Submit cells to SLURM, each once: seed blocks that train, then generate, then the report; and the scripts they run.

A script is a header from the cluster and site files, then a script of launch/, word for word.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from replication.config import ClusterConfig, RunConfig
from replication.console import say, timestamp
from replication.errors import SHIPPED, UserError
from replication.grid import slurm
from replication.grid.cells import Cell, Grid, claim_folder, make_ready, tell_before
from replication.grid.slurm import Site
from replication.grid.status import RETRIED, STYLE, statuses
from replication.grid.submissions import (
    JobStage,
    Submission,
    adopt_unanswered,
    jobs_of_cells,
    next_number,
    queue_of,
    still_queued,
    submissions,
)
from replication.processes.preemption import grace_seconds_needed
from replication.runs.failures import clear_failure
from replication.runs.files import hold_lock, read_json, remove_tree, write_json, write_text
from replication.runs.layout import SuiteDir, name_cells
from replication.runs.manifest import is_trained
from replication.runs.starts import LoggedCell

REPORT_MINUTES = 60  # time limit of the report, where the cells' own is not shorter


@dataclass(frozen=True)
class Job:
    """One call of sbatch: an array with one element a cell, or the report; and what it waits for.

    That is ids of jobs, or positions of earlier ones in the plan, which have no id yet.
    """

    name: str
    stage: JobStage
    cells: tuple[str, ...]  # folders relative to the output folder, in the order of the array
    config: RunConfig  # of one of the cells, which share their cluster section
    after: str = ""  # name, or beginning of names, of jobs whose chains it waits for as well
    after_end_of: tuple[int | str, ...] = ()
    after_success_of: int | str | None = None  # element by element


def submit_cells(grid: Grid, site: Site, console: Console, dry: bool = False, again: bool = False) -> None:
    """Submit the cells that are neither queued, running, complete nor failed, each with what follows it.

    If dry, every script and command is printed, and nothing is written or submitted. If again, it is the failed,
    preempted, interrupted and cancelled cells instead, and none waits for training that is in the queue.

    Raises UserError without a scheduler, or where it refuses a job; for a cell that cannot run; beside another call.
    """
    if not dry:
        slurm.queue()  # before anything is written: raises where there is no scheduler
    with nullcontext() if dry else one_at_a_time(grid.dir):
        begun: dict[str, LoggedCell] = {}
        if not dry:
            begun = claim_folder(grid.suite, grid.dir, grid.cells)
            tell_before(grid, begun, console)
        jobs = _jobs(grid, begun, console, dry, again)
        submit_jobs(jobs, grid.dir, site, console, dry)
    if not jobs:
        say(console, "nothing to submit")


def one_at_a_time(suite_dir: SuiteDir) -> AbstractContextManager[None]:
    """Hold the output folder, so that two calls cannot submit the same cell."""
    return hold_lock(suite_dir.root, "another process is submitting this suite; wait for it", ".submit.lock")


def _jobs(grid: Grid, begun: Mapping[str, LoggedCell], console: Console, dry: bool, again: bool) -> list[Job]:
    """The jobs to submit; unless this is a dry run, their cells are ready to run when this returns."""
    earlier, queue = submissions(grid.dir), queue_of(grid.dir, console, needed=not dry) or []
    if not dry:
        earlier = adopt_unanswered(earlier, queue)
    states = {row.name: row.state for row in statuses(grid.suite.diverged, grid.cells, earlier, queue)}
    taken, queued = (*RETRIED, "trained") if again else ("pending", "trained"), jobs_of_cells(earlier, queue)
    wanted = [c for c in grid.cells if states[c.name] in taken and c.folder not in queued]
    for state in STYLE:
        names = [c.name for c in grid.cells if c not in wanted and states[c.name] == state]
        hint = "; `replicate grid retry` submits it again" if state in RETRIED else ""
        if names:
            say(console, f"{name_cells(names)}: {state}, left as it is{hint}")
    _check_clusters(wanted)
    if not dry:
        make_ready(grid, wanted, begun, console)
        for cell in wanted:  # what it failed of before says nothing of what is submitted now
            clear_failure(cell.run)
    waiting, name = still_queued(earlier, queue), re.sub(r"[^A-Za-z0-9_-]+", "-", grid.suite.name)
    return plan_jobs(
        # the names of all jobs of an output folder, and of no other folder's, begin alike
        f"{name}-{hashlib.sha256(str(grid.dir.root.resolve()).encode()).hexdigest()[:6]}",
        next_number(grid.dir),
        grid.cells[0],
        wanted,
        trained=[c for c in wanted if is_trained(c.run)],
        waiting=waiting,
        unfollowed=find_unfollowed(waiting, grid.cells),
        behind=not again,
    )


def _check_clusters(cells: Sequence[Cell]) -> None:
    """Raise UserError where it is open whether a cell's job needs GPUs, or its grace period is shorter than a save."""
    if any(cell.config.cluster.accelerator == "auto" for cell in cells):
        raise UserError(
            "cluster.accelerator: auto does not say whether a job needs GPUs; choose cpu or gpu, or give a file of "
            "configs/cluster with --cluster"
        )
    for cell in cells:
        given, needed = cell.config.cluster.slurm.lead_seconds, grace_seconds_needed(cell.run)
        if needed is not None and needed > given:
            raise UserError(
                f"cluster.slurm.lead_seconds: {given} is too short, {cell.name} took up to "
                f"{json.dumps(read_json(cell.run.times))} for a step and a save; set at least "
                f"--cluster.slurm.lead_seconds={needed}"
            )


def plan_jobs(
    prefix: str,
    number: int,
    one: Cell,
    cells: Sequence[Cell],
    trained: Collection[Cell] = (),
    waiting: Sequence[Submission] = (),
    unfollowed: Mapping[Submission, Cell] | None = None,
    behind: bool = False,
) -> list[Job]:
    """Seed block by seed block an array that trains and one that generates, then the report.

    As many blocks side by side as cluster.slurm.concurrent_cells holds whole ones; a block waits for the end of the one
    that many before it, so that an early end leaves whole pairs.

    Args:
        prefix: of the jobs' names; `number` is that of the first submission.
        one: any cell of the suite: the report runs where it does.
        cells: to submit, in the plan's order; `trained` are those of them that only lack their completions.
        waiting: the suite's submissions that are in the queue, oldest first.
        unfollowed: those of them that train and whose completions an earlier call did not come to submit; a cell each.
        behind: whether the first blocks wait for training that is in the queue, as those that follow them do.
    """
    jobs: list[Job] = []

    def add(stage: JobStage, of: Cell, folders: Sequence[str], after: str = "", **waits: Any) -> int:
        what = stage if stage == "report" else f"{stage}-seed-{of.seed}"
        name = f"{prefix}.{number + len(jobs):04d}-{what}"
        jobs.append(Job(name, stage, tuple(folders), of.config, after, **waits))
        return len(jobs) - 1

    for s, cell in (unfollowed or {}).items():
        add("generate", cell, s.cells, s.name, after_success_of=s.job_id)
    blocks = _blocks([c for c in cells if c not in trained])
    largest = max((len(block) for block in blocks), default=1)
    earlier: list[tuple[int | str, str]] = []  # (position or id, name) of every array that trains
    if behind:
        earlier += [(s.job_id, s.name) for s in waiting if s.stage == "train" and s.job_id]
    for block in blocks:
        lanes = max(1, block[0].config.cluster.slurm.concurrent_cells // largest)
        before, name = earlier[-lanes] if len(earlier) >= lanes else (None, "")
        folders = [c.folder for c in block]
        at = add("train", block[0], folders, name, after_end_of=() if before is None else (before,))
        earlier.append((at, jobs[at].name))
        if block[0].config.generation.prompts:
            add("generate", block[0], folders, jobs[at].name, after_success_of=at)
    for block in _blocks(list(trained)):
        add("generate", block[0], [c.folder for c in block])
    if jobs or (waiting and not any(s.stage == "report" for s in waiting)):
        ids = [s.job_id for s in waiting if s.stage != "report" and s.job_id]
        add("report", one, (), prefix, after_end_of=(*range(len(jobs)), *ids))
    return jobs


def _blocks(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one seed that ask for the same machine, in the plan's order."""
    blocks: dict[tuple[int, ClusterConfig], list[Cell]] = {}
    for cell in cells:
        blocks.setdefault((cell.seed, cell.config.cluster), []).append(cell)
    return list(blocks.values())


def find_unfollowed(waiting: Sequence[Submission], cells: Sequence[Cell]) -> dict[Submission, Cell]:
    """Submissions that train, whose completions are wanted and not in the queue, each with one of its cells."""
    of = {c.folder: c for c in cells}
    followed = {cell for s in waiting if s.stage == "generate" for cell in s.cells}
    lost = [s for s in waiting if s.stage == "train" and s.job_id and not followed.intersection(s.cells)]
    return {s: of[s.cells[0]] for s in lost if s.cells[0] in of and of[s.cells[0]].config.generation.prompts}


def script(job: Job, site: Site, folder: Path, at_once: int) -> str:
    """The whole text of a job's script; see `options`."""
    cluster = job.config.cluster
    body = SHIPPED / "launch" / ("report.sbatch" if job.stage == "report" else "array.sbatch")
    lines = body.read_text(encoding="utf-8").rstrip("\n").split("\n")
    marked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]  # an example's, which ours replace
    settings = {
        "REPLICATION_CHECKOUT": str(SHIPPED),
        "REPLICATION_SITE": str(site.path or "/dev/null"),
        "REPLICATION_PYTHON": sys.executable,
        "REPLICATION_STOP_SIGNAL": cluster.stop_signal,
        "REPLICATION_LEAD_SECONDS": str(cluster.slurm.lead_seconds),
        "REPLICATION_MAX_REQUEUES": str(cluster.slurm.max_requeues),
        **({"REPLICATION_AFTER": job.after} if job.after else {}),
    }
    written = [
        lines[0],
        f"# Written by `replicate grid submit`: settings of this job, then launch/{body.name}, word for word.",
        *(f"#SBATCH {option}" for option in options(job, site, folder, at_once)),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.items()),
        "",
        *lines[1 : marked[0]],
        *lines[marked[-1] + 1 :],
    ]
    return "\n".join(written) + "\n"


def options(job: Job, site: Site, folder: Path, at_once: int) -> list[str]:
    """The options of sbatch, one a line: output goes to `folder`, at most `at_once` elements run side by side."""
    cluster, slurm = job.config.cluster, job.config.cluster.slurm
    trains, reports = job.stage == "train", job.stage == "report"
    tasks = cluster.devices if trains else 1
    found = [f"--job-name={job.name}", f"--chdir={_word(Path.cwd())}"]
    if not reports:
        found += [f"--array=0-{len(job.cells) - 1}%{min(at_once, len(job.cells))}"]
    found += [f"--output={_word(folder / ('output.txt' if reports else 'output-%a.txt'))}", "--open-mode=append"]
    found += [f"--nodes={cluster.nodes if trains else 1}", f"--ntasks-per-node={tasks}"]
    if cluster.accelerator == "gpu" and not reports:
        found += [f"--gpus-per-node={tasks}" if site.gpus == "gpus-per-node" else f"--gres=gpu:{tasks}"]
    if slurm.cpus_per_task:
        found += [f"--cpus-per-task={slurm.cpus_per_task}"]
    if slurm.memory_gib and not reports:
        found += [f"--mem={slurm.memory_gib if trains else -(-slurm.memory_gib // cluster.devices)}G"]
    found += [f"--time={min(REPORT_MINUTES, slurm.time_limit_minutes) if reports else slurm.time_limit_minutes}"]
    found += [f"--signal={'B:' if slurm.signal_to == 'batch' else ''}{cluster.stop_signal}@{slurm.lead_seconds}"]
    found += ["--requeue" if site.on_preemption == "requeue" else "--no-requeue"]
    asked = {name: getattr(site, name) for name in ("account", "partition", "qos", "constraint")}
    found += [f"--{name}={value}" for name, value in asked.items() if value]
    return found + ([site.sbatch] if site.sbatch else [])


def _word(path: Path) -> str:
    """A path as one word of an #SBATCH line."""
    return f'"{path}"' if " " in str(path) else str(path)


def submit_jobs(jobs: Sequence[Job], suite_dir: SuiteDir, site: Site, console: Console, dry: bool) -> None:
    """Write each job's folder, then ask sbatch, in order; or only show both.

    Raises UserError where sbatch refuses one; those before it stay submitted, and a second call goes on behind them.
    """
    ids: list[str] = []
    out = suite_dir.root.resolve()
    for job in jobs:
        folder = out / "launch" / job.name.partition(".")[2]
        file, plan = folder / "job.sbatch", folder / "plan.txt"
        text = script(job, site, folder, job.config.cluster.slurm.concurrent_cells)
        cells = "".join(f"{cell}\n" for cell in job.cells)
        given = [str(out)] if job.stage == "report" else [str(plan), str(out), job.stage]
        command = ["sbatch", "--parsable", *_dependency(job, ids), str(file), *given]
        if dry:
            ids.append(f"<{folder.name}>")
            for title, shown in (file, text), (plan, cells[:-1]), ("command", shlex.join(command)):
                if shown:
                    say(console, f"# {title}", style="bold")
                    say(console, shown)
            say(console, "")
            continue
        write_text(file, text)
        write_text(plan, cells)
        facts = {"name": job.name, "stage": job.stage, "cells": job.cells}
        write_json(folder / "job.json", facts | {"out": str(out), "user": slurm.user_name()})
        try:
            id = slurm.submit(file, command)
        except slurm.Refused:
            remove_tree(folder)  # it never was a submission
            raise
        ids.append(id)
        write_json(folder / "submitted.json", {"id": id, "at": timestamp()})
        n = len(job.cells)
        say(console, f"job {id}: {folder.name}{f', {n} cell(s)' if n else ''}")


def _dependency(job: Job, ids: Sequence[str]) -> list[str]:
    """The options of sbatch, with the ids of the jobs before it."""
    conditions = []
    for kind, before in ("aftercorr", (job.after_success_of,)), ("afterany", job.after_end_of):
        named = [ids[one] if isinstance(one, int) else one for one in before if one is not None]
        if named:
            conditions.append(":".join((kind, *named)))
    return [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"] if conditions else []
