"""The always-on callback that measures and logs; it never acts. Same tags in every arm.

Between log lines everything stays on the device; a log line, a checkpoint and a validation are the only moments at
which the host reads. On the device each step leaves one loss and one gradient norm, and the token bytes that were fed.
"""

from __future__ import annotations

import hashlib
import math
import time
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from replication.config import RunConfig
from replication.data.module import Batch
from replication.errors import Diverged
from replication.model.loss import histogram_entropy
from replication.objectives.layer_gain import included_blocks, layer_scales, step_divergence
from replication.objectives.token_gain import gain_sums, masked_mean, token_gain
from replication.runs.files import damage
from replication.runs.journal import Journal, Line, read_journal
from replication.runs.layout import RunDir
from replication.training.module import LanguageModel, Observed
from replication.training.ranks import gather, is_first, world_size


def chain_data(previous: str, fed: list[Tensor]) -> str:
    """The next link of the data hash chain: SHA-256(previous digest || int32 token bytes of one step, global order).

    Args:
        previous: hex digest; "" before the first step.
        fed: the step's int32 blocks [B, block_size_tokens + 1] in global order, however they were cut.
    """
    digest = hashlib.sha256(bytes.fromhex(previous))
    for tokens_BS in fed:
        digest.update(tokens_BS.to("cpu", torch.int32).contiguous().numpy().tobytes())
    return digest.hexdigest()


