"""A progress bar on a terminal, a line now and then elsewhere, and the marks that a drill aims by.

Reads nothing from the device.
"""

from __future__ import annotations

import time

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from torch.optim import Optimizer

from replication.config import RunConfig
from replication.console import LINE_SECONDS, progress
from replication.data.module import Batch
from replication.training.phases import enter


class Progress(Callback):
    """The cell, its step, and the time left."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.bar = progress(console, "bar", "step {task.completed:.0f}/{task.total:.0f}", "left")
        self._last_line = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps, done = self.config.training.steps, trainer.global_step
        name = f"{self.config.arm}/seed-{self.config.seed}"
        if trainer.is_global_zero and self.console.is_terminal:
            self.bar.add_task(name, total=steps, completed=done)
            self.bar.start()
        elif trainer.is_global_zero:
            self.console.print(f"{name}: training from step {done} to {steps}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if self.bar.task_ids:
            self.bar.update(self.bar.task_ids[0], completed=trainer.global_step)
        elif trainer.is_global_zero and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"step {trainer.global_step}/{self.config.training.steps}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.stop()


class PhaseMarks(Callback):
    """Writes on the phase board what this rank does; first of the callbacks, and only in a run that a drill started."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        micro_batch = batch_idx % self.config.accumulation
        enter("accumulate" if micro_batch else "forward", trainer.global_step, micro_batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if pl_module.at_boundary:
            enter("update", trainer.global_step, self.config.accumulation - 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        enter("validate", trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        enter("end", trainer.global_step)
