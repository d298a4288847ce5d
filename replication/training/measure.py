"""The always-on callback that measures and logs; it never acts. Same tags in every arm.

Between log lines everything stays on the device; a log line, a checkpoint and a validation are the only moments at
which the host reads. On the device each step leaves one loss and one gradient norm, and the token bytes that were fed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from replication.config import RunConfig
from replication.data.module import Batch
from replication.errors import Diverged
from replication.model.loss import histogram_entropy
from replication.objectives.layer_gain import included_blocks, layer_scales, step_divergence
from replication.objectives.plugins import NO_FUNCTIONS, Context, Functions
from replication.objectives.token_gain import GainSums, gain_scalars, gain_sums, masked_mean, token_gain
from replication.runs.files import damage
from replication.runs.journal import Journal, Line, read_journal
from replication.runs.layout import RunDir
from replication.training.module import PER_SEQUENCE, LanguageModel, Observed
from replication.training.ranks import gather, is_first, world_size

SEQUENCE_DIGITS = 5
"""Of the loss of a validation sequence in the journal: a thousandth of what sequences differ by."""
DIVERGENCE_SHOWN = 0.03, 30.0
"""The ends of every heat map's colours, so that arms compare; tiny and published models stay within but for a while."""


def chain_data(previous: str, fed: list[Tensor]) -> str:
    """The next link of the data hash chain: SHA-256(previous digest || int32 token bytes of one step, global order).

    `previous` is "" before the first step; `fed` are the step's blocks [B, S] in global order, however they were cut.
    """
    digest = hashlib.sha256(bytes.fromhex(previous))
    for tokens_BS in fed:
        digest.update(tokens_BS.to("cpu", torch.int32).contiguous().numpy().tobytes())
    return digest.hexdigest()


