"""What became of every cell: its files, and where there is a scheduler its job. Imports no torch, loads no config.

The files are the truth about the training, the scheduler about the queue. Where it cannot be asked, the notes that
each job leaves in its cell's jobs.jsonl stand in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from replication.config import DivergedRule
from replication.diverged import why_diverged
from replication.errors import UserError
from replication.grid.jobs import JobStage
from replication.grid.plan import Place
from replication.grid.slurm import Queued
from replication.reading import read_yaml, untyped
from replication.rundir import RunDir, first_error, is_trained, parse_objects, read_json, read_tail

STYLE = {
    "complete": "green",
    "trained": "green",
    "generating": "cyan",
    "running": "cyan",
    "requeued": "yellow",
    "preempted": "yellow",
    "interrupted": "yellow",
    "cancelled": "yellow",
    "diverged": "magenta",
    "failed": "red",
    "queued": "blue",
    "pending": "dim",
}
"""Every state. queued: its first job waits. requeued: its next job waits. preempted: it was told to stop, and no job
waits to go on. interrupted: it was begun, and nothing says how it ended. trained: only its completions are missing."""

NARROW = 60
"""Columns, below which the table becomes lines."""
RETRIED = ("failed", "preempted", "interrupted", "cancelled")
WAITING = ("queued", "requeued", "trained")


@dataclass(frozen=True)
class CellStatus:
    """One row of the status table; None is unknown."""

    place: Place
    state: str
    step: int
    steps: int | None
    loss_nats: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    requeues: int  # how often a job of the cell went back into the queue
    note: str  # a failed cell's first error line and log, a waiting one's reason

    @property
    def name(self) -> str:
        return self.place.name


@dataclass(frozen=True)
class Left:
    """The latest job of a cell, once it has left the queue."""

    word: str | None  # the scheduler's last: COMPLETED, FAILED, NODE_FAIL, ...; None where it keeps no accounts
    output: Path  # what its batch shell said before it found the cell's log


@dataclass(frozen=True)
class _Facts:
    """What status needs of a cell's config.yaml."""

    steps: int
    batch_tokens: int
    warmup_steps: int
    vocab_size: int
    generates: bool


def cell_status(
    place: Place,
    rule: DivergedRule,
    jobs: Mapping[JobStage, Queued] | None = None,
    left: Left | None = None,
) -> CellStatus:
    """The state of one cell.

    Args:
        place: the cell.
        rule: when it counts as diverged.
        jobs: what the scheduler has of it in the queue, by stage.
        left: its latest job, where that has left the queue.
    """
    run, jobs = place.run, jobs or {}
    facts, tail = _facts(run.config), read_tail(run.metrics) or {}
    notes = read_notes(run)
    restarts = [j.restarts for j in jobs.values()] + [n.get("restarts", 0) for n in notes]
    state, note = _state(run, jobs, notes, left, facts)
    if facts is not None and state not in (*WAITING, "pending"):
        why = why_diverged(run, rule, facts.warmup_steps, facts.vocab_size)
        state, note = ("diverged", why) if why else (state, note)
    speed, step = tail.get("train/tokens_per_second"), tail.get("step", 0)
    seconds_left = (facts.steps - step) * facts.batch_tokens / speed if facts and state == "running" and speed else None
    return CellStatus(
        place, state, step, facts.steps if facts else None, tail.get("train/loss_nats"),
        speed if state == "running" else None, seconds_left, max(restarts, default=0), note,
    )  # fmt: skip


def _facts(path: Path) -> _Facts | None:
    try:
        config = untyped(read_yaml(path).tree)
        t = config["training"]
        generates = bool(config["generation"]["prompts"])
        return _Facts(t["steps"], t["batch_tokens"], t["warmup_steps"], config["model"]["vocab_size"], generates)
    except (OSError, UserError, KeyError, TypeError):
        return None


