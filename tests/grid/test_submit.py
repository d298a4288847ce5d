"""What is submitted, without a scheduler: the text of scripts, who waits for whom, the site file."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from paths import CHECKOUT, SUPPORT

from replication.config import SlurmConfig, find_cluster, load_cell, load_suite
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.cells import Cell, load_cells
from replication.grid.slurm import Queued, Site, load_site
from replication.grid.submissions import Submission, hidden_jobs, jobs_of_cells, moved_from, next_number, submissions
from replication.grid.submit import Job, _dependency, find_unfollowed, options, plan_jobs, script
from replication.runs.files import write_json
from replication.runs.layout import SuiteDir

GOLDEN = SUPPORT / "golden"
CLUSTERS = ("one_gpu", "node_8gpu_zero2", "nodes_zero3")
SITE = Site(path=Path("/cluster/site.env"), account="lab", partition="gpu", qos="long", sbatch="--exclusive")


def suite_of(seeds=(1, 2)):
    suite = load_suite("ablation_2x2")
    run = suite.run | {
        "training": suite.run["training"] | {"batch_tokens": 64 * 128}
    }  # 32 processes cut it in two each
    return replace(suite, seeds=seeds, run=run)


@functools.cache  # loading configs is most of the time of these tests
def cells_of(cluster: str, seeds=(1, 2), *flags: str) -> list[Cell]:
    return load_cells(suite_of(seeds), SuiteDir(Path("/results")), flags, find_cluster(cluster))


def jobs_of(cluster: str, seeds=(1, 2), *flags: str, waiting=(), **more) -> list[Job]:
    cells = cells_of(cluster, seeds, *flags)
    return plan_jobs("suite-000000", 1, cells[0], cells, waiting=waiting, **more)


def in_queue(stage: str, seed: int, id: str, arms=("baseline", "both")) -> Submission:
    name = f"000{id}-{stage}" + (f"-seed-{seed}" if seed else "")
    cells = tuple(f"runs/{arm}/seed-{seed}" for arm in arms if seed)
    return Submission(Path(f"/results/launch/{name}"), f"suite-000000.{name}", stage, cells, id)  # type: ignore[arg-type]


def golden_text(cluster: str, monkeypatch) -> str:
    """The script that trains one seed block, with this machine's paths replaced."""
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr(sys, "executable", "/checkout/.venv/bin/python")
    text = script(jobs_of(cluster)[0], SITE, Path("/results/launch/0001-train-seed-1"), 4)
    return text.replace(str(CHECKOUT), "/checkout")


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_golden_scripts(cluster, monkeypatch):
    """Regenerate with REPLICATION_GOLDEN=write, and read the difference."""
    path, text = GOLDEN / f"{cluster}.sbatch", golden_text(cluster, monkeypatch)
    if os.environ.get("REPLICATION_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_body_is_the_launch_script_word_for_word(monkeypatch):
    """What a reader of launch/ sees is what runs: all its lines but the example's #SBATCH lines, in order."""
    body = [
        line for line in (CHECKOUT / "launch" / "array.sbatch").read_text().splitlines() if "#SBATCH" not in line[:7]
    ]
    written = golden_text("one_gpu", monkeypatch).splitlines()
    assert written[0] == body[0]
    assert written[-len(body) + 1 :] == body[1:]


# ---------------------------------------------------------------- what is asked for


def job(stage, cluster="node_8gpu_zero2", *flags):
    return Job(
        "name", stage, ("runs/both/seed-1",) if stage != "report" else (), cells_of(cluster, (1,), *flags)[0].config
    )


def test_what_one_process_does_asks_for_one_gpu_and_the_report_for_none():
    asked = {stage: " ".join(options(job(stage), Site(), Path("/f"), 4)) for stage in ("train", "generate", "report")}
    assert "--ntasks-per-node=8 --gpus-per-node=8" in asked["train"]
    assert "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1" in asked["generate"]
    assert "gpu" not in asked["report"] and "--array" not in asked["report"]


def test_the_sites_way_of_asking():
    keys = ("--cluster.slurm.memory_gib=900", "--cluster.slurm.cpus_per_task=12", "--cluster.slurm.signal_to=ranks")
    site = Site(gpus="gres", on_preemption="chain", constraint="h100")
    asked = options(job("train", "node_8gpu_zero2", *keys), site, Path("/a folder"), 4)
    for wanted in ("--gres=gpu:8", "--mem=900G", "--cpus-per-task=12", "--signal=USR2@300", "--no-requeue",
                   "--constraint=h100", '--output="/a folder/output-%a.txt"'):  # fmt: skip
        assert wanted in asked


# ---------------------------------------------------------------- who waits for whom


def waits(jobs: list[Job]) -> list[str]:
    """The dependency of each job, ids being positions."""
    ids = [str(i) for i in range(len(jobs))]
    return [next(iter(_dependency(job, ids)), "").removeprefix("--dependency=") for job in jobs]


def test_seed_blocks_follow_each_other_and_their_completions_and_the_report_follow_them():
    jobs = jobs_of("one_gpu", (1, 2, 3), "--cluster.slurm.concurrent_cells=4")  # one block after the other
    assert [s.stage for s in jobs] == ["train", "generate"] * 3 + ["report"]
    assert waits(jobs) == ["", "aftercorr:0", "afterany:0", "aftercorr:2", "afterany:2", "aftercorr:4",
                            "afterany:0:1:2:3:4:5"]  # fmt: skip
    assert [c.split("/")[1] for c in jobs[0].cells] == ["baseline", "token_gain", "layer_gain", "both"]
    assert {c.split("/")[2] for c in jobs[2].cells} == {"seed-2"}


def test_more_cells_at_once_are_more_blocks_side_by_side():
    jobs = jobs_of("one_gpu", (1, 2, 3, 4, 5), "--cluster.slurm.concurrent_cells=9")  # two whole blocks
    assert [w for s, w in zip(jobs, waits(jobs), strict=True) if s.stage == "train"] == [
        "", "", "afterany:0", "afterany:2", "afterany:4",
    ]  # fmt: skip
    assert "--array=0-3%4" in options(jobs[0], Site(), Path("/f"), 9)


def test_fewer_cells_at_once_than_arms_limit_the_array():
    jobs = jobs_of("one_gpu", (1, 2), "--cluster.slurm.concurrent_cells=2")
    assert "--array=0-3%2" in options(jobs[0], Site(), Path("/f"), 2)
    assert waits(jobs)[2] == "afterany:0"


def test_what_is_in_the_queue_already_is_waited_for():
    waiting = [in_queue("train", 1, "71"), in_queue("generate", 1, "72"), in_queue("report", 0, "73")]
    one_block = ("--cluster.slurm.concurrent_cells=4",)
    assert waits(jobs_of("one_gpu", (2,), *one_block, waiting=waiting, behind=True)) == [
        "afterany:71", "aftercorr:0", "afterany:0:1:71:72",
    ]  # fmt: skip
    jobs = jobs_of("one_gpu", (2,), *one_block, waiting=waiting)  # a retry is not kept waiting
    assert waits(jobs) == ["", "aftercorr:0", "afterany:0:1:71:72"]


def test_where_a_site_chains_what_follows_knows_whose_chains_to_wait_for():
    jobs = jobs_of("one_gpu", (1, 2), "--cluster.slurm.concurrent_cells=4")
    first = "suite-000000.0001-train-seed-1"
    assert [s.after for s in jobs] == ["", first, first, "suite-000000.0003-train-seed-2", "suite-000000"]


def test_trained_cells_only_generate_and_without_prompts_nothing_does():
    cells = cells_of("one_gpu", (1,))
    jobs = plan_jobs("suite-000000", 1, cells[0], cells, trained=cells[1:])
    asked = [(s.stage, len(s.cells)) for s in jobs]
    assert asked == [("train", 1), ("generate", 1), ("generate", 3), ("report", 0)]
    jobs = jobs_of("one_gpu", (1,), "--generation.prompts=null")
    assert [s.stage for s in jobs] == ["train", "report"]
    assert plan_jobs("suite-000000", 1, cells[0], []) == []


def test_what_an_earlier_call_did_not_come_to_submit_is_submitted():
    cells = cells_of("one_gpu", (1,))
    train, generate, report = in_queue("train", 1, "71"), in_queue("generate", 1, "72"), in_queue("report", 0, "73")
    lost = find_unfollowed([train], cells)
    assert lost == {train: cells[0]}
    jobs = plan_jobs("suite-000000", 2, cells[0], [], waiting=[train], unfollowed=lost)
    assert [(s.stage, s.cells) for s in jobs] == [("generate", train.cells), ("report", ())]
    assert waits(jobs) == ["aftercorr:71", "afterany:0:71"]
    assert find_unfollowed([train, generate], cells) == {}
    jobs = plan_jobs("suite-000000", 3, cells[0], [], waiting=[train, generate])
    assert waits(jobs) == ["afterany:71:72"], "the report alone"
    assert plan_jobs("suite-000000", 4, cells[0], [], waiting=[train, generate, report]) == []


def test_blocks_of_unlike_machines_are_arrays_of_their_own_and_the_largest_sets_the_lanes():
    here, there = cells_of("one_gpu", (1, 2, 3)), cells_of("node_8gpu_zero2", (1, 2, 3))
    cells = [*here[:4], here[4], there[8]]
    jobs = plan_jobs("suite-000000", 1, cells[0], cells)
    trains = [(len(s.cells), s.config.cluster.devices) for s in jobs if s.stage == "train"]
    assert trains == [(4, 1), (1, 1), (1, 8)]


# ---------------------------------------------------------------- a controller that does not answer

DOWN = "slurm_requeue error: Unable to contact slurm controller (connect failure)"


def go_on_later(folder: Path, functions: str, site: str = "", **given: str) -> subprocess.CompletedProcess[str]:
    """What a job does that was told to stop, with functions in place of SLURM's commands."""
    (folder / "site.env").write_text(site)
    variables = {"JOB_ID": "7", "JOB_NODELIST": "n1", "JOB_NAME": "suite.0001.0"}
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail\n{functions}\nsource "$REPLICATION_CHECKOUT/launch/job.sh"; go_on_later'],
        cwd=folder, capture_output=True, text=True, timeout=60,
        env={f"SLURM_{name}": value for name, value in variables.items()} | given |
            {"PATH": os.environ["PATH"], "REPLICATION_CHECKOUT": str(CHECKOUT),
             "REPLICATION_SITE": f"{folder}/site.env"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "asked", "said"),
    [
        ([], 1, "requeued"),
        ([DOWN, "Unexpected message received", DOWN], 4, "requeued"),
        (["Requested operation is presently disabled for job 7"], 1, "SITE_ON_PREEMPTION: this site does not requeue"),
        ([DOWN, "Access/permission denied"], 2, "SITE_ON_PREEMPTION: this site does not requeue"),
        ([DOWN] * 9, 5, f"not requeued: the controller did not answer in time ({DOWN})"),
    ],
)
def test_a_requeue_is_asked_for_until_there_is_an_answer_within_the_lead_time(tmp_path, answers, asked, said):
    """In a shell whose clock moves by what it sleeps."""
    for n, answer in enumerate(answers, 1):
        (tmp_path / f"answer-{n}").write_text(answer)
    functions = """
    scontrol() {
      echo "$*" >>asked
      local file; file=answer-$(wc -l <asked)
      if [[ -e $file ]]; then cat "$file"; return 1; fi
    }
    sleep() { SECONDS=$((SECONDS + $1)); }
    """
    done = go_on_later(tmp_path, functions, REPLICATION_LEAD_SECONDS="20")
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 7"] * asked
    lines = done.stderr.splitlines()
    assert said in lines[-1] and all("no answer from the controller" in line for line in lines[:-1])


