"""One cell as a whole: journal, data chain, TensorBoard, resume, what stops it, what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback
from memory_store import MemoryStore
from paths import SUPPORT
from run_files import read_journal
from slow_reference import SlowRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from training_setup import ARMS, fit, furthest, identical, small_config, weights

import replication.training.train as train_module
from replication.data.module import TrainingBatches
from replication.data.order import MixtureOrder
from replication.errors import UserError
from replication.generation.generate import load_model
from replication.model.cost import predict_step
from replication.runs.files import damage, read_json
from replication.runs.layout import RunDir
from replication.training.checkpoint_files import newest_checkpoint
from replication.training.host_copy import HostCopy
from replication.training.measure import chain_data


def training_lines(run: RunDir) -> list[dict]:
    return [line for line in read_journal(run.metrics) if "tokens" in line]


# ---------------------------------------------------------------- the journal


def test_every_arm_writes_the_same_tags_and_every_step(tmp_path):
    tags = {}
    for arm in ARMS:
        run = fit(small_config(arm, "--training.steps=5"), tmp_path / arm)
        lines = training_lines(run)
        assert [line["step"] for line in lines] == [2, 4, 5]
        assert [len(line["per_step"]["train/loss_nats"]) for line in lines] == [2, 2, 1]
        assert [len(line["per_step"]["train/grad_norm"]) for line in lines] == [2, 2, 1]
        assert all(line["per_step"]["train/loss_nats"][-1] == line["train/loss_nats"] for line in lines)
        validations = [line for line in read_journal(run.metrics) if "val/loss_nats" in line]
        assert [line["step"] for line in validations] == [3, 5], "the last step is always validated"
        tags[arm] = {key for line in read_journal(run.metrics) for key in line}
        board = EventAccumulator(str(run.tensorboard)).Reload()
        assert set(board.Tags()["scalars"]) == {t for t in tags[arm] if "/" in t}
        assert board.Tags()["images"] == ["divergence/blocks_over_steps"]
    assert len({frozenset(t) for t in tags.values()}) == 1
    expected = {"train/loss_nats", "train/objective", "train/grad_norm", "gain/mean", "gain/mean_before_clamp",
                "gain/share_at_min", "divergence/block_02", "scale/block_00", "entropy/predictive_nats",
                "entropy/predicted_tokens_nats", "experts/block_00_expert_3", "train/tokens_per_second"}  # fmt: skip
    assert expected <= tags["baseline"]


def test_objective_is_loss_plus_auxiliary_where_token_gain_is_off(tmp_path):
    config = small_config("layer_gain")
    for line in training_lines(fit(config, tmp_path)):
        expected = line["train/loss_nats"] + config.model.aux_coef * line["train/aux_loss"]
        assert line["train/objective"] == pytest.approx(expected, rel=1e-6)


def test_objective_exceeds_the_loss_by_s_n_minus_1_over_n_where_no_clamp_binds(tmp_path):
    config = small_config("token_gain", "--token_gain.c_min=-1e9", "--token_gain.c_max=1e9",
                          "--training.precision=64-true")  # fmt: skip
    n = config.training.gain_group_sequences * config.data.block_size_tokens
    for line in training_lines(fit(config, tmp_path, MemoryStore(blocks=(400, 300)))):
        excess = line["train/objective"] - line["train/loss_nats"] - config.model.aux_coef * line["train/aux_loss"]
        # eps in the denominator keeps the excess a little under its bound
        assert excess == pytest.approx((n - 1) / n, rel=1e-3)
        assert line["gain/share_at_min"] == line["gain/share_at_max"] == 0


def test_tokens_are_the_valid_targets(tmp_path):
    config, store = small_config(), MemoryStore(blocks=(6, 5))
    order = MixtureOrder(store.sizes("train"), [1.0, 0.5], config.effective_data_seed)
    expected = sum(
        int(store.valid_targets("train", *order.global_batch(k, config.batch_sequences)).sum())
        for k in range(config.training.steps)
    )
    assert training_lines(fit(config, tmp_path, store))[-1]["tokens"] == expected < 6 * 128


# ---------------------------------------------------------------- the data chain


def test_anyone_can_recompute_the_chain_and_it_ignores_the_micro_batch(tmp_path):
    store = MemoryStore()
    chains = set()
    for micro in (8, 2):
        config = small_config("both", f"--cluster.micro_batch_sequences={micro}")
        run = fit(config, tmp_path / str(micro), store)
        chains.add(read_json(run.manifest)["data_chain"])
    order = MixtureOrder(store.sizes("train"), [1.0, 0.5], config.effective_data_seed)
    chain = ""
    for k in range(config.training.steps):
        tokens = store.read("train", *order.global_batch(k, config.batch_sequences))
        chain = hashlib.sha256(bytes.fromhex(chain) + tokens.astype("<i4").tobytes()).hexdigest()
    assert chains == {chain}


def test_one_changed_token_changes_the_chain():
    tokens = torch.arange(20, dtype=torch.int32).view(2, 10)
    other = tokens.clone()
    other[1, 3] += 1
    assert chain_data("", [tokens]) != chain_data("", [other])
    assert chain_data("", [tokens]) == chain_data("", list(tokens.split(1)))


def test_seeds_set_weights_and_data_and_can_be_varied_alone(tmp_path):
    def hashes(*flags: str) -> tuple[str, str]:
        manifest = read_json(fit(small_config("baseline", *flags), tmp_path / "-".join(flags)).manifest)
        return manifest["initial_weights_sha256"], manifest["data_chain"]

    first, second = hashes("--seed=1"), hashes("--seed=2")
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert hashes("--seed=1", "--data_seed=2") == (first[0], second[1])
    assert hashes("--seed=1", "--weights_seed=2") == (second[0], first[1])


# ---------------------------------------------------------------- resume


class Crash(Callback):
    """Stops the process's run as a crash would: an exception after a given number of micro-batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("crash")


