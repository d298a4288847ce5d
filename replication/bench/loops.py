"""Trainings in nothing but torch, as written by hand, and the random corpus that all benches train on."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from replication.config import RunConfig
from replication.data.module import Batch, CountFrom, TrainingBatches, batch_loader
from replication.data.store import TokenStore
from replication.model.loss import TokenLosses
from replication.model.transformer import Transformer, initialise, rotary
from replication.objectives.token_gain import group_objective
from replication.training.module import inputs_and_targets
from replication.training.optimizers import build_optimizer, build_schedule

HEAD = "losses"
"""Method of the model that a breakdown calls the head."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# ---------------------------------------------------------------- corpus


class _SyntheticStore:
    """Uniformly random tokens, a pure function of (source, block), with one source and every position valid."""

    def __init__(self, config: RunConfig) -> None:
        self.vocab_size, self.block_size_tokens = config.model.vocab_size, config.data.block_size_tokens
        self.end_of_text_id = 0
        self.hash = f"synthetic-{self.vocab_size}-{self.block_size_tokens}"

    def check(self, config: RunConfig) -> None:
        """Nothing to check: the store is made from the config."""

    def sizes(self, split: str) -> list[int]:
        return [1_000_000]

    def valid_targets(
        self, split: str, source_ids: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        return np.full(len(indices), self.block_size_tokens)

    def read(
        self, split: str, source_ids: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        positions = np.arange(self.block_size_tokens + 1, dtype=np.uint64)
        x = (indices.astype(np.uint64)[:, None] << np.uint64(20)) + positions
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((x >> np.uint64(33)) % np.uint64(self.vocab_size)).astype(np.int32)


def synthetic_store(config: RunConfig) -> TokenStore:
    """A corpus of random tokens, never on disk, of the config's vocabulary and block size."""
    return cast(TokenStore, _SyntheticStore(config))


def training_loader(config: RunConfig, store: TokenStore) -> DataLoader:
    """The product's micro-batches from the first on, loaded as the product loads them."""
    return batch_loader(config, TrainingBatches(config, store), CountFrom(0))


# ---------------------------------------------------------------- baseline


def build_model(config: RunConfig, device: torch.device) -> Transformer:
    """The run's model as training starts it, on its device."""
    model = Transformer(config.model)
    initialise(model, config.effective_weights_seed)
    model.configure(config.cluster)
    return model.to(device, torch.float64 if config.training.precision == "64-true" else torch.float32)


def head_losses(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, label_smoothing: float) -> TokenLosses:
    """Losses of all tokens from the hidden states, by the head that the model has."""
    return model.losses(hidden_BTD, targets_BT, label_smoothing).losses


class PlainLoop:
    """The baseline's step: the product's model, groups, clipping, optimizer, schedule and batches.

    Args:
        config: the run's; its micro-batches, groups and precision hold.
        store: the corpus.
        device: where to train.
        block_steps: optimizer steps in a block.
        model: another training's, so that memory holds one; a new one where it is None.
        optimizer: of that model.
    """

    def __init__(
        self,
        config: RunConfig,
        store: TokenStore,
        device: torch.device,
        block_steps: int,
        model: Transformer | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.config, self.device, self.end_of_text, self.block_steps = config, device, store.end_of_text_id, block_steps
        self.model = build_model(config, device) if model is None else model
        self.optimizer = build_optimizer(config.training, self.model) if optimizer is None else optimizer
        self.schedule = build_schedule(config.training, self.optimizer)
        self.loader = iter(training_loader(config, store))
        self.groups = config.micro_batch_sequences // config.gain_group_sequences
        self.limit = config.training.clip_norm or float("inf")

    def block(self) -> None:
        """Run the steps of a block."""
        for _ in range(self.block_steps):
            self.step()

    def step(self) -> None:
        for _ in range(self.config.accumulation):
            batch = next(self.loader)
            with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in self.config.training.precision):
                self.objective(batch).backward()
        self.clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def clip(self) -> Tensor:
        """Clip the gradients; their norm before."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)

    def objective(self, batch: Batch) -> Tensor:
        """This micro-batch's share of the step's objective."""
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS.to(self.device, non_blocking=True), self.end_of_text)
        out = self.model(inputs_BT, self.groups)
        losses = head_losses(self.model, out.hidden_BTD, targets_BT, self.config.training.label_smoothing)
        loss_GN, valid_GN = losses.smoothed_N.view(self.groups, -1), targets_BT.view(self.groups, -1) >= 0
        objective_G = group_objective(loss_GN, valid_GN) + self.config.model.aux_coef * out.aux_G
        return objective_G.sum() / batch.step_groups


# ---------------------------------------------------------------- both interventions


class NaiveLoop(PlainLoop):
    """Both interventions as a first version writes them: the formulas without the care, on the whole micro-batch.

    Every block's divergence and the gain's statistics are read on the host as they arise, the quantiles of the gain are
    computed at every step, and the scales are handed out by a loop over all parameters' names.
    """

    def __init__(self, config: RunConfig, *args: Any) -> None:
        eager = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, compile=False))
        super().__init__(eager, *args)
        if config.cluster.compile:
            logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it says where the graph breaks: that is meant
        # compiled as a whole, as its author would: the reads inside break the graph at every block
        self._losses = torch.compile(self._forward) if config.cluster.compile else self._forward
        self.divergences: list[float] = []
        self.read: dict[str, float] = {}

    def clip(self) -> Tensor:
        self._scale_gradients()
        norm = super().clip()
        self.read["norm"] = norm.item()
        return norm

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
