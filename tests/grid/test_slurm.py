"""The launch scripts and `grid submit` on a real SLURM cluster of two nodes, with real ZeRO 2 over gloo."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from paths import CHECKOUT, SUPPORT
from required import do_without
from run_files import read_journal
from shadows import shadowed
from slurm_cluster import PACKAGES, SlurmCluster, missing_programs, slurm_cluster
from small_corpus import prose_layer, texts, write_folder

from replication.runs.files import read_json
from replication.runs.layout import RunDir, SuiteDir

ARMS = ("baseline", "token_gain", "layer_gain", "both")

FULL = bool(os.environ.get("REPLICATION_FULL"))  # the long form: all arms at two seeds, and what is marked with it

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    missing = missing_programs()
    if missing:
        do_without("slurm", f"no {', '.join(missing)} ({PACKAGES})")
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
    cluster.drain()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A prepared corpus that all suites of this file share."""
    folder = tmp_path_factory.mktemp("corpus")
    write_folder(folder / "text", texts(40))
    layer = {"data": prose_layer(folder / "text")}
    (folder / "data.yaml").write_text(yaml.safe_dump(layer))
    subprocess.run(
        [sys.executable, "-m", "replication", "prepare", "--config", folder / "data.yaml", "--out", folder / "tokens"],
        check=True, cwd=CHECKOUT, capture_output=True, timeout=120,
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
        """The site file, whose words before Python let a cell be held."""
        variables = {"SITE_CONTAINER": f"{sys.executable} {SUPPORT / 'held_cell.py'} {self.folder}"} | variables
        (self.folder / "site.env").write_text("".join(f"{k}='{v}'\n" for k, v in variables.items()))

    def hold(self, step: int | None) -> None:
        """Let no rank begin this step, or a later one; None lets all go."""
        if step is None:
            (self.folder / "hold").unlink()
            return
        (self.folder / "hold.new").write_text(str(step))
        (self.folder / "hold.new").replace(self.folder / "hold")

    def wait_until_held(self, step: int, ranks: int = 1) -> None:
        marks = [self.folder / f"held-{rank}" for rank in range(ranks)]

        def are_held() -> bool:
            return all(mark.exists() and mark.read_text() == str(step) for mark in marks)

        wait_for(are_held, f"{ranks} rank(s) held at step {step}", logs=self.logs, meanwhile=self.cluster.end_waits)

    def job(self) -> str:
        """The job in the queue that trains."""
        (line,) = (line for line in self.cluster.queue() if "train" in line)
        return line.split()[0]

    def wait_for_end(self) -> float:
        """Until no job of the cells' training is in the queue; how many seconds that took."""
        return wait_for(lambda: not any("train" in line for line in self.cluster.queue()), "the end", logs=self.logs)

    def where(self, lead: int = 20, concurrent: int = 1, signal_to: str = "batch", **keys) -> None:
        slurm = {"time_limit_minutes": 10, "lead_seconds": lead, "concurrent_cells": concurrent, "signal_to": signal_to}
        text = yaml.safe_dump({"cluster": {"accelerator": "cpu", "threads": 1, "slurm": slurm, **keys}})
        (self.folder / "cluster.yaml").write_text(text)

    def grid(self, action: str, *args: object, code: int = 0, env: dict[str, str] | None = None) -> str:
        """What `replicate grid ACTION` prints, on stderr where it is refused."""
        given = ["--site", self.folder / "site.env"] if action in ("submit", "retry") else []
        given += ["--cluster", self.folder / "cluster.yaml"] if action == "submit" else []
        of_suite = [self.folder / "suite.yaml", "--out", self.out.root]
        command = [sys.executable, "-P", "-m", "replication", "grid", action]
        command += of_suite if action in ("plan", "run", "submit") else [self.out.root]
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
        return _states(self.grid("status"))

    def without_accounts(self) -> dict[str, str]:
        """The environment of a cluster that keeps none, for a status."""
        (self.folder / "bin").mkdir()
        for program in ("squeue", "scontrol"):
            (self.folder / "bin" / program).symlink_to(shutil.which(program))
        return {"PATH": str(self.folder / "bin")}

    def run_dir(self, arm: str = "both", seed: int = 1) -> RunDir:
        return self.out.cell(arm, seed)

    def logs(self) -> str:
        paths = [*self.out.root.glob("launch/*/output*"), *self.out.root.glob("runs/*/*/log.txt")]
        queue = self.cluster.run("squeue", "--array", "-o", "%i %T %r %S %l %E") + self.cluster.run("sinfo", "-N", "-l")
        return "\n".join([queue, *(f"== {p}\n{p.read_text()[-3000:]}" for p in paths if p.stat().st_size)])

    def drain(self) -> None:
        try:
            self.cluster.drain()
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.logs()}")