class Measure(Callback):
    """Writes metrics.jsonl and TensorBoard; keeps the data hash chain; stops a run whose loss is not finite."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        self.config, self.run = config, run
        self.journal: Journal | None = None
        self.chain = ""
        self.wall_seconds = 0.0
        self.tokens = 0
        self._losses: list[float] = []  # one a step since the last line, read
        self._norms: list[float] = []
        self._unread: list[Tensor] = []  # [this rank's loss sum, its groups, gradient norm] of each later step
        self._fed: list[list[Tensor]] = []  # one list a step since the chain was last brought up to date
        self._due = False
        self._sums: dict[str, Tensor] = {}
        self._nonfinite: Tensor = torch.zeros((), dtype=torch.bool)
        self._new_tokens: Tensor = torch.zeros((), dtype=torch.int64)
        self._line_tokens = 0
        self._line_seconds = 0.0

    # ------------------------------------------------------------ life of a run

    def state_dict(self) -> dict[str, Any]:
        self._read_device()
        self._read_steps()
        return {
            "chain": self.chain,
            "tokens": self.tokens,
            "wall_seconds": self.elapsed(),
            "line": (self._line_tokens, self._line_seconds),
            "losses": self._losses,
            "norms": self._norms,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.chain, self.tokens = state_dict["chain"], state_dict["tokens"]
        self.wall_seconds = state_dict["wall_seconds"]
        self._line_tokens, self._line_seconds = state_dict["line"]
        self._losses, self._norms = list(state_dict["losses"]), list(state_dict["norms"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        if is_first():
            self.journal = Journal(self.run.metrics, resume_step=trainer.global_step)
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._new_tokens = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        n_blocks = self.config.model.n_blocks
        self._included_L = included_blocks(self.config.layer_gain, n_blocks).to(pl_module.device)
        if trainer.logger is not None:
            trainer.logger.experiment.add_custom_scalars(tensorboard_layout(n_blocks))  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step % self.config.validation.every_steps:
            trainer.validating = True  # what the training loop itself does around a validation
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        if trainer.logger is not None and is_first() and (drawn := divergence_figure(self.run)):
            trainer.logger.experiment.add_figure("divergence/blocks_over_steps", *drawn)  # type: ignore[attr-defined]
        self._read_device()
        self.check_finite(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.journal is not None:
            self.journal.close()

    @property
    def unlogged_steps(self) -> int:
        """Steps that were read, whose losses the next line will have; their losses are part of a checkpoint."""
        return len(self._losses)

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.wall_seconds + (time.monotonic() - self._started)

    # ------------------------------------------------------------ one step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.config.accumulation == 0:
            step = trainer.global_step + 1
            every = self.config.logging.log_every_steps
            self._due = step % every == 0 or step == self.config.training.steps
            self._sums = {}
            self._fed.append([])
        cast(LanguageModel, pl_module).measure_entropies = self._due

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._fed[-1].append(batch.tokens_BS)
        self._add_up(outputs["observed"])
        if (batch_idx + 1) % self.config.accumulation == 0:
            loss, norm = self._sums["loss"], cast(LanguageModel, pl_module).grad_norm
            self._unread.append(torch.stack([loss, self._sums["groups"].to(loss.dtype), norm.to(loss.dtype)]))
            # the sum, not the mean: a step without any valid token has no loss, and that is not a failure
            skipped = cast(LanguageModel, pl_module).step_skipped  # its norm is infinite by intent, and it is bounded
            self._nonfinite |= ~(loss if skipped else loss + norm).isfinite()
            if self._due:
                self._write_line(trainer, cast(LanguageModel, pl_module))

    @torch.no_grad()
    def _add_up(self, o: Observed) -> None:
        """Add one micro-batch to the step's sums; on the device, few kernels unless a line is due."""
        has_valid_G = o.valid_GN.any(1)
        self._new_tokens += o.valid_GN.sum()
        sums = {"loss": masked_mean(o.loss_GN, o.valid_GN).sum(), "groups": has_valid_G.sum()}
        if self._due:
            assert o.entropies is not None
            gains = token_gain(self.config.token_gain, o.loss_GN, o.plain_GN, o.valid_GN)
            sums |= {f"gain_{k}": v for k, v in gain_sums(gains, o.valid_GN)._asdict().items()}
            sums |= {
                "plain": masked_mean(o.plain_GN, o.valid_GN).sum(),
                "aux": (o.aux_G * has_valid_G).sum(),
                "objective": o.objective_G.sum(),
                "tokens_per_expert_LE": o.tokens_per_expert_LE,
                **o.entropies._asdict(),
            }
        extremes = {"gain_lowest": torch.minimum, "gain_highest": torch.maximum}
        for key, value in sums.items():
            add = extremes.get(key, torch.add)
            self._sums[key] = add(self._sums[key], value) if key in self._sums else value

    # ------------------------------------------------------------ reading the device

    def _write_line(self, trainer: Trainer, module: LanguageModel) -> None:
        self._sums = sum_of_all_ranks(self._sums)
        divergence_L = step_divergence(self.config.layer_gain, module.step_divergence_LS())
        scale_L = layer_scales(self.config.layer_gain, divergence_L, self._included_L)
        scalars = self._scalars() | {"train/grad_norm": module.grad_norm}
        for name, values in (("divergence", divergence_L), ("scale", scale_L)):
            scalars |= {f"{name}/block_{i:02d}": value for i, value in enumerate(values)}
        names = list(scalars)
        host = torch.stack([scalars[n].double() for n in names]).tolist()  # the one read of this line
        self._read_device()
        self._read_steps()
        step, now = trainer.global_step, self.elapsed()
        line: dict[str, Any] = {
            "tokens": self.tokens,
            "wall_seconds": round(now, 4),
            "data_hash": self.chain,
            "train/learning_rate": self._learning_rate,
            "train/skipped_steps": module.skipped_steps,
            "train/tokens_per_second": (self.tokens - self._line_tokens) / max(now - self._line_seconds, 1e-9),
            **dict(zip(names, host, strict=True)),
        }
        self._line_tokens, self._line_seconds = self.tokens, now
        per_step = {"train/loss_nats": self._losses, "train/grad_norm": self._norms}
        self._losses, self._norms = [], []
        if self.journal is not None:
            self.journal.append(Line(step, line, per_step))
        if trainer.logger is not None:
            trainer.logger.log_metrics({k: v for k, v in line.items() if "/" in k}, step)
        self.check_finite(step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]  # the rate of this step; the schedule moves on after it

    def _scalars(self) -> dict[str, Tensor]:
        """The step's scalars under their tags, as device tensors."""
        s = self._sums
        n, tokens = s["groups"], s["gain_tokens"]
        mean = s["gain_after"] / tokens
        scalars = {
            "train/loss_nats": s["loss"] / n,
            "train/loss_unsmoothed_nats": s["plain"] / n,
            "train/objective": s["objective"] / n,
            "train/aux_loss": s["aux"] / n,
            "gain/mean_before_clamp": s["gain_before"] / tokens,
            "gain/mean": mean,
            "gain/std": (s["gain_after_squared"] / tokens - mean.square()).clamp(min=0).sqrt(),
            "gain/min": s["gain_lowest"],
            "gain/max": s["gain_highest"],
            "gain/share_at_min": s["gain_at_min"] / tokens,
            "gain/share_at_max": s["gain_at_max"] / tokens,
            "entropy/predictive_nats": s["predictive"] / tokens,
            "entropy/predicted_tokens_nats": histogram_entropy(s["predicted_V"]),
        }
        shares_LE = s["tokens_per_expert_LE"] / s["tokens_per_expert_LE"].sum(1, keepdim=True).clamp(min=1)
        for i, shares_E in enumerate(shares_LE):
            scalars |= {f"experts/block_{i:02d}_expert_{e}": share for e, share in enumerate(shares_E)}
        return scalars

    def _read_device(self) -> None:
        """Bring the chain and the token count up to date with every finished step, over all ranks."""
        accumulation = self.config.accumulation
        finished = [torch.stack(fed).int() for fed in self._fed if len(fed) == accumulation]
        self._fed = [fed for fed in self._fed if len(fed) < accumulation]
        if finished:
            everyone_RKMBS = gather(torch.stack(finished))  # rank, step, micro-batch, sequence, token
            for step_MRBS in everyone_RKMBS.permute(1, 2, 0, 3, 4):  # slices in (micro-batch, rank) order
                self.chain = chain_data(self.chain, [step_MRBS.flatten(0, 2)])
        self.tokens += int(gather(self._new_tokens).sum())
        self._new_tokens.zero_()

    def _read_steps(self) -> None:
        """Read the loss and gradient norm of every step since the last reading, the loss over all ranks."""
        if self._unread:
            everyone_RK3 = gather(torch.stack(self._unread))
            loss_K, groups_K, _ = everyone_RK3.sum(0).unbind(1)
            self._losses += (loss_K / groups_K).tolist()
            self._norms += everyone_RK3[0, :, 2].tolist()
            self._unread = []

    def check_finite(self, step: int) -> None:
        """Read the flag of non-finite losses and gradient norms; called at log lines and before each checkpoint.

        Raises:
            Diverged: one was seen; names the last good checkpoint.
        """
        if bool(gather(self._nonfinite).any()):
            good = [folder for folder in self.run.checkpoint_folders() if damage(folder) is None]
            last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise Diverged(
                f"training: the loss or gradient norm was not finite at or before step {step}; {last}; "
                "lower training.learning_rate or training.clip_norm"
            )

    # ------------------------------------------------------------ validation

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation = cast(LanguageModel, pl_module).validation
        metrics = {k: float(v) for k, v in validation.compute().items()}  # over all ranks
        validation.reset()
        if self.journal is not None:
            self.journal.append(Line(trainer.global_step, metrics))
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, trainer.global_step)


