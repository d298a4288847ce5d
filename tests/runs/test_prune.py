"""Finished cells without their optimizer states: sampled and judged as before, and never trained further."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from memory_store import MemoryStore
from rich.console import Console
from trained_suite import write_trained_suite
from training_setup import fit, identical, small_config, weights

from replication.cli.main import main
from replication.config import load_run, to_yaml
from replication.errors import UserError
from replication.runs.files import damage, write_text
from replication.runs.layout import WEIGHTS, RunDir, SuiteDir
from replication.runs.manifest import mark_cell_complete
from replication.runs.prune import prunable, size
from replication.training.train import train


@pytest.fixture
def finished(tmp_path: Path) -> SuiteDir:
    """Two arms; the first is complete, the second trained and not complete."""
    suite_dir = SuiteDir(tmp_path / "out")
    for arm in ("baseline", "both"):
        config = small_config(arm)
        run = fit(config, suite_dir.cell(arm, 1).root)
        write_text(run.config, to_yaml(config))
        if arm == "baseline":
            mark_cell_complete(config, run)
    return suite_dir


def test_weights_and_marker_stay(finished: SuiteDir, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = finished.cell("baseline", 1), finished.cell("both", 1)
    before, whole = weights(run), size(run.checkpoints)
    left = size(other.checkpoints)
    (cell,) = prunable(finished)
    assert main(["prune", str(finished.root), "--yes"]) == 0
    said = capsys.readouterr().out
    assert "MiB of optimizer states" in said and "freed" in said and "never be trained further" in said
    for folder in run.checkpoint_folders():
        assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE", WEIGHTS]
        assert damage(folder) is None
    assert identical(weights(run), before)
    assert whole - size(run.checkpoints) == pytest.approx(cell.n_bytes, rel=0.05)
    assert size(other.checkpoints) == left, "a cell that is not complete may have to go on"
    assert main(["prune", str(finished.root)]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_nothing_goes_without_a_yes(finished: SuiteDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = size(finished.runs)
    assert main(["prune", str(finished.root)]) == 2
    assert "no terminal to ask on; --yes" in capsys.readouterr().err
    assert size(finished.runs) == before


def test_damaged_weights_keep_the_state_beside_them(finished: SuiteDir, capsys: pytest.CaptureFixture[str]) -> None:
    *_, last = finished.cell("baseline", 1).checkpoint_folders()
    content = bytearray((last / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (last / WEIGHTS).write_bytes(content)
    assert main(["prune", str(finished.root), "--yes"]) == 1
    assert "has weights.pt with another checksum; it is left as it is" in capsys.readouterr().out
    assert (last / "trainer.ckpt").is_file()


def test_a_cell_that_runs_is_left_alone(finished: SuiteDir, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished.cell("baseline", 1)
    with run.lock():
        assert main(["prune", str(finished.root), "--yes"]) == 1
    assert "another process is running this cell" in " ".join(capsys.readouterr().out.split())
    assert prunable(finished)


def test_a_pruned_cell_says_that_it_cannot_be_trained_further(finished: SuiteDir) -> None:
    run, config = finished.cell("baseline", 1), small_config("baseline")
    assert main(["prune", str(finished.root), "--yes"]) == 0
    train(config, run, MemoryStore(), Console(file=io.StringIO()))  # type: ignore[arg-type]  # trained: nothing to do
    shutil.rmtree(run.checkpoint_folders()[-1])
    with pytest.raises(UserError, match=r"was pruned to its weights at .* and cannot be trained further") as refused:
        train(config, run, MemoryStore(), Console(file=io.StringIO()))  # type: ignore[arg-type]
    *_, last = run.checkpoint_folders()
    assert f"training.initial_weights={last / WEIGHTS}" in str(refused.value)
    started = small_config("baseline", f"--training.initial_weights={last / WEIGHTS}")
    fit(started, finished.root / "from the weights")  # the remedy holds


def test_completions_are_sampled_from_pruned_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_dir = write_trained_suite(tmp_path, arms=("baseline",), seeds=(1,), untrained="")
    assert main(["generate", str(suite_dir.root)]) == 0
    run = suite_dir.cell("baseline", 1)
    before = run.samples.read_bytes()
    assert run.complete.is_file()
    assert main(["prune", str(suite_dir.root), "--yes"]) == 0
    assert main(["generate", str(suite_dir.root), "--again"]) == 0
    assert RunDir(run.root).samples.read_bytes() == before
    assert load_run([run.config]).arm == "baseline"
