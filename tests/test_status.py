"""What became of every cell, from simulated run folders and a simulated queue."""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_runs import build_suite

from replication.config import DivergedRule
from replication.errors import Diverged, UserError
from replication.grid.plan import Place
from replication.grid.slurm import Queued
from replication.grid.status import Left, cell_status, print_status
from replication.rundir import read_journal, read_json, read_last_losses, record_failure, write_json

ROOT = Path(__file__).parents[1]
RULE = DivergedRule(above_nats=1e9, for_steps=10)


@pytest.fixture
def cell(tmp_path) -> Place:
    """An interrupted cell at step 40 of 60; tests put notes and jobs beside it."""
    suite_dir, _ = build_suite(tmp_path / "out", arms=("baseline",), seeds=(1,), interrupted={("baseline", 1): 40})
    return Place("baseline", 1, suite_dir.cell("baseline", 1))


def note(cell: Place, *events: str, code: int = 0, restarts: int = 0) -> None:
    with open(cell.run.jobs, "a") as file:
        for event in events:
            last = {"code": code if event == events[-1] else 0, "restarts": restarts}
            file.write(json.dumps({"event": event, **last}) + "\n")


def queued(state: str, reason: str = "", restarts: int = 0) -> Queued:
    return Queued("7_0", 0, "suite.0001-train-seed-1", state, reason, restarts)


def left(word: str | None) -> Left:
    return Left(word, Path("/launch/output-0.txt"))


def test_without_a_scheduler(cell):
    assert cell_status(cell, RULE).state == "interrupted"
    note(cell, "started", "preempted", code=75)
    assert cell_status(cell, RULE).state == "preempted"
    note(cell, "started", "ended", code=137)
    cell.run.log.write_text("step 40/60\nrank 1: ended by SIGKILL (out of memory?)\n")
    status = cell_status(cell, RULE)
    assert (status.state, status.note) == (
        "failed", f"rank 1: ended by SIGKILL (out of memory?) (log: {cell.run.log})",
    )  # fmt: skip
    note(cell, "cancelled", "ended", code=130)
    assert cell_status(cell, RULE).state == "cancelled", "what a cancelled job notes while it ends changes nothing"
    note(cell, "started")
    assert (
        cell_status(cell, RULE).note == f"its job ended without a word: node or batch shell lost (log: {cell.run.log})"
    )
    with cell.run.lock():
        assert cell_status(cell, RULE).state == "running"


def test_with_a_scheduler(cell):
    def with_job(job: Queued):
        return cell_status(cell, RULE, {"train": job})

    status = with_job(queued("RUNNING"))
    assert (status.state, status.step, status.steps) == ("running", 40, 60)
    assert status.seconds_left is not None and status.tokens_per_second is not None
    assert (with_job(queued("PENDING", "Priority")).state, with_job(queued("PENDING", "Priority")).note) == (
        "queued", "Priority",
    )  # fmt: skip
    status = with_job(queued("PENDING", "BeginTime", restarts=3))
    assert (status.state, status.requeues) == ("requeued", 3)
    note(cell, "started", "preempted", code=75, restarts=1)
    status = with_job(queued("PENDING", "Dependency"))
    assert (status.state, status.requeues) == ("requeued", 1), "a link of a chain"
    note(cell, "started")
    assert cell_status(cell, RULE, {}, left("NODE_FAIL")).note.startswith("its job ended without a word: node_fail")
    assert cell_status(cell, RULE, {}, left("CANCELLED")).state == "cancelled"


def test_completions_that_wait_for_a_failed_cell_do_not_hide_the_failure(cell):
    note(cell, "started", "ended", code=2)
    assert cell_status(cell, RULE, {"generate": queued("PENDING", "Dependency")}).state == "failed"


def test_a_trained_cell_waits_for_its_completions(cell):
    write_json(cell.run.manifest, read_json(cell.run.manifest) | {"finished_at": "now"})
    assert cell_status(cell, RULE).state == "trained"
    assert cell_status(cell, RULE, {"generate": queued("PENDING")}).note == "completions are queued"
    assert cell_status(cell, RULE, {"generate": queued("RUNNING")}).state == "generating"
    note(cell, "started", "ended", code=137)
    cell.run.log.write_text("srun: error: n1: task 0: Killed\n")
    status = cell_status(cell, RULE)
    assert (status.state, status.note) == ("failed", f"srun: error: n1: task 0: Killed (log: {cell.run.log})")
    note(cell, "started", "preempted", code=75)
    assert cell_status(cell, RULE).state == "trained"