class Measure(Callback):
    """Writes metrics.jsonl and TensorBoard; keeps the data hash chain; stops a run whose loss is not finite."""

    def __init__(self, config: RunConfig, run: RunDir, functions: Functions = NO_FUNCTIONS) -> None:
        """`functions` are the plugins' that `config` names."""
        self.config, self.run, self.functions = config, run, functions
        self.journal: Journal | None = None
        self.finish_checkpoint: Callable[[], None] = lambda: None  # set by Checkpoints: waits for what is being written
        self.chain, self.tokens, self.wall_seconds = "", 0, 0.0
        self._line = (0, 0.0)  # tokens and seconds at the last line
        self.losses: list[float] = []  # of the steps read since the last line, for the next one; a checkpoint has them
        self._norms: list[float] = []
        self._unread: list[Tensor] = []  # [this rank's loss sum, its groups, gradient norm] of each later step
        self._fed: list[list[Tensor]] = []  # one list a step since the chain was last brought up to date
        self._due = False
        self._sums: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, object]:
        self._read()
        return {
            "chain": self.chain,
            "tokens": self.tokens,
            "wall_seconds": self.elapsed(),
            "line": self._line,
            "losses": self.losses,
            "norms": self._norms,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.chain, self.tokens = state_dict["chain"], state_dict["tokens"]
        self.wall_seconds, self._line = state_dict["wall_seconds"], state_dict["line"]
        self.losses, self._norms = list(state_dict["losses"]), list(state_dict["norms"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        if is_first():
            self.journal = Journal(self.run.metrics, resume_step=trainer.global_step)
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._new_tokens = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        n_blocks = len(cast(LanguageModel, pl_module).block_parameters())
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

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.journal is not None:
            self.journal.close()

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.wall_seconds + (time.monotonic() - self._started)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.config.accumulation == 0:
            step = trainer.global_step + 1
            self._due = step % self.config.logging.log_every_steps == 0 or step == self.config.training.steps
            self._sums = {}
            self._fed.append([])
        cast(LanguageModel, pl_module).measure_entropies = self._due

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]  # the rate of this step; the schedule moves on after it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        module = cast(LanguageModel, pl_module)
        self._fed[-1].append(batch.tokens_BS)
        self._add_up(outputs["observed"], module.context)
        if module.at_boundary:
            loss, norm = self._sums["loss"], module.grad_norm
            self._unread.append(torch.stack([loss, self._sums["groups"].to(loss.dtype), norm.to(loss.dtype)]))
            # the sum, not the mean: a step without any valid token has no loss, and that is not a failure;
            # the norm of a skipped step is infinite by intent, and how many may be skipped is bounded
            self._nonfinite |= ~(loss if module.step_skipped else loss + norm).isfinite()
            if self._due:
                self._write_line(trainer, module)

    @torch.no_grad()
    def _add_up(self, o: Observed, context: Context) -> None:
        """Add one micro-batch to the step's sums; on the device, few kernels unless a line is due."""
        has_valid_G = o.valid_GN.any(1)
        self._new_tokens += o.valid_GN.sum()
        sums = {"loss": masked_mean(o.loss_GN, o.valid_GN).sum(), "groups": has_valid_G.sum()}
        if self._due:
            assert o.entropies is not None
            losses = o.loss_GN, o.plain_GN, o.valid_GN
            gains = token_gain(self.config.token_gain, *losses, self.functions.gain, context)
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

    def _write_line(self, trainer: Trainer, module: LanguageModel) -> None:
        self._sums = sum_of_all_ranks(self._sums)
        measured = step_divergence(self.config.layer_gain, module.step_divergence_LS())
        divergence_L, of_parts = measured.tensor_split([len(self._included_L)])
        of_step = self.functions.scale, replace(module.context, group=0)
        scale_L = layer_scales(self.config.layer_gain, divergence_L, self._included_L, *of_step)
        scalars = self._scalars() | {"train/grad_norm": module.grad_norm}
        for name, values in (("divergence", divergence_L), ("scale", scale_L)):
            scalars |= {f"{name}/block_{i:02d}": value for i, value in enumerate(values)}
        if len(of_parts):
            scale_L = layer_scales(self.config.layer_gain, of_parts, self._included_L.repeat(2))
            for name, values in (("part_divergence", of_parts), ("part_scale", scale_L)):
                for part, own in zip(("attention", "feed_forward"), values.chunk(2), strict=True):
                    scalars |= {f"{name}/{part}_{i:02d}": value for i, value in enumerate(own)}
        host = torch.stack([value.double() for value in scalars.values()]).tolist()  # the one read of this line
        self._read()
        step, now = trainer.global_step, self.elapsed()
        tokens_before, before = self._line
        tags = {
            "train/learning_rate": self._learning_rate,
            "train/skipped_steps": module.skipped_steps,
            "train/tokens_per_second": (self.tokens - tokens_before) / max(now - before, 1e-9),
            **dict(zip(scalars, host, strict=True)),
        }
        if self.journal is not None:
            counts = {"tokens": self.tokens, "wall_seconds": round(now, 4), "data_hash": self.chain}
            per_step = {"train/loss_nats": self.losses, "train/grad_norm": self._norms}
            self.journal.append(Line(step, counts | tags, per_step))
        if trainer.logger is not None:
            trainer.logger.log_metrics(tags, step)
        self._line, self.losses, self._norms = (self.tokens, now), [], []
        self.check_finite(step)

    def _scalars(self) -> dict[str, Tensor]:
        """The step's scalars under their tags, as device tensors."""
        s = self._sums
        n, gains = s["groups"], GainSums(*(s[f"gain_{name}"] for name in GainSums._fields))
        scalars = {
            "train/loss_nats": s["loss"] / n,
            "train/loss_unsmoothed_nats": s["plain"] / n,
            "train/objective": s["objective"] / n,
            "train/aux_loss": s["aux"] / n,
            **gain_scalars(gains),
            "entropy/predictive_nats": s["predictive"] / gains.tokens,
            "entropy/predicted_tokens_nats": histogram_entropy(s["predicted_V"]),
        }
        shares_LE = s["tokens_per_expert_LE"] / s["tokens_per_expert_LE"].sum(1, keepdim=True).clamp(min=1)
        for i, shares_E in enumerate(shares_LE):
            scalars |= {f"experts/block_{i:02d}_expert_{e}": share for e, share in enumerate(shares_E)}
        return scalars

    def _read(self) -> None:
        """Bring chain, token count, losses and norms up to date with every finished step, over all ranks."""
        accumulation = self.config.accumulation
        finished = [torch.stack(fed).int() for fed in self._fed if len(fed) == accumulation]
        self._fed = [fed for fed in self._fed if len(fed) < accumulation]
        if finished:
            everyone_RKMBS = gather(torch.stack(finished))  # rank, step, micro-batch, sequence, token
            for step_MRBS in everyone_RKMBS.permute(1, 2, 0, 3, 4):  # slices in (micro-batch, rank) order
                self.chain = chain_data(self.chain, [step_MRBS.flatten(0, 2)])
        self.tokens += int(gather(self._new_tokens).sum())
        self._new_tokens.zero_()
        if self._unread:
            everyone_RK3 = gather(torch.stack(self._unread))
            loss_K, groups_K, _ = everyone_RK3.sum(0).unbind(1)
            self.losses += (loss_K / groups_K).tolist()
            self._norms += everyone_RK3[0, :, 2].tolist()
            self._unread = []

    def check_finite(self, step: int) -> None:
        """Raise Diverged where a loss or gradient norm was not finite; called at log lines and before a checkpoint."""
        if bool(gather(self._nonfinite).any()):
            with suppress(Exception):  # a failure to write is not what ends this run
                self.finish_checkpoint()
            good = [folder for folder in self.run.checkpoint_folders() if damage(folder) is None]
            last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise Diverged(
                f"training: the loss or gradient norm was not finite at or before step {step}; {last}; "
                "lower training.learning_rate or training.clip_norm"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation = cast(LanguageModel, pl_module).validation
        found = validation.compute()  # over all ranks
        per_sequence = [round(loss, SEQUENCE_DIGITS) for loss in found.pop(PER_SEQUENCE).tolist()]
        metrics = {k: float(v) for k, v in found.items()}
        validation.reset()
        if self.journal is not None:
            self.journal.append(Line(trainer.global_step, metrics, per_sequence=per_sequence))
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, trainer.global_step)


def sum_of_all_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up every rank's sums (gain_lowest and gain_highest: their extremes) with one all-gather."""
    if world_size() == 1:
        return sums
    dtype = sums["loss"].dtype
    everyone_RF = gather(torch.cat([value.reshape(-1).to(dtype) for value in sums.values()]))
    parts = everyone_RF.split([value.numel() for value in sums.values()], dim=1)
    extremes = {"gain_lowest": torch.amin, "gain_highest": torch.amax}
    return {
        key: extremes.get(key, torch.sum)(part_RF, 0).view(value.shape)
        for (key, value), part_RF in zip(sums.items(), parts, strict=True)
    }


def tensorboard_layout(n_blocks: int) -> dict[str, dict[str, list[Any]]]:
    """The custom-scalars page: the questions of the experiment first."""
    chosen = sorted({0, min(2, n_blocks - 1), n_blocks - 1})
    pages = {
        "Is the loss a tie?": {
            "validation loss, nats": ["val/loss_nats", "val/loss_unsmoothed_nats"],
            "training loss and objective": ["train/loss_nats", "train/objective"],
        },
        "What changed?": {
            "token entropies, nats": ["entropy/.*"],
            "gradient norm": ["train/grad_norm"],
            "gain": ["gain/mean", "gain/mean_before_clamp", "gain/std"],
            "clamped shares": ["gain/share_at_min", "gain/share_at_max"],
        },
        "Blocks": {name: [f"{name}/block_{i:02d}" for i in chosen] for name in ("divergence", "scale")},
    }
    return {page: {chart: ["Multiline", tags] for chart, tags in charts.items()} for page, charts in pages.items()}


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
    image = axes.pcolormesh(steps, range(len(tags)), values, cmap="cividis", norm=LogNorm(*DIVERGENCE_SHOWN))
    axes.invert_yaxis()
    axes.set(xlabel="step", ylabel="block", title="divergence ||y - x|| / ||x||", yticks=range(len(tags)))
    figure.colorbar(image, extend="both")
    return figure, steps[-1]
