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
from paths import CHECKOUT
from rich.console import Console
from run_files import read_journal
from synthetic_runs import build_suite

from replication.config import DivergedRule
from replication.errors import Diverged, UserError
from replication.grid import slurm
from replication.grid.cells import Place
from replication.grid.slurm import Queued
from replication.grid.status import CellStatus, cell_status, print_status
from replication.grid.submissions import Left, Note, last_link
from replication.runs.failures import record_failure
from replication.runs.files import read_json, write_json
from replication.runs.journal import read_last_losses

RULE = DivergedRule(above_nats=1e9, for_steps=10)


@pytest.fixture
def cell(tmp_path) -> Place:
    """An interrupted cell at step 40 of 60; tests put notes and jobs beside it."""
    suite_dir, _ = build_suite(tmp_path / "out", arms=("baseline",), seeds=(1,), interrupted={("baseline", 1): 40})
    return Place("baseline", 1, suite_dir.cell("baseline", 1))


def note(cell: Place, *events: str, code: int = 0, restarts: int = 0) -> None:
    with open(cell.run.jobs, "a") as file:
        for event in events:
            last = {"code": code if event == events[-1] else 0, "restarts": restarts, "job": "7_0"}
            file.write(json.dumps({"event": event, **last}) + "\n")


def queued(state: str, reason: str = "", restarts: int = 0) -> Queued:
    return Queued("7_0", 0, "suite.0001-train-seed-1", state, reason, restarts)


def left(word: str | None, stage: str = "train", id: str = "7_0", output: str = "/launch/output-0.txt"):
    """The job of a stage, gone from the queue with the scheduler's word."""
    return {stage: Left(id, id, word, Path(output))}


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
    with open(cell.run.log, "a") as log:
        log.write("2026-01-01T00:00:00 job 7_0: train in there on n1, restart 1\n")
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


ENDS = [  # the last note and its code, the last lines of the log, the scheduler's word -> what is shown
    ("ended", 1, "srun: error: n1: task 0: Exited with exit code 1\nOSError: [Errno 28] No space left", "FAILED",
     "failed", "OSError: [Errno 28] No space left"),
    ("ended", 137, "srun: error: n1: task 1: Killed", "FAILED", "failed", "srun: error: n1: task 1: Killed"),
    ("ended", 1, "srun: error: n1: task 1: Out Of Memory", "OUT_OF_MEMORY", "failed", "out_of_memory: srun"),
    ("ended", 0, "srun: error: Node failure on n2", "NODE_FAIL", "failed", "its job ended without a word: node_fail"),
    ("started", 0, "error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "TIMEOUT",
     "failed", "its job ended without a word: timeout: error: *** STEP 7.0 ON n1 CANCELLED AT"),
    ("started", 0, "error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***", "CANCELLED by 7", "cancelled",
     "cancelled by 7: error: *** STEP 7.0 ON n1"),
    ("started", 0, "step 40/60", "DEADLINE", "failed", "its job ended without a word: deadline (log: "),
    ("preempted", 75, "step 40/60", "FAILED", "preempted", ""),
    ("preempted", 75, "step 40/60", "CANCELLED by 7", "cancelled", "cancelled by 7"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "code", "log", "word", "state", "shown"), ENDS)
def test_the_schedulers_word_on_completions_hides_no_end_of_their_cell(cell, event, code, log, word, state, shown):
    """SLURM cancels the completions of a cell that fails."""
    note(cell, "started", event, code=code)
    cell.run.log.write_text(f"{log}\n")
    status = cell_status(cell, RULE, {}, left(word) | left("CANCELLED", "generate", "8_0"))
    assert status.state == state and status.note.startswith(shown), status
    if "CANCELLED AT" in log:
        assert cell_status(cell, RULE, {}, left(None)).state == state, "told from the log, where there are no accounts"
    record_failure(cell.run, OSError(28, "No space left on device"))
    status = cell_status(cell, RULE, {}, left("CANCELLED by 7"))
    assert (status.state, "No space left on device" in status.note) == ("failed", True), "the error came first"


