"""Checkpoints of every strategy: damage, a full disk, what is kept, and what can go on as something else."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_store import MemoryStore
from rank_cells import run_cell, run_cells_on_ranks
from rich.console import Console
from training_setup import MODEL, fit, furthest, identical, small_config, weights

from replication.config import scientific
from replication.errors import UserError
from replication.model.transformer import Transformer, weights_sha256
from replication.runs.files import damage, file_sha256, mark_complete, read_json
from replication.runs.journal import Journal, journal_gaps, logged_steps, read_journal
from replication.runs.layout import RunDir
from replication.training import checkpoints
from replication.training.checkpoint_files import load_weights, newest_checkpoint
from replication.training.checkpoints import restore_generators
from replication.training.host_copy import HostCopy
from replication.training.measure import Measure
from replication.training.stopping import GracefulStop
from replication.training.train import lost_lines, train

FP64 = "--training.precision=64-true"
MUON = "--training.optimizer=muon"


def flags(strategy: str, ranks: int, *more: str) -> list[str]:
    return ["--training.batch_tokens=256", "--checkpoints.every_steps=3", "--checkpoints.keep_last=9",
            "--training.learning_rate=0.001", f"--cluster.strategy={strategy}", f"--cluster.devices={ranks}",
            f"--cluster.micro_batch_sequences={8 // ranks}", *more]  # fmt: skip


def cell(name: str, strategy: str, ranks: int, *more: str) -> dict:
    return {"name": name, "arm": "both", "flags": flags(strategy, ranks, *more), "blocks": [40, 24]}


def cut_back(source: RunDir, target: Path, step: int = 3) -> None:
    """A copy of a finished cell as it was when only the checkpoint of an earlier step stood."""
    shutil.copytree(source.root, target)
    for folder in (target / "checkpoints").iterdir():
        if folder.name != f"step-{step:06d}":
            shutil.rmtree(folder)


# ---------------------------------------------------------------- damage


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {"truncated": (truncate, "bytes instead of"), "flipped": (flip_a_bit, "with another checksum"),
          "missing": (Path.unlink, "lacks the file")}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["trainer.ckpt", "weights.pt", "rank-00000.pt"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, kind, name):
    one = fit(small_config("both", "--checkpoints.keep_last=3"), tmp_path)
    whole = weights(one)
    harm, words = DAMAGE[kind]
    harm(one.checkpoints / "step-000006" / name)
    folder, notes = newest_checkpoint(one)
    assert folder == one.checkpoints / "step-000004"
    assert len(notes) == 1
    assert all(part in notes[0] for part in ("step-000006", name, words, "passed over"))
    fit(small_config("both", "--checkpoints.keep_last=3"), tmp_path)
    assert damage(one.checkpoints / "step-000006") is None
    assert identical(weights(one), whole)


# ---------------------------------------------------------------- beside training


@pytest.fixture
def slow_writer(monkeypatch):
    """Holds the writing of each checkpoint back until the training is two steps on, or in its last."""
    write, begin, steps = HostCopy.write, Measure.on_train_batch_start, []

    def held(self, folder):
        deadline = time.monotonic() + 60
        while steps[-1] < min(int(folder.name[-6:]) + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        steps_when_written.append((folder.name, steps[-1]))
        return write(self, folder)

    def begun(self, trainer, *args):
        steps.append(trainer.global_step)
        begin(self, trainer, *args)

    steps_when_written = []
    monkeypatch.setattr(HostCopy, "write", held)
    monkeypatch.setattr(Measure, "on_train_batch_start", begun)
    return steps_when_written


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_written_two_steps_later_is_the_step_that_was_saved(tmp_path, slow_writer, optimizer):
    flags = (f"--training.optimizer={optimizer}", "--checkpoints.every_steps=3", "--checkpoints.keep_last=9")
    fit(small_config("both", *flags), tmp_path / "beside")
    assert slow_writer[0] == ("partial-step-000003", 5)
    at_3 = load_weights(tmp_path / "beside" / "checkpoints" / "step-000003")
    assert read_json(tmp_path / "beside/checkpoints/step-000003/COMPLETE")["weights_sha256"] == weights_sha256(at_3)
    cut_back(RunDir(tmp_path / "beside"), tmp_path / "resumed")
    again = fit(small_config("both", *flags), tmp_path / "resumed")
    assert identical(weights(again), weights(RunDir(tmp_path / "beside")))
    assert read_json(again.times)["stall_seconds"] < read_json(again.times)["save_seconds"]


def test_a_crash_while_a_checkpoint_is_written_waits_for_it(tmp_path, slow_writer, monkeypatch):
    def crash(self, trainer, *args):
        if trainer.global_step == 5:
            raise RuntimeError("crash")

    monkeypatch.setattr(GracefulStop, "on_train_batch_start", crash)
    with pytest.raises(RuntimeError, match="crash"):
        fit(small_config("both", "--checkpoints.every_steps=3"), tmp_path)
    assert newest_checkpoint(RunDir(tmp_path)) == (tmp_path / "checkpoints" / "step-000003", [])


def test_a_checkpoint_that_fails_while_the_run_is_interrupted_is_told(tmp_path, monkeypatch, capsys):
    ctrl_c = threading.Event()

    def interrupted(self, trainer, *args):
        if trainer.global_step == 5:
            ctrl_c.set()
            raise KeyboardInterrupt

    def unwritable(self, folder):
        if folder.name == "partial-step-000004" and ctrl_c.wait(60):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return write(self, folder)

    write = HostCopy.write
    monkeypatch.setattr(HostCopy, "write", unwritable)
    monkeypatch.setattr(GracefulStop, "on_train_batch_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(small_config("both", "--checkpoints.every_steps=2"), tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is lost" in line]
    assert "the checkpoint that was being written is lost" in line and "Permission denied" in line
    assert line.endswith(f"the run goes on from {tmp_path}/checkpoints/step-000002")


def test_what_fails_in_the_writing_ends_the_run_at_a_later_step(tmp_path, monkeypatch):
    def broken(self, folder):
        (folder / "trainer.ckpt").write_bytes(b"half")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(HostCopy, "write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        fit(small_config("both"), tmp_path)
    assert RunDir(tmp_path).checkpoint_folders() == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_its_weights_once(tmp_path, tied):
    config = small_config("both", model=dataclasses.replace(MODEL, tied_head=tied))
    run = fit(config, tmp_path / "whole")
    assert set(weights(run)) == {name for name, _ in Transformer(config.model).named_parameters()}
    assert read_json(run.manifest)["final_weights_sha256"] == weights_sha256(weights(run))
    cut_back(run, tmp_path / "resumed", step=2)
    assert identical(weights(fit(config, tmp_path / "resumed")), weights(run))
    folder, _ = newest_checkpoint(run)
    assert torch.load(folder / "trainer.ckpt", weights_only=False)["state_dict"] == {}
    listed = read_json(folder / "COMPLETE")["files"]
    for name in ("trainer.ckpt", "weights.pt"):  # hashed while they were written
        assert listed[name] == {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}


# ---------------------------------------------------------------- several ranks, in two starts of them


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """Undisturbed runs: zero2 and zero3 on two ranks, each with Muon too, and one process in fp64."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_cell(cell("single", "single", 1, FP64), root)
    zero = [cell("zero2", "zero2", 2), cell("zero3", "zero3", 2)]
    run_cells_on_ranks([*zero, *(cell(f"muon-{s}", s, 2, MUON) for s in ("zero2", "zero3"))], root)
    return root