def _states(said: str) -> list[str]:
    rows = [line.split("│")[2].strip() for line in said.splitlines() if line.startswith("│")]
    assert rows
    return rows


def wait_for(holds, what: str, seconds: float = 240, pause: float = 0.1, logs=str, meanwhile=str) -> float:
    """Wait until something holds; how many seconds that took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() < started + seconds, f"waited {seconds} seconds for {what}\n{logs()}"
        meanwhile()
        time.sleep(pause)
    return time.monotonic() - started


def rank_pids(cluster: SlurmCluster) -> dict[int, int]:
    """Process of each rank of the training that runs on the cluster."""
    found = {}
    for process in psutil.process_iter():
        try:
            if "-P -m replication train" not in " ".join(process.cmdline()):
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
        [sys.executable, SUPPORT / "rank_suite.py", "2", suite.out.root, folder],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    suite.drain()
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
    """Told to stop by a signal to one rank (in the long form to either), by the time limit; killed; its node lost.

    Between these it is held at a step, so that none comes too early or too late, however fast the machine.
    """
    told_ranks = (1, 0) if FULL else (1,)
    last = 10 * (len(told_ranks) + 4)
    steps = {"training": {"steps": last}, "validation": {"every_steps": 20}, "checkpoints": {"every_steps": 5}}
    suite = Suite(idle, corpus, tmp_path, arms=["both"], seeds=[1], logging={"log_every_steps": 5}, **steps)
    suite.where(lead=120, strategy="zero2", nodes=2, micro_batch_sequences=2)  # several micro-batches a step
    run, at = suite.run_dir(), 10
    suite.hold(at)
    suite.grid("submit")

    def events() -> list[str]:
        return [json.loads(line)["event"] for line in run.jobs.read_text().splitlines()] if run.jobs.exists() else []

    def go_on() -> int:
        suite.hold(at + 10)
        return at + 10

    for times, rank in enumerate(told_ranks, 1):
        suite.wait_until_held(at, 2)
        os.kill(rank_pids(idle)[rank], signal.SIGUSR2)
        wait_for((suite.folder / f"told-{rank}").exists, "the signal to arrive")
        at = go_on()
        took = wait_for(lambda n=times: events().count("preempted") == n, "the job to save and stop")
        publish(f"SLURM: signal to rank {rank} alone, saved and requeued after {took:.1f} s")
        wait_for(lambda n=times: suite.states() == [f"requeued {n}"], "the job to be in the queue again", pause=1)

    suite.wait_until_held(at, 2)
    os.kill(rank_pids(idle)[1], signal.SIGKILL)
    at = go_on()
    publish(f"SLURM: SIGKILL of rank 1, the job ended after {suite.wait_for_end():.1f} s (allowed: a minute)")
    assert suite.states() == [f"failed, requeued {len(told_ranks)}"]
    line = next(line for line in suite.grid("status").splitlines() if line.startswith("both/seed-1: "))
    assert "task 1: Killed" in line and str(run.log) in line
    assert "`replicate grid retry` submits it again" in suite.grid("submit")
    suite.grid("retry")

    suite.wait_until_held(at, 2)
    job = suite.job()
    idle.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    took = wait_for(lambda: not rank_pids(idle), "the ranks to end")
    publish(f"SLURM: a node down, the job ended after {took:.1f} s (allowed: a minute)")
    at = go_on()
    wait_for(lambda: not idle.steps(), "what SLURM left of the job's first life to end")
    idle.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    wait_for(lambda: suite.states()[0].startswith("requeued"), "the job to be in the queue again", pause=1)

    for mark in suite.folder.glob("told-*"):
        mark.unlink()
    suite.wait_until_held(at, 2)
    # SLURM looks every 30 seconds, sends the signal up to 30 early, and would kill two minutes after that
    idle.run("scontrol", "update", f"JobId={job}", "EndTime=now+150")
    wait_for(lambda: len(list(suite.folder.glob("told-*"))) == 2, "the time limit", logs=suite.logs)
    idle.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    suite.hold(None)
    publish(f"SLURM: told to stop by the time limit at step {at} of {last}, a node having been lost at {at - 10}")
    suite.drain()
    assert suite.states() == ["complete, requeued 2"], suite.logs()  # of one job; the retry was another, requeued twice
    same_end(run, reference(suite, tmp_path / "local").cell("both", 1))
    assert tensorboard_steps(run) == list(range(5, last + 1, 5)), "no doubled and no missing points"
    assert len(read_json(run.manifest)["starts"]) == 4 + len(told_ranks)


BAD_ENDS = {  # what runs in place of an arm's cell
    "baseline": "import os; os.kill(os.getpid(), 9)",
    "token_gain": "",  # its time limit
    "layer_gain": "",
    "both": "",
}


def test_every_bad_end_is_shown_as_what_it_is_with_accounts_and_without(idle, corpus, tmp_path):
    """Killed; out of time; cancelled by hand; its node lost; cancelled by hand before it began."""
    suite = Suite(idle, corpus, tmp_path, seeds=(1, 2))
    suite.site(SITE_SBATCH="--no-requeue --signal=URG@1")  # nothing is told to stop before its time limit
    suite.where(strategy="single", concurrent=4)
    for arm, code in BAD_ENDS.items():
        (suite.folder / f"{arm}.py").write_text(
            f"import time\n{code}\nprint('stands still', flush=True)\nwhile True: time.sleep(0.1)\n"
        )
    suite.grid("submit")
    pending = [line.split()[0] for line in idle.queue() if line.endswith(("-train-seed-2", "-report"))]
    idle.run("scancel", *pending)

    def job_of(arm: str) -> str:
        log = suite.run_dir(arm).log
        wait_for(lambda: log.exists() and "stands still" in log.read_text(), f"{arm} to run", logs=suite.logs)
        return json.loads(suite.run_dir(arm).jobs.read_text().splitlines()[0])["job"]

    idle.run("scontrol", "update", f"JobId={job_of('token_gain')}", "EndTime=now")
    idle.run("scancel", job_of("layer_gain"))
    node = idle.node_of(job_of("both"))
    wait_for(lambda: not idle.node_of(job_of("token_gain")), "the time limit", logs=suite.logs)
    idle.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    suite.drain()

    logs = {arm: suite.run_dir(arm).log.read_text() for arm in ARMS}
    for accounts, env in ((True, {}), (False, suite.without_accounts())):
        # without accounts the log alone says why, and SLURM does not always get its word into it before the job ends
        by_hand = "cancelled" if accounts or "CANCELLED AT" in logs["layer_gain"] else "failed"
        timeout = "timeout: " if accounts or "DUE TO TIME LIMIT" in logs["token_gain"] else ""
        said = suite.grid("status", env=env)
        never = "cancelled" if accounts else "failed"
        # the time limit ends the step with SIGTERM, which also says stop; the job script may have time to note that
        noted = '"preempted"' in suite.run_dir("token_gain").jobs.read_text()
        at_limit = "preempted" if noted else "failed"
        assert _states(said) == ["failed", at_limit, by_hand, "failed"] + [never] * len(ARMS), said
        stepd_or_srun = r"(slurmstepd.* CANCELLED AT|srun: error: n\d: task 0: Terminated)"
        for line in (
            r"baseline/seed-1: srun: error: n\d: task 0: Killed \(log: ",
            *([] if noted else [rf"token_gain/seed-1: (its job ended without a word: )?{timeout}{stepd_or_srun}"]),
            rf"layer_gain/seed-1: (cancelled( by \w+)?|its job ended without a word): {stepd_or_srun}",
            r"both/seed-1: its job ended without a word: (node_fail: )?"
            r"(srun: error: Node failure on n\d|slurmstepd.* DUE TO NODE FAILURE)",
            rf"{'/seed-2, '.join(ARMS)}/seed-2: cancelled by" if accounts else "never began; see ",
        ):
            assert re.search(line, said), f"{line}\n{said}"


@pytest.mark.full
def test_a_requeued_job_waits_for_its_earlier_life_on_a_lost_node(one):
    """And hears the stop signal while it waits."""
    one.hold(2)
    one.grid("submit")
    one.wait_until_held(2)
    (old,), job = rank_pids(one.cluster).values(), one.job()
    with one.cluster.lost_node(job):
        for times in (1, 2):
            wait_for(lambda n=times: one.run_dir().log.read_text().count("waiting up to 10 minutes for job") == n,
                     "the next life to wait", logs=one.logs, meanwhile=one.cluster.end_waits)  # fmt: skip
            if times == 1:
                one.cluster.run("scancel", "--batch", "--signal=USR2", job)
                wait_for(lambda: one.states() == ["requeued 2"], "the waiting job to stop", pause=1, logs=one.logs)
        os.kill(old, signal.SIGKILL)
        one.hold(None)
        wait_for(one.run_dir().complete.exists, "the cell", logs=one.logs, meanwhile=one.cluster.end_waits)


# ---------------------------------------------------------------- one process: ways of a site, and clear lines


@pytest.fixture
def one(idle, corpus, tmp_path) -> Suite:
    """One cell of one process."""
    suite = Suite(idle, corpus, tmp_path, arms=["both"], seeds=[1])
    suite.where(strategy="single")
    return suite


def tell_the_batch_shell(suite: Suite) -> None:
    """Submit, and send the stop signal, as SLURM sends it to the batch shell alone, while the cell trains."""
    suite.hold(2)
    suite.grid("submit")
    suite.wait_until_held(2)
    suite.cluster.run("scancel", "--batch", "--signal=USR2", suite.job())
    wait_for((suite.folder / "told-0").exists, "the signal to arrive", logs=suite.logs)
    suite.hold(None)


@pytest.mark.full
def test_a_site_that_chains_and_what_waits_for_its_cells(one):
    one.site(SITE_ON_PREEMPTION="chain")
    tell_the_batch_shell(one)
    one.drain()
    assert one.states() == ["complete, requeued 1"], one.logs()
    assert one.out.report_html.is_file()
    assert "goes on as job" in one.run_dir().log.read_text()


@pytest.mark.full
def test_a_signal_to_the_processes_and_two_ways_to_cancel(one):
    """As SLURM sends it with signal_to: ranks; then `grid cancel`, and scancel as SLURM's own preemption: SIGTERM."""
    one.where(strategy="single", signal_to="ranks")
    one.hold(2)
    one.grid("submit")
    assert "#SBATCH --signal=USR2@20" in next(one.out.launch.glob("*-train-*/job.sbatch")).read_text()
    one.wait_until_held(2)
    one.cluster.run("scancel", "--signal=USR2", one.job())
    wait_for((one.folder / "told-0").exists, "the signal to arrive", logs=one.logs)
    one.hold(4)
    wait_for(lambda: one.states() == ["requeued 1"], "the job to go on later", pause=1, logs=one.logs)
    one.wait_until_held(4)
    one.grid("cancel")
    wait_for(lambda: not one.cluster.queue(), "all to end")
    assert one.states() == ["cancelled, requeued 1"]
    one.hold(5)
    one.grid("retry")
    one.wait_until_held(5)
    one.cluster.run("scancel", one.job())
    wait_for(lambda: not one.cluster.queue(), f"all to end and stay so: {one.cluster.queue()}")
    assert one.states()[0].split(",")[0] == "cancelled"
    assert len(list(one.run_dir().checkpoints.glob("step-*"))) >= 1


