"""launch/array.sbatch on a made-up SLURM: what reaches the processes, and how every end is told."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass

import pytest
from paths import CHECKOUT

PROGRAMS = {
    "srun": 'printf "%s\\0" "$@" >"$FAKE/srun"; env --null >"$FAKE/environment"; eval "$ACT"; exit "$CODE"',
    "scontrol": """case $* in
  *hostnames*) echo n1 ;;
  *node*) echo "NodeName=n1 NodeAddr=10.0.0.1" ;;
  *) echo "$*" >>"$FAKE/scontrol" ;;
esac""",
}  # fmt: skip


@dataclass
class Job:
    """How one job ended, and what it left."""

    code: int
    log: str
    notes: list[tuple[str, int]]
    environment: dict[str, str]
    asked: str


@pytest.fixture
def job(tmp_path):
    """Runs array.sbatch for one cell, with a site file, a code of srun and a login shell's variables."""
    cell = tmp_path / "out" / "cell"
    (tmp_path / "bin").mkdir()
    cell.mkdir(parents=True)
    (tmp_path / "plan.txt").write_text("cell\n")
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(site: str = "", code: int = 0, **shell: str) -> Job:
        (tmp_path / "site.env").write_text(site)
        given = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAKE": str(tmp_path), "CODE": str(code), "ACT": "",
            "HOME": "/",
            "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "n1",
            "SLURM_NNODES": "1", "REPLICATION_CHECKOUT": str(CHECKOUT), "REPLICATION_SITE": str(tmp_path / "site.env"),
            "REPLICATION_PYTHON": "python",
        }  # fmt: skip
        command = ["bash", CHECKOUT / "launch" / "array.sbatch", tmp_path / "plan.txt", tmp_path / "out", "train"]
        done = subprocess.run(command, env=given | shell, timeout=60, capture_output=True, text=True)
        assert done.stdout + done.stderr == "", "all of it is in the cell's log"
        notes = [json.loads(line) for line in (cell / "jobs.jsonl").read_text().splitlines()]
        found = tmp_path / "environment"
        lines = found.read_text().split("\0") if found.exists() else []
        asked = tmp_path / "scontrol"
        return Job(
            done.returncode, (cell / "log.txt").read_text(), [(n["event"], n["code"]) for n in notes],
            dict(line.partition("=")[::2] for line in lines if line), asked.read_text() if asked.exists() else "",
        )  # fmt: skip

    return run


def test_nothing_of_a_login_shell_passes_for_the_job_s_own(job):
    stray = {"MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    ended = job("NCCL_DEBUG=WARN\n", PYTHONPATH=":/mine::", SITE_SCRATCH="/nowhere", SITE_MASTER_ADDR="old", **stray)
    assert (ended.code, ended.notes) == (0, [("started", 0), ("ended", 0)]), ended.log
    assert not set(stray) & set(ended.environment) and "SITE_SCRATCH" not in ended.environment
    assert [ended.environment[k] for k in ("SITE_MASTER_ADDR", "PYTHONPATH", "NCCL_DEBUG")] == [
        "10.0.0.1",
        "/mine",
        "WARN",
    ]
    assert job("SITE_MASTER_ADDR=n1-ib0\n").environment["SITE_MASTER_ADDR"] == "n1-ib0"


def test_the_site_s_own_code_may_read_what_is_unset_and_fail_in_the_middle(job):
    module = 'false\nmodule() { [ "$NOT_SET" = "" ]; false; export LOADED="$2"; }\nSITE_MODULES=cuda\ntrue\n'
    ended = job(module)
    assert (ended.code, ended.environment["LOADED"]) == (0, "cuda"), ended.log


@pytest.mark.parametrize(
    ("site", "code", "says"),
    [
        ("module() { return 1; }\nSITE_MODULES=cuda\n", 2, "error: SITE_MODULES: cannot load cuda"),
        ("SITE_MODULES=cuda\n", 2, "module: command not found"),
        ("if\n", 2, "site.env: its last line ended with code"),
        ("exit 3\n", 3, "error: the job script ended with code 3 before its step"),
        ("module() { exit 4; }\nSITE_MODULES=cuda\n", 4, "error: the job script ended with code 4 before its step"),
    ],
)  # fmt: skip
def test_why_a_job_ended_before_its_step_is_in_the_log_and_in_the_notes(job, site, code, says):
    ended = job(site)
    assert (ended.code, ended.notes, ended.environment) == (code, [("ended", code)], {})
    assert says in ended.log


@pytest.mark.parametrize("code", [75, 128 + 12, 128 + 15])
def test_a_step_that_was_told_to_stop_at_any_phase_goes_on_later(job, code):
    ended = job(code=code)
    assert (ended.code, ended.notes) == (75, [("started", 0), ("preempted", 75)])
    assert ended.asked == "requeue 7_0\n"


def test_a_job_that_was_cancelled_says_nothing_more(job):
    note = """echo '{"event": "cancelled", "code": 0}' >>"$FAKE/out/cell/jobs.jsonl\""""
    ended = job(code=75, ACT=note)
    assert (ended.code, ended.notes, ended.asked) == (75, [("started", 0), ("cancelled", 0)], "")


def test_a_step_that_failed_is_said_once(job):
    assert job(code=1).notes == [("started", 0), ("ended", 1)]