def shard_of_rank_1(run: RunDir) -> str:
    files = read_json(run.checkpoints / "step-000006" / "COMPLETE")["files"]
    (shard,) = [name for name in files if "zero_pp_rank_1" in name and "optim_states" in name]
    return shard


def initial_weights(root: Path) -> str:
    return f"--training.initial_weights={newest_checkpoint(RunDir(root / 'zero2'))[0] / 'weights.pt'}"


@pytest.fixture(scope="module")
def second(first) -> Path:
    """What goes on from them, or starts from their weights, on two ranks."""
    for strategy in ("zero2", "zero3"):
        shutil.copytree(first / strategy, first / f"{strategy}-damaged")
        run = RunDir(first / f"{strategy}-damaged")
        flip_a_bit(run.checkpoints / "step-000006" / shard_of_rank_1(run))
        assert shard_of_rank_1(run) in newest_checkpoint(run)[1][0], "the shard is named"
        cut_back(RunDir(first / f"muon-{strategy}"), first / f"muon-{strategy}-resumed")
    cut_back(RunDir(first / "single"), first / "single-as-ddp")
    cut_back(RunDir(first / "zero2"), first / "zero2-as-zero1")
    cells = [cell(f"{s}-damaged", s, 2) for s in ("zero2", "zero3")]
    cells += [cell(f"muon-{s}-resumed", s, 2, MUON) for s in ("zero2", "zero3")]
    cells += [cell("single-as-ddp", "ddp", 2, FP64), cell("zero2-as-zero1", "zero1", 2)]
    run_cells_on_ranks([*cells, cell("zero3-from-weights", "zero3", 2, initial_weights(first))], first)
    return first


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_damaged_shard_of_one_rank_is_passed_over_and_the_run_goes_on_from_before(second, strategy):
    mended, whole = RunDir(second / f"{strategy}-damaged"), RunDir(second / strategy)
    assert damage(mended.checkpoints / "step-000006") is None
    assert identical(weights(mended), weights(whole))
    assert len(read_json(mended.manifest)["starts"]) == 2
    assert {f"rank-{r:05d}.pt" for r in (0, 1)} < set(
        read_json(whole.checkpoints / "step-000006" / "COMPLETE")["files"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_muons_momentum_comes_back_under_zero(second, strategy):
    resumed, whole = (RunDir(second / f"muon-{strategy}{suffix}") for suffix in ("-resumed", ""))
    assert len(read_json(resumed.manifest)["starts"]) == 2
    assert identical(weights(resumed), weights(whole))


@pytest.mark.slow
def test_single_goes_on_as_ddp_and_ddp_as_single(second):
    single, as_ddp = RunDir(second / "single"), RunDir(second / "single-as-ddp")
    assert furthest(weights(as_ddp), weights(single)) < 1e-12
    cut_back(as_ddp, second / "ddp-as-single")
    run_cell(cell("ddp-as-single", "single", 1, FP64), second)
    assert furthest(weights(RunDir(second / "ddp-as-single")), weights(single)) < 1e-12
    assert [s["strategy"]["strategy"] for s in read_json(as_ddp.manifest)["starts"]] == ["single", "ddp"]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("zero1", 2), ("zero2", 1)])