def read_notes(run: RunDir) -> list[dict[str, Any]]:
    """The lines of jobs.jsonl, torn ones left out."""
    try:
        return list(parse_objects(run.jobs.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []


def _state(
    run: RunDir,
    jobs: Mapping[JobStage, Queued],
    notes: Sequence[Mapping[str, Any]],
    left: Left | None,
    facts: _Facts | None,
) -> tuple[str, str]:
    """(state, note): complete, then what is in the queue, then what files and notes say."""
    if run.complete.is_file():
        return "complete", ""
    trained = facts is not None and facts.generates and is_trained(run)
    train, generate = jobs.get("train"), jobs.get("generate")
    if train is not None and train.state == "PENDING":
        began = train.restarts or any(n.get("event") == "started" for n in notes)
        return ("requeued" if began else "queued"), train.reason
    if train is not None and not trained:
        return "running", "" if run.manifest.is_file() else "starting"
    if generate is not None and trained:
        return ("trained", "completions are queued") if generate.state == "PENDING" else ("generating", "")
    if run.is_locked():
        return ("generating" if trained else "running"), ""
    state, note = _ended(run, notes, left)
    return ("trained", note) if trained and state != "failed" else (state, note)


def _ended(run: RunDir, notes: Sequence[Mapping[str, Any]], left: Left | None) -> tuple[str, str]:
    """How a cell ended that is neither complete, nor in the queue, nor held by a process."""
    last, word = (notes[-1] if notes else {}), (left.word if left else None)
    event, code = last.get("event"), last.get("code")
    if _is_cancelled(notes) or word == "CANCELLED":
        return "cancelled", ""
    failure = read_json(run.failed)
    if failure is not None:
        return "failed", f"{failure.get('error')} (log: {failure.get('log', run.log)})"
    if event == "preempted":
        return "preempted", ""
    if event == "ended" and code:
        return "failed", f"{first_error(run.log) or f'its job ended with code {code}'} (log: {run.log})"
    if event == "started":
        how = word.lower() if word else "node or batch shell lost"
        return "failed", f"its job ended without a word: {how} (log: {run.log})"
    if left is not None and not notes:  # it did not come as far as its first note
        how = f": {word.lower()}" if word else ""
        return "failed", f"its job never began{how}; see {left.output}"
    return ("interrupted" if run.manifest.is_file() else "pending"), ""


def _is_cancelled(notes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the latest job was taken out of the queue, whatever it managed to note after that."""
    latest = [n.get("event") for n in notes]
    begun = max((i for i, event in enumerate(latest) if event == "started"), default=-1)
    return "cancelled" in latest[begun + 1 :]


# ---------------------------------------------------------------- the table


def print_status(rows: Sequence[CellStatus], title: str, console: Console) -> None:
    """cell, state, step, loss, tokens/s, time left; below, how many are in each state, and a line on what needs one."""
    table = Table(title=title)
    for name, justify in (("cell", "left"), ("state", "left"), ("step", "right"), ("loss, nats", "right"),
                          ("tokens/s", "right"), ("left", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        times = f", requeued {row.requeues}" if row.requeues and row.state != "requeued" else ""
        state = f"requeued {row.requeues}" if row.state == "requeued" else row.state
        table.add_row(
            row.name,
            f"[{STYLE[row.state]}]{state}{times}[/]",
            f"{row.step}/{row.steps or '-'}",
            _number(row.loss_nats, ".3f"),
            _number(row.tokens_per_second, ",.0f"),
            clock(row.seconds_left),
        )
    if console.width < NARROW:
        for row in rows:
            loss = "" if row.loss_nats is None else f", loss {row.loss_nats:.3f}"
            console.print(f"{row.name} [{STYLE[row.state]}]{row.state}[/] {row.step}/{row.steps or '-'}{loss}")
    else:
        console.print(table)
    counts = Counter(row.state for row in rows)
    console.print(", ".join(f"{counts[state]} {state}" for state in STYLE if counts[state]))
    for state in WAITING:
        reasons = Counter(row.note for row in rows if row.state == state and row.note)
        if reasons:
            console.print(f"{state}: {', '.join(f'{n} {reason}' for reason, n in reasons.items())}", soft_wrap=True)
    for row in rows:
        if row.note and row.state not in WAITING:
            console.print(f"[{STYLE[row.state]}]{row.name}[/]: {escape(row.note)}", soft_wrap=True)


def clock(seconds: float | None) -> str:
    """h:mm:ss, or a dash where unknown."""
    if seconds is None:
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
