"""The state of every cell: from its files, and where there is a scheduler its job. Imports no torch, loads no config.

The files are the truth about the training, the scheduler about the queue. Where it cannot be asked, the notes that
each job leaves in its cell's jobs.jsonl stand in.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from replication.config import DivergedRule
from replication.config.reading import read_yaml, untyped
from replication.console import duration, say, table
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.cells import Place
from replication.grid.slurm import Queued
from replication.grid.submissions import (
    Jobs,
    JobStage,
    Left,
    Note,
    Submission,
    jobs_of_cells,
    left_of_cells,
    read_notes,
)
from replication.protocol.diverged import why_diverged
from replication.runs.failures import first_error, last_line, read_failure
from replication.runs.journal import Line, read_tail
from replication.runs.layout import RunDir, name_cells
from replication.runs.manifest import is_trained

STYLE = {
    "complete": "green",
    "trained": "green",
    "generating": "cyan",
    "running": "cyan",
    "suspended": "yellow",
    "requeued": "yellow",
    "preempted": "yellow",
    "interrupted": "yellow",
    "cancelled": "yellow",
    "diverged": "magenta",
    "failed": "red",
    "queued": "blue",
    "pending": "dim",
}
"""Every state. suspended: its job stands still. queued: its first job waits. requeued: its next job waits. preempted:
it was told to stop, and no job waits to go on. interrupted: it was begun, and nothing says how it ended. trained: only
its completions are missing."""

NARROW = 60  # columns, below which the table becomes lines
RETRIED = ("failed", "preempted", "interrupted", "cancelled")
WAITING = ("queued", "requeued", "trained")
IN_QUEUE = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", slurm.HIDDEN)
STANDING = ("SUSPENDED", "STOPPED")


@dataclass(frozen=True)
class CellStatus:
    """One row of the status table; None is unknown."""

    name: str
    state: str
    step: int
    steps: int | None
    loss_nats: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    requeues: int  # how often a job of the cell went back into the queue
    note: str  # a failed cell's first error line and log, a waiting one's reason


def statuses(
    rule: DivergedRule, of: Sequence[Place], earlier: Sequence[Submission] = (), queue: Sequence[Queued] = ()
) -> list[CellStatus]:
    """The state of cells, by what was submitted earlier (none: no scheduler answers) and what is in the queue."""
    jobs = jobs_of_cells(earlier, queue)
    left = left_of_cells(earlier, jobs, {place.folder: place.run for place in of})
    return [cell_status(p, rule, jobs.get(p.folder), left.get(p.folder)) for p in of]


def cell_status(
    place: Place, rule: DivergedRule, jobs: Jobs | None = None, left: Mapping[JobStage, Left] | None = None
) -> CellStatus:
    """The state of one cell, by its jobs in the queue, and the latest ones that have left it, of each stage."""
    run, jobs, tail = place.run, jobs or {}, Line(0, {})
    facts, notes = _facts(run.config), read_notes(run)
    try:
        tail = read_tail(run.metrics) or tail
        state, note = _state(run, jobs, notes, left or {}, facts)
        if facts is not None and state not in (*WAITING, "pending"):
            why = why_diverged(run, rule, facts.warmup_steps, facts.vocab_size)
            state, note = ("diverged", why) if why else (state, note)
    except UserError as error:  # a damaged file is this cell's, and named; the table shows the others
        state, note = ("complete" if run.complete.is_file() else "failed"), str(error)
    speed = tail.number("train/tokens_per_second") if state == "running" else None
    return CellStatus(
        place.name,
        state,
        tail.step,
        steps=facts.steps if facts else None,
        loss_nats=tail.number("train/loss_nats"),
        tokens_per_second=speed,
        seconds_left=(facts.steps - tail.step) * facts.batch_tokens / speed if facts and speed else None,
        requeues=max([job.restarts for job in jobs.values()] + [n.restarts for n in notes], default=0),
        note=note,
    )


class _Facts(NamedTuple):
    """Values of a cell's config.yaml that its status needs."""

    steps: int
    batch_tokens: int
    warmup_steps: int
    vocab_size: int
    generates: bool


def _facts(path: Path) -> _Facts | None:
    try:
        config = untyped(read_yaml(path).tree)
        t = config["training"]
        numbers = (t["steps"], t["batch_tokens"], t["warmup_steps"], config["model"]["vocab_size"])
        facts = _Facts(*numbers, bool(config["generation"]["prompts"]))
    except (OSError, UserError, KeyError, TypeError):
        return None
    return facts if all(type(n) is int for n in numbers) and facts.vocab_size > 0 else None


