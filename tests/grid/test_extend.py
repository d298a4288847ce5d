"""A longer run from the last checkpoint: the weights of a run that had the steps from the start, and marked as one."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from trained_suite import write_trained_suite
from training_setup import identical, weights

from replication.cli.main import main
from replication.config import load_run, load_suite, scientific_hash
from replication.errors import UserError
from replication.grid import extend as extend_module
from replication.grid.cell import run_cell
from replication.grid.cells import places
from replication.grid.status import statuses
from replication.protocol.deviations import check_plan
from replication.protocol.preregistration import register
from replication.report.report import collect
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.ledger import read_ledger
from replication.runs.manifest import read_manifest

WHY = "the loss was still falling"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SuiteDir:
    """Three cells with two steps behind them, a validation each step; the fourth has not begun."""
    suite_dir = write_trained_suite(tmp_path_factory.mktemp("extend"))
    edit(suite_dir, generation={"prompts": None})
    return suite_dir


@pytest.fixture
def trained(built: SuiteDir, tmp_path: Path) -> SuiteDir:
    return SuiteDir(Path(shutil.copytree(built.root, tmp_path / "out")))


def extend(suite_dir: SuiteDir, steps: int = 5) -> int:
    return main(["grid", "extend", str(suite_dir.root), "--steps", str(steps), "--why", WHY])


def go_on(suite_dir: SuiteDir, *names: str) -> None:
    for name in names:
        run_cell(load_run([suite_dir.runs / name / "config.yaml"]), suite_dir, Console(file=io.StringIO()))


def test_the_weights_are_those_of_a_run_that_had_the_steps_from_the_start(
    trained: SuiteDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(trained, load_suite(trained.suite), ["--generation.prompts=null"])
    run = trained.cell("both", 1)
    before = load_run([run.config])
    assert extend(trained, 3) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "3 begun cells are of 3 steps now" in said
    assert f"replicate grid run {trained.suite} --out {trained.root}" in said.replace("  ", " ")
    suite = load_suite(trained.suite)
    rows = {r.name: (r.state, r.step, r.steps) for r in statuses(suite.diverged, places(suite, trained))}
    assert rows["both/seed-1"] == ("interrupted", 2, 3) and rows["both/seed-2"] == ("pending", 0, 3)

    go_on(trained, "both/seed-1")
    whole = SuiteDir(tmp_path / "whole")
    whole.root.mkdir()
    whole.data.symlink_to(trained.data)
    run_cell(replace(before, training=replace(before.training, steps=3)), whole, Console(file=io.StringIO()), "train")
    assert identical(weights(run), weights(whole.cell("both", 1)))

    manifest, other = read_manifest(run), read_manifest(whole.cell("both", 1))
    assert manifest is not None and other is not None
    assert manifest.data_chain == other.data_chain and manifest.config_hash == other.config_hash
    (extension,) = manifest.extensions
    assert (extension.from_steps, extension.to_steps) == (2, 3) and extension.config_hash == scientific_hash(before)
    assert [start.step for start in manifest.starts] == [0, 2]
    (entry, *_) = [entry for entry in read_ledger(trained).of("extension") if entry.cell == "both/seed-1"]
    assert entry.facts == {"from_steps": 2, "to_steps": 3, "why": WHY}
    (amended,) = [line for line in check_plan(trained, load_suite(trained.suite)).deviations if "amended" in line]
    assert "(settings.shared.training.steps: 2 -> 3)" in amended and f'"extended to 3 steps: {WHY}"' in amended


def test_half_of_a_suite_is_compared_among_cells_of_the_same_steps(trained: SuiteDir, tmp_path: Path) -> None:
    go_on(trained, "baseline/seed-1", "baseline/seed-2", "both/seed-1", "both/seed-2")
    untouched = SuiteDir(Path(shutil.copytree(trained.root, tmp_path / "untouched")))
    assert extend(trained, 3) == 0
    go_on(trained, "baseline/seed-1", "both/seed-1", "baseline/seed-2")
    _, results = collect(trained, load_suite(trained.suite))
    assert [(pair.arm, pair.seed) for pair in results.pairs_used if pair.arm != "baseline"] == [("both", 1)]
    assert {(c["arm"], c["seed"]): (c["state"], c["step"]) for c in results.cells}["both", 2] == ("interrupted", 2)
    late = results.quantity("late_val_loss")
    assert late.values["both"][1] is None and late.arm("both").n == 1
    (line,) = [line for line in results.warnings if "extended" in line]
    assert line.startswith("baseline/seed-1, both/seed-1, baseline/seed-2, both/seed-2: extended from 2 to 3 steps at ")
    assert line.endswith(f": {WHY}.")
    (schedule,) = [c for c in results.certificate.seeds[0].checks if c.name == "schedule"]
    assert "from 2 to 3 steps" in str(schedule.values["both"])

    # what a call that was cut short would leave: cells of other steps, all complete
    for arm in ("baseline", "both"):
        shutil.copytree(untouched.cell(arm, 2).root, trained.cell(arm, 2).root, dirs_exist_ok=True)
    _, results = collect(trained, load_suite(trained.suite))
    assert "training.steps is 2 at seed 2 and 3 at seed 1" in results.certificate.not_pooled[2]
    assert results.quantity("late_val_loss").arm("both").n == 1


def test_the_validation_at_the_earlier_end_is_in_no_late_mean(trained: SuiteDir) -> None:
    assert extend(trained, 3) == 0  # validations are due at step 2 and 3
    go_on(trained, "baseline/seed-1")
    assert extend(trained, 5) == 0  # ... at 2, 4 and 5: the one at 3 is of the earlier end
    go_on(trained, "baseline/seed-1")
    cells, _ = collect(trained, load_suite(trained.suite))
    assert cells[0].name == "baseline/seed-1" and cells[0].validation.steps.tolist() == [2, 4, 5]
    manifest = read_manifest(trained.cell("baseline", 1))
    assert manifest is not None and [e.to_steps for e in manifest.extensions] == [3, 5]


def test_a_call_that_was_cut_short_is_finished_by_the_same_one(
    trained: SuiteDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[str] = []

    def break_after_one(cell: Any, longer: Any, *more: Any) -> None:
        if marked:
            raise KeyboardInterrupt
        marked.append(cell.name)
        mark(cell, longer, *more)

    mark = extend_module._mark
    monkeypatch.setattr(extend_module, "_mark", break_after_one)
    extend(trained)
    monkeypatch.undo()
    assert extend(trained) == 0 == extend(trained)
    for name in ("baseline/seed-1", "both/seed-1"):
        manifest = read_manifest(RunDir(trained.runs / name))
        assert manifest is not None and len(manifest.extensions) == 1
        assert load_run([trained.runs / name / "config.yaml"]).training.steps == 5


def edit(suite_dir: SuiteDir, **sections: dict[str, Any]) -> None:
    """Give every cell's config.yaml other keys."""
    for _, _, run in suite_dir.cells():
        tree = yaml.safe_load(run.config.read_text())
        for section, keys in sections.items():
            tree[section] = keys and tree[section] | keys
        run.config.write_text(yaml.safe_dump(tree))


