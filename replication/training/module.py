"""The LightningModule: forward, per-token loss, groups, objective; validation; what a step leaves to be measured.

Shapes: B sequences, T positions, S = T + 1 stored tokens, G gain groups of a micro-batch, N tokens of a group,
L blocks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torchmetrics import Metric

from replication.config import RunConfig, gain_contradictions
from replication.data.module import Batch
from replication.errors import UserError
from replication.model.foreign import Foreign, Model
from replication.model.head import HeadOutput
from replication.model.loss import IGNORE, EntropySums, histogram_entropy, inputs_and_targets
from replication.model.transformer import Transformer, initialise, unset_transformer
from replication.objectives.callbacks import Weigh
from replication.objectives.layer_gain import in_global_order
from replication.objectives.plugins import Context
from replication.objectives.token_gain import group_objective
from replication.training.optimizers import build_optimizer, build_schedule, learning_rate_factor
from replication.training.ranks import rank
from replication.training.strategies import is_zero

PER_SEQUENCE = "per_sequence"
"""Of a validation, among its scalars: each sequence's part of the loss, whose mean is val/loss_nats."""


class Observed(NamedTuple):
    """One micro-batch: the objective of each group, with gradients, and what is measured of it, without."""

    objective_G: Tensor
    loss_GN: Tensor
    plain_GN: Tensor
    valid_GN: Tensor
    aux_G: Tensor
    tokens_per_expert_LE: Tensor
    divergence_LG: Tensor
    entropies: EntropySums | None  # where a log line is due


class StepOutput(TypedDict):
    """Of one micro-batch: Lightning runs backward on the loss, and hands both to the callbacks."""

    loss: Tensor
    observed: Observed


class ValidationMetrics(Metric):
    """Validation means over all valid tokens of all ranks (sums and counts are added up before dividing)."""

    full_state_update = False
    tokens: Tensor
    smoothed: Tensor
    plain: Tensor
    predictive: Tensor
    predicted_V: Tensor
    sequences_Q: Tensor  # smoothed, summed over each of the Q sequences of the set

    def __init__(self, vocab_size: int, n_sequences: int) -> None:
        super().__init__()
        for name in ("tokens", "smoothed", "plain", "predictive"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name, size in (("predicted_V", vocab_size), ("sequences_Q", n_sequences)):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: HeadOutput, valid_BT: Tensor, places_B: Tensor) -> None:
        """`places_B`: of the sequences, in the set."""
        assert output.entropies is not None
        self.tokens += valid_BT.sum()
        self.smoothed += output.losses.smoothed_N.double().sum()
        self.plain += output.losses.plain_N.double().sum()
        self.predictive += output.entropies.predictive
        self.predicted_V += output.entropies.predicted_V
        of_sequence_B = output.losses.smoothed_N.double().view(valid_BT.shape).sum(1)
        self.sequences_Q[places_B] = of_sequence_B.to(self.sequences_Q)  # under ZeRO DeepSpeed makes the states fp32

    def compute(self) -> dict[str, Tensor]:
        return {
            "val/loss_nats": self.smoothed / self.tokens,
            "val/loss_unsmoothed_nats": self.plain / self.tokens,
            "val/entropy_predictive_nats": self.predictive / self.tokens,
            "val/entropy_predicted_tokens_nats": histogram_entropy(self.predicted_V),
            PER_SEQUENCE: self.sequences_Q * (len(self.sequences_Q) / self.tokens),
        }


