"""The predicted step: its arithmetic is the model's own, and what it says of the shipped cluster files."""

from dataclasses import replace

import pytest

from replication.config import load_run
from replication.model.cost import H100, predict_step
from replication.model.size import active_matrix_parameters, padded_vocabulary


def published(cluster: str, *flags: str):
    layers = ["model/1b2.yaml", "training/phase3.yaml", f"cluster/{cluster}.yaml", "arms/both.yaml"]
    return load_run(layers, list(flags))


def flops(config) -> dict[str, float]:
    return {part.name: part.flops for part in predict_step(config).parts}


def test_products_are_those_of_the_active_parameters():
    config = published("one_gpu", "--cluster.head=logits")
    m, n = config.model, config.training.batch_tokens
    found = flops(config)
    assert found["head"] == 6 * n * padded_vocabulary(m) * m.d_model
    routers = m.n_blocks * m.n_experts * m.d_model
    of_blocks = active_matrix_parameters(m) - m.vocab_size * m.d_model - routers
    assert found["experts' grouped products"] + found["other products of blocks"] == 6 * n * of_blocks


@pytest.mark.parametrize("dense", [False, True])
def test_a_dense_model_has_no_grouped_products(dense):
    found = flops(published("one_gpu", f"--model.feed_forward={'dense' if dense else 'moe'}"))
    assert ("experts' grouped products" in found) is not dense
    assert ("routing" in {p.name for p in predict_step(published("one_gpu")).parts}) is True


def test_more_arithmetic_or_slower_parts_take_longer():
    step = predict_step(published("one_gpu"))
    assert step.seconds == pytest.approx(sum(part.seconds for part in step.parts))
    for flag in ("cluster.compile=false", "cluster.activation_checkpointing=true", "cluster.micro_batch_sequences=2"):
        assert predict_step(published("one_gpu", f"--{flag}")).seconds > step.seconds, flag
    assert predict_step(published("one_gpu"), replace(H100, memory=H100.memory / 2)).seconds > step.seconds


def test_muon_by_gram_matrices_has_less_arithmetic_in_fp32_and_other_coefficients_change_nothing():
    plain, gram, polar = (
        predict_step(published("one_gpu", *flags))
        for flags in ((), ("--training.muon_gram=true",), ("--training.muon_coefficients=polar_express",))
    )
    part = {
        name: next(p for p in step.parts if p.name == "optimizer") for name, step in (("plain", plain), ("gram", gram))
    }
    assert 0.6 < part["gram"].flops / part["plain"].flops < 0.75
    assert part["gram"].seconds > part["plain"].seconds, "fp32 beside bf16, on assumed rates"
    assert polar == plain


def test_what_it_says_of_the_shipped_cluster_files():
    """The goals that the defaults were chosen for; on assumed rates."""
    one, node, zero2, ddp, zero3 = (
        predict_step(published(name))
        for name in ("one_gpu", "node_8gpu_ddp", "node_8gpu_zero2", "nodes_ddp", "nodes_zero3")
    )
    assert one.tokens_per_second > 80_000
    assert 6 * one.tokens_per_second < node.tokens_per_second < zero2.tokens_per_second < 8 * one.tokens_per_second
    assert ddp.seconds < zero3.seconds
    assert one.gpu_hours(30_000) == pytest.approx(30_000 * one.seconds / 3600)
