"""The request to stop: kept as a flag, acted on at an optimizer boundary, and the same end as undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning import Callback
from paths import CHECKOUT
from run_files import read_journal
from training_setup import fit, identical, small_config, weights

import replication.processes.preemption as preemption
import replication.training.train as train_module
from replication.processes.launcher import run_ranks
from replication.processes.preemption import PREEMPTED, Preempted, Times, grace_seconds_needed, record_times
from replication.runs.files import read_json
from replication.runs.layout import RunDir


class TellToStop(Callback):
    """Sends this process the stop signal in the middle of a step."""

    def __init__(self, step: int, micro_batch: int) -> None:
        self.step, self.micro_batch = step, micro_batch

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        micro_batches = trainer.fit_loop.epoch_loop.batch_idx
        if (trainer.global_step, micro_batches % trainer.accumulate_grad_batches) == (self.step, self.micro_batch):
            os.kill(os.getpid(), signal.SIGUSR2)


@pytest.fixture
def listening():
    before = signal.getsignal(signal.SIGUSR2)
    preemption.listen("USR2")
    yield
    signal.signal(signal.SIGUSR2, before)
    preemption._requested = False


def stop_at(monkeypatch, step: int, micro_batch: int = 0) -> None:
    build = train_module.build_trainer

    def with_stop(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.callbacks.append(TellToStop(step, micro_batch))
        return trainer

    monkeypatch.setattr(train_module, "build_trainer", with_stop)


@pytest.mark.parametrize(("step", "micro_batch", "saved"), [(0, 0, 1), (2, 1, 3), (3, 1, 4)])
def test_a_run_stops_at_the_next_boundary_and_ends_as_if_it_had_not(
    tmp_path, monkeypatch, listening, step, micro_batch, saved
):
    config = small_config("both", "--cluster.micro_batch_sequences=4")
    undisturbed = fit(config, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        stop_at(patch, step, micro_batch)
        with pytest.raises(Preempted, match=f"both/seed-1: told to stop and saved at step {saved}"):
            fit(config, tmp_path / "stopped")
    run = RunDir(tmp_path / "stopped")
    assert not run.failed.exists()
    assert (run.checkpoints / f"step-{saved:06d}" / "COMPLETE").is_file()
    preemption._requested = False
    fit(config, tmp_path / "stopped")
    assert identical(weights(run), weights(undisturbed))
    assert read_json(run.manifest)["data_chain"] == read_json(undisturbed.manifest)["data_chain"]
    assert [line["step"] for line in read_journal(run.metrics)] == [
        line["step"] for line in read_journal(undisturbed.metrics)
    ]


def test_told_before_the_first_step_nothing_is_saved(tmp_path, monkeypatch, listening):
    monkeypatch.setattr(preemption, "_requested", True)
    with pytest.raises(Preempted, match="told to stop before its first step; nothing was to be saved"):
        fit(small_config(), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_signal_that_comes_before_a_process_listens_is_kept():
    code = "import os, signal, time; from replication.processes.preemption import *; hold('USR2'); "
    code += "os.kill(os.getpid(), 12); listen('USR2'); print(stop_requested())"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n")


def catches(signum: signal.Signals, status: str) -> bool:
    """Whether the process of a /proc/PID/status has a handler for a signal."""
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signum - 1) & 1)


def test_the_launcher_hands_the_signal_on_and_its_code_is_that_of_the_ranks(tmp_path):
    rank = "import os, sys, time; from replication.processes.preemption import *; listen('USR2')\n"
    rank += f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').close()\n"
    rank += "while not stop_requested(): time.sleep(0.02)\ntime.sleep(1.5 * int(os.environ['RANK']))\n"
    rank += f"sys.exit({PREEMPTED})"
    code = "import sys; from replication.processes.launcher import run_ranks; "
    code += f"sys.exit(run_ranks([sys.executable, '-c', {rank!r}], 2))"
    before = signal.getsignal(signal.SIGUSR2)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT)
    status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 120
    while not (len(list(tmp_path.iterdir())) == 2 and catches(signal.SIGUSR2, status.read_text())):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=120) == PREEMPTED
    assert run_ranks([sys.executable, "-c", "pass"], 2) == 0
    assert signal.getsignal(signal.SIGUSR2) == before, "what was there before is back"


def test_the_lead_time_that_is_needed_comes_from_the_longest_step_and_save(tmp_path):
    run = RunDir(tmp_path)
    assert grace_seconds_needed(run) is None
    record_times(run, Times(save_seconds=12.0, step_seconds=2.0, stall_seconds=1.0))
    record_times(run, Times(save_seconds=8.0, step_seconds=3.0))
    assert read_json(run.times) == {"save_seconds": 12.0, "step_seconds": 3.0, "stall_seconds": 1.0}
    assert grace_seconds_needed(run) == 39  # 1.5 x (a step of 3, a save of 12, 11 of another that is being written)


def test_a_run_records_how_long_its_steps_and_saves_take(tmp_path):
    times = read_json(fit(small_config(), tmp_path).times)
    assert times["save_seconds"] > 0 and times["step_seconds"] > 0
