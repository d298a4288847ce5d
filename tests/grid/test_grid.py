"""The whole path through the door on a small corpus: plan, run, status, report; and every mistake a user can make.

Real processes, real text files, the real command line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from paths import CHECKOUT, SUPPORT
from run_files import read_journal
from shadows import shadowed
from small_corpus import prose_layer, texts, write_folder

from replication.cli.main import main
from replication.config import AnalysisConfig, load_run, load_suite
from replication.protocol.certificate import certify
from replication.protocol.deviations import check_plan
from replication.protocol.preregistration import register
from replication.runs.files import read_json
from replication.runs.layout import SuiteDir


def replicate(*args: object, timeout: float = 240, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "replication", *map(str, args)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip


def refused(*args: object) -> str:
    """The one line of a refusal: exit code 2, no traceback. In this process, which has loaded everything already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, args)])
    assert code == 2, out.getvalue() + err.getvalue()
    assert "Traceback" not in out.getvalue() + err.getvalue()
    (line,) = err.getvalue().strip().splitlines()
    return line


def write_suite(folder: Path, **run: object) -> Path:
    corpus = folder / "corpus"
    write_folder(corpus, texts(40))
    layer = {
        "data": prose_layer(corpus),
        "model": {"vocab_size": 300, "n_blocks": 2, "d_model": 32, "d_head": 8, "d_ff": 16},
        "cluster": {"accelerator": "cpu", "threads": 1},
    }
    (folder / "layer.yaml").write_text(yaml.safe_dump(layer))
    suite = {
        "name": "small",
        "arms": ["baseline", "token_gain", "layer_gain", "both"],
        "seeds": [1, 2],
        "layers": [str(folder / "layer.yaml")],
        "run": {
            "training": {"steps": 6, "batch_tokens": 64, "warmup_steps": 2},
            "validation": {"every_steps": 3, "sequences": 4},
            "logging": {"log_every_steps": 2},
            "checkpoints": {"every_steps": 2},
            "generation": {"max_new_tokens": 5, "samples_per_prompt": 1},
            **run,
        },
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """A suite of eight cells that `grid run` brought to the end, once for all tests that only read it.

    It was called in a folder whose modules would break every process that imported them.
    """
    folder = tmp_path_factory.mktemp("grid")
    here = shadowed(tmp_path_factory.mktemp("here"))
    suite = write_suite(folder)
    frozen = replicate("plan", "freeze", suite, "--out", folder / "out")
    assert frozen.returncode == 0, frozen.stdout + frozen.stderr
    done = replicate("grid", "run", suite, "--out", folder / "out", "--jobs", 2, timeout=400, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "analysis plan" in done.stdout and "not the plan's" not in done.stdout
    assert f"replicate tensorboard {folder / 'out'}" in " ".join(done.stdout.split())
    return suite, folder / "out"


def test_the_contract_of_the_output(finished):
    suite, out = finished
    plan = {k: read_json(out / "plan.json")[k] for k in ("sha256", "frozen_at")}
    assert check_plan(SuiteDir(out), load_suite(suite)).followed
    for arm in ("baseline", "token_gain", "layer_gain", "both"):
        for seed in (1, 2):
            cell = out / "runs" / arm / f"seed-{seed}"
            for name in ("config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "COMPLETE"):
                assert (cell / name).stat().st_size > 0
            assert list((cell / "tensorboard").glob("events.*"))
            assert (cell / "checkpoints" / "step-000006" / "COMPLETE").is_file()
            assert (out / "tensorboard" / arm / f"seed-{seed}").resolve() == (cell / "tensorboard").resolve()
            manifest = read_json(cell / "manifest.json")
            for key in (
                "config_hash",
                "git",
                "packages",
                "hardware",
                "world_size",
                "initial_weights_sha256",
                "data_chain",
            ):
                assert manifest[key] is not None
            assert manifest["plan"] == plan and [start["plan"] for start in manifest["starts"]] == [plan]
            written_last = (cell / "COMPLETE").stat().st_mtime_ns
            assert all((cell / n).stat().st_mtime_ns <= written_last for n in ("samples.jsonl", "metrics.jsonl"))
            assert len((cell / "samples.jsonl").read_text().splitlines()) == 32
    for name in ("report.html", "report.md", "results.json", "certificate.json"):
        assert (out / name).stat().st_size > 0
    assert list((out / "figures").glob("*.svg"))


def test_the_certificate_holds_for_both_seeds_and_fails_on_each_tampering(finished, tmp_path):
    suite, out = finished
    arms = load_suite(suite).arms
    whole = certify(SuiteDir(out), arms, (1, 2)).to_dict()
    assert [s["state"] for s in whole["seeds"]] == ["holds", "holds"]

    def state_after(change) -> str:
        copy = tmp_path / f"copy-{time.monotonic_ns()}"
        shutil.copytree(out, copy, symlinks=True)
        change(SuiteDir(copy).cell("both", 1))
        first, second = certify(SuiteDir(copy), arms, (1, 2)).to_dict()["seeds"]
        assert second["state"] == "holds", "the other seed is untouched"
        return first["state"]

    def edit_manifest(key):
        def change(cell):
            manifest = read_json(cell.manifest)
            manifest[key] = "0" * 64
            cell.manifest.write_text(json.dumps(manifest))

        return change

    def edit_config(cell):
        text = cell.config.read_text()
        assert "weight_decay: 0.1" in text
        cell.config.write_text(text.replace("weight_decay: 0.1", "weight_decay: 0.2"))

    assert state_after(lambda cell: None) == "holds"
    assert state_after(edit_manifest("initial_weights_sha256")) == "fails"
    assert state_after(edit_manifest("data_chain")) == "fails"
    assert state_after(edit_config) == "fails"


def test_one_fed_sequence_changed_in_training_fails_the_certificate(tmp_path):
    """Not an edited file: the arm is really trained on one other sequence, and on other initial weights."""
    import io

    from memory_store import MemoryStore
    from rich.console import Console
    from training_setup import small_config

    from replication.training.train import train as train_cell

    class OtherSequence(MemoryStore):
        def read(self, split, source_ids, indices):
            tokens = super().read(split, source_ids, indices)
            chosen = (source_ids == 1) & (indices == 3) & (split == "train")
            tokens[chosen, 4] = 1 + tokens[chosen, 4] % 60
            return tokens

    def states(store, *flags: str) -> str:
        out = SuiteDir(tmp_path / f"{type(store).__name__}{'-'.join(flags)}")
        for arm, of_arm, extra in (("baseline", MemoryStore(), ()), ("both", store, flags)):
            run = out.cell(arm, 1)
            config = small_config(arm, "--training.steps=12", *extra)
            train_cell(config, run, of_arm, Console(file=io.StringIO()))
            manifest = read_json(run.manifest)
            run.complete.write_text(json.dumps({k: manifest[k] for k in ("config_hash", "step")}))
        (seed,) = certify(out, ("baseline", "both"), (1,)).to_dict()["seeds"]
        return seed["state"]

    assert states(MemoryStore()) == "holds"
    assert states(OtherSequence()) == "fails"
    assert states(MemoryStore(), "--weights_seed=9") == "fails"
    assert states(MemoryStore(), "--training.learning_rate=0.002") == "fails"


def test_a_second_call_repeats_nothing(finished):
    suite, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "suite.yaml"}
    done = replicate("grid", "run", suite, "--out", out, "--jobs", 2)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_status_and_plan_show_every_cell(finished):
    suite, out = finished
    status = replicate("grid", "status", out)
    assert status.stdout.count("complete") == 8 + 1  # every row, and the count below
    assert "6/6" in status.stdout
    plan = replicate("grid", "plan", suite, "--out", out)
    assert plan.stdout.index("both/seed-1") < plan.stdout.index("baseline/seed-2"), "seed blocks"
    diff = replicate("grid", "diff", suite, "baseline", "both")
    assert "token_gain.enabled" in diff.stdout
    assert "learning_rate" not in diff.stdout


def test_two_processes_side_by_side_or_one_give_the_same_weights(finished):
    """Same config and seed in another folder, run alone through `replicate train`."""
    _, out = finished
    cell = SuiteDir(out).cell("both", 2)
    alone = out.parent / "alone"
    done = replicate("train", "--config", cell.config, "--out", alone, "--data.dir", out / "data")
    assert done.returncode == 0, done.stderr
    again = SuiteDir(alone).cell("both", 2)
    for key in ("final_weights_sha256", "data_chain", "initial_weights_sha256"):
        assert read_json(again.manifest)[key] == read_json(cell.manifest)[key]
    assert again.samples.read_text() == cell.samples.read_text()


def test_two_processes_through_the_door(finished, tmp_path):
    """`replicate train` starts its own ranks; another world size is the same experiment."""
    _, out = finished
    cell = SuiteDir(out).cell("both", 2)
    shutil.copy(out / "plan.json", tmp_path)
    flags = ("--cluster.strategy=ddp", "--cluster.devices=2")
    done = replicate("train", "--config", cell.config, "--out", tmp_path, "--data.dir", out / "data", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    two = SuiteDir(tmp_path).cell("both", 2)
    assert two.state() == "complete"
    a, b = read_json(two.manifest), read_json(cell.manifest)
    assert (a["world_size"], b["world_size"]) == (2, 1)
    for key in ("config_hash", "data_chain", "tokens", "initial_weights_sha256", "plan"):
        assert a[key] == b[key]
    losses = [
        [line["val/loss_nats"] for line in read_journal(c.metrics) if "val/loss_nats" in line] for c in (two, cell)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(two.samples.read_text().splitlines()) == 32


def test_status_shows_the_folder_not_the_plan(finished, tmp_path):
    _, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, symlinks=True)
    stored = yaml.safe_load((copy / "suite.yaml").read_text())
    (copy / "suite.yaml").write_text(yaml.safe_dump(stored | {"seeds": [1]}))
    config = copy / "runs/both/seed-1/config.yaml"
    config.write_text(config.read_text().replace("steps: 6", "steps: 60", 1))
    status = replicate("grid", "status", copy).stdout
    assert "6/60" in status
    assert "seed-2" not in status


def test_arms_sampled_differently_are_noticed_in_the_report(finished, tmp_path):
    _, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, symlinks=True)
    assert "sampled under different settings" not in (copy / "report.md").read_text()
    assert replicate("generate", copy, "--arm", "both", "--generation.temperature=0.1").returncode == 0
    assert replicate("report", copy).returncode == 0
    assert "sampled under different settings" in (copy / "report.md").read_text()


def test_report_and_generate_again(finished):
    _, out = finished
    cell = SuiteDir(out).cell("both", 1)
    before = cell.samples.read_text()
    assert replicate("generate", out, "--arm", "both", "--seed", 1).returncode == 0
    assert cell.samples.read_text() == before
    assert replicate("report", out).returncode == 0


# ---------------------------------------------------------------- failure, interruption


@pytest.mark.full
def test_a_failed_cell_is_shown_and_can_be_run_again(tmp_path):
    suite = write_suite(tmp_path)
    config = yaml.safe_load(suite.read_text())
    config |= {"seeds": [1], "arms": ["baseline", "both"]}
    suite.write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    blocker = out / "runs" / "both" / "seed-1" / "tensorboard"
    prepared = replicate("prepare", "--config", tmp_path / "layer.yaml", "--out", tmp_path / "data")
    assert prepared.returncode == 0, prepared.stderr
    assert replicate("grid", "run", suite, "--out", out, "--data.dir", tmp_path / "nodata").returncode == 2
    blocker.parent.mkdir(parents=True, exist_ok=True)
    blocker.write_text("a file where a folder belongs")
    done = replicate("grid", "run", suite, "--out", out, "--data.dir", tmp_path / "data")
    assert done.returncode == 2
    assert "1 of 2 cells failed (both/seed-1)" in done.stderr
    status = replicate("grid", "status", out)
    assert "failed" in status.stdout
    assert "Error" in status.stdout
    assert "failed" in (out / "report.md").read_text(), "the report shows failed cells too"
    blocker.unlink()
    again = replicate("grid", "run", suite, "--out", out, "--data.dir", tmp_path / "data")
    assert again.returncode == 0, again.stdout + again.stderr
    assert SuiteDir(out).cell("both", 1).state() == "complete"
    assert not SuiteDir(out).cell("both", 1).failed.exists()


@pytest.mark.parametrize(
    "stop",
    [pytest.param(signal.SIGINT, id="ctrl-c"), pytest.param(signal.SIGTERM, id="sigterm", marks=pytest.mark.full)],
)
def test_a_stopped_grid_stops_its_cells_and_the_same_command_goes_on(tmp_path, stop):
    suite = write_suite(tmp_path, training={"steps": 12, "batch_tokens": 64, "warmup_steps": 2})
    config = yaml.safe_load(suite.read_text())
    suite.write_text(yaml.safe_dump(config | {"arms": ["baseline"]}))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "replication",
        "grid",
        "run",
        str(suite),
        "--out",
        str(out),
        "--seeds",
        "1",
        "--jobs",
        "2",
    ]
    (tmp_path / "hold").write_text("8")
    held = {"PYTHONPATH": f"{SUPPORT / 'held'}:{CHECKOUT}", "REPLICATION_HELD": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as with & in a script
                               env=os.environ | {"OMP_NUM_THREADS": "1"} | held)  # fmt: skip
    cell = SuiteDir(out).cell("baseline", 1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "held-0").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cell.state() == "running"
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in output
    assert "Traceback" not in output
    assert cell.state() == "interrupted"
    stopped_at = read_journal(cell.metrics)[-1]["step"]
    assert stopped_at == 8
    assert "no analysis plan is registered" in output
    late_mean = AnalysisConfig(late_validations=2)
    two_arms = replace(load_suite(suite), arms=("baseline", "both"), analysis=late_mean)  # a plan compares
    late = register(SuiteDir(out), two_arms)
    assert late.record.began_before == ("baseline/seed-1",)
    again = replicate("grid", "run", suite, "--out", out, "--seeds", "1")
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [line["step"] for line in read_journal(cell.metrics) if "tokens" in line]
    assert steps == list(range(2, 13, 2)), "nothing is lost or doubled"
    manifest = read_json(cell.manifest)
    assert manifest["plan"] is None, "of the first start"
    assert [bool(start["plan"]) for start in manifest["starts"]] == [False, True]
    checked = replicate("plan", "check", out)
    assert checked.returncode == 1
    assert "cells that started before the plan was registered: baseline/seed-1" in checked.stdout


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_one_line_with_the_remedy(tmp_path):
    suite = write_suite(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("model:\n  n_blocks: three\n")
    done = replicate("trian")
    assert done.returncode == 2 and "no verb 'trian'" in done.stderr and "Traceback" not in done.stderr
    assert "model.n_blocks" in refused("train", "--config", bad, "--out", tmp_path / "x")
    assert "--model.n_blok" in refused("train", "--model.n_blok=3", "--out", tmp_path / "x")
    assert "--out is missing" in refused("train", "--config", "arms/both.yaml")
    assert "no such config file" in refused("grid", "plan", "nosuite")
    assert "--jobs" in refused("grid", "run", suite, "--out", tmp_path / "x", "--jobs", "0")
    assert "--seeds[0]: must be a whole number" in refused("grid", "plan", suite, "--seeds", "a,b")
    assert "replicate prepare" in refused("train", "--config", "arms/both.yaml", "--out", tmp_path / "x")
    assert "does not exist" in refused("train", "--data.dir", tmp_path / "nodata", "--out", tmp_path / "x")
    assert "replicate grid run" in refused("report", tmp_path / "nothing")
    assert "neither a folder nor a suite" in refused("generate", tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "is not empty" in refused("grid", "run", suite, "--out", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert "choose another path" in refused("grid", "run", suite, "--out", tmp_path / "full" / "thesis.txt")
    assert "choose another path" in refused("grid", "run", suite, "--out", "/proc/nowhere")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("arm: caf\xe9\n".encode("latin-1"))
    assert "latin.yaml" in refused("train", "--config", latin, "--out", tmp_path / "x")
    assert "nope.json" in refused("grid", "run", suite, "--out", tmp_path / "y", "--generation.prompts=nope.json")
    assert not list((tmp_path / "y" / "runs").rglob("manifest.json")), "told before a cell was trained"


def test_debug_shows_the_traceback(tmp_path):
    done = replicate("train", "--debug", "--model.n_blocks=x", "--out", tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_corpus_shorter_than_one_batch_is_refused(tmp_path):
    suite = write_suite(tmp_path, training={"steps": 6, "batch_tokens": 1_600_000, "warmup_steps": 2})
    done = replicate("grid", "run", suite, "--out", tmp_path / "out", "--seeds", "1")
    assert done.returncode == 2
    assert "training.batch_tokens" in done.stderr
    assert not (tmp_path / "out" / "runs" / "baseline" / "seed-1" / "manifest.json").exists(), "before any cell ran"


def test_another_suite_or_cell_in_the_folder_is_refused(finished):
    suite, out = finished
    other = refused("grid", "run", suite, "--out", out, "--training.learning_rate=0.001")
    assert "training.learning_rate: 0.003 there, 0.001 here" in other
    assert "choose another --out" in other
    cell = SuiteDir(out).cell("both", 1)
    assert "training.steps" in refused("train", "--config", cell.config, "--training.steps=7", "--out", out)


def test_a_busy_cell_is_not_run_twice(finished):
    _, out = finished
    cell = SuiteDir(out).cell("both", 1)
    with cell.lock():
        assert cell.is_locked()
        assert "another process is running this cell" in refused(
            "generate", out, "--arm", "both", "--seed", 1, "--again"
        )
    assert not cell.is_locked()


def test_print_config_is_a_config(tmp_path):
    done = replicate("train", "--config", "arms/both.yaml", "--training.steps=31", "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    config = load_run([path])
    assert config.arm == "both"
    assert config.training.steps == 31


@pytest.mark.parametrize("verb", ["", "prepare", "train", "grid", "generate", "report", "doctor"])
def test_help_answers(verb):
    done = replicate(*([verb] if verb else []), "--help")
    assert done.returncode == 0
    assert "usage" in done.stdout.lower()