def contents(suite_dir: SuiteDir) -> dict[Path, bytes]:
    files = (p for p in suite_dir.root.rglob("*") if p.is_file() and "lock" not in p.name)
    return {path: path.read_bytes() for path in files}


def refused(suite_dir: SuiteDir, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = contents(suite_dir)
    given = words or ("--steps", "5", "--why", WHY)
    assert main(["grid", "extend", str(suite_dir.root), *given]) == 2
    assert contents(suite_dir) == before, "a refusal changes nothing"
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_cannot_go_on_is_refused_by_name(trained: SuiteDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps: 1, and baseline/seed-1 has 2" in refused(trained, capsys, "--steps", "1", "--why", WHY)
    assert "--why: is empty" in refused(trained, capsys, "--steps", "5", "--why", " ")
    assert "--seeds: every cell" in refused(trained, capsys, "--steps", "5", "--why", WHY, "--seeds", "1")
    with trained.cell("both", 1).lock():
        assert "another process is running this cell" in refused(trained, capsys)
    trained.judging.mkdir()
    assert "completions at the present steps are judged" in refused(trained, capsys)
    trained.judging.rmdir()
    edit(trained, training={"decay_steps": 1})
    assert "falls over the last 1 of 2 steps, which are none of a run of 5;" in refused(trained, capsys)
    edit(trained, training={"decay_steps": 0}, data={"token_budget": 300})
    assert "data.token_budget: 300 tokens, and 5 steps of 64 read 320; extend to 4" in refused(trained, capsys)
    edit(trained, data={"token_budget": None}, token_gain={"function": "mine"}, plugins={"mine.py": "0" * 64})
    assert "plugins: functions of baseline are told how many steps" in refused(trained, capsys)
    edit(trained, token_gain={"function": None}, plugins={})
    (folder,) = trained.cell("both", 1).checkpoint_folders()
    marker = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps(marker | {"pruned_at": "then"}))
    assert "has no whole checkpoint to go on from" in refused(trained, capsys)
    shutil.rmtree(folder)
    assert "has no whole checkpoint to go on from" in refused(trained, capsys)


def test_more_steps_by_hand_are_another_config(trained: SuiteDir) -> None:
    edit(trained, training={"steps": 5})
    with pytest.raises(UserError, match=r"step-000002 was made with another config .training.steps: 2 there, 5 here"):
        go_on(trained, "both/seed-1")