def test_a_link_of_a_chain_whose_answer_was_lost_is_not_submitted_twice(tmp_path):
    functions = """
    sbatch() { echo "$*" >>asked; echo "Socket timed out on send/recv operation" >&2; return 1; }
    squeue() { echo 7; [[ ! -e asked ]] || echo 8; }
    env() { shift 2; "$@"; }
    sleep() { :; }
    """
    done = go_on_later(tmp_path, functions, site="SITE_ON_PREEMPTION=chain\n")
    assert (done.returncode, len((tmp_path / "asked").read_text().splitlines())) == (0, 1), done.stderr
    assert done.stderr.splitlines()[-1].endswith("goes on as job 8")


# ---------------------------------------------------------------- whose the queue is


def record(suite_dir: SuiteDir, number: int, stage: str, cells: list[str], **facts: str) -> Submission:
    folder = suite_dir.launch / f"000{number}-{stage}"
    known = {"name": f"suite-000000.{folder.name}", "stage": stage, "cells": cells, "out": str(suite_dir.root)} | facts
    write_json(folder / "job.json", known)
    write_json(folder / "submitted.json", {"id": str(number)})
    return submissions(suite_dir)[-1]


def queued(submission: Submission, index: int = 0, **facts: Any) -> Queued:
    asked = {"state": "PENDING", "reason": "", "restarts": 0, "user": "alice"} | facts
    return Queued(f"{submission.job_id}_{index}", index, submission.name, **asked)


