"""Token gain: a detached weight on each token's loss, from the statistics of its group (README.md, Token gain).

Pure functions. Shapes: G gain groups, N tokens in one group. `valid_GN` is `target != ignore_index`; a token whose
loss happens to be exactly 0 is valid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from replication.config import TokenGainConfig
from replication.errors import UserError
from replication.objectives.plugins import Context, Function


class ClampedGain(NamedTuple):
    """The gain of every token before and after its clamp; 1 at invalid positions. No gradient."""

    before_GN: Tensor
    after_GN: Tensor


def masked_mean(values_GN: Tensor, valid_GN: Tensor) -> Tensor:
    """Mean over the valid tokens of each group: [G]; 0 where a group has none. Differentiable."""
    total_G = values_GN.masked_fill(~valid_GN, 0.0).sum(1)
    return total_G / valid_GN.sum(1).clamp(min=1)


@torch.no_grad()
def token_gain(
    config: TokenGainConfig,
    loss_GN: Tensor,
    plain_GN: Tensor,
    valid_GN: Tensor,
    function: Function | None = None,
    context: Context | None = None,
) -> ClampedGain:
    """The gain of every token, whatever `config.enabled` says.

    precision  clamp(1 + s * (l - mean) / (var + eps), c_min, c_max), var unbiased (0 for a single token)
    linear     clamp(l / mean, c_min, c_max)
    focal      clamp((1 - p) ** gamma, focal_min, focal_max), p = exp(-plain loss)
    sigmoid    1 - a + 2 a * sigmoid(k * (l - mean))
    none       1

    Args:
        config: variant and constants.
        loss_GN: the per-token loss that is trained, in nats, with label smoothing where there is any.
        plain_GN: the same without label smoothing (focal reads the model's probability from it).
        valid_GN: bool.
        function: a plugin's, which `config.function` names; it acts in place of the variant.
        context: of the first group; a function needs one.

    Returns:
        Both gains in the dtype of loss_GN. Statistics are over the valid tokens of one group, on this rank: a group
        is never split over ranks.
    """
    mean_G1 = masked_mean(loss_GN, valid_GN)[:, None]
    if config.function is not None:
        assert function is not None and context is not None, f"{config.function} was not loaded"
        before = function.of_groups(context, loss_GN, plain_GN, valid_GN)
        after = before.clamp(config.c_min, config.c_max) if function.clamp else before
    elif config.variant == "none":
        before = after = torch.ones_like(loss_GN)
    elif config.variant == "precision":
        before = 1 + config.s * (loss_GN - mean_G1) / (_variance(loss_GN, mean_G1, valid_GN) + config.eps)
        after = before.clamp(config.c_min, config.c_max)
    elif config.variant == "linear":
        before = torch.where(mean_G1 > 0, loss_GN / mean_G1, 1.0)
        after = before.clamp(config.c_min, config.c_max)
    elif config.variant == "focal":
        before = (1 - torch.exp(-plain_GN)) ** config.focal_gamma
        after = before.clamp(config.focal_min, config.focal_max)
    elif config.variant == "sigmoid":
        a, k = config.sigmoid_a, config.sigmoid_k
        before = after = 1 - a + 2 * a * torch.sigmoid(k * (loss_GN - mean_G1))
    else:
        raise UserError(
            f"token_gain.variant: {config.variant} has no formula in objectives/token_gain.py; add it there"
        )
    return ClampedGain(before.masked_fill(~valid_GN, 1.0), after.masked_fill(~valid_GN, 1.0))


def _variance(loss_GN: Tensor, mean_G1: Tensor, valid_GN: Tensor) -> Tensor:
    """Unbiased variance over valid tokens [G, 1]; 0 where fewer than two are valid."""
    squares_G1 = (loss_GN - mean_G1).square().masked_fill(~valid_GN, 0.0).sum(1, keepdim=True)
    return squares_G1 / (valid_GN.sum(1, keepdim=True) - 1).clamp(min=1)


@torch.no_grad()
def controlled_gain(config: TokenGainConfig, gain_GN: Tensor, valid_GN: Tensor, context: Context) -> Tensor:
    """What a control arm puts in place of the clamped gain, within each group: [G, N]; 1 at invalid positions.

    shuffled      the same gains on a random permutation of the valid tokens
    renormalised  gain / mean(gain), whose mean is 1 again after the clamp
    constant      mean(gain) on every token
    none          the gain

    Args:
        context: of the first group; the permutation depends on its seed, step and group alone.
    """
    if config.control == "shuffled":
        places = [replace(context, group=context.group + g).generator for g in range(len(gain_GN))]
        drawn = [torch.rand(gain_GN.shape[1], generator=of, dtype=torch.float64) for of in places]
        random_GN = torch.stack(drawn).to(gain_GN.device)
        in_order_GN = (~valid_GN).byte().argsort(dim=1, stable=True)  # the valid tokens' places first
        shuffled_GN = (random_GN + 2 * ~valid_GN).argsort(dim=1)
        return gain_GN.scatter(1, in_order_GN, gain_GN.gather(1, shuffled_GN))
    mean_G1 = masked_mean(gain_GN, valid_GN)[:, None]
    if config.control == "renormalised":
        return torch.where(valid_GN & (mean_G1 > 0), gain_GN / mean_G1, 1.0)
    return torch.where(valid_GN, mean_G1, 1.0) if config.control == "constant" else gain_GN


def group_objective(loss_GN: Tensor, valid_GN: Tensor, gain_GN: Tensor | None = None) -> Tensor:
    """mean over the valid tokens of gain * l, for each group: [G]. Without a gain: the plain cross-entropy."""
    return masked_mean(loss_GN if gain_GN is None else gain_GN * loss_GN, valid_GN)


class GainSums(NamedTuple):
    """One micro-batch's part of the step's gain statistics; scalars over all its valid tokens."""

    tokens: Tensor
    before: Tensor
    after: Tensor
    after_squared: Tensor
    at_min: Tensor
    at_max: Tensor
    lowest: Tensor
    highest: Tensor


@torch.no_grad()
def gain_sums(gains: ClampedGain, valid_GN: Tensor) -> GainSums:
    """Sums and extremes over the valid tokens; clamped shares are counted where the clamp changed a value."""
    weight = valid_GN.to(gains.after_GN.dtype)
    inf = float("inf")
    return GainSums(
        tokens=weight.sum(),
        before=(gains.before_GN * weight).sum(),
        after=(gains.after_GN * weight).sum(),
        after_squared=(gains.after_GN.square() * weight).sum(),
        at_min=((gains.after_GN > gains.before_GN) * weight).sum(),
        at_max=((gains.after_GN < gains.before_GN) * weight).sum(),
        lowest=gains.after_GN.masked_fill(~valid_GN, inf).min(),
        highest=gains.after_GN.masked_fill(~valid_GN, -inf).max(),
    )


def add_gain_sums(a: GainSums, b: GainSums) -> GainSums:
    """Of two micro-batches together."""
    added = GainSums(*(x + y for x, y in zip(a, b, strict=True)))
    return added._replace(lowest=torch.minimum(a.lowest, b.lowest), highest=torch.maximum(a.highest, b.highest))


def gain_scalars(s: GainSums) -> dict[str, Tensor]:
    """What is logged of a step's sums, under its tags."""
    mean = s.after / s.tokens
    return {
        "gain/mean_before_clamp": s.before / s.tokens,
        "gain/mean": mean,
        "gain/std": (s.after_squared / s.tokens - mean.square()).clamp(min=0).sqrt(),
        "gain/min": s.lowest,
        "gain/max": s.highest,
        "gain/share_at_min": s.at_min / s.tokens,
        "gain/share_at_max": s.at_max / s.tokens,
    }
