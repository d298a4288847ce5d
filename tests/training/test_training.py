"""The update itself: against the slow reference, against a plain loop, neutral settings, accumulation."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from memory_store import MemoryStore
from run_files import read_journal
from slow_reference import SlowRun
from training_setup import ARMS, MODEL, fit, furthest, identical, small_config, weights

from replication.config import TokenGainConfig
from replication.data.module import TrainingBatches
from replication.model.transformer import Transformer, initialise
from replication.training.optimizers import build_optimizer, learning_rate_factor, parameter_groups

FP64 = "--training.precision=64-true"


def global_batches(config, store, steps: int) -> list[torch.Tensor]:
    whole = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, micro_batch_sequences=None))
    batches = TrainingBatches(whole, store)
    return [batches[k].tokens_BS for k in range(steps)]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("micro", [8, 2])
def test_weights_of_three_steps_equal_the_slow_reference(tmp_path, arm, micro):
    config = small_config(arm, FP64, "--training.steps=3", f"--cluster.micro_batch_sequences={micro}",
                          "--logging.log_every_steps=1", "--validation.every_steps=3")  # fmt: skip
    store = MemoryStore(blocks=(6, 5))  # so short that the padded block is among the first steps
    run = fit(config, tmp_path, store)
    slow = SlowRun(config)
    batches = global_batches(config, store, 3)
    assert any((b < 0).any() for b in batches)
    for batch in batches:
        slow.step(batch)
    assert furthest(weights(run), slow.model.state_dict()) < 1e-10
    lines = [line for line in read_journal(run.metrics) if "tokens" in line]
    for line, record in zip(lines, slow.records, strict=True):
        assert line["train/objective"] == pytest.approx(record["objective"], rel=1e-10)
        assert line["train/grad_norm"] == pytest.approx(record["norm"], rel=1e-8)
        assert [line[f"scale/block_{i:02d}"] for i in range(3)] == pytest.approx(record["scales"], rel=1e-10)
        assert line["gain/mean_before_clamp"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("arm", ["baseline", "both"])
@pytest.mark.parametrize(
    "flags",
    [
        ("sgd", "0.05"),
        ("muon", "0.01", "--training.muon_learning_rate=0.03"),
        ("muon", "0.01", "--training.muon_coefficients=polar_express", "--training.muon_gram=true"),
    ],
)
def test_other_optimizers_train_as_the_slow_reference(tmp_path, arm, flags):
    optimizer, rate, *more = flags
    rate = f"--training.learning_rate={rate}"
    config = small_config(arm, FP64, "--training.steps=4", f"--training.optimizer={optimizer}", rate, *more)
    store = MemoryStore()
    run = fit(config, tmp_path, store)
    slow = SlowRun(config)
    for batch in global_batches(config, store, 4):
        slow.step(batch)
    assert furthest(weights(run), slow.model.state_dict()) < 1e-10


@pytest.mark.parametrize("variant", sorted({*get_args(get_type_hints(TokenGainConfig)["variant"])} - {"precision"}))
def test_every_published_gain_trains_as_the_slow_reference(tmp_path, variant):
    config = small_config("token_gain", FP64, "--training.steps=2", f"--token_gain.variant={variant}")
    store = MemoryStore()
    run = fit(config, tmp_path, store)
    slow = SlowRun(config)
    for batch in global_batches(config, store, 2):
        slow.step(batch)
    assert furthest(weights(run), slow.model.state_dict()) < 1e-10


def plain_loop(config, store) -> dict[str, torch.Tensor]:
    """Nothing but torch: cross_entropy per token, reduced by group; AdamW; clipping."""
    t = config.training
    torch.set_num_threads(1)
    model = Transformer(config.model)
    initialise(model, config.effective_weights_seed)
    optimizer = build_optimizer(t, model)
    for k, blocks in enumerate(global_batches(config, store, t.steps)):
        for group in optimizer.param_groups:
            group["lr"] = t.learning_rate * learning_rate_factor(t, k)
        optimizer.zero_grad()
        micros = blocks.long().split(config.micro_batch_sequences)
        for tokens in micros:
            out = model(tokens[:, :-1], n_groups=len(tokens) // 2)
            logits = model.logits(out.hidden_BTD).flatten(0, 1)
            each = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none", label_smoothing=t.label_smoothing)
            by_group = each.view(len(tokens) // 2, -1)
            objective = by_group.sum(1) / by_group.shape[1] + config.model.aux_coef * out.aux_G
            (objective.sum() * (len(micros) / (len(blocks) // 2)) / len(micros)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip_norm)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("micro", [8, 2])
def test_with_both_off_training_is_bit_identical_to_a_plain_loop(tmp_path, micro):
    config = small_config("baseline", f"--cluster.micro_batch_sequences={micro}")
    store = MemoryStore(blocks=(400, 300))  # no padded block among these steps
    assert identical(weights(fit(config, tmp_path, store)), plain_loop(config, store))


def test_neutral_settings_are_bit_identical_to_the_baseline(tmp_path):
    baseline = weights(fit(small_config("baseline"), tmp_path / "baseline"))
    neutral = small_config("both", "--token_gain.variant=none", "--layer_gain.t=0")
    assert identical(weights(fit(neutral, tmp_path / "neutral")), baseline)


def test_each_intervention_changes_the_update(tmp_path):
    results = {arm: weights(fit(small_config(arm), tmp_path / arm)) for arm in ARMS}
    for i, a in enumerate(ARMS):
        for b in ARMS[i + 1 :]:
            assert furthest(results[a], results[b]) > 1e-4, (a, b)


@pytest.mark.parametrize("arm", ARMS)
def test_accumulation_does_not_change_the_update(tmp_path, arm):
    runs = [fit(small_config(arm, FP64, f"--cluster.micro_batch_sequences={m}"), tmp_path / str(m)) for m in (8, 4, 2)]
    whole, *cut = (weights(run) for run in runs)
    assert all(furthest(w, whole) < 1e-10 for w in cut)


def test_last_group_is_the_last_of_the_global_batch(tmp_path):
    flag = "--layer_gain.divergence=last_group"
    store = MemoryStore()
    for micro in (8, 2):
        config = small_config("layer_gain", FP64, flag, f"--cluster.micro_batch_sequences={micro}")
        run = fit(config, tmp_path / str(micro), store)
        slow = SlowRun(config)
        for batch in global_batches(config, store, config.training.steps):
            slow.step(batch)
        assert furthest(weights(run), slow.model.state_dict()) < 1e-10


def test_scaling_per_micro_batch_equals_per_step_at_accumulation_one_only(tmp_path):
    def run(apply: str, micro: int) -> dict[str, torch.Tensor]:
        config = small_config(
            "layer_gain", FP64, f"--layer_gain.apply={apply}", f"--cluster.micro_batch_sequences={micro}"
        )
        return weights(fit(config, tmp_path / f"{apply}-{micro}"))

    assert furthest(run("micro_batch", 8), run("step", 8)) < 1e-12
    assert furthest(run("micro_batch", 2), run("step", 2)) > 1e-6


def test_schedule_is_warmup_stable_decay():
    t = dataclasses.replace(small_config().training, steps=10, warmup_steps=4, decay_steps=2)
    assert [learning_rate_factor(t, k) for k in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]
    no_decay = dataclasses.replace(t, decay_steps=0, warmup_steps=0)
    assert {learning_rate_factor(no_decay, k) for k in range(10)} == {1.0}


def test_parameter_groups_are_explicit():
    def names(optimizer: str, **model: object) -> dict[str, set[str]]:
        training = dataclasses.replace(small_config().training, optimizer=optimizer)
        groups = parameter_groups(training, Transformer(dataclasses.replace(MODEL, **model)))
        return {name: set(group.parameters) for name, group in groups.items()}

    def in_blocks(*parts: str) -> set[str]:
        return {f"blocks.{i}.{part}" for i in range(3) for part in parts}

    norms = in_blocks(*(f"{n}.weight" for n in ("attention_norm", "feed_forward_norm", "attention.q_norm",
                                                "attention.k_norm")))  # fmt: skip
    ours = in_blocks(*(f"attention.{x}.weight" for x in "qkvo"),
                     *(f"feed_forward.{x}.{e}" for x in ("gate", "up", "down") for e in range(4)),
                     *(f"feed_forward.shared.{x}.weight" for x in ("gate", "up", "down")))  # fmt: skip
    routers = in_blocks("feed_forward.router.weight")
    still = {"embedding.weight", "norm.weight"} | norms
    for optimizer in ("adamw", "sgd"):
        assert names(optimizer) == {"matrices": ours | routers | {"head.weight"}, "embeddings_and_norms": still}
    assert names("muon") == {"muon": ours, "matrices": routers | {"head.weight"}, "embeddings_and_norms": still}
    tied = names("muon", tied_head=True, feed_forward="dense")
    assert set(tied) == {"muon", "embeddings_and_norms"}, "no group is empty"
    assert "embedding.weight" in tied["embeddings_and_norms"]