def test_a_moved_folder_keeps_its_jobs_and_a_copy_has_none(tmp_path):
    here = SuiteDir(tmp_path / "here")
    job = queued(record(here, 1, "train", ["runs/both/seed-1"]))
    (there := SuiteDir(tmp_path / "there")).root.symlink_to(here.root)
    assert list(jobs_of_cells(submissions(there), [job])) == ["runs/both/seed-1"], "another way to the same folder"
    shutil.copytree(here.root, tmp_path / "copy")
    shutil.copytree(here.launch / "0001-train", tmp_path / "copy" / "launch" / "old 0001-train")
    assert submissions(SuiteDir(tmp_path / "copy")) == [] and next_number(SuiteDir(tmp_path / "copy")) == 2
    assert moved_from(submissions(here)) == []
    moved = SuiteDir(here.root.rename(tmp_path / "moved"))
    assert list(jobs_of_cells(submissions(moved), [job])) == ["runs/both/seed-1"]
    assert moved_from(submissions(moved)) == [str(here.root)]
    record(here, 1, "train", ["runs/both/seed-1"], name=job.name)
    write_json(here.launch / "0001-train" / "submitted.json", {"id": "5"})
    assert jobs_of_cells(submissions(here), [job]) == {}, "a new suite in the old place: another job of the same name"
    assert list(jobs_of_cells(submissions(moved), [job])) == ["runs/both/seed-1"]


