"""What a cell's starts record: code and machine are told where they change, other data and configs are refused."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from memory_store import MemoryStore
from rich.console import Console
from synthetic_runs import build_suite, edit_manifest, edit_start
from trained_suite import write_trained_suite
from training_setup import fit, small_config

from replication.cli.grid import grid
from replication.config import load_run, load_suite
from replication.errors import UserError
from replication.grid.cell import run_cell
from replication.grid.cells import claim_folder, load_cells, load_grid, tell_before
from replication.runs.files import read_json, write_json
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import code_hash
from replication.runs.starts import changes, logged_cells, unlike
from replication.training.train import train


def go_on(run: RunDir, *flags: str) -> str:
    """Train on from step 4; returns what was printed."""
    shutil.rmtree(run.checkpoints / "step-000006")
    said = io.StringIO()
    train(small_config("baseline", *flags), run, MemoryStore(), Console(file=said, width=1000))  # type: ignore[arg-type]
    return said.getvalue()


def test_every_start_records_code_and_machine_and_a_change_is_one_line(tmp_path: Path) -> None:
    run = fit(small_config(), tmp_path / "run")
    assert "otherwise" not in go_on(run)
    first, second = read_json(run.manifest)["starts"]
    assert first["code_hash"] == second["code_hash"] == code_hash() and (first["step"], second["step"]) == (0, 4)
    assert (
        first["machine"]["micro_batch_sequences"] == 8 and first["machine"]["device"] and "torch" in first["packages"]
    )
    write_json(run.manifest, read_json(run.manifest) | {"starts": [first | {"code_hash": "beef"}]})
    said = go_on(run, "--cluster.micro_batch_sequences=2")
    (line,) = [line for line in said.splitlines() if "otherwise" in line]
    assert f"code_hash beef -> {code_hash()}, micro_batch_sequences 8 -> 2; the report will say so" in line
    assert len(read_json(run.manifest)["starts"]) == 2
    edit_start(run, code_hash=None, machine=None, packages=None)  # as an older version wrote it
    assert f"code_hash not recorded -> {code_hash()}; the report" in go_on(run)


def test_facts_in_words() -> None:
    assert unlike({"a": [{"x": 1}], "b": [{"x": 1, "y": 2}]}) == "" == changes([], {"x": 1})
    many = {f"both/seed-{i}": [{"x": i == 0}] for i in range(12)}
    many |= {name: [{"x": False}] for name in ("now", "here/seed-7")}
    assert unlike(many) == "x is True (both/seed-0) and False (both/seed-[1-11], now, here/seed-7)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SuiteDir:
    """Two arms at two seeds, the last cell not trained; then the corpus becomes another."""
    suite_dir = write_trained_suite(tmp_path_factory.mktemp("trained"))
    manifest = suite_dir.data / "manifest.json"
    write_json(manifest, read_json(manifest) | {"hash": "5" * 64})
    return suite_dir


def test_a_cell_is_not_trained_on_other_data_than_the_folders_other_cells(
    trained: SuiteDir, capsys: pytest.CaptureFixture[str]
) -> None:
    there = read_json(trained.cell("both", 1).manifest)["data"]["hash"][:16]
    words = f"holds the data {'5' * 16}, and cells in .* were trained on others .{there} of seeds 1, 2.*another --out"
    with pytest.raises(UserError, match=words) as of_grid:
        grid(["run", str(trained.suite), "--out", str(trained.root), "--seeds", "2"])
    with pytest.raises(UserError, match=words) as of_cell:  # as in a job that starts days after it was submitted
        run_cell(load_run([trained.cell("both", 2).config]), trained, Console(file=io.StringIO()), "train")
    assert "\n" not in f"{of_grid.value}{of_cell.value}"
    assert not trained.cell("both", 2).manifest.exists()


def test_other_code_is_told_before_a_cell_runs(trained: SuiteDir, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(trained.cell("both", 1), starts=[{"step": 0, "code_hash": "beef"}])
    said = io.StringIO()
    tell_before(
        load_grid(load_suite(trained.suite), trained), logged_cells(trained.runs), Console(file=said, width=1000)
    )
    assert re.search(rf"ran other code: code_hash is {code_hash()} \(.*now\) and beef \(both/seed-1\)", said.getvalue())


def test_a_seed_of_another_config_is_refused_and_one_of_another_data_seed_is_not(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,), steps=20)
    more = type(suite)(**{**vars(suite), "seeds": (2,)})
    words = r"runs/baseline/seed-1: a seed of another config.*training.weight_decay: 0.1 there, 0.2 here.*same flags"
    with pytest.raises(UserError, match=words):
        claim_folder(more, suite_dir, load_cells(more, suite_dir, ["--training.weight_decay=0.2"]))
    claim_folder(more, suite_dir, load_cells(more, suite_dir, ["--data_seed=7", "--cluster.micro_batch_sequences=8"]))
    assert json.loads(json.dumps(load_suite(suite_dir.suite).seeds)) == [1, 2]
