"""A SLURM job waits for its cell while an earlier life of it, on a node that SLURM gave up, still holds it."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
from rich.console import Console

from replication.errors import UserError
from replication.grid import cell
from replication.processes import preemption
from replication.processes.preemption import Preempted
from replication.runs.layout import RunDir


@pytest.fixture
def job(monkeypatch):
    """Makes this process a step of a job's second life."""
    for name, value in {"JOB_ID": "7", "STEP_ID": "0", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A cell that the job's first life holds; closing it ends that."""
    run, life = RunDir(tmp_path), ExitStack()
    with life:
        with monkeypatch.context() as first:
            first.setenv("SLURM_RESTART_COUNT", "0")
            life.enter_context(cell.hold_cell(run, True, Console()))
        yield run, life


class Told(Console):
    """Hands on what it is told to print."""

    def __init__(self) -> None:
        super().__init__()
        self.said = threading.Event()

    def print(self, *objects: object, **style: object) -> None:
        self.text = str(objects[0])
        self.said.set()


def test_it_waits_for_the_end_of_the_earlier_life(job, held):
    run, earlier = held
    console, ranks = Told(), []

    def hold(first: bool) -> None:
        with cell.hold_cell(run, first, console):
            ranks.append(first)

    waiting = [threading.Thread(target=hold, args=(first,)) for first in (True, False)]
    for thread in waiting:
        thread.start()
    assert console.said.wait(60)
    assert console.text.startswith("waiting up to 10 minutes for job 7.0, restart 0, process ") and ranks == []
    earlier.close()
    for thread in waiting:
        thread.join(60)
    assert sorted(ranks) == [False, True]


def test_other_ranks_of_a_life_share_it(job, tmp_path):
    with cell.hold_cell(RunDir(tmp_path), True, Console()), cell.hold_cell(RunDir(tmp_path), False, Console()):
        pass


def test_it_hears_the_stop_signal_and_does_not_wait_for_ever(job, held, monkeypatch):
    run, _ = held
    with monkeypatch.context() as patch, pytest.raises(Preempted, match=r"told to stop while job 7.0, restart 0"):
        patch.setattr(preemption, "_requested", True)
        cell.hold_cell(run, True, Console()).__enter__()
    monkeypatch.setattr(cell, "HELD_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"restart 0, process \d+ on \S+ has held the cell .*`replicate grid retry`"):
        cell.hold_cell(run, False, Console()).__enter__()


def test_without_slurm_it_is_refused_at_once_and_what_a_killed_process_left_is_removed(held, tmp_path):
    run, earlier = held
    with pytest.raises(UserError, match="another process is running this cell"):
        cell.hold_cell(run, True, Console()).__enter__()
    for name in (".FAILED.123", ".manifest.json.4567", ".keep"):
        (tmp_path / name).touch()
    earlier.close()
    with cell.hold_cell(run, True, Console()):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".keep"}