class LanguageModel(LightningModule):
    """Trains the step's objective: the mean over gain groups of `mean(gain * l) + coef * aux`
    (replication/objectives/README.md, Several processes)."""

    def __init__(
        self,
        config: RunConfig,
        end_of_text: int,
        initial_weights: Mapping[str, Tensor] | None = None,
        unset: bool = False,
    ) -> None:
        """`end_of_text` is fed where a block is padded; `initial_weights`, by name, replace the seed's own; `unset`
        leaves the weights to a checkpoint."""
        super().__init__()
        self.config, self.end_of_text = config, end_of_text
        foreign = config.model.class_path is not None
        self._foreign = Foreign(config.model, config.effective_weights_seed) if foreign else None
        self.model: Any = self._foreign.net if self._foreign else unset_transformer(config.model)
        if initial_weights is not None:
            self.model.load_state_dict(initial_weights)
        elif not unset and isinstance(self.model, Transformer):
            initialise(self.model, config.effective_weights_seed)
        for problem in gain_contradictions(config.token_gain, config.layer_gain, len(self.block_parameters())):
            raise UserError(problem)
        if config.training.precision == "64-true":
            self.model.double()  # now, not in the strategy's setup: a checkpoint is loaded before that
        self.network.configure(config.cluster)
        if config.layer_gain.parts != "block":
            for block in self.model.blocks:
                block.by_parts = True
        self.validation = ValidationMetrics(config.model.vocab_size, config.validation.sequences)
        self.micro_batch_groups = config.micro_batch_sequences // config.gain_group_sequences
        self.weigh_tokens: Weigh | None = None
        self.asked: tuple[str, ...] = ()  # by the gain's function: of plugins.ASKED
        self.context = self._context(0, 0)
        self.measure_entropies = False  # set by the measuring callback when a log line is due
        self.at_boundary = False  # whether the current micro-batch is the last of its step
        self.grad_norm = torch.zeros(())  # of the latest update, over all parameters and ranks, before clipping
        self.skipped_steps = 0  # updates that ZeRO skipped since the start of training
        self.step_skipped = False  # whether it skipped the latest one
        self._divergences: list[Tensor] = []

    @property
    def network(self) -> Model:
        """What computes with the model's parameters: our model itself, or what makes another's look like it."""
        return self._foreign or self.model

    def on_train_start(self) -> None:
        if self._foreign is not None and self.trainer.global_step == 0:
            with self.trainer.precision_plugin.forward_context():
                self._foreign.try_out(self.config.data.block_size_tokens, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> StepOutput:
        """One micro-batch; its loss is scaled so that accumulation and rank averages give the step's objective."""
        self.context = self._context(self.trainer.global_step, batch_idx % self.config.accumulation)
        if batch_idx % self.config.accumulation == 0:
            self._divergences.clear()
        self.at_boundary = (batch_idx + 1) % self.config.accumulation == 0
        observed = self.objective(batch)
        self._divergences.append(observed.divergence_LG)
        # Lightning divides by the accumulation, and the strategy averages over ranks; the divisor is the step's groups
        share = self.config.accumulation * self.trainer.world_size / max(batch.step_groups, 1)
        detached = observed._replace(objective_G=observed.objective_G.detach())
        return {"loss": observed.objective_G.sum() * share, "observed": detached}

    def objective(self, batch: Batch) -> Observed:
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS, self.end_of_text)
        out = self.network(inputs_BT, self.micro_batch_groups)
        smoothing = self.config.training.label_smoothing
        losses, entropies = self.network.losses(out.hidden_BTD, targets_BT, smoothing, self.measure_entropies)
        loss_GN, plain_GN = (l.view(self.micro_batch_groups, -1) for l in losses)  # noqa: E741
        valid_GN = targets_BT.view(self.micro_batch_groups, -1) != IGNORE
        if self.asked:
            self.context = replace(self.context, asked=self._asked(inputs_BT, targets_BT, out.hidden_BTD))
        gain_GN = self.weigh_tokens(loss_GN, plain_GN.detach(), valid_GN) if self.weigh_tokens else None
        objective_G = group_objective(loss_GN, valid_GN, gain_GN)
        if self.network.aux_coef is not None:
            # a group without a valid token contributes nothing, its load-balancing loss included
            objective_G = objective_G + self.network.aux_coef * out.aux_G * valid_GN.any(1)
        return Observed(
            objective_G=objective_G,
            loss_GN=loss_GN.detach(),
            plain_GN=plain_GN.detach(),
            valid_GN=valid_GN,
            aux_G=out.aux_G.detach(),
            tokens_per_expert_LE=out.tokens_per_expert_LE.detach(),
            divergence_LG=out.divergence_LG,
            entropies=entropies,
        )

    def _asked(self, inputs_BT: Tensor, targets_BT: Tensor, hidden_BTD: Tensor) -> dict[str, Tensor]:
        groups = self.micro_batch_groups
        found = {name: t.unflatten(0, (groups, -1)) for name, t in (("inputs", inputs_BT), ("targets", targets_BT))}
        if "entropy" in self.asked:
            found["entropy"] = self.network.entropies(hidden_BTD).view(groups, -1)
        return {name: found[name] for name in self.asked}

    def _context(self, step: int, micro_batch: int) -> Context:
        """Of a micro-batch on this rank; slices of the global batch go to (micro-batch, rank) in order."""
        t, slices = self.config.training, micro_batch * self.config.world_size + rank()
        fraction = learning_rate_factor(t, step)
        return Context(self.config.seed, step, t.steps, fraction, slices * self.micro_batch_groups)

    def block_parameters(self) -> list[list[Parameter]]:
        return self.network.block_parameters()

    def part_parameters(self) -> list[list[Parameter]]:
        return cast(list[list[Parameter]], self.model.part_parameters())

    def latest_divergence_LG(self) -> Tensor:
        return self._divergences[-1]

    def step_divergence_LS(self) -> Tensor:
        """Divergences of the groups of this step so far [L, groups], in global order, from every rank."""
        return in_global_order(self._divergences)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by global norm, after the layer scale, and keep the norm before clipping on the device.

        DeepSpeed clips in its own step, by the same formula; the norm is read from it afterwards.
        """
        if is_zero(self.config):
            return
        limit = self.config.training.clip_norm or float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS, self.end_of_text)
        hidden_BTD = self.network(inputs_BT).hidden_BTD
        output = self.network.losses(hidden_BTD, targets_BT, self.config.training.label_smoothing, entropies=True)
        rows_B = torch.arange(len(targets_BT), device=targets_BT.device) + batch_idx * self.config.micro_batch_sequences
        self.validation.update(output, targets_BT != IGNORE, rows_B * self.config.world_size + rank())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.config.training, self.model)
        schedule = build_schedule(self.config.training, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
