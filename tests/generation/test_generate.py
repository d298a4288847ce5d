"""`replicate generate` on a trained suite: which cells, going on after a kill, several processes, every mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from paths import CHECKOUT
from rich.console import Console
from trained_suite import PROMPTS, write_trained_suite

from replication.cli.main import main
from replication.config import load_run
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.generation import completions, suite
from replication.generation import generate as generate_module
from replication.generation.completions import Completion, Samples, Shard, read_samples, suite_completions
from replication.generation.export import read_export
from replication.generation.generate import generate, sample_shard
from replication.grid.cell import run_cell
from replication.processes import preemption
from replication.processes.preemption import Preempted
from replication.runs.files import file_sha256, read_json, write_json
from replication.runs.layout import RunDir, SuiteDir

CELLS = ("baseline/seed-1", "both/seed-1", "baseline/seed-2")  # both/seed-2 is not trained
N = len(PROMPTS) * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a suite of four cells, three of them trained and none with completions."""
    folder = tmp_path_factory.mktemp("trained")
    write_trained_suite(folder)
    return folder


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> SuiteDir:
    """The same with completions, sampled undisturbed in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    shutil.copytree(trained / "out", out, symlinks=True)
    assert main(["generate", str(out)]) == 1
    return SuiteDir(out)


@pytest.fixture
def suite_dir(trained, tmp_path) -> SuiteDir:
    """A copy of the trained suite for one test."""
    shutil.copytree(trained / "out", tmp_path / "out", symlinks=True)
    return SuiteDir(tmp_path / "out")


@pytest.fixture
def finished(whole, tmp_path) -> SuiteDir:
    """A copy of the suite with completions for one test."""
    shutil.copytree(whole.root, tmp_path / "out", symlinks=True)
    return SuiteDir(tmp_path / "out")


def cell(suite_dir: SuiteDir, name: str) -> RunDir:
    return RunDir(suite_dir.runs / name)


def texts(suite_dir: SuiteDir) -> dict[str, bytes]:
    return {name: cell(suite_dir, name).samples.read_bytes() for name in CELLS}


def start(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "replication", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as with & in a script
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300", "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def said(capsys) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.out + captured.err


# ---------------------------------------------------------------- which cells


def test_every_trained_cell_gets_its_completions_and_is_complete(whole):
    assert not cell(whole, "both/seed-2").samples.exists()
    for name in CELLS:
        run = cell(whole, name)
        lines = [json.loads(line) for line in run.samples.read_text().split("\n")[:-1]]
        assert [(x["prompt_id"], x["sample"]) for x in lines] == [(p["id"], s) for p in PROMPTS for s in range(3)]
        assert {f"{x['arm']}/seed-{x['seed']}" for x in lines} == {name}
        assert all(x["tokens"] == 12 or (x["stopped"] and x["tokens"] < 12) for x in lines)
        assert run.complete.is_file() and not run.samples_part.exists()
        assert read_json(run.manifest)["generation"]["samples_sha256"] == file_sha256(run.samples)
    assert len(set(texts(whole).values())) == 3
    assert list(suite_completions(whole, ["baseline", "both"])) == [1]


def test_what_is_there_is_left_alone_until_something_changes(finished, capsys):
    before = texts(finished)
    stamps = {name: cell(finished, name).samples.stat().st_mtime_ns for name in CELLS}

    def sampled() -> list[str]:
        """Which cells were written since the last look."""
        now = {name: cell(finished, name).samples.stat().st_mtime_ns for name in CELLS}
        changed = [name for name in CELLS if now[name] != stamps[name]]
        stamps.update(now)
        return changed

    assert main(["generate", str(finished.root)]) == 1
    text = said(capsys)
    assert text.count("12 completions, there already") == 3 and "not trained: both/seed-2" in text
    assert sampled() == []
    assert main(["generate", str(finished.root), "--arm", "both", "--seed", "1", "--generation.rows_at_once=1"]) == 0
    assert sampled() == [], "how many go side by side is no setting of the completions"
    assert main(["generate", str(finished.root), "--arm=both", "--seed=1", "--again"]) == 0
    assert sampled() == ["both/seed-1"] and texts(finished) == before
    assert main(["generate", str(finished.root), "--seed", "1", "--generation.temperature=0.2"]) == 0
    assert sampled() == ["baseline/seed-1", "both/seed-1"] and texts(finished)["both/seed-1"] != before["both/seed-1"]
    prompts = Path(load_run([cell(finished, "both/seed-1").config]).generation.prompts)
    assert (
        main(["generate", str(finished.root), "--seed", "2", "--arm=baseline", f"--generation.prompts={prompts}"]) == 0
    )
    assert sampled() == [], "a prompt file is its content"
    with open(cell(finished, "baseline/seed-2").samples, "a") as file:
        file.write("{}\n")
    assert main(["generate", str(finished.root)]) == 1
    assert sampled() == list(CELLS) and texts(finished) == before


def test_other_prompts_do_not_complete_a_cell(suite_dir, tmp_path):
    run = cell(suite_dir, "both/seed-1")
    (tmp_path / "mine.json").write_text(json.dumps(PROMPTS[:1]))
    only = ["generate", str(suite_dir.root), "--arm=both", "--seed=1"]
    assert main([*only, f"--generation.prompts={tmp_path / 'mine.json'}"]) == 0
    assert len(run.samples.read_text().splitlines()) == 3 and not run.complete.exists()
    run_cell(load_run([run.config]), suite_dir, Console(file=io.StringIO()), "generate")
    assert run.complete.is_file() and len(run.samples.read_text().split("\n")) == N + 1
    run.complete.unlink()
    assert main(only) == 0
    assert run.complete.is_file(), "nothing to sample, but the marker was missing"


def test_a_suite_may_be_named_by_its_file_or_name(trained, whole, monkeypatch, capsys):
    assert main(["generate", str(trained / "suite.yaml"), "--out", str(whole.root)]) == 1
    assert said(capsys).count("there already") == 4
    assert main(["generate", str(trained / "suite.yaml"), "--out", str(trained / "none")]) == 2
    monkeypatch.chdir(trained)
    (trained / "out" / "small").symlink_to(whole.root)
    assert main(["generate", "suite.yaml"]) == 1
    assert said(capsys).count("there already") == 4
    (trained / "out" / "small").unlink()


# ---------------------------------------------------------------- the same text whatever happens


@pytest.mark.parametrize("rows", [1, 5, 96])
def test_completions_do_not_depend_on_what_is_sampled_beside_them(suite_dir, whole, rows):
    assert main(["generate", str(suite_dir.root), "--arm=both", "--seed=1", f"--generation.rows_at_once={rows}"]) == 0
    assert texts(whole)["both/seed-1"] == cell(suite_dir, "both/seed-1").samples.read_bytes()


def test_a_killed_process_loses_one_batch_and_the_same_command_goes_on(suite_dir, whole, monkeypatch):
    run = cell(suite_dir, "both/seed-1")
    flags = ["--arm=both", "--seed=1", "--generation.rows_at_once=1", "--generation.max_new_tokens=80"]
    undisturbed = cell(whole, "both/seed-1").root.parent / "undisturbed"
    shutil.copytree(run.root, undisturbed)
    config = load_run([run.config], flags[2:])
    store = TokenStore.open(suite_dir.data)
    quiet = Console(file=io.StringIO())
    generate(config, RunDir(undisturbed), store, quiet)

    process = start("generate", suite_dir.root, *flags)
    part = Shard().path(run, ".jsonl")
    wait_for(lambda: part.is_file() and part.read_bytes().count(b"\n") >= 4)  # the binding and three completions
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert not run.samples.exists() and not run.complete.exists()
    kept = part.read_bytes()
    n_kept = kept.count(b"\n") - 1
    assert 3 <= n_kept < N
    part.write_bytes(kept + b'{"arm": "both", "se')  # a kill may tear a line

    batches: list[int] = []
    real = generate_module.complete
    monkeypatch.setattr(generate_module, "complete", lambda *a: batches.append(len(a[1])) or real(*a))
    assert main(["generate", str(suite_dir.root), *flags]) == 0
    assert sum(batches) == N - n_kept, "what was on the disk was not sampled again"
    assert run.samples.read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    shutil.rmtree(undisturbed)


def test_parts_of_other_settings_or_weights_are_begun_anew(suite_dir):
    run = cell(suite_dir, "both/seed-1")
    samples = Samples.of(load_run([run.config]), run)
    appender = samples.appender(Shard(1, 2))
    appender.append([Completion("x", 1, 3, "x", "x", 0, "x", tokens=1)])
    appender.close()
    assert len(samples.parts()) == 1 and samples.begin() == 1
    other = Samples.of(load_run([run.config], ["--generation.top_p=0.5"]), run)
    assert other.binding != samples.binding and not other.parts()
    manifest = read_json(run.manifest)
    write_json(run.manifest, manifest | {"final_weights_sha256": "0" * 64})
    retrained = Samples.of(load_run([run.config]), run)
    assert retrained.binding != samples.binding and retrained.begin() == 0
    assert not list(run.samples_part.iterdir()), "the stale part is gone"


def test_a_kill_between_the_file_and_the_manifest_is_mended(suite_dir, whole, monkeypatch):
    run = cell(suite_dir, "both/seed-1")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(completions, "update_manifest", fail)
    assert main(["generate", str(suite_dir.root), "--arm=both", "--seed=1"]) == 130
    assert run.samples.is_file() and not run.complete.exists()
    monkeypatch.undo()
    monkeypatch.setattr(generate_module, "complete", fail)  # nothing is left to sample
    assert main(["generate", str(suite_dir.root), "--arm=both", "--seed=1"]) == 0
    assert run.samples.read_bytes() == texts(whole)["both/seed-1"] and run.complete.is_file()


def test_texts_sampled_anew_and_killed_before_the_manifest_are_read_by_nobody(finished, monkeypatch):
    """They would pass for texts of the settings that the manifest still has."""
    run, words = cell(finished, "both/seed-1"), ("--arm=both", "--seed=1", "--generation.temperature=0.2")
    before = run.samples.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(completions, "update_manifest", fail)
    assert main(["generate", str(finished.root), *words]) == 130
    monkeypatch.undo()
    assert run.samples.read_bytes() != before and run.complete.is_file()
    with pytest.raises(UserError, match="sampling it again was cut off: `replicate generate` makes it again"):
        read_samples(run)
    assert main(["generate", str(finished.root), *words]) == 0
    assert len(read_samples(run)) == N


def test_a_cell_told_to_stop_while_it_generates_goes_on_later(suite_dir, whole, monkeypatch):
    run = cell(suite_dir, "both/seed-1")
    config = load_run([run.config])  # four rows at once: three batches
    steps = []
    monkeypatch.setattr(generate_module, "stop_requested", lambda: steps.append(1) or len(steps) > 45)
    with pytest.raises(Preempted, match=r"both/seed-1: told to stop; (4|8) of 12 completions are kept"):
        run_cell(config, suite_dir, Console(file=io.StringIO()), "generate")
    assert not run.complete.exists() and not run.failed.exists() and not run.samples.exists()
    monkeypatch.undo()
    run_cell(config, suite_dir, Console(file=io.StringIO()), "generate")
    assert run.complete.is_file() and run.samples.read_bytes() == texts(whole)["both/seed-1"]


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    "only",
    [
        pytest.param([], id="cells dealt out", marks=pytest.mark.full),
        pytest.param(["--arm=both", "--seed=1"], id="one cell in shards"),
    ],
)
def test_any_number_of_processes_gives_the_same_files(suite_dir, whole, only):
    process = start("generate", suite_dir.root, "--jobs", 2, *only)
    out, err = process.communicate(timeout=240)
    assert process.returncode == (0 if only else 1), out + err
    for name in ["both/seed-1"] if only else CELLS:
        assert cell(suite_dir, name).samples.read_bytes() == texts(whole)[name]
        assert cell(suite_dir, name).complete.is_file() and not cell(suite_dir, name).samples_part.exists()


def test_shards_cut_a_cell_and_any_cut_goes_on_with_another(suite_dir, whole):
    run = cell(suite_dir, "both/seed-1")
    samples, store = Samples.of(load_run([run.config]), run), TokenStore.open(suite_dir.data)
    assert sum(len(samples.rows[s.i :: s.n]) for _, s in suite.deal([samples], 8)) == N
    assert [(s.i, s.n) for _, s in suite.deal([samples] * 3, 8)] == [(0, 2), (1, 2)] * 3
    assert [(s.i, s.n) for _, s in suite.deal([samples] * 3, 2)] == [(0, 1)] * 3
    assert len(suite.deal([samples], 100)) == N
    sample_shard(samples, Shard(1, 3), store)
    sample_shard(samples, Shard(0, 2), store)
    assert len(samples.parts()) == 4 + 4  # of rows 0 to 11: 1 4 7 10, and what is even but not among them
    sample_shard(samples, Shard(), store)
    assert samples.finish() == N
    assert run.samples.read_bytes() == texts(whole)["both/seed-1"]


def run_fake_workers(suite_dir: SuiteDir, slots: list[dict[str, str]], code_of: dict[str, str]) -> dict[str, str]:
    """Python one-liners in place of workers; what they print goes where a worker's would."""
    todo = [Samples.of(load_run([cell(suite_dir, name).config]), cell(suite_dir, name)) for name in code_of]
    display = suite.Display(Console(file=io.StringIO()), 1, 0)
    done: list[str] = []

    def command(samples: Samples, shard: Shard) -> list[str]:
        return [sys.executable, "-c", code_of[samples.name]]

    failed = suite.run_workers(todo, slots, command, display, lambda samples: done.append(samples.name))
    assert {*failed, *done} == set(code_of) and not set(failed) & set(done)
    return failed


