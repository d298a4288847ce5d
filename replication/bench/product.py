"""The product's own training as a contestant: Lightning, every callback, the journal and TensorBoard on schedule."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from rich.console import Console

from replication.bench.blocks import Elapsed, Pause, Turns
from replication.bench.breakdown import Clock, MarkedLoader
from replication.config import RunConfig, SourceConfig
from replication.data.module import Batch, TokenDataModule
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.objectives.callbacks import LayerGain, TokenGain
from replication.runs.layout import RunDir
from replication.training.module import LanguageModel
from replication.training.train import build_trainer

ARMS: dict[str, tuple[type[Callback], ...]] = {
    "baseline": (),
    "token_gain": (TokenGain,),
    "layer_gain": (LayerGain,),
    "both": (TokenGain, LayerGain),
}
"""The interventions of each arm; the constants are the config's."""


def configure(config: RunConfig, block_steps: int, arm: str = "both") -> RunConfig:
    """The config as a training without end of an arm, on random tokens, without validation or checkpoint.

    Args:
        config: the user's.
        block_steps: optimizer steps in a block.
        arm: one of ARMS.

    Raises:
        UserError: it asks for several processes, for ZeRO, or for blocks of which only some have a log line.
    """
    if config.world_size > 1:
        raise UserError(
            f"cluster.devices: this times one process, not {config.world_size}; choose 1 (`replicate bench scaling` "
            "times several)"
        )
    if config.cluster.strategy.startswith("zero"):
        raise UserError(
            f"cluster.strategy: {config.cluster.strategy} keeps weights and optimizer where a plain loop cannot train "
            "them; choose single (`replicate bench scaling` times it at one process, too)"
        )
    return endless(config, block_steps, arm)


def endless(config: RunConfig, block_steps: int, arm: str) -> RunConfig:
    """`configure`, for any number of processes."""
    every, never = config.logging.log_every_steps, 10**9
    if block_steps % every:
        raise UserError(
            f"--block-steps: {block_steps} is no multiple of logging.log_every_steps ({every}), so blocks would differ "
            f"in their log lines; choose a multiple, or add --logging.log_every_steps={block_steps}"
        )
    on = ARMS[arm]
    return dataclasses.replace(
        config,
        arm=arm,
        token_gain=dataclasses.replace(config.token_gain, enabled=TokenGain in on),
        layer_gain=dataclasses.replace(config.layer_gain, enabled=LayerGain in on),
        data=dataclasses.replace(config.data, sources=(SourceConfig("synthetic", path="in memory"),)),
        training=dataclasses.replace(config.training, steps=never, decay_steps=0, initial_weights=None),
        validation=dataclasses.replace(config.validation, every_steps=never),
        checkpoints=dataclasses.replace(config.checkpoints, every_steps=never, keep_every_steps=None),
        generation=dataclasses.replace(config.generation, prompts=None),
    ).check()


def silent_trainer(config: RunConfig, store: TokenStore, folder: str) -> Trainer:
    """The product's trainer, journal, TensorBoard and all, in a folder that nobody keeps."""
    start = {"config hash": "", "data hash": store.hash}
    return build_trainer(config, RunDir(Path(folder)), start, None, Console(file=io.StringIO()))


class BeforeBlock(Callback):
    """First of the callbacks: calls something before the first micro-batch of every block."""

    def __init__(self, call: Callable[[], None], config: RunConfig, block_steps: int) -> None:
        self.call, self.micro_batches = call, block_steps * config.accumulation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.micro_batches == 0:
            self.call()


class _MarkedData(TokenDataModule):
    """The product's loaders, with marks around the wait for a training batch."""

    def __init__(self, config: RunConfig, store: TokenStore, clock: Clock) -> None:
        super().__init__(config, store)
        self.clock = clock

    def train_dataloader(self) -> Iterable[Batch]:  # type: ignore[override]
        return MarkedLoader(super().train_dataloader(), self.clock)


class Product:
    """A training of the product, paused between blocks, whose interventions can be switched there.

    Args:
        config: from `configure`.
        store: the corpus.
        block_steps: optimizer steps in a block.
    """

    def __init__(self, config: RunConfig, store: TokenStore, block_steps: int) -> None:
        self.config, self.block_steps = config, block_steps
        self.module = LanguageModel(config, store.end_of_text_id)
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = silent_trainer(config, store, self._folder.name)
        self.device = self.trainer.strategy.root_device
        self.clock = Clock(self.device)
        self._data = _MarkedData(config, store, self.clock)
        self._all: list[Callback] = list(self.trainer.callbacks)  # type: ignore[attr-defined]
        self._on = set(ARMS[config.arm])
        self._turns = Turns(self._train)

    def block(self, instead: Callable[[], None] | None = None) -> Elapsed:
        """Run the next block, or something else in its place and thread."""
        return self._turns.block(instead)

    def close(self) -> None:
        """End the training and let go of model, optimizer and folder."""
        self._turns.close()
        self._folder.cleanup()
        del self.module, self.trainer, self._data, self._all, self._turns

    def switch(self, arm: str) -> None:
        """From the next step on train as this arm: callbacks that it lacks leave the training, the others join it."""
        for callback in self._all:
            kind = type(callback)
            if kind not in (TokenGain, LayerGain) or (kind in ARMS[arm]) == (kind in self._on):
                continue
            if kind in ARMS[arm]:
                callback.setup(self.trainer, self.module, "fit")
                callback.on_fit_start(self.trainer, self.module)
            else:
                callback.on_fit_end(self.trainer, self.module)
                callback.teardown(self.trainer, self.module, "fit")
        self._on = set(ARMS[arm])
        left_out = {TokenGain, LayerGain} - self._on
        present = [c for c in self._all if type(c) not in left_out]
        self.trainer.callbacks[1:] = present  # type: ignore[attr-defined]

    def _train(self, pause: Pause) -> None:
        before_block = BeforeBlock(pause, self.config, self.block_steps)
        self.trainer.callbacks.insert(0, before_block)  # type: ignore[attr-defined]
        self.trainer.fit(self.module, datamodule=self._data)
