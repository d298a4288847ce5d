"""`replicate bench step`: a step of the product beside the same step in a plain torch loop, interleaved in one run.

The training that is timed is the real one: Lightning, every callback, the journal and TensorBoard on their schedule.
A callback stops it after every block of steps and runs a block of the plain loop, so that both see the same machine at
the same time; each block is compared with the mean of the plain blocks before and after it.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import quantile_test
from torch.utils.data import DataLoader

from replication.bench.synthetic import SyntheticStore
from replication.config import RunConfig, SourceConfig
from replication.data.module import Batch, CountFrom, TokenDataModule, TrainingBatches
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.model.transformer import Transformer, initialise
from replication.objectives.token_gain import group_objective
from replication.rundir import RunDir
from replication.training.environment import prepare_torch
from replication.training.module import LanguageModel, inputs_and_targets
from replication.training.optimizers import build_optimizer, build_schedule
from replication.training.train import build_trainer


@dataclass(frozen=True)
class StepBench:
    """Seconds of each block, in the order in which they ran: plain, product, plain, product, ..., plain."""

    block_steps: int
    batch_tokens: int
    plain_seconds: tuple[float, ...]
    product_seconds: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Each product block over the mean of its two plain neighbours."""
        neighbours = zip(self.plain_seconds, self.plain_seconds[1:], strict=False)
        return [p / statistics.mean(pair) for p, pair in zip(self.product_seconds, neighbours, strict=True)]

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def upper_bound(self) -> float:
        """One-sided 95 % upper confidence bound of the median ratio, from order statistics."""
        return float(quantile_test(self.ratios, p=0.5, alternative="less").confidence_interval(0.95).high)

    def to_dict(self) -> dict[str, object]:
        return {
            "block_steps": self.block_steps,
            "batch_tokens": self.batch_tokens,
            "blocks": len(self.product_seconds),
            "median_ratio": self.median_ratio,
            "upper_bound_95": self.upper_bound,
            "plain_seconds": list(self.plain_seconds),
            "product_seconds": list(self.product_seconds),
        }


class PlainLoop:
    """The baseline's step in nothing but torch: the same model, groups, clipping, optimizer, schedule and batches."""

    def __init__(self, config: RunConfig, store: SyntheticStore, device: torch.device) -> None:
        self.config, self.device, self.end_of_text = config, device, store.end_of_text_id
        self.model = Transformer(config.model)
        initialise(self.model, config.effective_weights_seed)
        self.model.arrange(config.cluster)
        self.model.to(device, torch.float64 if config.training.precision == "64-true" else torch.float32)
        self.optimizer = build_optimizer(config.training, self.model)
        self.schedule = build_schedule(config.training, self.optimizer)
        batches = TrainingBatches(config, cast(TokenStore, store))
        self.loader = iter(DataLoader(batches, batch_size=None, sampler=CountFrom(0)))
        self.groups = config.micro_batch_sequences // config.gain_group_sequences
        self.limit = config.training.clip_norm or float("inf")

    def block(self, steps: int) -> float:
        """Run some steps; seconds."""
        synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize()
        return time.perf_counter() - started

    def step(self) -> None:
        self.optimizer.zero_grad()
        for _ in range(self.config.accumulation):
            batch = next(self.loader)
            with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in self.config.training.precision):
                self._objective(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.optimizer.step()
        self.schedule.step()

    def _objective(self, batch: Batch) -> torch.Tensor:
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS.to(self.device), self.end_of_text)
        out = self.model(inputs_BT, self.groups)
        losses = self.model.losses(out.hidden_BTD, targets_BT, self.config.training.label_smoothing).losses
        loss_GN, valid_GN = losses.smoothed_N.view(self.groups, -1), targets_BT.view(self.groups, -1) >= 0
        objective_G = group_objective(loss_GN, valid_GN) + self.config.model.aux_coef * out.aux_G
        return objective_G.sum() / batch.step_groups


class Interleave(Callback):
    """Runs a block of the plain loop before every block of the training; the first pair warms up and is dropped."""

    def __init__(self, plain: PlainLoop, block_steps: int, progress: Progress) -> None:
        self.plain, self.block_steps, self.progress = plain, block_steps, progress
        self.plain_seconds: list[float] = []
        self.product_seconds: list[float] = []
        self.task = progress.add_task("blocks", total=plain.config.training.steps // block_steps)
        self._started: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % (self.block_steps * self.plain.config.accumulation) == 0:
            self._turn()
            self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._turn()
        del self.plain_seconds[0], self.product_seconds[0]

    def _turn(self) -> None:
        synchronize()
        if self._started is not None:
            self.product_seconds.append(time.perf_counter() - self._started)
        self.plain_seconds.append(self.plain.block(self.block_steps))
        self.progress.advance(self.task)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def configure(config: RunConfig, n_blocks: int, block_steps: int) -> RunConfig:
    """The config with as many steps as the blocks need, and no validation or checkpoint among them.

    Args:
        config: the user's.
        n_blocks: paired blocks that count; one more warms up.
        block_steps: optimizer steps in a block; a multiple of logging.log_every_steps times whole log lines.

    Raises:
        UserError: it asks for more than one process.
    """
    if config.world_size > 1:
        raise UserError(f"cluster.devices: bench step times one process, not {config.world_size}; choose 1")
    steps = (n_blocks + 1) * block_steps
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=(SourceConfig("synthetic", path="in memory"),)),
        training=dataclasses.replace(
            config.training, steps=steps, warmup_steps=min(steps, config.training.warmup_steps), decay_steps=0
        ),
        validation=dataclasses.replace(config.validation, every_steps=steps + 1),
        checkpoints=dataclasses.replace(config.checkpoints, every_steps=steps + 1),
        generation=dataclasses.replace(config.generation, prompts=None),
    ).check()


def bench_step(config: RunConfig, block_steps: int, console: Console) -> StepBench:
    """Time a config's training beside the plain loop, in one process.

    Args:
        config: from `configure`.
        block_steps: optimizer steps in a block.
        console: for progress.
    """
    prepare_torch(config)
    store = SyntheticStore(config)
    module = LanguageModel(config, store.end_of_text_id)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        run = RunDir(Path(folder))
        start = {"config hash": "", "data hash": store.hash}
        trainer = build_trainer(config, run, start, None, Console(file=io.StringIO()))
        plain = PlainLoop(config, store, trainer.strategy.root_device)
        interleave = Interleave(plain, block_steps, progress)
        trainer.callbacks.insert(0, interleave)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=TokenDataModule(config, cast(TokenStore, store)))
    return StepBench(
        block_steps, config.training.batch_tokens, tuple(interleave.plain_seconds), tuple(interleave.product_seconds)
    )


def step_table(bench: StepBench, config: RunConfig) -> Table:
    """The figures in words."""
    table = Table("", "", title="a step of the product beside the same step in a plain torch loop", show_header=False)
    tokens = bench.block_steps * bench.batch_tokens
    rows = {
        "arm": config.arm,
        "micro-batches a step": str(config.accumulation),
        "paired blocks": f"{len(bench.ratios)} of {bench.block_steps} steps, a log line every "
        f"{config.logging.log_every_steps}",
        "plain loop": f"{tokens / statistics.median(bench.plain_seconds):,.0f} tokens/s",
        "product": f"{tokens / statistics.median(bench.product_seconds):,.0f} tokens/s",
        "ratio of times, median": f"{bench.median_ratio:.4f}",
        "  95 % upper bound": f"{bench.upper_bound:.4f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
