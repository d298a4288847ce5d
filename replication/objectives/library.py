"""Both interventions in anyone's training loop (objectives/README.md, In your own training).

Shapes: B sequences, T positions, D width, V vocabulary, G gain groups of a micro-batch, N tokens of a group, L blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replication.config import Layer, LayerGainConfig, TokenGainConfig, build, gain_contradictions
from replication.errors import UserError
from replication.model.foreign import BlockDivergences, find_blocks
from replication.model.loss import IGNORE, token_losses
from replication.objectives.layer_gain import (
    in_global_order,
    included_blocks,
    layer_scales,
    multiply_whole,
    step_divergence,
)
from replication.objectives.token_gain import (
    GainSums,
    add_gain_sums,
    gain_scalars,
    gain_sums,
    group_objective,
    masked_mean,
    token_gain,
)

Config = TypeVar("Config", TokenGainConfig, LayerGainConfig)
Constants = Mapping[str, Any]


class Measured(NamedTuple):
    """What one micro-batch leaves, on the device."""

    divergence_LG: Tensor
    sums: Tensor  # [loss, objective, groups with a valid token], over groups
    gains: GainSums


class Gains:
    """Token gain and layer gain of one model in training; measured also where they are off, for a baseline's sake.

    Forward hooks on the blocks take the divergence of each gain group; nothing else of the model is touched. Call
    `loss` for every micro-batch, `scale` once a step: after its last backward, before clipping.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module] | str,
        model: nn.Module | None = None,
        *,
        group_sequences: int | None = 2,
        token: Constants | None = None,
        layer: Constants | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        """Register the hooks.

        Args:
            blocks: the residual blocks in order, or their path in `model`, such as "transformer.h". A block takes x
                [B, T, D] first (or as `hidden_states`) and returns y, alone or first of a tuple.
            group_sequences: consecutive sequences of one gain group; None takes the whole micro-batch.
            token: constants of TokenGainConfig that differ from the published ones; {} for these; None: not weighted.
            layer: the same of LayerGainConfig; None: gradients are not scaled.
            label_smoothing: a in [0, 1), part of the trained loss before its gain.

        Raises:
            UserError: no blocks there, or constants that cannot be.
        """
        self.blocks = _blocks(blocks, model)
        self.token, self.layer = _config(TokenGainConfig, "token", token), _config(LayerGainConfig, "layer", layer)
        for problem in gain_contradictions(self.token, self.layer, len(self.blocks)):
            raise UserError(f"Gains: {problem}")
        for key, known in (("apply", "step"), ("parts", "block")):
            if (value := getattr(self.layer, key)) != known:
                raise UserError(f"Gains: layer.{key}: {value} acts only under `replicate`; use {known}")
        if self.token.function is not None or self.layer.function is not None:
            raise UserError("Gains: function: a plugin acts only under `replicate`; drop it, or choose a variant")
        if self.token.control != "none" or self.layer.control != "none":
            raise UserError("Gains: control: control arms need a seed and a step, which only `replicate` has; drop it")
        if (group_sequences is not None and group_sequences < 1) or not 0 <= label_smoothing < 1:
            raise UserError("Gains: group_sequences is at least 1, and label_smoothing lies in 0..1 without 1")
        self.group_sequences, self.label_smoothing = group_sequences, label_smoothing
        self._included_L = included_blocks(self.layer, len(self.blocks))
        self._divergences = BlockDivergences(self.blocks, self._groups)
        self._step: list[Measured] = []
        self._finished: list[Measured] = []

    def loss(
        self,
        logits_BTV: Tensor,
        labels_BT: Tensor,
        *,
        shift: bool = True,
        extra: Tensor | float = 0.0,
        divisor: Tensor | float | None = None,
    ) -> Tensor:
        """The objective of one micro-batch: mean over its groups of mean over valid tokens of gain * l, plus `extra`.

        While the blocks are in eval mode: the plain cross-entropy, a mean over all valid tokens, smoothed alike. Over K
        micro-batches the caller divides by K, unless its framework does.

        Args:
            labels_BT: int64, -100 where there is none; `shift` moves them by one position, as transformers does.
            extra: what each group adds unweighted, [G] or one value for all, such as coef * load-balancing loss.
            divisor: of the sum over groups; default: the micro-batch's groups with a valid token. The step's such
                groups / (K * processes) keeps the mean exact where a whole group is masked.
        """
        if shift:
            labels_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)
        losses, valid_BT = (
            token_losses(logits_BTV.flatten(0, 1), labels_BT.flatten(), self.label_smoothing),
            labels_BT != IGNORE,
        )
        if not self.blocks[0].training:
            return masked_mean(losses.smoothed_N[None], valid_BT.view(1, -1))[0]
        n_groups = self._groups(len(labels_BT))
        divergence_LG = self._divergences.take(n_groups, "Gains.loss")
        loss_GN, plain_GN, valid_GN = (x.reshape(n_groups, -1) for x in (*losses, valid_BT))
        gains = token_gain(self.token, loss_GN, plain_GN, valid_GN)
        objective_G = group_objective(loss_GN, valid_GN, gains.after_GN if self.token.enabled else None)
        has_valid_G = valid_GN.any(1)
        objective_G = objective_G + extra * has_valid_G
        groups, plain = has_valid_G.sum(), masked_mean(loss_GN.detach(), valid_GN).sum()
        sums = torch.stack([plain, objective_G.detach().sum(), groups.to(plain.dtype)])
        self._step.append(Measured(divergence_LG, sums, gain_sums(gains, valid_GN)))
        return objective_G.sum() / (groups.clamp(min=1) if divisor is None else divisor)

    def scale(self) -> None:
        """End the step: multiply the gradients of each block by its scale. On every rank, also with `layer=None`.

        Raises:
            UserError: no `loss` since the last step, no gradient to scale, or gradients that DeepSpeed keeps elsewhere.
        """
        if not self._step:
            raise UserError("Gains.scale: no loss() in training mode since the last step; call it after backward")
        self._finished, self._step = self._step, []
        divergence_LS = in_global_order([measured.divergence_LG for measured in self._finished])
        self._divergence_L = step_divergence(self.layer, divergence_LS)
        self._included_L = self._included_L.to(divergence_LS.device)
        self._scale_L = layer_scales(self.layer, self._divergence_L, self._included_L)
        if self.layer.enabled:
            parameters = [list(block.parameters()) for block in self.blocks]
            if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for block in parameters for p in block):
                raise UserError(
                    "Gains.scale: DeepSpeed ZeRO keeps gradients out of reach and steps in backward; use DDP or FSDP2, "
                    "layer=None, or cluster.strategy of `replicate`"
                )
            if all(p.grad is None for block in parameters for p in block):
                raise UserError("Gains.scale: no block has a gradient; call it after backward and before zero_grad")
            multiply_whole(parameters, self._scale_L)

    def metrics(self) -> dict[str, float]:
        """Scalars of the last finished step, in one read of the device.

        Loss and gains are of this process's tokens, in nats; divergences and scales of every rank's.
        """
        if not self._finished:
            raise UserError("Gains.metrics: no step has ended; call scale() after the step's last backward")
        loss, objective, groups = torch.stack([measured.sums for measured in self._finished]).sum(0)
        gains = functools.reduce(add_gain_sums, [measured.gains for measured in self._finished])
        scalars = {"train/loss_nats": loss / groups, "train/objective": objective / groups}
        scalars |= gain_scalars(gains)
        for name, values_L in (("divergence", self._divergence_L), ("scale", self._scale_L)):
            scalars |= {f"{name}/block_{i:02d}": value for i, value in enumerate(values_L)}
        return dict(zip(scalars, torch.stack([value.float() for value in scalars.values()]).tolist(), strict=True))

    def remove(self) -> None:
        """Take the hooks off the blocks."""
        self._divergences.remove()

    def _groups(self, sequences: int) -> int:
        """Groups of a micro-batch."""
        if sequences % (self.group_sequences or sequences):
            raise UserError(
                f"Gains: a micro-batch of {sequences} sequences does not hold whole groups of group_sequences "
                f"{self.group_sequences}; change either, and drop the last batch of an epoch where it is smaller"
            )
        return sequences // (self.group_sequences or sequences)


def _blocks(blocks: Iterable[nn.Module] | str, model: nn.Module | None) -> list[nn.Module]:
    if not isinstance(blocks, str):
        found = list(blocks)
    elif model is None:
        raise UserError(f"Gains: blocks {blocks!r} is a path in a model; give model= too")
    else:
        found = find_blocks(blocks, model, "Gains")
    if not found or not all(isinstance(block, nn.Module) for block in found):
        raise UserError("Gains: blocks must be the model's residual blocks, such as model.model.layers")
    return found


def _config(kind: type[Config], name: str, constants: Constants | None) -> Config:
    return build(kind, [Layer({"enabled": constants is not None, **(constants or {})}, f"Gains: {name}")])