def test_full_state_crosses_stages_and_world_sizes(second, strategy, ranks):
    """By DeepSpeed's universal checkpoint: Adam's moments and step included, or the ends would differ by 1e-3."""
    name = "zero2-as-zero1" if ranks == 2 else "zero2-alone"
    if ranks == 1:
        cut_back(RunDir(second / "zero2"), second / name)
        run_cells_on_ranks([cell(name, strategy, 1)], second, ranks=1)
    crossed, zero2 = RunDir(second / name), RunDir(second / "zero2")
    assert furthest(weights(crossed), weights(zero2)) < 1e-6
    assert read_json(crossed.manifest)["data_chain"] == read_json(zero2.manifest)["data_chain"]
    assert not list(crossed.checkpoints.glob("universal-*")), "the resharded copy goes when the next checkpoint stands"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "ranks", "optimizer", "message"),
    [("single", 1, "adamw", r"is of zero2 on 2 process\(es\), and its full state cannot go on as single on 1"),
     ("zero3", 2, "adamw", r"cannot go on as zero3 on 2 .*initial_weights"),
     ("zero2", 1, "sgd", r"carries AdamW's state only")],
)  # fmt: skip
def test_what_cannot_cross_is_refused_by_name(tmp_path, monkeypatch, first, strategy, ranks, optimizer, message):
    monkeypatch.setattr("replication.training.train.Meeting", lambda run, n_ranks: None)  # the others do not come
    target = RunDir(tmp_path / "crossed")
    cut_back(RunDir(first / "zero2"), target.root)
    config = small_config("both", *flags(strategy, ranks, f"--training.optimizer={optimizer}"))
    marker = target.checkpoints / "step-000003" / "COMPLETE"
    if optimizer == "sgd":  # its other scientific config would be refused first
        target.config.unlink()
        facts = {k: v for k, v in read_json(marker).items() if k not in ("files", "marker_sha256")}
        mark_complete(marker.parent, facts | {"scientific": scientific(config)})
    with pytest.raises(UserError, match=message):
        fit(config, target.root, MemoryStore(blocks=(40, 24)))


