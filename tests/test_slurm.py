"""The launch scripts and `grid submit` on a real SLURM cluster of two nodes, with real ZeRO 2 over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from required import do_without
from shadows import shadowed
from slurm_cluster import SlurmCluster, missing_programs, slurm_cluster
from small_corpus import prose_layer, texts, write_folder

from replication.rundir import RunDir, SuiteDir, read_journal, read_json

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
ARMS = ("baseline", "token_gain", "layer_gain", "both")

FULL = bool(os.environ.get("REPLICATION_FULL"))  # the long form: all arms at two seeds, and what is marked with it

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    missing = missing_programs()
    if missing:
        reason = f"no {', '.join(missing)} (Debian, Ubuntu: apt-get install slurm-wlm munge)"
        do_without("slurm", reason)
    with slurm_cluster() as running:
        yield running


@pytest.fixture
def idle(cluster):
    """The cluster, whose queue a test leaves empty."""
    yield cluster
    cluster.run("scancel", "--user", str(os.getuid()))
    for node in ("n1", "n2"):
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    cluster.drain(60)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A prepared corpus that all suites of this file share."""
    folder = tmp_path_factory.mktemp("corpus")
    write_folder(folder / "text", texts(40))
    layer = {"data": prose_layer(folder / "text")}
    (folder / "data.yaml").write_text(yaml.safe_dump(layer))
    subprocess.run(
        [sys.executable, "-m", "replication", "prepare", "--config", folder / "data.yaml", "--out", folder / "tokens"],
        check=True, cwd=ROOT, capture_output=True, timeout=120,
    )  # fmt: skip
    return folder


class Suite:
    """A suite in a folder of its own, and the commands of a user on a login node."""

    def __init__(self, cluster: SlurmCluster, corpus: Path, folder: Path, arms=ARMS, seeds=(1, 2), **run) -> None:
        self.cluster, self.folder, self.out = cluster, folder, SuiteDir(folder / "out put")  # a space in every path
        model = {"vocab_size": 300, "n_blocks": 2, "d_model": 32, "d_head": 8, "d_ff": 16}
        (folder / "layer.yaml").write_text(yaml.safe_dump({"model": model}))
        defaults = {
            "data": {"dir": str(corpus / "tokens")},
            "training": {"steps": 6, "batch_tokens": 128, "warmup_steps": 2},
            "validation": {"every_steps": 3, "sequences": 4},
            "logging": {"log_every_steps": 2},
            "checkpoints": {"every_steps": 2},
            "generation": {"max_new_tokens": 5, "samples_per_prompt": 1},
        }
        suite = {
            "name": "small", "arms": list(arms), "seeds": list(seeds),
            "layers": [str(corpus / "data.yaml"), str(folder / "layer.yaml")],
            "run": {key: value | run.get(key, {}) for key, value in defaults.items()},
        }  # fmt: skip
        (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
        self.site()
        self.where(strategy="zero2", nodes=2)

    def site(self, **variables: str) -> None:
        (self.folder / "site.env").write_text("".join(f"{k}='{v}'\n" for k, v in variables.items()))

    def where(self, lead: int = 20, concurrent: int = 1, signal_to: str = "batch", **keys) -> None:
        slurm = {"time_limit_minutes": 10, "lead_seconds": lead, "concurrent_cells": concurrent, "signal_to": signal_to}
        text = yaml.safe_dump({"cluster": {"accelerator": "cpu", "threads": 1, "slurm": slurm, **keys}})
        (self.folder / "cluster.yaml").write_text(text)

    def grid(self, action: str, *args: object, code: int = 0, env: dict[str, str] | None = None) -> str:
        """What `replicate grid ACTION` prints, on stderr where it is refused."""
        given = ["--site", self.folder / "site.env"] if action in ("submit", "retry") else []
        given += ["--cluster", self.folder / "cluster.yaml"] if action == "submit" else []
        command = [
            sys.executable,
            "-P",
            "-m",
            "replication",
            "grid",
            action,
            self.folder / "suite.yaml",
            "--out",
            self.out.root,
        ]
        done = subprocess.run(
            [*map(str, command), *map(str, given), *map(str, args)], capture_output=True, text=True,
            timeout=300, cwd=shadowed(self.folder / "here"),
            env=self.cluster.environment | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | (env or {}),
        )  # fmt: skip
        assert done.returncode == code, f"{done.stdout}{done.stderr}\n{self.logs()}"
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr.strip()

    def states(self) -> list[str]:
        """The state column of the status table, in the order of its rows."""
        rows = [line.split("│")[2].strip() for line in self.grid("status").splitlines() if line.startswith("│")]
        assert rows
        return rows

    def run_dir(self, arm: str = "both", seed: int = 1) -> RunDir:
        return self.out.cell(arm, seed)

    def logs(self) -> str:
        paths = [*self.out.root.glob("launch/*/output*"), *self.out.root.glob("runs/*/*/log.txt")]
        queue = self.cluster.run("squeue", "--array", "-o", "%i %T %r %S %l %E") + self.cluster.run("sinfo", "-N", "-l")
        return "\n".join([queue, *(f"== {p}\n{p.read_text()[-3000:]}" for p in paths if p.stat().st_size)])

    def drain(self, seconds: float) -> None:
        try:
            self.cluster.drain(seconds)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.logs()}")


