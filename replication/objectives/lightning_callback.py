"""Gains in anyone's LightningModule: `from replication import GainsCallback`."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from replication.objectives.library import Gains


class GainsCallback(Callback):
    """Scales the gradients of each step before Lightning clips them, and logs `gains.metrics()` where a line is due.

    The module's `training_step` returns `gains.loss(logits, labels)`; Lightning divides it by the accumulation. Under
    manual optimization there is no such moment: call `gains.scale()` before clipping, without this callback.
    """

    def __init__(self, gains: Gains) -> None:
        self.gains = gains

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.gains.scale()
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # Lightning sets it
            pl_module.log_dict(self.gains.metrics())