def sum_of_all_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up every rank's sums (gain_lowest and gain_highest: their extremes) with one all-gather."""
    if world_size() == 1:
        return sums
    dtype = sums["loss"].dtype
    everyone_RF = gather(torch.cat([value.reshape(-1).to(dtype) for value in sums.values()]))
    total, start = {}, 0
    for key, value in sums.items():
        part_RF = everyone_RF[:, start : start + value.numel()]
        start += value.numel()
        extreme = {"gain_lowest": part_RF.amin(0), "gain_highest": part_RF.amax(0)}
        total[key] = extreme.get(key, part_RF.sum(0)).view(value.shape)
    return total


def tensorboard_layout(n_blocks: int) -> dict[str, dict[str, list[Any]]]:
    """The custom-scalars page: the questions of the experiment first."""
    chosen = sorted({0, min(2, n_blocks - 1), n_blocks - 1})
    return {
        "Is the loss a tie?": {
            "validation loss, nats": ["Multiline", ["val/loss_nats", "val/loss_unsmoothed_nats"]],
            "training loss and objective": ["Multiline", ["train/loss_nats", "train/objective"]],
        },
        "What changed?": {
            "token entropies, nats": ["Multiline", ["entropy/.*"]],
            "gradient norm": ["Multiline", ["train/grad_norm"]],
            "gain": ["Multiline", ["gain/mean", "gain/mean_before_clamp", "gain/std"]],
            "clamped shares": ["Multiline", ["gain/share_at_min", "gain/share_at_max"]],
        },
        "Blocks": {
            "divergence": ["Multiline", [f"divergence/block_{i:02d}" for i in chosen]],
            "scale": ["Multiline", [f"scale/block_{i:02d}" for i in chosen]],
        },
    }


def divergence_figure(run: RunDir) -> tuple[Figure, int] | None:
    """Divergence over blocks and steps, from the journal; and the last step it shows; None where it has no line."""
    by_step = {line.step: line for line in read_journal(run.metrics) if "divergence/block_00" in line.values}
    if not by_step:
        return None
    steps, lines = zip(*sorted(by_step.items()), strict=True)
    tags = sorted(k for k in lines[-1].values if k.startswith("divergence/"))
    values = np.array([[math.nan if (v := line.number(t)) is None else v for line in lines] for t in tags])
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    image = axes.pcolormesh(steps, range(len(tags)), values, shading="nearest")
    axes.set(xlabel="step", ylabel="block", title="divergence ||y - x|| / ||x||", yticks=range(len(tags)))
    figure.colorbar(image)
    return figure, steps[-1]
