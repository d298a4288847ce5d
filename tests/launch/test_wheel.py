"""The wheel: built, installed into an environment without this checkout, and used there."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import CHECKOUT
from required import do_without

from replication import __version__

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("hatchling") is None:
        do_without("hatchling", "hatchling is not installed; launch/install.sh test")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=CHECKOUT, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, beside every package of this one but ours."""
    env = tmp_path_factory.mktemp("env")
    venv.create(env)
    pip = [sys.executable, "-m", "pip", "--python", env / "bin/python", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, wheel], check=True)
    packages = next(env.glob("lib/python*/site-packages"))
    present = [path for path in sys.path if "-packages" in path]
    (packages / "present.pth").write_text("\n".join(present))  # after this environment's own
    return env


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command of the environment in an empty folder."""
    empty = tmp_path_factory.mktemp("elsewhere")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(command: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{installed / 'bin'}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [installed / "bin" / command, *map(str, words)], cwd=empty, env=kept | path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return call


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(f"replication-{__version__}.dist-info/METADATA").decode())
    for folder in ("replication", "configs"):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=CHECKOUT, capture_output=True, text=True, check=True)
        prefix = "" if folder == "replication" else "replication/"
        assert [f for f in tracked.stdout.splitlines() if prefix + f not in names] == []
    launch = {name for name in names if name.startswith("replication/launch/")}
    assert {name.rpartition("/")[2] for name in launch} == {
        *("array.sbatch", "train.sbatch", "report.sbatch", "job.sh", "site.env.example"),
        *("install.sh", "local.sh", "ablation_2x2.sh", "gpu_check.sh"),
    }, "and never a site's own launch/site.env"
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"
    assert "replication" in metadata.get_payload()


def test_both_names_are_the_door(run: Run) -> None:
    assert (
        run("replicate", "--version").stdout == run("replication", "--version").stdout == f"replicate {__version__}\n"
    )


def test_remedies_fit_where_it_runs(run: Run, installed: Path) -> None:
    code = "from replication.errors import install; from replication.runs.manifest import git_state\n"
    code += "print(install('judge'), git_state())"
    said = run("python", "-P", "-c", code).stdout
    assert said == "pip install 'replication[judge]' Git(commit=None, dirty=None)\n"
    error = run("replicate", "grid", "submit", "laptop", "--site", "nowhere.env", code=2).stderr
    example = Path(error.partition("copy ")[2].partition(" there")[0])
    assert example.is_file() and example.is_relative_to(installed)


def test_a_job_of_slurm_is_what_the_wheel_brings(run: Run, installed: Path) -> None:
    said = run(
        "replicate", "grid", "submit", "ablation_2x2", "--cluster", "cpu_ddp", "--out", "jobs", "--dry-run"
    ).stdout
    home = next(line for line in said.splitlines() if "REPLICATION_CHECKOUT=" in line).partition("=")[2]
    assert (Path(home) / "launch" / "job.sh").is_file() and Path(home).is_relative_to(installed)
    script = subprocess.run(["bash", Path(home) / "launch" / "local.sh", "--help"], capture_output=True, text=True)
    assert "replicate train" in script.stdout


def test_the_first_cell_of_the_quickstart_in_short(run: Run, installed: Path, tmp_path: Path) -> None:
    layer = tmp_path / "short.yaml"
    layer.write_text(
        "data: {block_size_tokens: 16, token_budget: 20000, tokenizer: {vocab_size: 300}, "
        "sources: [{name: topics, kind: python_topics}]}\n"
        "model: {vocab_size: 300, n_blocks: 2, d_model: 32, d_ff: 32}\n"
        "training: {steps: 4, warmup_steps: 2, batch_tokens: 128}\n"
        "validation: {every_steps: 2, sequences: 4}\n"
        "checkpoints: {every_steps: 2}\n"
        "generation: {max_new_tokens: 2, samples_per_prompt: 1}\n"
    )
    layers = ("model/tiny.yaml", "data/python.yaml", "cluster/cpu.yaml", "arms/baseline.yaml", layer)
    configs = [word for name in layers for word in ("--config", name)]
    run("replication", "prepare", *configs, "--out", tmp_path / "data")
    run("replication", "train", *configs, "--out", tmp_path)
    cell = tmp_path / "runs" / "baseline" / "seed-1337"
    assert (cell / "COMPLETE").is_file()
    assert len((cell / "samples.jsonl").read_text().splitlines()) == 32
