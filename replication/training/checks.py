"""Checks that turn silent failures into messages: before the first step, and at every optimizer boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from replication.config import RunConfig
from replication.data.module import Batch
from replication.errors import Diverged, UserError
from replication.runs.layout import RunDir, cells_in
from replication.runs.manifest import find_manifest, update_manifest
from replication.training.module import LanguageModel
from replication.training.preflight import preflight
from replication.training.strategies import ZeroStrategy


class Checks(Callback):
    """First of the callbacks: what it sees of a step holds for all that follow."""

    def __init__(self, config: RunConfig, run: RunDir, identity: dict[str, str]) -> None:
        """The cell's manifest gets what the preflight found, and what DeepSpeed made of its config.

        `identity` is what must agree between ranks, by name: hashes of config, data and weights at start, checkpoint.
        """
        self.config, self.run, self.identity = config, run, identity

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._note("preflight", preflight(self.config, self.run, self.identity), trainer)
        if trainer.is_global_zero:
            self.run.start.unlink(missing_ok=True)  # every rank has read it by now, and the next start must not

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            self._note("deepspeed", trainer.strategy.resolved_config, trainer)

    def _note(self, key: str, value: Mapping[str, Any], trainer: Trainer) -> None:
        if trainer.is_global_zero:
            update_manifest(self.run, **{key: value})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):  # a resumed engine remembers what it skipped
            cast(LanguageModel, pl_module).skipped_steps = trainer.strategy.deepspeed_engine.skipped_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """At a boundary: the step counts agree, and what DeepSpeed knows of the update reaches the module."""
        module = cast(LanguageModel, pl_module)
        if not module.at_boundary:
            return
        counts = {"Lightning": trainer.global_step, "the data": (batch_idx + 1) // self.config.accumulation}
        if isinstance(trainer.strategy, ZeroStrategy):
            engine = trainer.strategy.deepspeed_engine
            counts["DeepSpeed"] = engine.global_steps
            module.grad_norm = torch.as_tensor(engine.get_global_grad_norm(), device=module.device)
            module.step_skipped = engine.skipped_steps > module.skipped_steps
            module.skipped_steps = engine.skipped_steps
            self._check_skipped(module.skipped_steps, trainer.global_step)
        if len(set(counts.values())) > 1:
            raise UserError(
                f"training: the step counts differ ({counts}), so updates were lost or repeated; "
                "remove the newest checkpoint and run again"
            )

    def _check_skipped(self, skipped: int, step: int) -> None:
        limit = self.config.training.max_skipped_steps
        if skipped > limit:
            raise Diverged(
                f"training.max_skipped_steps: DeepSpeed has skipped {skipped} updates up to step {step} because a "
                f"gradient was not finite, {limit} are allowed; lower training.learning_rate, or allow more"
            )


def check_neighbours(config: RunConfig, run: RunDir, initial_weights: str) -> None:
    """Raise UserError where another arm of the same seed started elsewhere, or another seed at the same place."""
    for _, _, neighbour in cells_in(run.root.parent.parent):
        other = find_manifest(neighbour)  # a neighbour's damage is the certificate's to name
        if neighbour.root == run.root or other is None or other.weights_seed is None:
            continue
        same_seed = other.weights_seed == config.effective_weights_seed
        same_start = other.initial_weights_sha256 == initial_weights
        if same_seed and not same_start:
            raise UserError(
                f"{neighbour.root}: started from other weights at the same seed {config.effective_weights_seed}; "
                "arms can be compared only from the same start: choose another --out, or remove that cell"
            )
        if same_start and not same_seed and config.training.initial_weights is None:
            raise UserError(
                f"{neighbour.root}: started from the same weights at another seed ({other.weights_seed}, this cell has "
                f"{config.effective_weights_seed}); seeds would not be independent: remove that cell, or this one"
            )