def _state(
    run: RunDir, jobs: Jobs, notes: Sequence[Note], left: Mapping[JobStage, Left], facts: _Facts | None
) -> tuple[str, str]:
    """(state, note): complete, then what is in the queue, then what files and notes say."""
    if run.complete.is_file():
        return "complete", ""
    trained = facts is not None and facts.generates and is_trained(run)
    train, generate = jobs.get("train"), jobs.get("generate")
    hidden_but_here = train is not None and train.state == slurm.HIDDEN and run.is_locked()
    if train is not None and train.state in IN_QUEUE and not hidden_but_here:
        began = train.restarts or any(n.event == "started" for n in notes)
        return ("requeued" if began else "queued"), train.reason
    for job in (train, generate) if trained else (train,):
        if job is not None and job.state in STANDING:
            return "suspended", f"job {job.id} stands still; `scontrol resume {job.id}` lets it go on"
    if train is not None and not trained:
        return "running", "" if run.manifest.is_file() else "starting"
    if generate is not None and trained:
        return ("trained", "completions are queued") if generate.state in IN_QUEUE else ("generating", "")
    if run.is_locked():
        return ("generating" if trained else "running"), ""
    # what became of completions says nothing of a cell that is not trained: the scheduler cancels them when it fails
    state, note = _ended(run, trained, notes, left.get("generate" if trained else "train"))
    return ("trained", "no completions are queued") if trained and state != "failed" else (state, note)


def _ended(run: RunDir, trained: bool, notes: Sequence[Note], left: Left | None) -> tuple[str, str]:
    """The end of a cell that is neither complete, nor in the queue, nor held by a process.

    An error that was recorded comes before the scheduler's word, the scheduler's before what its silence would mean.
    """
    last, failure = notes[-1] if notes else Note(), read_failure(run)
    event = last.event
    if "cancelled" in takewhile(lambda word: word != "started", (n.event for n in reversed(notes))):
        return "cancelled", ""  # whatever its latest job managed to note after that
    if failure is not None:
        return "failed", f"{failure.error} (log: {run.log})"
    never_began = left is not None and all(n.job not in ("", left.id) for n in notes)
    log = left.output if left is not None and never_began else run.log
    error = first_error(log)
    word = (left.word if left else None) or ""
    told = re.search(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?", error)
    if not word and told and event in ("started", "ended"):  # no accounts are kept, and it wrote to the job's log
        words = {"TIME LIMIT": "timeout", "NODE FAILURE": "node_fail", "PREEMPTION": "preempted"}
        word = words.get((told[1] or "").strip(), "cancelled")
    how = word.partition(" ")[0].lower()
    if how == "cancelled":
        return "cancelled", f"{word.replace('CANCELLED', 'cancelled')}{f': {error} (log: {log})' if error else ''}"
    if never_began:
        return "failed", f"{': '.join(filter(None, ('its job never began', how, error)))}; see {log}"
    if event == "preempted" or (event == "started" and how == "preempted"):
        return "preempted", ""
    if event == "ended" and last.code:
        because = error or last_line(log) or f"its job ended with code {last.code}"
        return "failed", f"{f'{how}: ' if how not in ('', 'failed') else ''}{because} (log: {log})"
    if event == "started" or (event == "ended" and not trained):
        full = "its disk is full" if shutil.disk_usage(run.root).free < 2**20 else ""
        because = ": ".join(filter(None, (how, error, full))) or "node or batch shell lost"
        return "failed", f"its job ended without a word: {because} (log: {log})"
    return ("interrupted" if run.manifest.is_file() else "pending"), ""


def print_status(rows: Sequence[CellStatus], title: str, console: Console) -> None:
    """cell, state, step, loss, tokens/s, time left; below, how many are in each state, and a line on what needs one."""
    shown: list[tuple[str | Text, ...]] = []
    for row in rows:
        step, loss = f"{row.step}/{row.steps or '-'}", "-" if row.loss_nats is None else f"{row.loss_nats:.3f}"
        if console.width < NARROW:
            brief = "" if loss == "-" else f", loss {loss}"
            console.print(f"{row.name} [{STYLE[row.state]}]{row.state}[/] {step}{brief}")
        state = row.state
        if row.requeues:
            state += f" {row.requeues}" if state == "requeued" else f", requeued {row.requeues}"
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        shown.append((row.name, Text(state, STYLE[row.state]), step, loss, speed, duration(row.seconds_left)))
    if console.width >= NARROW:
        console.print(table(title, ("cell", "state", ">step", ">loss, nats", ">tokens/s", ">left"), shown))
    counts = Counter(row.state for row in rows)
    console.print(", ".join(f"{counts[state]} {state}" for state in STYLE if counts[state]))
    for state in WAITING:
        reasons = Counter(row.note for row in rows if row.state == state and row.note)
        if reasons:
            say(console, f"{state}: {', '.join(f'{n} {reason}' for reason, n in reasons.items())}")
    alike: dict[tuple[str, str], list[CellStatus]] = {}
    for row in rows:
        if row.note and row.state not in WAITING:
            alike.setdefault((row.state, row.note.partition(" (log: ")[0]), []).append(row)
    for (state, text), group in alike.items():
        log = group[0].note.removeprefix(text)
        first = log.replace("(log:", "(log of the first:") if len(group) > 1 else log
        say(console, (name_cells([row.name for row in group]), STYLE[state]), f": {text}{first}")
