"""`replicate doctor`: the real thing on this machine, broken config files, and the estimates."""

from __future__ import annotations

import dataclasses
import io
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from replication.cli.main import main
from replication.config import (
    ModelConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    config_root,
    find_cluster,
    load_cell,
    load_suite,
)
from replication.grid import doctor as doctor_module
from replication.grid.cluster import time_table
from replication.grid.doctor import Machine, _obstacles, data_needs, doctor, needs_of
from replication.model.cost import predict_step
from replication.model.size import activation_gib, parameter_count, state_needs

PUBLISHED_MODEL = ModelConfig(
    vocab_size=100_031, n_blocks=20, d_model=1024, n_heads=16, n_kv_heads=8, d_head=64, d_ff=3072
)
LARGE_MACHINE = Machine(memory_gib=64, gpu_gib=80, disk_gib=1000, hub=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not looked at, for tests of the config part."""
    monkeypatch.setattr("replication.grid.doctor.examine_machine", lambda: Machine(memory_gib=8, disk_gib=100))


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A copy of the shipped configs that a test may break, with one suite: each takes a while to look at."""
    root = Path(shutil.copytree(config_root(), tmp_path / "configs"))
    for suite in (root / "suites").glob("*.yaml"):
        if suite.stem != "ablation_2x2":
            suite.unlink()
    return root


def examine(root: Path) -> tuple[int, str]:
    out = io.StringIO()
    code = doctor(Console(file=out, width=200), root)
    return code, out.getvalue()


# ---------------------------------------------------------------- the real thing


def test_on_this_machine() -> None:
    code, text = examine(config_root())
    assert code == 0, text
    for item in ("Python", "CPU", "memory", "torch", "GPUs", "ZeRO", "SLURM", "disk", "data hub", "git"):
        assert item in text
    for path in config_root().glob("*/*.[jy]*"):
        assert path.stem in text or path.parent.name == "examples"
    assert "Traceback" not in text


def test_the_verb() -> None:
    command = [sys.executable, "-m", "replication", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ablation_2x2" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("package", "version", "source"),
    [
        ("lightning", "2.6.2", "GHSA-w37p-236h-pfx3"),
        ("lightning", "2.6.3", "GHSA-w37p-236h-pfx3"),
        ("deepspeed", "0.17.6", "DeepSpeed#7718"),
        ("deepspeed", "0.18.2+cu130", "DeepSpeed#7718"),
        ("deepspeed", "0.19.3", "DeepSpeed#8224"),
        ("liger-kernel", "0.8.1", "Liger-Kernel#1298"),
        ("lightning", "2.6.6", ""),
        ("deepspeed", "0.19.8", ""),
        ("liger-kernel", "0.8.2", ""),
    ],
)
def test_a_release_with_a_known_fault_is_named(
    package: str, version: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "importlib.metadata.version", {"lightning": "2.6.6", "deepspeed": "0.19.8", package: version}.get
    )
    broken = [f for f in doctor_module._packages() if f.verdict == "broken"]
    assert [(f.item, f.found.partition(":")[0]) for f in broken] == [(package, version)] * bool(source)
    assert all(source in f.found and f.remedy == "run launch/install.sh" for f in broken)


def test_torch_that_does_not_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "IMPORTS", "raise OSError('libtorch_cpu.so: cannot open shared object file')")
    findings = {f.item: f for f in doctor_module.examine_machine().findings}
    for item in ("torch", "ZeRO"):
        assert findings[item].verdict == "missing" and "libtorch_cpu.so: cannot open" in findings[item].found


def test_what_is_asked_of_a_cluster_needs_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--out", "out"]) == 2
    assert "--out: says what a cluster is asked about; name that with --cluster" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_one_suite_is_told_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--suite", "phase3_1b2"]) == 0
    said = capsys.readouterr().out
    assert "memory of a cell" in said and "runs here" in said and "phase3_1b2" in said
    assert "ablation_2x2" not in said and "Config files" not in said
    assert main(["doctor", "--suite", "phase_3"]) == 2
    assert "phase_3: no such config file; configs/suites has: " in capsys.readouterr().err


# ---------------------------------------------------------------- broken config files


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("model/tiny.yaml", "model:\n  n_blocks: [1\n", "line 2"),
        ("arms/both.yaml", "token_gain:\n  enable: true\n", "enable"),
        ("cluster/cpu.yaml", "cluster:\n  threads: many\n", "many"),
        ("suites/new.yaml", "name: new\narms: [nope]\nseeds: [1]\n", "nope"),
        ("suites/new.yaml", "name: new\nseeds: [1]\n", "arms"),
        ("prompts/new.json", "[{]", "not valid JSON"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_broken_file_is_named(configs: Path, name: str, text: str, expected: str) -> None:
    (configs / name).write_text(text)
    code, output = examine(configs)
    assert code == 2
    assert name in output.splitlines()[-1]
    assert expected in " ".join(output.split())


@pytest.mark.usefixtures("quick")
def test_a_suite_is_read_from_the_given_folder(configs: Path) -> None:
    tiny = configs / "model" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("n_blocks: 4", "n_blocks: 3"))
    code, output = examine(configs)
    assert code == 0
    model = ModelConfig(n_blocks=3, d_ff=160)
    assert f"{parameter_count(model):,}" in output


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("tied", "feed_forward", "qk_norm", "shared"),
    list(product([False, True], ["moe", "dense"], ["none", "after_rotary", "before_rotary"], [False, True])),
)
def test_parameter_count_is_the_real_models(tied: bool, feed_forward: str, qk_norm: str, shared: bool) -> None:
    from replication.model.transformer import Transformer

    model = ModelConfig(
        vocab_size=50,
        n_blocks=3,
        d_model=24,
        n_heads=6,
        n_kv_heads=2,
        d_head=8,
        d_ff=40,
        n_experts=3,
        feed_forward=feed_forward,  # type: ignore[arg-type]
        qk_norm=qk_norm,  # type: ignore[arg-type]
        tied_head=tied,
        shared_expert=shared,
    )
    assert parameter_count(model) == sum(p.numel() for p in Transformer(model).parameters())