def wait_for(holds, what: str, seconds: float = 60, pause: float = 0.1, logs=str) -> float:
    """Wait until something holds; how many seconds that took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() < started + seconds, f"waited {seconds} seconds for {what}\n{logs()}"
        time.sleep(pause)
    return time.monotonic() - started


def rank_pids(cluster: SlurmCluster) -> dict[int, int]:
    """Process of each rank of the training that runs on the cluster."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cmdline()[1:5] != ["-P", "-m", "replication", "train"]:
                continue
            environment = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if environment.get("SLURM_CONF") == cluster.environment["SLURM_CONF"] and "SLURM_STEP_ID" in environment:
            found[int(environment["SLURM_PROCID"])] = process.pid
    return found


def reference(suite: Suite, folder: Path) -> SuiteDir:
    """The suite's cells trained without SLURM, on two local ranks of the same strategy."""
    done = subprocess.run(
        [sys.executable, HERE / "rank_suite.py", "2", suite.out.root, folder],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return SuiteDir(folder)


def same_end(run: RunDir, other: RunDir) -> None:
    """Bitwise the same weights, the same bytes fed, and a journal of the same values at the same steps."""
    a, b = read_json(run.manifest), read_json(other.manifest)
    for key in ("final_weights_sha256", "data_chain", "tokens", "step", "initial_weights_sha256"):
        assert a[key] == b[key], key
    timing = ("wall_seconds", "train/tokens_per_second")
    lines = [[{k: v for k, v in l.items() if k not in timing} for l in read_journal(r.metrics)] for r in (run, other)]  # noqa: E741
    assert lines[0] == lines[1]


def tensorboard_steps(run: RunDir) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss_nats")]


# ---------------------------------------------------------------- the whole grid


def test_the_grid_is_submitted_with_one_command_and_equals_local_runs_bit_for_bit(idle, corpus, tmp_path, publish):
    """Two arms at one seed; with REPLICATION_FULL=1 the 2x2 at two seeds."""
    arms, seeds = (ARMS, (1, 2)) if FULL else (("baseline", "both"), (1,))
    suite = Suite(idle, corpus, tmp_path, arms, seeds)
    suite.where(strategy="zero2", nodes=2, concurrent=2)
    started = time.monotonic()
    shell = {"MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1", "RANK": "3", "WORLD_SIZE": "8", "SITE_CONTAINER": "no"}
    said = suite.grid("submit", env=shell)  # of which nothing reaches the jobs
    n_cells = len(arms) * len(seeds)
    assert said.count("job ") == 2 * len(seeds) + 1, "an array that trains, one that generates; the report"
    again = suite.grid("submit")
    assert "nothing to submit" in again and again.count("left as it is") == n_cells, "sbatch is asked nothing twice"
    suite.drain(600)
    seconds = time.monotonic() - started
    publish(f"SLURM, two nodes, ZeRO 2: {n_cells} cells submitted, trained, sampled and reported in {seconds:.0f} s")
    assert suite.states() == ["complete"] * n_cells, suite.logs()
    assert suite.out.report_html.is_file() and len(read_json(suite.out.results)["cells"]) == n_cells
    local = reference(suite, tmp_path / "local")
    for arm in arms:
        for seed in seeds:
            same_end(suite.run_dir(arm, seed), local.cell(arm, seed))
    run = suite.run_dir()
    assert (run.root / "train.sbatch").read_text() == (
        suite.out.launch / "0001-train-seed-1" / "job.sbatch"
    ).read_text()
    assert read_json(run.manifest)["preflight"]["all_reduce_gb_per_second"] > 0
    assert "nothing to submit" in suite.grid("submit")
    assert "nothing to submit" in suite.grid("retry")


# ---------------------------------------------------------------- preemption and death


def test_a_cell_survives_signals_a_killed_rank_a_lost_node_and_the_time_limit(idle, corpus, tmp_path, publish):
    """Told to stop by a signal to one rank (in the long form to either), by the time limit; killed; its node lost."""
    steps = {"training": {"steps": 400}, "validation": {"every_steps": 100}, "checkpoints": {"every_steps": 5}}
    suite = Suite(idle, corpus, tmp_path, arms=["both"], seeds=[1], logging={"log_every_steps": 5}, **steps)
    suite.where(strategy="zero2", nodes=2, micro_batch_sequences=2)  # several micro-batches a step
    run = suite.run_dir()
    suite.grid("submit")

    def step() -> int:
        lines = read_journal(run.metrics)
        return lines[-1]["step"] if lines else 0

    def events() -> list[str]:
        return [json.loads(line)["event"] for line in run.jobs.read_text().splitlines()] if run.jobs.exists() else []

    def goes_on_from(before: int) -> None:
        def is_there() -> bool:
            idle.end_waits()
            return step() >= before + 10

        wait_for(is_there, f"step {before + 10}", 240, logs=suite.logs)

    reached = 0
    told_ranks = (1, 0) if FULL else (1,)
    for times, rank in enumerate(told_ranks, 1):
        goes_on_from(reached)
        os.kill(rank_pids(idle)[rank], signal.SIGUSR2)
        took = wait_for(lambda n=times: events().count("preempted") == n, "the job to save and stop", 60)
        publish(f"SLURM: signal to rank {rank} alone, saved and requeued after {took:.1f} s")
        reached = step()
        wait_for(lambda n=times: suite.states() == [f"requeued {n}"], "the job to be in the queue again", 30, 1)

    goes_on_from(reached)
    os.kill(rank_pids(idle)[1], signal.SIGKILL)
    took = wait_for(lambda: not any("train" in line for line in idle.queue()), "the job to end", 60)
    publish(f"SLURM: SIGKILL of rank 1, the job ended after {took:.1f} s (allowed: a minute)")
    assert suite.states() == [f"failed, requeued {len(told_ranks)}"]
    line = next(line for line in suite.grid("status").splitlines() if line.startswith("both/seed-1: "))
    assert "task 1: Killed" in line and str(run.log) in line
    assert "`replicate grid retry` submits it again" in suite.grid("submit")
    reached = step()
    suite.grid("retry")

    goes_on_from(reached)
    idle.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    took = wait_for(lambda: not rank_pids(idle), "the ranks to end", 60)
    publish(f"SLURM: a node down, the job ended after {took:.1f} s (allowed: a minute)")
    time.sleep(10)  # SLURM kills what is left of the job's first life a while later; nobody else starts it that early
    idle.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    wait_for(lambda: suite.states()[0].startswith("requeued"), "the job to be in the queue again", 30, 1)
    (job,) = (line.split()[0] for line in idle.queue() if "train" in line)
    # SLURM looks every 30 seconds and sends the signal up to 30 early: 10 to 40 seconds after the start
    idle.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    told = events().count("preempted")

    def is_told() -> bool:
        idle.end_waits()
        return events().count("preempted") == told + 1

    wait_for(is_told, "the time limit", 120, logs=suite.logs)
    idle.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    publish(f"SLURM: told to stop by the time limit at step {step()} of 400, the node having been lost at {reached}")
    assert step() < 400
    suite.drain(300)
    assert suite.states() == ["complete, requeued 2"], suite.logs()  # of one job; the retry was another, requeued twice
    same_end(run, reference(suite, tmp_path / "local").cell("both", 1))
    assert tensorboard_steps(run) == list(range(5, 401, 5)), "no doubled and no missing points"
    assert len(read_json(run.manifest)["starts"]) >= 3 + len(
        told_ranks
    )  # the last may be told before it writes its own


# ---------------------------------------------------------------- one process: ways of a site, and clear lines


@pytest.fixture
def one(idle, corpus, tmp_path) -> Suite:
    """One cell of one process, long enough to be told to stop."""
    steps = {"training": {"steps": 400}, "validation": {"every_steps": 400}, "checkpoints": {"every_steps": 400}}
    suite = Suite(idle, corpus, tmp_path, arms=["both"], seeds=[1], **steps)
    suite.where(strategy="single")
    return suite


def tell_the_batch_shell(suite: Suite) -> None:
    """The stop signal, as SLURM sends it to the batch shell alone, once the cell trains."""
    run = suite.run_dir()
    wait_for(lambda: len(read_journal(run.metrics)) > 2, "the first steps", 60, logs=suite.logs)
    (job,) = (line.split()[0] for line in suite.cluster.queue() if "train" in line)
    suite.cluster.run("scancel", "--batch", "--signal=USR2", job)


@pytest.mark.full
def test_a_site_that_chains_and_what_waits_for_its_cells(one):
    one.site(SITE_ON_PREEMPTION="chain")
    one.grid("submit")
    tell_the_batch_shell(one)
    one.drain(300)
    assert one.states() == ["complete, requeued 1"], one.logs()
    assert one.out.report_html.is_file()
    assert "goes on as job" in one.run_dir().log.read_text()


@pytest.mark.full
def test_a_signal_to_the_processes_and_two_ways_to_cancel(one):
    """As SLURM sends it with signal_to: ranks; then `grid cancel`, and scancel as SLURM's own preemption: SIGTERM."""
    one.where(strategy="single", signal_to="ranks")
    one.grid("submit")
    assert "#SBATCH --signal=USR2@20" in next(one.out.launch.glob("*-train-*/job.sbatch")).read_text()
    wait_for(lambda: len(read_journal(one.run_dir().metrics)) > 2, "the first steps", 60, logs=one.logs)
    (job,) = (line.split()[0] for line in one.cluster.queue() if "train" in line)
    one.cluster.run("scancel", "--signal=USR2", job)
    wait_for(lambda: one.states() == ["requeued 1"], "the job to go on later", 30, 1, logs=one.logs)
    step = one.run_dir().checkpoints

    def begins_again() -> bool:
        one.cluster.end_waits()
        return len(rank_pids(one.cluster)) == 1

    wait_for(begins_again, "the job to start again", 60, logs=one.logs)
    one.grid("cancel")
    wait_for(lambda: not one.cluster.queue(), "all to end", 60)
    assert one.states() == ["cancelled, requeued 1"]
    one.grid("retry")
    before = len(read_journal(one.run_dir().metrics))
    wait_for(lambda: len(read_journal(one.run_dir().metrics)) > before, "more steps", 60, logs=one.logs)
    (job,) = (line.split()[0] for line in one.cluster.queue() if "train" in line)
    one.cluster.run("scancel", job)
    wait_for(lambda: not one.cluster.queue(), f"all to end and stay so: {one.cluster.queue()}", 60)
    assert one.states()[0].split(",")[0] in ("failed", "preempted"), "without accounts nobody says who cancelled it"
    assert len(list(step.glob("step-*"))) >= 1


@pytest.mark.full
def test_train_sbatch_by_hand(one, corpus):
    command = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]
    command += [f"--output={one.folder}/by-hand.txt", "launch/train.sbatch", "--out", str(one.out.root)]
    for layer in (corpus / "data.yaml", one.folder / "layer.yaml", "arms/both.yaml", one.folder / "cluster.yaml"):
        command += ["--config", str(layer)]
    keys = {"data.dir": corpus / "tokens", "seed": 3, "generation.max_new_tokens": 5, "validation.sequences": 4}
    keys |= {"training.steps": 4, "training.batch_tokens": 128, "training.warmup_steps": 2}
    done = subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in keys.items())], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env=one.cluster.environment | {"REPLICATION_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one.drain(120)
    said = (one.folder / "by-hand.txt").read_text()
    assert one.run_dir("both", 3).complete.is_file(), said


def test_a_site_without_requeue_is_told_so(one):
    one.site(SITE_SBATCH="--no-requeue")
    one.grid("submit")
    tell_the_batch_shell(one)
    wait_for(lambda: not any("train" in line for line in one.cluster.queue()), "the job to end")
    assert one.states() == ["preempted"]
    line = one.run_dir().log.read_text().splitlines()[-1]
    assert "SITE_ON_PREEMPTION: this site does not requeue" in line and "set it to chain or end in" in line
    if FULL:
        one.site(SITE_ON_PREEMPTION="end")
        one.grid("retry")
        one.drain(120)
        assert one.states() == ["complete"], one.logs()


def test_a_full_scratch_is_one_clear_line(one, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", scratch], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here, so there is no small one to fill")
    try:
        one.site(SITE_SCRATCH=str(scratch))
        one.grid("submit")
        wait_for(lambda: not any("train" in line for line in one.cluster.queue()), "the job to end")
        assert one.states() == ["failed"]
        told = one.grid("status").splitlines()[-1]
        assert "1 MiB of scratch left" in told and "make room, or point TMPDIR elsewhere" in told
        one.site(SITE_SCRATCH=str(scratch / "no" / "such"), SITE_ON_PREEMPTION="end")
        (scratch / "no").write_text("a file, where a folder is to be made")
        one.grid("retry")
        wait_for(lambda: not any("train" in line for line in one.cluster.queue()), "the job to end")
        assert f"SITE_SCRATCH: cannot write to {scratch}/no/such; make room" in one.grid("status")
    finally:
        subprocess.run(["umount", scratch], check=False)


def test_refusals_are_one_line_and_nothing_is_written(one, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to("/bin/bash")
    bare = {"PATH": str(tmp_path / "bin")}
    assert one.grid("submit", code=2, env=bare).startswith("error: squeue: not found on this machine; call this on a")
    assert not one.out.root.exists()
    one.site(SITE_PARTITION="nowhere")
    line = one.grid("submit", code=2)
    assert "invalid partition specified: nowhere" in line
    assert line.endswith("set SITE_PARTITION in the site file to one of: main")
    assert len(line.splitlines()) == 1
    one.site()
    one.cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # jobs wait
    assert one.grid("submit").count("job ") == 3, "what was refused is no obstacle"
    assert one.states() == ["queued"]


def test_a_submission_whose_answer_was_lost_is_found_by_its_name(one):
    one.cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    one.grid("submit")
    (answer,) = one.out.launch.glob("*-train-*/submitted.json")
    known = json.loads(answer.read_text())["id"]
    answer.unlink()
    assert "nothing to submit" in one.grid("submit")
    assert json.loads(answer.read_text())["id"] == known
    assert "cancelled 3" in one.grid("cancel")
    one.cluster.drain(30)
    assert one.states() == ["cancelled"]
    assert "nothing of this suite is in the queue" in one.grid("cancel")
    assert one.grid("retry").count("job ") == 3
