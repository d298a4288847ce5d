"""The baseline's step in nothing but torch: the same model, groups, clipping, optimizer, schedule and batches."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from replication.bench.synthetic import SyntheticStore
from replication.config import RunConfig
from replication.data.module import Batch, CountFrom, TrainingBatches, batch_loader
from replication.data.store import TokenStore
from replication.model.loss import TokenLosses
from replication.model.transformer import Transformer, initialise
from replication.objectives.token_gain import group_objective
from replication.training.module import inputs_and_targets
from replication.training.optimizers import build_optimizer, build_schedule

HEAD = "losses"
"""Method of the model that a breakdown calls the head."""


def build_model(config: RunConfig, device: torch.device) -> Transformer:
    """The run's model as training starts it, on its device."""
    model = Transformer(config.model)
    initialise(model, config.effective_weights_seed)
    model.arrange(config.cluster)
    return model.to(device, torch.float64 if config.training.precision == "64-true" else torch.float32)


def head_losses(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, label_smoothing: float) -> TokenLosses:
    """Losses of all tokens from the hidden states, by the head that the model has."""
    return model.losses(hidden_BTD, targets_BT, label_smoothing).losses


def training_loader(config: RunConfig, store: SyntheticStore) -> DataLoader:
    """The product's micro-batches from the first on, loaded as the product loads them."""
    return batch_loader(config, TrainingBatches(config, cast(TokenStore, store)), CountFrom(0))


class PlainLoop:
    """What a person would write by hand.

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
        store: SyntheticStore,
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
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def objective(self, batch: Batch) -> Tensor:
        """This micro-batch's share of the step's objective."""
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS.to(self.device, non_blocking=True), self.end_of_text)
        out = self.model(inputs_BT, self.groups)
        losses = head_losses(self.model, out.hidden_BTD, targets_BT, self.config.training.label_smoothing)
        loss_GN, valid_GN = losses.smoothed_N.view(self.groups, -1), targets_BT.view(self.groups, -1) >= 0
        objective_G = group_objective(loss_GN, valid_GN) + self.config.model.aux_coef * out.aux_G
        return objective_G.sum() / batch.step_groups