def test_a_job_that_never_came_to_its_first_note(tmp_path):
    suite_dir, _ = build_suite(tmp_path / "out", arms=("baseline",), seeds=(1,), missing=[("baseline", 1)])
    place = Place("baseline", 1, suite_dir.cell("baseline", 1))
    status = cell_status(place, RULE, {}, left("FAILED"))
    assert (status.state, status.note) == ("failed", "its job never began: failed; see /launch/output-0.txt")
    assert cell_status(place, RULE, {}, left(None)).note == "its job never began; see /launch/output-0.txt"
    assert cell_status(place, RULE, {}, left("CANCELLED")).state == "cancelled"


def test_failures_and_divergence(cell):
    record_failure(cell.run, UserError("data: gone; bring them back"))
    assert cell_status(cell, RULE).note == f"data: gone; bring them back (log: {cell.run.log})"
    record_failure(cell.run, Diverged("training: the loss was not finite"))
    assert cell_status(cell, RULE).state == "diverged"
    cell.run.failed.unlink()
    step, losses = read_last_losses(cell.run.metrics, 10)
    assert step == 40 and len(losses) == 10
    limit = min(losses) - 0.01
    status = cell_status(cell, DivergedRule(above_nats=limit, for_steps=10))
    assert status.state == "diverged"
    assert status.note == f"train/loss_nats above {limit:.3f} in each of the 10 steps up to step 40"
    assert cell_status(cell, DivergedRule(above_nats=min(losses) + 0.01, for_steps=10)).state == "interrupted"
    assert cell_status(cell, DivergedRule(above_nats=limit, for_steps=39)).state == "interrupted", "inside the warm-up"
    lines = read_journal(cell.run.metrics)
    lines[-1]["per_step"]["train/loss_nats"][0] = None
    cell.run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "was not finite" in cell_status(cell, RULE).note


def test_a_narrow_terminal_gets_lines_in_place_of_the_table(cell):
    out = io.StringIO()
    print_status([cell_status(cell, RULE)], "suite", Console(file=out, width=20))
    lines = out.getvalue().splitlines()
    assert " ".join(line.strip() for line in lines[:-1]).startswith("baseline/seed-1 interrupted 40/60, loss")
    assert lines[-1] == "1 interrupted" and max(map(len, lines)) <= 20


def test_a_cell_without_a_folder_is_pending(tmp_path):
    suite_dir, _ = build_suite(tmp_path / "out", arms=("baseline",), seeds=(1,), missing=[("baseline", 1)])
    status = cell_status(Place("baseline", 1, suite_dir.cell("baseline", 1)), RULE)
    assert (status.state, status.step, status.steps) == ("pending", 0, None)


def test_128_cells_are_shown_from_the_tails_of_their_journals(tmp_path, publish):
    """Four arms at 32 seeds, each with a journal of more than 2 MB."""
    dead = {("both", seed): 40 for seed in range(1, 33, 4)}
    suite_dir, _ = build_suite(tmp_path / "out", seeds=range(1, 33), interrupted=dead, samples=False)
    long = tmp_path / "journal"
    lines = suite_dir.cell("both", 2).metrics.read_text()
    long.write_text(lines * (2 * 2**20 // len(lines) + 1))
    for journal in suite_dir.runs.glob("*/*/metrics.jsonl"):
        journal.unlink()
        os.link(long, journal)
    command = [sys.executable, "-X", "importtime", "-m", "replication", "grid", "status", "ablation_2x2"]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(
            [*command, "--out", suite_dir.root], cwd=ROOT, capture_output=True, text=True, timeout=60,
            env=os.environ | {"COLUMNS": "200"},
        )  # fmt: skip
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "120 complete, 8 interrupted" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "replication.grid.status" in loaded and "torch" not in loaded
    publish(f"grid status of 128 cells: {statistics.median(seconds):.2f} s (median of 3; allowed: 2 s)")