def test_another_users_jobs_are_taken_to_live_where_the_cluster_hides_them(tmp_path, monkeypatch):
    suite_dir = SuiteDir(tmp_path / "out")
    cells = [f"runs/{arm}/seed-1" for arm in ("baseline", "token_gain", "layer_gain", "both")]
    record(suite_dir, 1, "train", cells, user="alice")
    monkeypatch.setattr(slurm, "hides_others", lambda: True)
    (suite_dir.root / cells[0]).mkdir(parents=True)
    (suite_dir.root / cells[0] / "jobs.jsonl").write_text('{"event": "ended", "code": 137, "job": "1_0"}\n')
    (suite_dir.root / cells[1]).mkdir(parents=True)
    (suite_dir.root / cells[1] / "jobs.jsonl").write_text('{"event": "started", "code": 0, "job": "1_1"}\n')
    hidden = hidden_jobs(suite_dir, submissions(suite_dir))
    assert [job.id for job in hidden] == ["1_1", "1_2", "1_3"] and all("alice" in job.reason for job in hidden)
    assert list(jobs_of_cells(submissions(suite_dir), hidden)) == cells[1:]
    monkeypatch.setattr(slurm, "user_name", lambda uid=None: "alice")
    assert hidden_jobs(suite_dir, submissions(suite_dir)) == []