@pytest.mark.full
def test_train_sbatch_by_hand(one, corpus):
    command = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]
    command += [f"--output={one.folder}/by-hand.txt", "launch/train.sbatch", "--out", str(one.out.root)]
    for layer in (corpus / "data.yaml", one.folder / "layer.yaml", "arms/both.yaml", one.folder / "cluster.yaml"):
        command += ["--config", str(layer)]
    keys = {"data.dir": corpus / "tokens", "seed": 3, "generation.max_new_tokens": 5, "validation.sequences": 4}
    keys |= {"training.steps": 4, "training.batch_tokens": 128, "training.warmup_steps": 2}
    done = subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in keys.items())], cwd=CHECKOUT, capture_output=True, text=True,
        timeout=120, env=one.cluster.environment | {"REPLICATION_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one.drain()
    said = (one.folder / "by-hand.txt").read_text()
    assert one.run_dir("both", 3).complete.is_file(), said


def test_a_site_without_requeue_is_told_so(one):
    one.site(SITE_SBATCH="--no-requeue")
    tell_the_batch_shell(one)
    one.wait_for_end()
    assert one.states() == ["preempted"]
    line = one.run_dir().log.read_text().splitlines()[-1]
    assert "SITE_ON_PREEMPTION: this site does not requeue" in line and "set it to chain or end in" in line
    if FULL:
        one.site(SITE_ON_PREEMPTION="end")
        one.grid("retry")
        one.drain()
        assert one.states() == ["complete"], one.logs()


def test_a_full_scratch_is_one_clear_line(one, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", scratch], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here, so there is no small one to fill")
    try:
        one.site(SITE_SCRATCH=str(scratch))
        one.grid("submit")
        one.wait_for_end()
        assert one.states() == ["failed"]
        told = one.grid("status").splitlines()[-1]
        assert "1 MiB of scratch left" in told and "make room, or point TMPDIR elsewhere" in told
        one.site(SITE_SCRATCH=str(scratch / "no" / "such"), SITE_ON_PREEMPTION="end")
        (scratch / "no").write_text("a file, where a folder is to be made")
        one.grid("retry")
        one.wait_for_end()
        assert f"SITE_SCRATCH: cannot write to {scratch}/no/such; make room" in one.grid("status")
    finally:
        subprocess.run(["umount", scratch], check=False)


def test_a_full_disk_is_told_whatever_could_still_be_written(one):
    (one.folder / "both.py").write_text("open(cell / 'large', 'wb').write(bytes(2**25))")
    without = one.without_accounts()
    one.out.root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", one.out.root], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here, so there is no small one to fill")
    try:
        one.grid("submit")
        one.wait_for_end()
        for shown in ("No space left on device", "its disk is full"):
            for env in ({}, without):
                said = one.grid("status", env=env)
                assert _states(said) == ["failed"] and shown in said.splitlines()[-1], said
            one.run_dir().log.write_text("")  # as where not even that could be written
            one.run_dir().jobs.write_text(one.run_dir().jobs.read_text().splitlines()[0])
    finally:
        one.cluster.drain()
        subprocess.run(["umount", one.out.root], check=False)


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
    one.cluster.drain()
    assert one.states() == ["cancelled"]
    assert "nothing of this suite is in the queue" in one.grid("cancel")
    assert one.grid("retry").count("job ") == 3