def test_a_cell_whose_next_job_never_began_is_not_told_by_its_last_one(cell, tmp_path):
    note(cell, "started", "ended", code=137)
    (tmp_path / "output").write_text("slurmstepd: error: Could not open stdout file: No such file or directory\n")
    status = cell_status(cell, RULE, {}, left("FAILED", id="9_0", output=f"{tmp_path}/output"))
    assert status.note == (
        "its job never began: failed: slurmstepd: error: Could not open stdout file: No such file or directory; see "
        f"{tmp_path}/output"
    )
    assert cell_status(cell, RULE, {}, left("CANCELLED by 7", id="9_0")).note == "cancelled by 7"


@pytest.mark.parametrize(("state", "shown"), [("SUSPENDED", "suspended"), ("STOPPED", "suspended"),
                                              ("REQUEUE_HOLD", "queued"), ("SPECIAL_EXIT", "queued"),
                                              ("COMPLETING", "running")])  # fmt: skip
def test_states_of_a_job_that_neither_waits_nor_runs(cell, state, shown):
    status = cell_status(cell, RULE, {"train": queued(state)})
    assert status.state == shown
    assert shown != "suspended" or "`scontrol resume 7_0`" in status.note
    write_json(cell.run.manifest, read_json(cell.run.manifest) | {"finished_at": "now"})
    of_completions = {"suspended": "suspended", "queued": "trained", "running": "generating"}[shown]
    assert cell_status(cell, RULE, {"generate": queued(state)}).state == of_completions


def test_what_many_cells_have_in_common_is_said_once(capsys):
    rows = [
        CellStatus(f"{arm}/seed-{seed}", "failed", 0, None, None, None, None, 0, f"[x] lost (log: {seed})")
        for arm in ("baseline", "both")
        for seed in range(1, 65)
    ]
    print_status(rows, "suite", Console(width=200))
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "baseline/seed-[1-64], both/seed-[1-64]: [x] lost (log of the first: 1)"
    )


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


ACCOUNTS = """\
5_0|FAILED
5_1|CANCELLED by 0
5_[3-9%2]|PENDING
6|CANCELLED by 70007
7_0|RUNNING
8_[0-3]|CANCELLED
"""


def test_the_accounts_of_elements_that_never_began(tmp_path, monkeypatch):
    """5_2 was cancelled alone, 6_1 with all of its array, which leaves no line of theirs; 7_0's line lags behind."""
    (tmp_path / "sacct").write_text(f"#!/bin/sh\ncat <<END\n{ACCOUNTS}END\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.history(["5_0", "5_1", "5_2", "6_1", "7_0", "8_3", "9_0"]) == {
        "5_0": "FAILED", "5_1": "CANCELLED by root", "5_2": "CANCELLED", "6_1": "CANCELLED by 70007", 
        "8_3": "CANCELLED",
    }  # fmt: skip


def test_a_chain_is_told_by_its_last_link():
    notes = [Note(job="5_0"), Note(job="9_0"), Note("cancelled"), Note(job="6_0")]
    assert last_link("5_0", notes, {"6_0"}) == "9_0"
    assert last_link("6_0", notes, {"5_0"}) == "6_0"
    assert last_link("11_0", notes, {"6_0"}) == "11_0", "its job never began"


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
    command = [sys.executable, "-X", "importtime", "-m", "replication", "grid", "status", suite_dir.root]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60,
            env=os.environ | {"COLUMNS": "200"},
        )  # fmt: skip
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "120 complete, 8 interrupted" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "replication.grid.status" in loaded and loaded.isdisjoint({"torch", "scipy"})
    publish(f"grid status of 128 cells: {statistics.median(seconds):.2f} s (median of 3)")
