"""How the processes of a start meet: whoever is missing, or answers in another's place, is named; the stop is heard."""

from __future__ import annotations

import itertools
import os
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

import replication.processes.preemption as preemption
from replication.errors import UserError, is_lost_peer
from replication.processes.launcher import PLACE, START, forget_place_of_the_shell, start_name
from replication.processes.preemption import Preempted
from replication.runs.files import read_json, write_json
from replication.runs.layout import RunDir
from replication.training import ranks
from replication.training.ranks import Meeting


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    """The cell of a start, in this process: rank 1 in a thread of that name, else rank 0."""
    for name, value in {START: "one", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "launched_rank", lambda: int(threading.current_thread().name == "rank 1"))
    monkeypatch.setattr(ranks, "_starts", itertools.repeat(0))
    monkeypatch.setattr(ranks, "MEET_SECONDS", 1.0)
    cell = RunDir(tmp_path / "both" / "seed-1")
    cell.root.mkdir(parents=True)
    return cell


def on_rank_1(act) -> tuple[threading.Thread, list[object]]:
    """What a function returns or raises in a thread that is rank 1."""
    result: list[object] = []

    def work() -> None:
        try:
            result.append(act())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, name="rank 1", daemon=True)
    thread.start()
    return thread, result


def test_two_ranks_meet_at_a_port_that_nobody_chose_and_the_first_one_decides(run, monkeypatch):
    monkeypatch.setattr(ranks, "MEET_SECONDS", 60.0)
    thread, told = on_rank_1(lambda: Meeting(run, 2).tell("checkpoint"))
    meeting = Meeting(run, 2)
    assert meeting.tell("checkpoint", "step-000004") == "step-000004"
    thread.join(60)
    assert told == ["step-000004"]
    port = read_json(run.start)["port"]
    assert port == meeting._store.port > 1, "not the shell's"


def test_who_does_not_come_is_named(run):
    with pytest.raises(UserError, match=r"rank 0: still without come 1 after 1 seconds; 2 processes are to start"):
        Meeting(run, 2)
    run.start.unlink()
    thread, said = on_rank_1(lambda: Meeting(run, 2))
    thread.join(30)
    assert "start.json does not say where it listens; do all nodes see this folder?" in str(said[0])


def test_a_stranger_is_refused_by_name(run):
    other = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    other.set("start", "both/seed-2, job 7 step 0 restart 1, training 0 SECRET")
    name = f"both/seed-1, {start_name()}, training 0"
    write_json(run.start, {"start": name, "secret": "ours", "host": "127.0.0.1", "port": other.port})
    thread, said = on_rank_1(lambda: Meeting(run, 2))
    thread.join(30)
    assert f"at 127.0.0.1:{other.port} answers both/seed-2, job 7 step 0 restart 1, training 0, and" in str(said[0])
    assert str(said[0]).endswith(f"this is {name}") and "SECRET" not in str(said[0])


def test_an_address_that_cannot_be_listened_at_is_one_line(run, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setattr(ranks, "CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"MASTER_ADDR: the first rank cannot be reached at no-such-host.invalid"):
        Meeting(run, 2)


def test_the_stop_signal_of_one_is_heard_by_all_that_wait(run, monkeypatch):
    monkeypatch.setattr(ranks, "MEET_SECONDS", 60.0)
    thread, said = on_rank_1(lambda: Meeting(run, 2).wait_for_all("built"))
    meeting = Meeting(run, 2)
    deadline = time.monotonic() + 120
    while not meeting._store.check(["built 1"]):
        assert time.monotonic() < deadline
    monkeypatch.setattr(preemption, "_requested", True)
    with pytest.raises(Preempted, match=r"both/seed-1: told to stop before it trained; nothing was to be saved"):
        meeting.tell("never")
    thread.join(30)
    assert isinstance(said[0], Preempted)


def test_a_first_rank_that_dies_is_a_lost_peer(run, monkeypatch):
    thread, said = on_rank_1(lambda: Meeting(run, 2).wait_for_all("built"))
    meeting = Meeting(run, 2)
    ranks._kept.clear()
    del meeting
    thread.join(30)
    assert isinstance(said[0], Exception) and is_lost_peer(said[0]), said


def test_each_start_has_a_name_of_its_own(monkeypatch):
    monkeypatch.delenv(START, raising=False)
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    first = start_name()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert len({first, start_name()}) == 2 and "job 5 step 0 restart 1" in start_name()


def test_the_place_of_a_login_shell_is_none(monkeypatch, capsys):
    for name in PLACE:
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    forget_place_of_the_shell()
    assert os.environ["RANK"] == "3"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    forget_place_of_the_shell()
    assert not set(PLACE) & set(os.environ)
    assert "RANK=3 is ignored: neither srun nor torchrun set it" in capsys.readouterr().err