def test_a_worker_that_fails_or_dies_fails_its_cell_alone(suite_dir):
    failed = run_fake_workers(
        suite_dir,
        [{}, {}],
        {
            "baseline/seed-1": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "both/seed-1": "import sys; print('first'); sys.exit('error: a mistake; its remedy')",
            "baseline/seed-2": "import time; time.sleep(1)",
        },
    )
    assert set(failed) == {"baseline/seed-1", "both/seed-1"}
    assert failed["baseline/seed-1"].startswith("ended by SIGKILL (out of memory?) (log: ")
    assert failed["both/seed-1"].startswith("a mistake; its remedy (log: ")
    assert "first" in Shard().path(cell(suite_dir, "both/seed-1"), ".log").read_text()


def test_each_worker_has_a_device_of_its_own(suite_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "visible_gpus", lambda: ["3", "GPU-5e"])
    samples = Samples.of(load_run([cell(suite_dir, "both/seed-1").config], ["--cluster.accelerator=auto"]),
                         cell(suite_dir, "both/seed-1"))  # fmt: skip
    slots = suite.slots(samples.config.cluster, None)
    assert slots == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-5e"}]
    assert suite.slots(samples.config.cluster, 1) == slots[:1]
    with pytest.raises(UserError, match=r"--jobs: 3 processes on 2 GPU"):
        suite.slots(samples.config.cluster, 3)
    code = f"import os, time; open({str(tmp_path)!r} + '/' + os.environ['CUDA_VISIBLE_DEVICES'], 'a'); time.sleep(0.5)"
    assert run_fake_workers(suite_dir, slots, dict.fromkeys(CELLS, code)) == {}
    assert {p.name for p in tmp_path.iterdir()} >= {"3", "GPU-5e"}
    monkeypatch.setattr(suite, "visible_gpus", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert suite.slots(samples.config.cluster, None) == [{"OMP_NUM_THREADS": "1"}]  # cluster.threads of the suite


def test_visible_devices_are_kept_by_name(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-a,")
    assert suite.visible_gpus() == ["4", "GPU-a"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert suite.visible_gpus() == ["0", "1"]


def test_ctrl_c_ends_every_worker_and_the_same_command_goes_on(suite_dir, whole):
    slow = ["--generation.rows_at_once=1", "--generation.max_new_tokens=12"]
    process = start("generate", suite_dir.root, "--seed=1", "--jobs=2", *slow)
    runs = [cell(suite_dir, name) for name in CELLS[:2]]
    wait_for(lambda: all(Shard().path(run, ".jsonl").is_file() for run in runs))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in out + err
    assert not psutil.wait_procs(children, timeout=10)[1], "a worker was left behind"
    assert main(["generate", str(suite_dir.root), "--seed=1", "--jobs=1"]) == 0
    for name in CELLS[:2]:
        assert cell(suite_dir, name).samples.read_bytes() == texts(whole)[name]


def test_a_cell_that_cannot_be_sampled_leaves_the_others_going(suite_dir, capsys):
    weights = next(cell(suite_dir, "both/seed-1").checkpoints.glob("step-*")) / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    with cell(suite_dir, "baseline/seed-1").lock():
        assert main(["generate", str(suite_dir.root)]) == 1
    text = said(capsys)
    assert "failed baseline/seed-1: " in text and "another process is running this cell" in text
    assert "failed both/seed-1: " in text and "no undamaged checkpoint of the last step 2" in text
    assert cell(suite_dir, "baseline/seed-2").complete.is_file() and "1 of 4 cells sampled" in text
    assert main(["generate", str(suite_dir.root), "--arm=both", "--seed=1"]) == 2
    assert "no undamaged checkpoint" in said(capsys)


# ---------------------------------------------------------------- what is shown


def test_progress_counts_completions_tokens_and_what_is_left(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(suite.time, "monotonic", lambda: 0.0)
    display = suite.Display(Console(file=io.StringIO()), 10, 2)
    display._meter._clock = lambda: float(next(clock))
    display._meter._started = -10.0
    step = display.steps_of(4)
    for n_ended in (0, 2, 0, 2):
        step(4 if n_ended == 0 and display._done == 2 else 2 if display._done > 2 else 4, n_ended)
    assert display._done == 6 and display._tokens == 12
    assert display._open_tokens == 0, "no row is open"
    assert str(display).startswith("6 of 10 completions, ") and str(display).endswith("left")


# ---------------------------------------------------------------- export


def test_two_arms_are_exported_and_come_back(whole, tmp_path, capsys):
    path = tmp_path / "ab.json"
    assert main(["generate", str(whole.root), "--export", str(path), "--seed", "1"]) == 0
    assert "wrote" in said(capsys)
    assert read_export(path, 1) == suite_completions(whole, ["baseline", "both"])
    assert json.loads(path.read_text())["metadata"]["questions_file"].endswith("prompts.json")
    assert main(["generate", str(whole.root), f"--export={path}", "--seed=1", "--pair=both,baseline"]) == 0
    assert list(read_export(path)[0]) == ["both", "baseline"]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["OUT", "--training.steps=3"], ["--training.steps=3", "does not act on generation"]),
        (["OUT", "--jobs=0"], ["--jobs: 0 must be at least 1"]),
        (["OUT", "--arm=nope"], ["no trained cell matches nope/seed-*"]),
        (["OUT", "--arm=both", "--seed=2"], ["no trained cell matches both/seed-2", "train first"]),
        (["OUT", "--out=elsewhere"], ["--out", "give one of them"]),
        (["nope"], ["nope: neither a folder nor a suite", "configs/suites has"]),
        (["OUT", "--generation.top_p=0"], ["generation.top_p: 0.0 must lie in (0, 1]"]),
        (["OUT", "--generation.top_p=1.01"], ["generation.top_p", "(0, 1]"]),
        (["OUT", "--generation.top_p=.nan"], ["generation.top_p: nan must be a finite number"]),
        (["OUT", "--generation.temperature=0"], ["generation.temperature: 0.0 must be at least 1e-06"]),
        (["OUT", "--generation.temperature=.inf"], ["generation.temperature: inf"]),
        (["OUT", "--generation.top_k=0"], ["generation.top_k: 0 must be at least 1"]),
        (["OUT", "--generation.rows_at_once=0"], ["generation.rows_at_once: 0 must be at least 1"]),
        (["OUT", "--generation.max_new_tokens=0"], ["generation.max_new_tokens: 0 must be at least 1"]),
        (["OUT", "--generation.prompts=null"], ["generation.prompts is empty", "name a prompt file"]),
        (["OUT", "--generation.prompts=nope"], ["nope: no such prompt file"]),
        (["OUT", "--pair=a,b"], ["--pair", "--export"]),
        (["OUT", "--export=x"], ["--export: needs --seed"]),
        (["OUT", "--export=x", "--seed=1", "--jobs=2"], ["--export", "--jobs"]),
        (["OUT", "--export=x", "--seed=1", "--pair=both"], ["--pair: 'both' must be two arms"]),
        (["OUT", "--export=x", "--seed=2"], ["samples.jsonl: no such file"]),
        (["OUT", "--shard=2/2"], ["--shard"]),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(whole, args, parts, capsys):
    assert main(["generate", *(str(whole.root) if a == "OUT" else a for a in args)]) == 2
    text = said(capsys)
    assert len(text.strip().splitlines()) == 1, text
    for part in parts:
        assert part in text


def test_another_corpus_is_not_taken_for_the_cells(suite_dir, capsys):
    run = cell(suite_dir, "both/seed-1")
    write_json(run.manifest, read_json(run.manifest) | {"data": {"hash": "f" * 64}})
    assert main(["generate", str(suite_dir.root), "--arm=both", "--seed=1"]) == 2
    assert "was trained on another corpus (ffffffffffffffff then" in said(capsys)


@pytest.fixture(autouse=True)
def not_told(monkeypatch):
    """A test that listens leaves no request to stop behind."""
    yield
    preemption._requested = False