# ---------------------------------------------------------------- cluster and site files


def test_a_cluster_file_cannot_change_the_experiment(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text("cluster: {devices: 2}\ntraining: {steps: 5}\n")
    with pytest.raises(UserError, match=r"fast.yaml: sets training; a cluster file says where cells run"):
        find_cluster(str(path))
    a, b = (load_cell(suite_of(), "both", 1, cluster=find_cluster(c)) for c in ("one_gpu", "nodes_zero3"))
    assert a.cluster != b.cluster
    assert Cell("both", 1, None, a).hash == Cell("both", 1, None, b).hash  # type: ignore[arg-type]


def test_the_example_of_a_site_file_is_read(tmp_path, monkeypatch):
    assert load_site(CHECKOUT / "launch" / "site.env.example") == Site(path=CHECKOUT / "launch" / "site.env.example")
    path = tmp_path / "my site.env"
    path.write_text("SITE_ACCOUNT=lab\nSITE_MODULES='cuda/12.6 gcc/13'\nNCCL_DEBUG=WARN\nSITE_SCRATCH=/local/$USER\n")
    monkeypatch.setenv("USER", "me")
    with open(path, "a") as file:  # what is set only inside a job is empty here
        file.write("SITE_CONTAINER=apptainer\nSITE_MASTER_ADDR=$SLURM_JOB_NODELIST\n")
    site = load_site(path)
    assert (site.account, site.modules, site.scratch) == ("lab", "cuda/12.6 gcc/13", "/local/me")
    assert "NCCL_DEBUG" not in os.environ


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("SITE_PARTITON=gpu\n", "unknown SITE_PARTITON; the site's variables are SITE_ACCOUNT, SITE_PARTITION"),
        ("SITE_ON_PREEMPTION=wait\n", "SITE_ON_PREEMPTION is 'wait'; it must be one of requeue, chain, end"),
        ("SITE_ACCOUNT=(\n", "bash cannot read it"),
        ("false\n", "bash cannot read it"),
    ],
)
def test_a_broken_site_file_is_one_line(tmp_path, text, line):
    path = tmp_path / "site.env"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_site(path)
    assert line in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_site_file():
    with pytest.raises(UserError, match=r"--site: nowhere\.env does not exist; copy launch/site.env.example there"):
        load_site(Path("nowhere.env"))


def test_a_dry_run_prints_all_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "replication", "grid", "submit", "ablation_2x2", "--cluster", "node_8gpu_zero2",
         "--out", str(tmp_path / "out"), "--dry-run"],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "60"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nsbatch --parsable ") == 5
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert "'--dependency=aftercorr:<0001-train-seed-1>' --kill-on-invalid-dep=yes" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_cluster_file_must_say_whether_jobs_need_gpus(tmp_path):
    path = tmp_path / "open.yaml"
    path.write_text("cluster: {accelerator: auto}\n")
    done = subprocess.run(
        [sys.executable, "-m", "replication", "grid", "submit", "ablation_2x2", "--cluster", str(path), "--dry-run",
         "--out", str(tmp_path / "out")],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cluster.accelerator: auto does not say whether a job needs GPUs" in done.stderr


def test_the_page_on_clusters_has_every_key_with_its_default():
    page = (CHECKOUT / "launch" / "README.md").read_text()
    for field in fields(SlurmConfig):
        default = {"batch": "`batch`", None: "the site's"}.get(field.default, field.default)
        assert f"| `{field.name}` | {default} |" in page
