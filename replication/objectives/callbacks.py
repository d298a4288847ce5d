"""The two interventions as Lightning callbacks. They only act; measuring is another callback's task, in every arm.

Order in one step: forward, per-token loss, gain, backward, layer scale, clip by global norm, optimizer (README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from replication.config import LayerGainConfig, TokenGainConfig
from replication.objectives.layer_gain import gather, included_blocks, layer_scales, permuted_scales, step_divergence
from replication.objectives.plugins import Context, Function
from replication.objectives.token_gain import controlled_gain, masked_mean, token_gain

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(loss_GN, plain_GN, valid_GN) -> detached weight of every token; None weighs none."""


class AcceptsGains(Protocol):
    """Needs of the callbacks of a LightningModule."""

    weigh_tokens: Weigh | None
    """Set by TokenGain; None trains the plain cross-entropy."""

    context: Context
    """Of the latest micro-batch: the step, and its first group."""

    at_boundary: bool
    """Whether the current micro-batch is the last of its step; some strategies call their hooks for every one."""

    def block_parameters(self) -> list[list[Parameter]]:
        """The parameters of each block."""

    def part_parameters(self) -> list[list[Parameter]]:
        """Those of each block's attention, then of each one's feed-forward; asked for where LayerGain acts by parts."""

    def latest_divergence_LG(self) -> Tensor:
        """Divergences of the groups of this rank's latest forward pass."""

    def step_divergence_LS(self) -> Tensor:
        """Divergences of every group of the step so far, in global order, equal on every rank."""


MultiplyGradients = Callable[[Sequence[Sequence[Parameter]], Tensor], None]
"""Multiply the gradients of each block's parameters by that block's scale [L], wherever the strategy keeps them."""


class TokenGain(Callback):
    """Weights each token's loss by its gain, or by what `control` puts in its place.

    `control: rate` weighs nothing: the step's mean gain, over groups and ranks, multiplies the learning rate of that
    step, and the schedule sets it anew for the next.
    """

    def __init__(self, config: TokenGainConfig, function: Function | None = None) -> None:
        """`function` is the plugin's that `config` names."""
        self.config, self.function = config, function
        self._means: list[Tensor] = []  # [sum of the groups' mean gains, groups] of each micro-batch of the step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._module = cast(AcceptsGains, pl_module)
        self._module.weigh_tokens = self._weigh

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cast(AcceptsGains, pl_module).weigh_tokens = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.config.control == "rate" and self._module.at_boundary:
            total, groups = gather(torch.stack(self._means).sum(0)).sum(0).tolist()
            self._means.clear()
            for group in optimizer.param_groups:
                group["lr"] *= total / max(groups, 1)

    def _weigh(self, loss_GN: Tensor, plain_GN: Tensor, valid_GN: Tensor) -> Tensor | None:
        context = self._module.context
        gain_GN = token_gain(self.config, loss_GN, plain_GN, valid_GN, self.function, context).after_GN
        if self.config.control != "rate":
            return controlled_gain(self.config, gain_GN, valid_GN, context)
        means_G = masked_mean(gain_GN, valid_GN)
        self._means.append(torch.stack([means_G.sum(), valid_GN.any(1).sum().to(means_G)]))
        return None


class LayerGain(Callback):
    """Multiplies every gradient of a block by the block's scale, before clipping.

    `apply: step` acts once, on the accumulated gradient at the optimizer boundary, as published. `apply: micro_batch`
    acts in backward, with the scale of that micro-batch's own groups. `apply: update` multiplies what the optimizer
    changed, from a copy of the blocks' weights; where the scale is 1 not a bit is moved.
    """

    def __init__(self, config: LayerGainConfig, multiply: MultiplyGradients, function: Function | None = None) -> None:
        """`function` is the plugin's that `config` names."""
        self.config, self.multiply, self.function = config, multiply, function
        self.included_L = torch.empty(0)
        self._scale_L = torch.empty(0)
        self._blocks: list[list[Parameter]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._before: list[list[Tensor]] = []  # weights of each block, while an update is made

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(AcceptsGains, pl_module)
        self._blocks = module.block_parameters()
        self.included_L = included_blocks(self.config, len(self._blocks)).to(pl_module.device)
        if self.config.parts != "block":
            self._blocks, self.included_L = module.part_parameters(), self.included_L.repeat(2)
        if self.config.apply == "micro_batch":
            self._hooks = [p.register_hook(self._hook(i)) for i, block in enumerate(self._blocks) for p in block]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.config.apply == "micro_batch":
            module = cast(AcceptsGains, pl_module)
            self._scale_L = self._scales(module.latest_divergence_LG(), module.context)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        module = cast(AcceptsGains, pl_module)
        if self.config.apply == "micro_batch" or not module.at_boundary:
            return
        self._scale_L = self._scales(module.step_divergence_LS(), replace(module.context, group=0))
        if self.config.apply == "step":
            self.multiply(self._blocks, self._scale_L)
        else:
            self._before = [[p.detach().clone() for p in block] for block in self._blocks]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._before:  # at a boundary alone
            for block, before, scale in zip(self._blocks, self._before, self._scale_L, strict=True):
                for p, old in zip(block, before, strict=True):
                    p.copy_(torch.lerp(old, p, scale.to(p)))
        self._before = []

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()

    def _scales(self, divergence_LG: Tensor, context: Context) -> Tensor:
        divergence_L = step_divergence(self.config, divergence_LG)[-len(self._blocks) :]  # parts come behind blocks
        scale_L = layer_scales(self.config, divergence_L, self.included_L, self.function, context)
        if self.config.control == "permuted":
            return permuted_scales(scale_L, self.config.exclude_blocks, context.seed)
        return scale_L

    def _hook(self, block: int) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient * self._scale_L[block].to(gradient.dtype)
