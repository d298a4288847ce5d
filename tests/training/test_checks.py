"""What would be a silent failure is a message: before the first step, and at every boundary."""

from __future__ import annotations

import json

import pytest
import torch
from lightning import Callback
from rank_cells import run_cells_on_ranks
from run_files import read_journal
from training_setup import fit, small_config

import replication.training.train as train_module
from replication.errors import UserError
from replication.runs.files import read_json
from replication.runs.layout import RunDir
from replication.training.checks import check_ranks
from replication.training.strategies import deepspeed_config

TWO = ("--cluster.strategy=zero2", "--cluster.devices=2", "--cluster.micro_batch_sequences=4")


def test_a_world_of_another_size_than_the_configs_is_refused():
    config = small_config("baseline", "--cluster.strategy=ddp", "--cluster.devices=2")
    with pytest.raises(UserError, match=r"asks for 2 processes, 1 answered; start as many tasks"):
        check_ranks(config, {})


@pytest.mark.slow
def test_ranks_that_are_not_alike_are_refused_by_what_differs(tmp_path):
    """Two real ranks, of which one has another config, in a key that no rank could notice alone."""
    flags = ["--cluster.strategy=ddp", "--cluster.devices=2"]
    cells = [{"name": "unlike", "arm": "baseline", "flags": flags, "flags_of_rank_1": ["--weights_seed=9"]}]
    with pytest.raises(AssertionError, match=r"config hash: differs between ranks|weights at start: differs"):
        run_cells_on_ranks(cells, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cluster.strategy=zero2", "--training.precision=64-true"], r"training\.precision: DeepSpeed has no fp64"),
        (["--cluster.strategy=zero1", "--training.precision=bf16-mixed"], r"zero1 with bf16-mixed .* choose zero2"),
        (["--cluster.offload_optimizer=true"], r"cluster\.offload_optimizer: single keeps .* choose zero2"),
        (["--cluster.devices=2"], r"single is one process.*choose ddp or zero2"),
        (["--cluster.strategy=zero3", "--cluster.devices=2", "--validation.sequences=5"], r"no multiple of 2 proc"),
        (["--cluster.strategy=zero2", "--layer_gain.apply=update"], r"layer_gain\.apply: with zero2 .* single or ddp"),
        (["--training.momentum=1"], r"training\.momentum: 1\.0 must lie in \[0, 1\)"),
        (["--checkpoints.keep_every_steps=0"], r"checkpoints\.keep_every_steps: 0 must be at least 1"),
        (["--training.max_skipped_steps=-1"], r"training\.max_skipped_steps: -1 must be at least 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(flags, message):
    with pytest.raises(UserError, match=message):
        small_config("both", *flags)


def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=r"cluster\.accelerator: gpu, but torch sees none"):
        fit(small_config("baseline", "--cluster.accelerator=gpu"), tmp_path)


def test_neighbours_of_a_suite_start_alike_where_the_seed_is_the_same_and_only_there(tmp_path):
    def cell(arm: str, seed: int, *flags: str) -> RunDir:
        return fit(small_config(arm, "--training.steps=2", f"--seed={seed}", *flags), tmp_path / arm / f"seed-{seed}")

    cell("baseline", 1)
    first = cell("baseline", 2)
    cell("both", 1)
    manifest = read_json(first.manifest)
    first.manifest.write_text(json.dumps(manifest | {"initial_weights_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"baseline/seed-2: started from other weights at the same seed 2"):
        cell("both", 2)
    with pytest.raises(UserError, match=r"started from the same weights at another seed"):
        one = read_json(tmp_path / "baseline" / "seed-1" / "manifest.json")["initial_weights_sha256"]
        first.manifest.write_text(json.dumps(manifest | {"initial_weights_sha256": one}))
        cell("layer_gain", 1)


class LoseCount(Callback):
    """What a resume in the middle of an accumulation did: the batch counter no longer agrees with the steps."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            trainer.fit_loop.epoch_loop.batch_progress.current.ready += 1


def test_step_counts_that_part_stop_the_run(tmp_path, monkeypatch):
    build = train_module.build_trainer

    def build_with_loss(*args):
        trainer = build(*args)
        trainer.callbacks.insert(0, LoseCount())
        return trainer

    monkeypatch.setattr(train_module, "build_trainer", build_with_loss)
    with pytest.raises(UserError, match=r"step counts differ .*Lightning.*the data.* remove the newest checkpoint"):
        fit(small_config(), tmp_path)


OVERFLOW = {"arm": "both", "overflow_at": [2],
            "flags": [*TWO, "--training.precision=bf16-mixed", "--logging.log_every_steps=1"]}  # fmt: skip


@pytest.fixture(scope="module")
def skipping(tmp_path_factory) -> tuple[RunDir, str]:
    """A ZeRO 2 run in bf16 whose third update overflows, where one may be skipped; what one said where none may be."""
    root = tmp_path_factory.mktemp("skipping")
    allowed = OVERFLOW | {"name": "allowed", "flags": [*OVERFLOW["flags"], "--training.max_skipped_steps=1"]}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError) as stopped:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(root / "extensions"))
        run_cells_on_ranks([allowed, OVERFLOW | {"name": "stopped"}], root)
    return RunDir(root / "allowed"), str(stopped.value)


@pytest.mark.slow
def test_skipped_updates_under_zero_are_counted(skipping):
    """bf16 gradients that overflow: DeepSpeed skips the update and says nothing."""
    run, _ = skipping
    lines = [line for line in read_journal(run.metrics) if "tokens" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["train/grad_norm"] is None, "an infinite norm is missing, not a number"
    assert read_json(run.manifest)["step"] == 6


@pytest.mark.slow
def test_skipped_updates_beyond_the_limit_stop_the_run(skipping):
    run, said = skipping
    assert "training.max_skipped_steps: DeepSpeed has skipped 1 updates up to step 3" in said
    assert not list(run.root.parent.glob("extensions/**/*")), "DeepSpeed on CPU needs no compiler"


def test_no_field_of_deepspeeds_bf16_is_left_to_a_default():
    """Defaults changed between releases, and a field that a new one adds has to be decided."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    written = deepspeed_config(small_config("baseline", "--cluster.strategy=zero2", "--cluster.devices=2"))
    assert written["bf16"].keys() == DeepSpeedBF16Config.model_fields.keys()
    assert written["gradient_clipping"] == 1.0


@pytest.mark.slow
def test_the_resolved_deepspeed_config_is_in_the_manifest(skipping):
    manifest = read_json(skipping[0].manifest)
    resolved = manifest["deepspeed"]
    assert manifest["strategy"] == {"strategy": "zero2", "world_size": 2, "offload_optimizer": False}
    assert resolved["zero_optimization"]["stage"] == 2
    assert resolved["zero_optimization"]["overlap_comm"] is False
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["communication_data_type"] == "fp32"
    assert (resolved["gradient_clipping"], resolved["gradient_accumulation_steps"]) == (1.0, 1)
    assert resolved["train_batch_size"] == 8
