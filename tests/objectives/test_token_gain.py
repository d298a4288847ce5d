"""Token gain against its slow restatement: value, gradient, masks, degenerate groups."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from slow_reference import slow_gain

from replication.config import TokenGainConfig
from replication.errors import UserError
from replication.model.loss import IGNORE, token_losses
from replication.objectives.token_gain import gain_sums, group_objective, masked_mean, token_gain

VARIANTS = get_args(get_type_hints(TokenGainConfig)["variant"])
PUBLISHED = TokenGainConfig()


def logits_and_targets(groups: int = 3, tokens: int = 20, vocab: int = 30, spread: float = 3.0, masked: int = 0):
    g = torch.Generator().manual_seed(groups * 100 + tokens)
    logits = spread * torch.randn(groups * tokens, vocab, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocab, (groups * tokens,), generator=g)
    targets[torch.randperm(groups * tokens, generator=g)[:masked]] = IGNORE
    return logits.requires_grad_(), targets


def grouped(logits, targets, groups, smoothing=0.0):
    losses = token_losses(logits, targets, smoothing)
    return (
        losses.smoothed_N.view(groups, -1),
        losses.plain_N.view(groups, -1),
        targets.view(groups, -1) != IGNORE,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked", [0, 17])
def test_value_and_gradient_equal_the_slow_reference(variant, smoothing, masked):
    config = replace(PUBLISHED, variant=variant)
    logits, targets = logits_and_targets(masked=masked)
    loss, plain, valid = grouped(logits, targets, 3, smoothing)
    gains = token_gain(config, loss, plain, valid)
    fast = group_objective(loss, valid, gains.after_GN)
    (fast_grad,) = torch.autograd.grad(fast.sum(), logits)

    slow_sum = torch.zeros((), dtype=torch.float64)
    for g in range(3):
        each = [
            F.cross_entropy(logits[i : i + 1], targets[i : i + 1], label_smoothing=smoothing)
            for i in range(20 * g, 20 * g + 20)
            if targets[i] != IGNORE
        ]
        nll = [
            -float(F.log_softmax(logits[i].detach(), 0)[targets[i]])
            for i in range(20 * g, 20 * g + 20)
            if targets[i] != IGNORE
        ]
        before, after = slow_gain(config, [float(x.detach()) for x in each], nll)
        assert gains.before_GN[g][valid[g]].tolist() == pytest.approx(before, rel=1e-12)
        assert gains.after_GN[g][valid[g]].tolist() == pytest.approx(after, rel=1e-12)
        slow = sum(w * x for w, x in zip(after, each, strict=True)) / len(each)
        assert float(fast[g].detach()) == pytest.approx(float(slow.detach()), rel=1e-12)
        slow_sum = slow_sum + slow
    (slow_grad,) = torch.autograd.grad(slow_sum, logits)
    assert torch.allclose(fast_grad, slow_grad, rtol=1e-10, atol=1e-14)


def test_the_gain_carries_no_gradient():
    logits, targets = logits_and_targets()
    loss, plain, valid = grouped(logits, targets, 3)
    assert not token_gain(PUBLISHED, loss, plain, valid).after_GN.requires_grad


def test_mean_gain_before_the_clamp_is_one():
    logits, targets = logits_and_targets(groups=2, tokens=500)
    loss, plain, valid = grouped(logits.detach().float(), targets, 2)
    before = token_gain(PUBLISHED, loss, plain, valid).before_GN
    assert before.mean(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_objective_is_the_loss_plus_s_n_minus_1_over_n_where_no_clamp_binds():
    config = replace(PUBLISHED, s=0.7, eps=0.0, c_min=-1e9, c_max=1e9)
    logits, targets = logits_and_targets(groups=2, tokens=9, masked=4)
    loss, plain, valid = grouped(logits, targets, 2)
    gains = token_gain(config, loss, plain, valid)
    difference = group_objective(loss, valid, gains.after_GN) - masked_mean(loss, valid)
    n = valid.sum(1).double()
    assert difference.tolist() == pytest.approx((0.7 * (n - 1) / n).tolist(), rel=1e-10)


def test_clamps_bind_and_are_counted():
    loss = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    config = replace(PUBLISHED, s=4.0, c_min=0.5, c_max=1.5)
    valid = torch.ones_like(loss, dtype=torch.bool)
    gains = token_gain(config, loss, loss, valid)
    assert gains.after_GN.min() == 0.5
    assert gains.after_GN.max() == 1.5
    sums = gain_sums(gains, valid)
    assert float(sums.at_min) == int((gains.before_GN < 0.5).sum()) > 0
    assert float(sums.at_max) == int((gains.before_GN > 1.5).sum()) > 0
    assert float(sums.tokens) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_group_without_valid_tokens_contributes_zero_and_no_nan(variant):
    logits, targets = logits_and_targets(groups=2, tokens=6)
    targets[:6] = IGNORE
    loss, plain, valid = grouped(logits, targets, 2)
    gains = token_gain(replace(PUBLISHED, variant=variant), loss, plain, valid)
    objective = group_objective(loss, valid, gains.after_GN)
    assert float(objective[0].detach()) == 0.0
    (grad,) = torch.autograd.grad(objective.sum(), logits)
    assert torch.isfinite(grad).all()
    assert grad[:6].abs().sum() == 0


def test_a_variant_without_a_formula_is_said_and_not_taken_for_another():
    one = torch.ones(1, 1)
    with pytest.raises(
        UserError, match=r"token_gain\.variant: cubic has no formula in objectives/token_gain\.py; add it"
    ):
        token_gain(replace(PUBLISHED, variant="cubic"), one, one, one.bool())


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_valid_token_and_zero_variance(variant):
    config = replace(PUBLISHED, variant=variant)
    one = torch.tensor([[2.0, 0.0, 0.0]])
    valid = torch.tensor([[True, False, False]])
    same = torch.full((1, 3), 2.0)
    for loss, mask in ((one, valid), (same, torch.ones_like(same, dtype=torch.bool))):
        gain = token_gain(config, loss, loss, mask).after_GN
        expected = (1 - torch.exp(torch.tensor(-2.0))) ** 2 if variant == "focal" else torch.tensor(1.0)
        assert torch.allclose(gain[mask], expected.expand(int(mask.sum()))), (
            f"{variant}: its value where losses are equal"
        )


def test_a_valid_token_with_loss_zero_counts():
    """The published code masks by l > 0; the target decides here."""
    loss = torch.tensor([[0.0, 1.0, 2.0]])
    valid = torch.ones_like(loss, dtype=torch.bool)
    gains = token_gain(PUBLISHED, loss, loss, valid)
    assert gains.before_GN.tolist() == [[pytest.approx(0.0, abs=1e-5), 1.0, pytest.approx(2.0, abs=1e-5)]]


def test_bf16_logits_are_widened_before_the_loss():
    logits, targets = logits_and_targets()
    narrow = logits.detach().to(torch.bfloat16)
    loss, plain, valid = grouped(narrow, targets, 3)
    wide, wide_plain, _ = grouped(narrow.float(), targets, 3)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide)
    a, b = token_gain(PUBLISHED, loss, plain, valid), token_gain(PUBLISHED, wide, wide_plain, valid)
    assert torch.equal(a.after_GN, b.after_GN)


def test_statistics_do_not_cross_groups():
    logits, targets = logits_and_targets(groups=2)
    loss, plain, valid = grouped(logits.detach(), targets, 2)
    whole = token_gain(PUBLISHED, loss, plain, valid).after_GN
    alone = token_gain(PUBLISHED, loss[1:], plain[1:], valid[1:]).after_GN
    assert torch.equal(whole[1:], alone)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_per_token_loss_is_bit_equal_to_torch(smoothing):
    logits, targets = logits_and_targets(masked=11)
    logits = logits.detach().float()
    ours = token_losses(logits, targets, smoothing)
    theirs = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing, ignore_index=IGNORE)
    assert torch.equal(ours.smoothed_N, theirs)
    assert torch.equal(ours.plain_N, F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE))