@pytest.mark.slow
def test_the_weights_of_any_strategy_start_a_cell_of_any_other(second):
    run_cell(cell("single-from-weights", "single", 1, initial_weights(second)), second)
    single, zero3 = (RunDir(second / f"{s}-from-weights") for s in ("single", "zero3"))
    hashes = {read_json(r.manifest)["initial_weights_sha256"] for r in (single, zero3)}
    assert hashes == {read_json(RunDir(second / "zero2").manifest)["final_weights_sha256"]}
    assert furthest(weights(zero3), weights(single)) < 1e-5
    assert furthest(weights(single), weights(RunDir(second / "zero2"))) > 1e-3


# ---------------------------------------------------------------- a full disk


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", pytest.param("zero2", marks=pytest.mark.full)])
def test_a_disk_that_fills_during_a_save_stops_the_run_and_harms_nothing(tmp_path, first, strategy):
    """A real file system with room for all checkpoints at the start, and for half of one when the second is due."""
    ranks, more = (1, [FP64]) if strategy == "single" else (2, [])
    c, free = cell("cell", strategy, ranks, *more), RunDir(first / strategy)
    one = sum(p.stat().st_size for p in (free.checkpoints / "step-000003").rglob("*") if p.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={one * 12 // 1024}k"
    c["leave_free"] = one // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", disk], capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    words = r"step-000006: no room to write the checkpoint .*goes on from .*000003"
    try:
        with pytest.raises((UserError, AssertionError), match=words):
            run_cell(c, disk) if strategy == "single" else run_cells_on_ranks([c], disk)
        cut = RunDir(disk / "cell")
        left = {p.name for p in cut.checkpoints.iterdir()}
        assert left == {"step-000003"} or (strategy == "zero2" and left == {"step-000003", "partial-step-000006"}), (
            "the part that was written is gone, unless a rank was ended while it removed it"
        )
        assert damage(cut.checkpoints / "step-000003") is None
        (disk / "filler").write_bytes(b"")
        run_cell(c, disk) if strategy == "single" else run_cells_on_ranks([c], disk)
        assert identical(weights(cut), weights(free))
        assert not list(cut.checkpoints.glob("partial-*"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # TensorBoard's writer of a failed fit is still open


# ---------------------------------------------------------------- what is kept, what comes back


def test_the_last_k_and_a_schedule_are_kept(tmp_path):
    config = small_config("baseline", "--training.steps=11", "--checkpoints.every_steps=1",
                          "--checkpoints.keep_last=2", "--checkpoints.keep_every_steps=4")  # fmt: skip
    kept = sorted(p.name for p in fit(config, tmp_path).checkpoints.iterdir())
    assert kept == ["step-000004", "step-000008", "step-000010", "step-000011"]


def test_every_generator_comes_back(tmp_path):
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    one = fit(small_config(), tmp_path)
    restore_generators(newest_checkpoint(one)[0])
    first = draw()
    assert draw() != first
    restore_generators(newest_checkpoint(one)[0])
    assert draw() == first


def test_the_marker_carries_the_hash_of_the_whole_weights(tmp_path):
    one = fit(small_config(), tmp_path)
    marker = read_json(newest_checkpoint(one)[0] / "COMPLETE")
    assert marker["weights_sha256"] == weights_sha256(weights(one)) == read_json(one.manifest)["final_weights_sha256"]


def test_what_a_checkpoint_stands_for_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """Its files, the journal up to it, then its marker, then its name; only then goes what it replaces."""
    happened: list[tuple[str, str]] = []

    def note(module: object, name: str, path_of: Callable[[tuple], Path]) -> None:
        own = getattr(module, name)
        noted = lambda *args, **named: (happened.append((name, path_of(args).name)), own(*args, **named))[1]  # noqa: E731
        monkeypatch.setattr(module, name, noted)

    note(Journal, "sync", lambda args: args[0].path)
    note(os, "replace", lambda args: Path(args[1]))
    for name in ("mark_complete", "sync", "remove_tree"):
        note(checkpoints, name, lambda args: args[0])
    fit(small_config("baseline", "--training.steps=4", "--checkpoints.keep_last=1"), tmp_path)
    wanted = [("sync", "metrics.jsonl"), ("mark_complete", "partial-step-000004"), ("replace", "COMPLETE"),
              ("replace", "step-000004"), ("sync", "checkpoints"), ("remove_tree", "step-000002")]  # fmt: skip
    assert happened[happened.index(wanted[1]) - 1 :][: len(wanted)] == wanted


def test_a_journal_that_lost_lines_before_the_checkpoint_is_told_when_the_run_goes_on(tmp_path):
    config = small_config("baseline", "--training.steps=7", "--checkpoints.every_steps=5")
    run, out = fit(config, tmp_path), io.StringIO()
    shutil.rmtree(run.checkpoints / "step-000007")
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join(lines))
    assert lost_lines(config, run, 5) == [], "the loss of step 5 is in the checkpoint, and in the line of step 6"
    run.metrics.write_bytes(b"".join(lines[:1]))
    train(config, run, MemoryStore(), Console(file=out, width=500))
    assert (
        "metrics.jsonl lacks the losses of steps 3-4, metrics.jsonl lacks the validation of step 3: the certificate"
        in (out.getvalue())
    )
    gaps = journal_gaps(logged_steps(read_journal(run.metrics)), 7, {3, 6, 7})
    assert gaps == ["metrics.jsonl lacks the losses of steps 3-4", "metrics.jsonl lacks the validation of step 3"]


# ---------------------------------------------------------------- crossing


def test_another_micro_batch_goes_on_from_the_same_step(tmp_path):
    whole = fit(small_config("both", FP64), tmp_path / "whole")
    cut_back(whole, tmp_path / "cut", step=4)
    other = fit(small_config("both", FP64, "--cluster.micro_batch_sequences=2"), tmp_path / "cut")
    assert furthest(weights(other), weights(whole)) < 1e-12
    steps = [len(line.losses) for line in read_journal(other.metrics) if line.per_step]
    assert sum(steps) == 6, "no step is lost or repeated where the micro-batches are counted anew"


def test_a_checkpoint_is_never_run(tmp_path):
    """A pickle that calls, in a folder whose checksums are right, is refused before it has."""
    whole = fit(small_config("both"), tmp_path / "whole")

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    for file in ("trainer.ckpt", "weights.pt", "rank-00000.pt"):
        cut_back(whole, tmp_path / file, step=4)
        folder = tmp_path / file / "checkpoints" / "step-000004"
        torch.save(torch.load(folder / file, weights_only=False) | {"more": Call()}, folder / file)
        marker = read_json(folder / "COMPLETE")
        mark_complete(folder, {key: marker[key] for key in marker.keys() - {"files", "marker_sha256"}})
        with pytest.raises(UserError, match=f"{file}: cannot be read as weights"):
            fit(small_config("both"), tmp_path / file)
    assert not (tmp_path / "was run").exists()


def test_initial_weights_of_another_model_are_refused(tmp_path):
    one = fit(small_config("baseline", "--training.steps=2"), tmp_path / "one")
    file = newest_checkpoint(one)[0] / "weights.pt"
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for path, message in ((tmp_path / "none.pt", "no such file"), (tmp_path / "junk.pt", "cannot be read as weights"),
                          (tmp_path / "other.pt", "of another model")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            fit(small_config("baseline", f"--training.initial_weights={path}"), tmp_path / "refused")
    assert not (tmp_path / "refused" / "manifest.json").exists()
    assert file.is_file()
