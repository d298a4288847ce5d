"""Both interventions as a first version writes them, for the benchmark alone: the formulas without the care.

Every block's divergence and the gain's statistics are read on the host as they arise, the quantiles of the gain are
computed at every step, and the scales are handed out by a loop over all parameters' names (METHOD 1, on the whole
micro-batch).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor

from replication.bench.plain import PlainLoop, head_losses
from replication.config import RunConfig
from replication.data.module import Batch
from replication.model.transformer import rotary
from replication.training.module import inputs_and_targets

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class NaiveLoop(PlainLoop):
    """The plain loop with both interventions, and what the host reads of them at every step."""

    def __init__(self, config: RunConfig, *args: Any) -> None:
        eager = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, compile=False))
        super().__init__(eager, *args)
        if config.cluster.compile:
            logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it says where the graph breaks: that is meant
        # compiled as a whole, as its author would: the reads inside break the graph at every block
        self._losses = torch.compile(self._forward) if config.cluster.compile else self._forward
        self.divergences: list[float] = []
        self.read: dict[str, Any] = {}

    def step(self) -> None:
        for _ in range(self.config.accumulation):
            batch = next(self.loader)
            with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in self.config.training.precision):
                self.objective(batch).backward()
        self._scale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.read["norm"] = norm.item()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def objective(self, batch: Batch) -> Tensor:
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS.to(self.device), self.end_of_text)
        loss_N = self._losses(inputs_BT, targets_BT)
        g = self.config.token_gain
        with torch.no_grad():
            gain_N = (1 + g.s * (loss_N - loss_N.mean()) / (loss_N.var() + g.eps)).clamp(g.c_min, g.c_max)
            self.read |= {"loss": loss_N.mean().item(), "gain": gain_N.mean().item(), "std": gain_N.std().item()}
            for q in QUANTILES:
                self.read[f"gain_{q}"] = torch.quantile(gain_N, q).item()
        return (gain_N * loss_N).mean() / self.config.accumulation

    def _forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        m = self.config.model
        x_BTD = self.model.embedding(inputs_BT)
        angles = rotary(m.rotary_base, m.d_head, 0, inputs_BT.shape[1], x_BTD.device, x_BTD.dtype)
        self.divergences = []
        for block in self.model.blocks:
            y_BTD, *_ = block(x_BTD, angles)
            with torch.no_grad():
                self.divergences.append(((y_BTD - x_BTD).norm() / (x_BTD.norm() + 1e-8)).item())
            x_BTD = y_BTD
        hidden_BTD = self.model.norm(x_BTD)
        return head_losses(self.model, hidden_BTD, targets_BT, self.config.training.label_smoothing).smoothed_N

    def _scale_gradients(self) -> None:
        g, mean = self.config.layer_gain, sum(self.divergences) / len(self.divergences)
        for i, divergence in enumerate(self.divergences):
            scale = min(max(1 + g.t * (divergence / mean - 1), g.m_min), g.m_max)
            for name, parameter in self.model.named_parameters():
                if name.startswith(f"blocks.{i}.") and parameter.grad is not None:
                    parameter.grad.mul_(scale)
