"""Run cells on this machine: each in a process of its own, several side by side, with one progress display."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress, TaskID

from replication.config import load_suite
from replication.console import duration, progress, say
from replication.errors import UserError
from replication.grid.cells import Cell, places
from replication.processes.launcher import end
from replication.processes.preemption import PREEMPTED
from replication.runs.failures import clear_failure, last_line, read_failure, record_failure
from replication.runs.files import read_object
from replication.runs.journal import read_tail
from replication.runs.layout import SuiteDir

STOP_SECONDS = 20.0  # for each running cell, to save and stop in when Ctrl-C is pressed


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    task: TaskID


@dataclass
class Outcome:
    """The end of every cell of one `grid run`."""

    complete: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    stopped: list[Cell] = field(default_factory=list)  # told to by a signal; they go on with the same command
    skipped: list[Cell] = field(default_factory=list)  # complete before
    elsewhere: list[Cell] = field(default_factory=list)  # running in a process that is not ours


def run_cells(cells: Sequence[Cell], suite_dir: SuiteDir, jobs: int, console: Console) -> Outcome:
    """Run every cell that is not complete, at most `jobs` at once, in the suite's order; show progress.

    A cell that fails does not stop the others. On Ctrl-C the running cells are told to stop and waited for; the same
    command goes on from their checkpoints.
    """
    outcome = Outcome(skipped=[c for c in cells if c.run.complete.is_file()])
    for cell in (c for c in cells if c.run.state() == "running"):
        say(console, ("running", "cyan"), f" {cell.name}: in another process already; not started again")
        outcome.elsewhere.append(cell)
    waiting = [c for c in cells if c not in (*outcome.skipped, *outcome.elsewhere)]
    running: list[_Running] = []
    started = time.monotonic()
    with progress(console, "bar", "count", "{task.fields[note]}", "elapsed") as bars:
        n_skipped = len(outcome.skipped)
        total = bars.add_task("cells", total=n_skipped + len(waiting), completed=n_skipped, note="")
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), suite_dir, bars))
                time.sleep(0.5)
                for r in list(running):
                    _show(r, bars)
                    if r.process.poll() is not None:
                        running.remove(r)
                        _finish(r, outcome, bars)
                ended = len(outcome.complete) + len(outcome.failed) + len(outcome.stopped)
                left = (time.monotonic() - started) / ended * (len(waiting) + len(running)) if ended else None
                bars.update(total, completed=n_skipped + ended, note=f"left about {duration(left)}" if left else "")
        except BaseException:
            end([r.process for r in running], STOP_SECONDS * len(running))
            raise
    return outcome


def _start(cell: Cell, suite_dir: SuiteDir, bars: Progress) -> _Running:
    command = [sys.executable, "-P", "-m", "replication", "train", "--config", str(cell.run.config)]
    command += ["--out", str(suite_dir.root)]
    clear_failure(cell.run)
    threads = cell.config.cluster.threads
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(cell.run.log, "ab") as log:
        # a group of its own, so that Ctrl-C reaches this process alone, which then stops the cells in order
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    return _Running(cell, process, bars.add_task(cell.name, total=cell.config.training.steps, note="starting"))


def _show(r: _Running, bars: Progress) -> None:
    tail, t = None, r.cell.config.training
    with suppress(UserError):  # a journal that cannot be read is the cell's to say
        tail = read_tail(r.cell.run.metrics)
    if tail is None:
        bars.update(r.task, completed=0, note="starting")
        return
    speed, loss = tail.number("train/tokens_per_second"), tail.number("train/loss_nats")
    left = (t.steps - tail.step) * t.batch_tokens / speed if speed else None
    note = f"loss {'-' if loss is None else format(loss, '.3f')}, left {duration(left)}"
    bars.update(r.task, completed=tail.step, note=note if tail.step < t.steps else "generating")


def _finish(r: _Running, outcome: Outcome, bars: Progress) -> None:
    cell, code = r.cell, r.process.returncode
    bars.update(r.task, visible=False)
    if code == 0 and cell.run.complete.is_file():
        outcome.complete.append(cell)
        say(bars.console, ("complete", "green"), f" {cell.name}")
        return
    if code == PREEMPTED:
        outcome.stopped.append(cell)
        say(bars.console, ("told to stop", "yellow"), f" {cell.name}: the same command goes on with it")
        return
    outcome.failed.append(cell)
    error = last_line(cell.run.log).removeprefix("error: ") or f"the process ended with code {code}"
    if read_failure(cell.run) is None:  # killed before it could say why
        record_failure(cell.run, error)
    failure = read_failure(cell.run)
    why = failure.error if failure else f"{error}; its FAILED could not be written: is the disk full?"
    say(bars.console, ("failed", "red"), f" {cell.name}: {why} (log: {cell.run.log})")


def report_is_current(suite_dir: SuiteDir) -> bool:
    """Whether the report is there, and made from what is there now: cells, suite, plan, votes, noise."""
    if not all(p.is_file() for p in (suite_dir.report_html, suite_dir.report_md)):
        return False
    try:
        made_from = read_object(suite_dir.results).get("made_from")
    except UserError:
        return False
    every = places(load_suite(suite_dir.suite), suite_dir)  # its seeds may be more than those of a call
    return bool(made_from == suite_dir.inputs_sha256(place.run for place in every))