def test_jobs_of_another_user_those_of_a_moved_folder_and_a_suspended_one_are_all_found(one):
    """Root submits in the name of another; nothing is submitted twice."""
    one.cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    one.site(SITE_SBATCH="--uid=nobody")
    one.grid("submit")
    said = one.grid("status")
    assert _states(said) == ["queued"] and "3 job(s) or elements of this suite in the queue are nobody's" in said
    assert "both/seed-1: queued, left as it is" in one.grid("retry")
    there = one.out.root
    one.out = SuiteDir(there.rename(one.folder / "moved"))
    said = one.grid("status")
    assert _states(said) == ["queued"] and f"look for this folder at {there}, where it is no more" in said
    for action in ("submit", "retry"):
        assert "nothing to submit" in one.grid(action)
    assert "cancelled 3 job(s)" in one.grid("cancel")
    one.cluster.drain()
    one.cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    assert one.states() == ["cancelled"]
    one.site()
    (one.folder / "both.py").write_text("(cell / 'began').touch()\nwhile True: import time; time.sleep(0.1)\n")
    one.grid("retry")
    wait_for((one.run_dir().root / "began").exists, "the job to run", logs=one.logs)
    one.cluster.run("scontrol", "suspend", one.job())
    said = one.grid("status")
    assert _states(said) == ["suspended"] and f"`scontrol resume {one.job()}` lets it go on" in said
    one.cluster.run("scontrol", "resume", one.job())
    assert one.states() == ["running"]
    one.grid("cancel")