def test_the_published_model_has_1_21_billion_parameters() -> None:
    assert round(parameter_count(PUBLISHED_MODEL) / 1e6) == 1212


def test_needs_are_counted_over_all_cells() -> None:
    suite = dataclasses.replace(load_suite("ablation_2x2"), seeds=(1, 2, 3))
    config = RunConfig()
    needs = needs_of(suite, config)
    assert needs.n_cells == 12
    assert needs.tokens == 12 * config.training.steps * config.training.batch_tokens
    assert needs.training_gib == pytest.approx(needs.parameters * 16 / 2**30)
    assert needs.checkpoints_gib == pytest.approx(12 * 3 * needs.parameters * 12 / 2**30)


def obstacles(machine: Machine, **changes: object) -> list[str]:
    config = dataclasses.replace(RunConfig(), **changes)  # type: ignore[arg-type]
    needs = needs_of(load_suite("ablation_2x2"), config)
    return [o for o in _obstacles(needs, config, machine) if "names no source" not in o]


def test_what_keeps_a_suite_from_running() -> None:
    cpu_only = dataclasses.replace(LARGE_MACHINE, gpu_gib=0)
    on_gpu = dataclasses.replace(RunConfig().cluster, accelerator="gpu")
    full_run = dataclasses.replace(RunConfig().training, steps=30_000, batch_tokens=131_072)
    assert obstacles(LARGE_MACHINE) == []
    assert obstacles(cpu_only) == []
    assert "accelerator" in obstacles(cpu_only, cluster=on_gpu)[0]
    memory, months = obstacles(cpu_only, model=PUBLISHED_MODEL, training=full_run)
    assert "free memory" in memory and "months on a CPU" in months, "a whole batch's activations do not fit either"
    assert "do not fit the GPU" in obstacles(dataclasses.replace(LARGE_MACHINE, gpu_gib=8), model=PUBLISHED_MODEL)[0]
    assert "free memory" in obstacles(Machine(memory_gib=8, disk_gib=1000), model=PUBLISHED_MODEL)[0]
    assert "free on disk" in obstacles(dataclasses.replace(LARGE_MACHINE, disk_gib=0.001))[0]


def test_where_the_data_come_from(tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("text")
    sources = (
        SourceConfig("docs", "python_docstrings"),
        SourceConfig("files", "text", f"{tmp_path}/*.txt"),
        SourceConfig("gone", "jsonl", f"{tmp_path}/*.jsonl"),
        SourceConfig("web", "hub", "someone/corpus"),
    )
    data = dataclasses.replace(RunConfig().data, sources=sources, tokenizer=TokenizerConfig("someone/bpe"))
    states = dict(data_needs(dataclasses.replace(RunConfig(), data=data)))
    assert {name: state.split(":")[0] for name, state in states.items()} == {
        "docs": "embedded",
        "files": "local",
        "gone": "missing",
        "web": "hub",
        "tokenizer": "hub",
    }
    found = obstacles(dataclasses.replace(LARGE_MACHINE, hub=False), data=data)
    assert [o.split()[0] for o in found] == ["gone:", "web", "tokenizer"]


def test_a_prepared_folder_stands_for_the_sources(tmp_path: Path) -> None:
    config = dataclasses.replace(RunConfig(), data=dataclasses.replace(RunConfig().data, dir=str(tmp_path)))
    assert data_needs(config)[0][1].startswith("missing")
    (tmp_path / "manifest.json").write_text("{}")
    assert data_needs(config) == [("data.dir", "local: prepared")]


def test_the_time_of_a_suite_is_predicted_for_each_strategy():
    suite = load_suite("phase3_1b2")
    config = load_cell(suite, "both", suite.seeds[0], cluster=find_cluster("nodes_ddp"))
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(time_table(suite, config))
    cells = [line.replace(",", "").split() for line in console.export_text().splitlines()[4:-1]]
    rows = {words[1]: [float(word) for word in words if word[0].isdigit()] for words in cells}
    assert list(rows) == ["ddp", "zero1", "zero2", "zero3"], "one process is another strategy"
    milliseconds, tokens_per_second, of_cell, of_all = rows["ddp"]
    assert milliseconds == round(1e3 * predict_step(config).seconds)
    assert tokens_per_second == pytest.approx(131_072_000 / milliseconds, rel=0.01)
    assert of_all == pytest.approx(of_cell * len(suite.arms) * len(suite.seeds), rel=0.02)


def test_one_gpu_of_24_gb_has_time_and_memory_for_one_gpu_day():
    suite = load_suite("one_gpu_day")
    config = load_cell(suite, "both", 1)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(time_table(suite, config))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines()[4:-1]]
    hours = {gpu.strip(): float(of_all) for _, gpu, *_, of_all in rows}
    assert hours["H100"] < hours["RTX 4090"] < hours["RTX 3090"] < 22, "two hours for validations and starts"
    assert state_needs(config).device_gib + activation_gib(config) < 8