@pytest.fixture
def crash_after(monkeypatch):
    build = train_module.build_trainer

    def arrange(micro_batches: int | None) -> None:
        def build_with_crash(*args, **kwargs):
            trainer = build(*args, **kwargs)
            if micro_batches is not None:
                trainer.callbacks.append(Crash(micro_batches))
            return trainer

        monkeypatch.setattr(train_module, "build_trainer", build_with_crash)

    return arrange


@pytest.mark.parametrize("arm", ["baseline", "both"])
@pytest.mark.parametrize("micro", [8, 2])
def test_two_crashes_and_resumes_change_nothing(tmp_path, crash_after, monkeypatch, arm, micro):
    # files of one second are read in the order of this number's digits, and a start has a process of its own elsewhere
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    config = small_config(arm, f"--cluster.micro_batch_sequences={micro}", "--training.steps=9")
    undisturbed = fit(config, tmp_path / "undisturbed")
    run = RunDir(tmp_path / "crashed")
    per_step = config.accumulation
    for micro_batches in (3 * per_step + per_step // 2 + 1, 4 * per_step, None):  # in step 4; in step 7; to the end
        crash_after(micro_batches)
        if micro_batches is None:
            fit(config, run.root)
        else:
            with pytest.raises(RuntimeError, match="crash"):
                fit(config, run.root)
    assert identical(weights(run), weights(undisturbed))
    kept = ("data_chain", "tokens", "step", "final_weights_sha256", "initial_weights_sha256")
    a, b = read_json(run.manifest), read_json(undisturbed.manifest)
    assert [a[k] for k in kept] == [b[k] for k in kept]
    assert len(a["starts"]) == 3
    timing = ("wall_seconds", "train/tokens_per_second")
    strip = [[{k: v for k, v in line.items() if k not in timing} for line in read_journal(r.metrics)]
             for r in (run, undisturbed)]  # fmt: skip
    assert strip[0] == strip[1]
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [e.step for e in board.Scalars("train/loss_nats")] == [2, 4, 6, 8, 9], "no doubled points"


def test_a_sigkilled_process_goes_on_where_it_was(tmp_path):
    """A real kill, not an exception: the child is killed when it has a checkpoint and is held at a later step."""
    flags = ("--training.steps=12", "--checkpoints.every_steps=5")
    script = (
        "import sys; sys.path[:0] = [sys.argv[2]]\n"
        "from pathlib import Path\nfrom held_cell import hold_steps\nfrom training_setup import fit, small_config\n"
        "hold_steps(Path(sys.argv[1]).parent)\n"
        f"fit(small_config('both', *{flags}), Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), str(SUPPORT)]
    (tmp_path / "hold").write_text("7")
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    run = RunDir(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not list(run.checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    folder, _ = newest_checkpoint(run)
    assert folder is not None
    assert read_json(folder / "COMPLETE")["step"] == 5
    fit(small_config("both", *flags), run.root)
    assert identical(weights(run), weights(fit(small_config("both", *flags), tmp_path / "undisturbed")))


def test_a_start_that_goes_on_draws_no_weights(tmp_path, crash_after, monkeypatch):
    config = small_config("both")
    undisturbed = fit(config, tmp_path / "undisturbed")
    crash_after(4)
    with pytest.raises(RuntimeError, match="crash"):
        fit(config, tmp_path / "crashed")
    crash_after(None)
    normal, uniform, drawn = torch.Tensor.normal_, torch.Tensor.uniform_, []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, *a, **k: (drawn.append(x.device), normal(x, *a, **k))[1])
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *a, **k: (drawn.append(x.device), uniform(x, *a, **k))[1])
    assert identical(weights(fit(config, tmp_path / "crashed")), weights(undisturbed))
    assert {device.type for device in drawn} == {"meta"}, "what torch's own modules draw is never there"


def test_the_manifest_compares_the_speed_with_what_was_predicted(tmp_path, monkeypatch):
    config = small_config()
    run = fit(config, tmp_path / "cpu")
    speeds = [
        line["train/tokens_per_second"] for line in read_journal(run.metrics) if "train/tokens_per_second" in line
    ]
    assert read_json(run.manifest)["speed"] == {"measured": round(statistics.median(speeds), 1), "predicted": None}
    monkeypatch.setattr("replication.training.environment.uses_gpu", lambda config: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a GPU")
    predicted = read_json(fit(config, tmp_path / "gpu").manifest)["speed"]["predicted"]
    assert predicted == round(predict_step(config).tokens_per_second, 1)


def test_a_trained_cell_is_left_as_it_is(tmp_path):
    run = fit(small_config(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    fit(small_config(), tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert run.state() == "interrupted"  # trained, but not yet generated and marked complete


def test_determinism_ends_with_the_training(tmp_path, crash_after, monkeypatch):
    """What follows in the same process is sampling, and on a GPU its sums have no deterministic kernel."""
    during, is_on = set(), torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(Crash, "on_train_batch_end", lambda *_: during.add(is_on()))
    crash_after(1)
    before = is_on()
    for wanted in (True, False):
        during.clear()
        fit(small_config("baseline", f"--training.deterministic={wanted}"), tmp_path / str(wanted))
        assert during == {wanted} and is_on() == before


# ---------------------------------------------------------------- checkpoints


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path):
    run = fit(small_config("baseline", "--checkpoints.keep_last=4"), tmp_path)
    folders = sorted(run.checkpoints.glob("step-*"))
    assert [f.name for f in folders] == ["step-000002", "step-000004", "step-000006"]
    state = folders[2] / "trainer.ckpt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert "another checksum" in damage(folders[2])
    (folders[1] / "trainer.ckpt").write_bytes(b"short")
    newest, notes = newest_checkpoint(run)
    assert newest == folders[0]
    assert len(notes) == 2
    assert str(folders[2]) in notes[0]
    assert "5 bytes instead of" in notes[1]
    with pytest.raises(
        UserError, match=r"no undamaged checkpoint of the last step 6 \(its newest is of step 2; .*000006"
    ):
        load_model(small_config(), run)  # completions of an older checkpoint would pass for the trained model's
    undisturbed = weights(fit(small_config(), tmp_path / "undisturbed"))
    fit(small_config("baseline", "--checkpoints.keep_last=4"), tmp_path)
    assert all(damage(folder) is None for folder in folders), "the run went on and replaced what was damaged"
    assert identical(weights(run), undisturbed)
    for folder in folders:
        (folder / "trainer.ckpt").unlink()
    assert newest_checkpoint(run)[0] is None


def test_a_kill_between_the_last_checkpoint_and_the_manifest_is_mended(tmp_path):
    run = fit(small_config(), tmp_path)
    whole = read_json(run.manifest)
    cut = {k: v for k, v in whole.items() if k not in ("step", "tokens", "data_chain", "wall_seconds",
                                                       "final_weights_sha256", "finished_at")}  # fmt: skip
    run.manifest.write_text(json.dumps(cut))
    fit(small_config(), tmp_path)
    mended = read_json(run.manifest)
    assert {k: v for k, v in mended.items() if k != "finished_at"} == {
        k: v for k, v in whole.items() if k != "finished_at"
    }


def test_only_the_last_k_are_kept_and_partial_folders_are_ignored(tmp_path):
    run = fit(small_config("baseline", "--training.steps=9", "--checkpoints.keep_last=2"), tmp_path)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000008", "step-000009"]
    (run.checkpoints / "partial-step-000099").mkdir()
    assert newest_checkpoint(run)[0].name == "step-000009"


def test_a_checkpoint_of_another_config_or_data_is_refused(tmp_path):
    fit(small_config(), tmp_path)
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.003 there, 0\.001 here"):
        fit(small_config("baseline", "--training.learning_rate=0.001"), tmp_path)
    with pytest.raises(UserError, match="another data"):
        fit(small_config(), tmp_path, MemoryStore(blocks=(41, 24)))
    run = RunDir(tmp_path)
    run.config.unlink()  # the checkpoint alone tells as well
    with pytest.raises(UserError, match="another config"):
        fit(small_config("baseline", "--training.learning_rate=0.001"), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(tmp_path, monkeypatch):
    step = train_module.LanguageModel.training_step

    def poisoned(self, batch, batch_idx):
        out = step(self, batch, batch_idx)
        if self.trainer.global_step == 4:
            out["observed"] = out["observed"]._replace(loss_GN=out["observed"].loss_GN * math.nan)
        return out

    write = HostCopy.write
    monkeypatch.setattr(HostCopy, "write", lambda *of: time.sleep(0.3) or write(*of))  # still going on at the end
    monkeypatch.setattr(train_module.LanguageModel, "training_step", poisoned)
    with pytest.raises(UserError, match=r"not finite at or before step 6; the last good checkpoint is .*step-000004"):
        fit(small_config(), tmp_path)
    assert newest_checkpoint(RunDir(tmp_path))[0].name == "step-000004"
    line = training_lines(RunDir(tmp_path))[-1]
    assert line["per_step"]["train/loss_nats"][0] is None, "missing is missing, never a number"


class Silent(MemoryStore):
    """Some blocks have no valid target at all; with `everywhere` none has."""

    def __init__(self, everywhere: bool = False) -> None:
        super().__init__()
        self.everywhere = everywhere

    def valid_targets(self, split, source_ids, indices):
        silent = (split == "train") & (self.everywhere | (indices % 2 == 0))
        return np.where(silent, 0, super().valid_targets(split, source_ids, indices))


def test_groups_without_valid_tokens_leave_the_divisor(tmp_path):
    config, store = small_config("both", "--training.precision=64-true", "--training.steps=3"), Silent()
    batches = [TrainingBatches(config, store)[k] for k in range(3)]
    assert any(0 < b.step_groups < 4 for b in batches)
    slow = SlowRun(config)
    for batch in batches:
        slow.step(batch.tokens_BS)
    assert furthest(weights(fit(config, tmp_path, store)), slow.model.state_dict()) < 1e-10


def test_a_step_without_any_valid_token_has_no_loss_and_does_not_stop_the_run(tmp_path):
    line = training_lines(fit(small_config("both"), tmp_path, Silent(everywhere=True)))[-1]
    assert line["tokens"] == 0
    assert line["train/grad_norm"] == 0
    assert line["train/loss_nats"] is line["gain/mean"] is line["gain/min"] is None, "missing is missing, never 0"


# ---------------------------------------------------------------- golden losses


GOLDEN = SUPPORT / "golden_losses.json"
GOLDEN_STEPS = 20


def golden_losses(root: Path, arm: str) -> list[float]:
    """The first losses of an arm on the shipped tiny model, with the vocabulary and blocks of the store in memory."""
    from replication.config import load_run

    tiny = dataclasses.replace(load_run(["model/tiny.yaml"]).model, vocab_size=256)
    config = small_config(arm, f"--training.steps={GOLDEN_STEPS}", "--training.warmup_steps=5", model=tiny)
    run = fit(config, root, MemoryStore(vocab_size=256, blocks=(400, 300)))
    return [loss for line in training_lines(run) for loss in line["per_step"]["train/loss_nats"]]


def fingerprint() -> dict[str, object]:
    """What bit-equality may depend on: torch's version and the CPU's instruction set as torch uses it."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def losses_of_a_fresh_process(root: Path) -> dict[str, list[float]]:
    script = (
        "import json, sys; sys.path[:0] = sys.argv[2:]\nfrom pathlib import Path\n"
        "from test_run import golden_losses\nfrom training_setup import ARMS\n"
        "print('LOSSES' + json.dumps({a: golden_losses(Path(sys.argv[1]) / a, a) for a in ARMS}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(root), str(SUPPORT), str(Path(__file__).parent)],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.split("LOSSES")[1])


def test_golden_losses(tmp_path, publish):
    """Bit-equal between two fresh processes; against the stored ones bit-equal on the same CPU and torch, else 1e-4.

    To store new ones after a numeric change, say why in the commit and run:
    PYTHONPATH=tests/support python tests/training/test_run.py
    """
    first = losses_of_a_fresh_process(tmp_path / "1")
    assert first == losses_of_a_fresh_process(tmp_path / "2")
    stored = json.loads(GOLDEN.read_text())
    assert {a: len(v) for a, v in first.items()} == dict.fromkeys(ARMS, GOLDEN_STEPS)
    if stored["fingerprint"] == fingerprint():
        assert first == stored["losses"]
    pairs = [(a, b) for arm in ARMS for a, b in zip(first[arm], stored["losses"][arm], strict=True)]
    furthest = max(abs(a / b - 1) for a, b in pairs)
    of = fingerprint()
    publish(f"golden losses with torch {of['torch']} on {of['cpu']}: within {furthest:.1e} of those stored")
    for arm in ARMS:
        assert first[arm] == pytest.approx(stored["losses"][arm], rel=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        losses = losses_of_a_fresh_process(Path(folder))
    GOLDEN.write_text(json.dumps({"fingerprint": fingerprint(), "losses": losses}, indent=1) + "\n")
