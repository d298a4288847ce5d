"""Control arms: what stands in place of the gain and of the scales, and that it trains, resumes and is certified."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from memory_store import MemoryStore
from run_files import read_journal
from slow_reference import SlowRun
from training_setup import fit, furthest, identical, small_config, weights

from replication.config import TokenGainConfig, scientific_hash
from replication.data.module import TrainingBatches
from replication.errors import UserError
from replication.objectives.layer_gain import permuted_scales
from replication.objectives.library import Gains
from replication.objectives.plugins import Context
from replication.objectives.token_gain import controlled_gain, masked_mean

CONTROLS = ("shuffled_gain", "renormalised_gain", "constant_gain", "matched_rate", "permuted_scale")
CONTEXT = Context(seed=3, step=5, steps=10, learning_rate_fraction=1.0)


def gains_of(control: str, gain_GN: torch.Tensor, valid_GN: torch.Tensor, **context: int) -> torch.Tensor:
    return controlled_gain(TokenGainConfig(control=control), gain_GN, valid_GN, replace(CONTEXT, **context))


def drawn_gains(masked: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    valid = torch.rand(4, 30, generator=g).argsort(1) >= masked
    return torch.rand(4, 30, generator=g, dtype=torch.float64).masked_fill(~valid, 1.0) + ~valid * 0.0, valid


def test_shuffled_gains_are_the_same_ones_on_other_tokens():
    gain, valid = drawn_gains()
    shuffled = gains_of("shuffled", gain, valid)
    for before, after, counts in zip(gain, shuffled, valid, strict=True):
        assert torch.equal(before[counts].sort().values, after[counts].sort().values)
        assert torch.equal(after[~counts], torch.ones(5, dtype=torch.float64))
        assert (before[counts] == after[counts]).float().mean() < 0.3


def test_the_shuffle_depends_on_seed_step_and_group_and_not_on_the_cut():
    gain, valid = drawn_gains()
    whole = gains_of("shuffled", gain, valid)
    cut = [gains_of("shuffled", gain[i : i + 1], valid[i : i + 1], group=i) for i in range(4)]
    assert torch.equal(whole, torch.cat(cut))
    for other in ({"seed": 4}, {"step": 6}, {"group": 1}):
        assert not torch.equal(whole, gains_of("shuffled", gain, valid, **other))


def test_renormalised_gains_have_mean_one_and_constant_ones_the_mean():
    gain, valid = drawn_gains()
    one, constant = gains_of("renormalised", gain, valid), gains_of("constant", gain, valid)
    torch.testing.assert_close(masked_mean(one, valid), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(one[valid] / gain[valid], (1 / masked_mean(gain, valid))[:, None].expand(4, 30)[valid])
    torch.testing.assert_close(constant, torch.where(valid, masked_mean(gain, valid)[:, None], 1.0))
    nothing_valid = gains_of("renormalised", gain, torch.zeros_like(valid))
    assert torch.equal(nothing_valid, torch.ones_like(gain))


@pytest.mark.parametrize("seed", range(1, 8))
def test_permuted_scales_are_the_same_ones_and_none_on_its_own_block(seed):
    scale = torch.arange(6.0)
    permuted = permuted_scales(scale, (2,), seed)
    assert sorted(permuted.tolist()) == scale.tolist()
    assert [i for i in range(6) if permuted[i] == scale[i]] == [2]


@pytest.mark.parametrize(("arm", "micro"), [(arm, 8) for arm in CONTROLS] + [("shuffled_gain", 2), ("matched_rate", 2)])
def test_a_control_trains_as_its_slow_restatement(tmp_path, arm, micro):
    flags = ("--training.steps=3", f"--cluster.micro_batch_sequences={micro}", "--training.precision=64-true")
    config = small_config(arm, *flags, "--training.optimizer=sgd")
    store, slow = MemoryStore(blocks=(6, 5)), SlowRun(config)  # the padded block is among the first steps
    whole = TrainingBatches(replace(config, cluster=replace(config.cluster, micro_batch_sequences=None)), store)
    for step in range(3):
        slow.step(whole[step].tokens_BS)
    assert furthest(weights(fit(config, tmp_path, store)), slow.model.state_dict()) < 1e-10


def test_the_rate_that_acted_is_logged(tmp_path):
    config = small_config("matched_rate", "--logging.log_every_steps=1")
    lines = [line for line in read_journal(fit(config, tmp_path).metrics) if "train/learning_rate" in line]
    assert len(lines) == 6
    for k, line in enumerate(lines):
        scheduled = config.training.learning_rate * min(1.0, (k + 1) / config.training.warmup_steps)
        factor = line["train/learning_rate"] / scheduled
        assert factor == pytest.approx(line["gain/mean"], rel=0.01)  # over tokens; that over groups differs by padding
        assert abs(factor - 1) > 0.02
        plain = line["train/loss_nats"] + config.model.aux_coef * line["train/aux_loss"]
        assert line["train/objective"] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("arm", ["shuffled_gain", "matched_rate"])
def test_a_control_resumes_bitwise(tmp_path, arm):
    run = fit(small_config(arm), tmp_path)
    whole = weights(run)
    shutil.rmtree(run.checkpoint_folders()[-1])
    assert identical(weights(fit(small_config(arm), tmp_path)), whole)


def test_a_control_is_part_of_the_hash_and_its_absence_is_not():
    plain, control = small_config("token_gain"), small_config("shuffled_gain")
    assert scientific_hash(plain) != scientific_hash(replace(control, arm="token_gain"))
    again = replace(control, arm="token_gain", token_gain=replace(control.token_gain, control="none"))
    assert scientific_hash(plain) == scientific_hash(again)


def test_controls_are_refused_where_they_cannot_act():
    with pytest.raises(UserError, match=r"layer_gain\.control: permuted needs two included blocks"):
        small_config("permuted_scale", "--model.n_blocks=2", "--layer_gain.exclude_blocks=[0]")
    with pytest.raises(UserError, match="Gains: control: control arms need a seed and a step"):
        Gains([torch.nn.Linear(2, 2)], token={"control": "shuffled"})
