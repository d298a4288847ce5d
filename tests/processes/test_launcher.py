"""Processes of one run: their variables, their end, and that none outlives the launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from paths import CHECKOUT
from shadows import shadowed

from replication.processes import launcher
from replication.processes.launcher import run_ranks


def rank_script(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time, json, signal\nrank = int(os.environ['RANK'])\n{code}"]


def test_each_rank_gets_the_variables_of_torchs_launcher(tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    code = f"open(f'{tmp_path}/{{rank}}', 'w').write(json.dumps([os.environ[n] for n in {names}]))"
    assert run_ranks(rank_script(code), 2) == 0
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"]
    assert second == ["1", "1", *first[2:]]


def test_one_bad_end_ends_all_and_its_code_is_the_result(tmp_path, capfd):
    wait = f"(time.sleep(600), open('{tmp_path}/waited', 'w'))"
    assert run_ranks(rank_script(f"sys.exit(2) if rank == 1 else {wait}"), 2) == 2
    assert run_ranks(rank_script(f"os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else {wait}"), 2) == 137
    assert run_ranks(rank_script("sys.exit(75 if rank == 1 else 1)"), 2) == 75, "the other lost a peer that had stopped"
    assert not (tmp_path / "waited").exists()
    assert capfd.readouterr().err.strip() == "rank 0: ended by SIGKILL (out of memory?)", "who could not speak is named"


def test_a_rank_that_ignores_the_signal_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); open('{tmp_path}/deaf', 'w'); time.sleep(600)"
    bad = f"while not os.path.exists('{tmp_path}/deaf'): time.sleep(0.02)\n    sys.exit(3)"
    code = f"if rank:\n    {bad}\n{deaf}; open('{tmp_path}/waited', 'w')"
    assert run_ranks(rank_script(code), 2) == 3
    assert not (tmp_path / "waited").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_launcher(tmp_path, how):
    code = f"open(f'{tmp_path}/{{rank}}', 'w').write(str(os.getpid())); time.sleep(600)"
    script = f"import sys; from replication.processes.launcher import run_ranks; run_ranks({rank_script(code)!r}, 2)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=CHECKOUT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(pids := [int(p.read_text() or 0) for p in tmp_path.iterdir()]) < 2 or 0 in pids:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, how)
    process.wait(timeout=120)
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=60)
    assert alive == []


POOL = """
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
import sys
from replication.cli.main import main
if __name__ == "__main__":
    sys.argv = ["replicate", "--version"]
    main()
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        print(pool.submit(abs, -5).result())
"""


def test_the_current_folder_holds_no_module_of_ours(tmp_path):
    """Typed by hand, and in processes that a library starts."""
    here, script = shadowed(tmp_path / "here"), tmp_path / "pool.py"
    script.write_text(POOL)
    for command, says in ((["-m", "replication", "--version"], "replicate 0"), (["-P", str(script)], "5")):
        shutil.rmtree(here / "replication", ignore_errors=True)  # before -P Python itself would have taken it
        done = subprocess.run([sys.executable, *command], cwd=here, capture_output=True, text=True, timeout=60)
        assert says in done.stdout, done.stderr


BACKGROUND = """
import sys, time
from replication.cli import main as cli
def wait(args):
    print("ready", flush=True)
    time.sleep(60)
cli.VERBS["train"] = wait
sys.argv = ["replicate", "train"]
sys.exit(cli.main())
"""


def ended_by(stop: signal.Signals, environment: dict[str, str]) -> int:
    """Code of a verb that was started in the background, with SIGINT and SIGHUP ignored, and then told to stop."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with subprocess.Popen(
        [sys.executable, "-P", "-c", BACKGROUND], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | environment, preexec_fn=ignore,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)  # nohup means it
        process.send_signal(stop)
        return process.wait(timeout=120)


@pytest.mark.parametrize(
    ("stop", "environment", "code"),
    [("SIGINT", {}, 130), ("SIGTERM", {}, 130), ("SIGUSR2", {}, 75), ("SIGTERM", {"SLURM_STEP_ID": "0"}, 75)],
)
def test_what_was_started_in_the_background_hears_a_signal_that_is_sent_to_it(stop, environment, code):
    assert ended_by(signal.Signals[stop], environment) == code
