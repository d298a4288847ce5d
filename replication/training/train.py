"""One cell from its config to its last checkpoint: one arm at one seed."""

from __future__ import annotations

import time
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from replication.config import RunConfig, scientific_hash, to_yaml
from replication.console import LINE_SECONDS, progress, say
from replication.data.module import Batch, TokenDataModule
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.model.foreign import without_memory
from replication.model.transformer import weights_sha256
from replication.model.weights import set_initial_weights
from replication.objectives.callbacks import LayerGain, TokenGain
from replication.objectives.plugins import NO_FUNCTIONS, Functions, functions_of
from replication.runs.files import write_text
from replication.runs.journal import due_validations, journal_gaps, logged_steps, read_journal
from replication.runs.layout import STATE, WEIGHTS, RunDir, SuiteDir, step_of
from replication.runs.manifest import read_manifest
from replication.runs.starts import logged_cells, refuse_other_config, refuse_other_data
from replication.training.checkpoint_files import (
    checkpoint_folder,
    load_weights,
    newest_checkpoint,
    read_marker,
    remove_abandoned,
    reshard,
    universal_form,
)
from replication.training.checkpoints import Checkpoints
from replication.training.checks import Checks, check_neighbours, data_sample
from replication.training.environment import determinism, finish_manifest, prepare_torch, start_manifest
from replication.training.host_copy import HostCopy
from replication.training.measure import Measure
from replication.training.module import LanguageModel
from replication.training.phases import enter
from replication.training.ranks import Meeting, launched_rank
from replication.training.stopping import GracefulStop
from replication.training.strategies import build_strategy, gradient_multiplier, is_zero


def train(config: RunConfig, run: RunDir, store: TokenStore, console: Console) -> None:
    """Train one cell, going on from its newest complete checkpoint where there is one.

    Writes config.yaml, manifest.json, metrics.jsonl, tensorboard/ and checkpoints/ into the cell's folder. A cell that
    has trained to its last step is left as it is. The caller holds the cell's lock. UserError where the data do not fit
    the config, the folder or its checkpoint belongs to another config, or the loss is not finite.
    """
    store.check(config)
    first = launched_rank() == 0
    if first:  # whether the others have the same config, the preflight asks
        refuse_other_config(config, run)
    meeting = Meeting(run, config.world_size) if config.world_size > 1 else None
    checkpoint: Path | None = None
    notes: list[str] = []
    if first:  # alone: a checkpoint of a large model is tens of GB, and all of it is read
        remove_abandoned(run)  # it takes room that this run needs
        checkpoint, notes = newest_checkpoint(run, config, store.hash)
        if checkpoint and step_of(checkpoint) < config.training.steps and (at := read_marker(checkpoint).pruned_at):
            raise UserError(
                f"{checkpoint}: was pruned to its weights at {at} and cannot be trained further; begin another cell "
                f"with training.initial_weights={checkpoint / WEIGHTS}, or remove {run.root} to train this one again"
            )
    if meeting is not None:
        name = meeting.tell("checkpoint", checkpoint.name if checkpoint else "")
        checkpoint = run.checkpoints / name if name else None
    step = step_of(checkpoint) if checkpoint else 0
    if first:
        for note in (*notes, *lost_lines(config, run, step)):
            say(console, note, style="yellow")
    if step >= config.training.steps:
        if first:
            console.print(f"{config.arm}/seed-{config.seed}: trained to step {config.training.steps} already")
            finish_manifest(config, run)
        return

    functions = functions_of(config, SuiteDir.of(run).plugins.glob("*"))
    prepare_torch(config)
    began = read_manifest(run) if checkpoint else None
    known = began.initial_weights_sha256 if began else None
    # a run that goes on draws nothing, and needs no file to start from: it may be gone by then
    given, from_files = None if checkpoint else initial_weights(config), config.model.initial_weights is not None
    module = LanguageModel(config, store.end_of_text_id, given, unset=known is not None or from_files)
    if from_files and checkpoint is None:
        set_initial_weights(module.network, config.model)
    module.asked = functions.gain.asks if functions.gain else ()
    start = shared_by_ranks(config, run, store, checkpoint, known or weights_at_start(config, run, module, checkpoint))
    if first:
        refuse_other_data(logged_cells(run.root.parent.parent), config.data.dir or "data", store.hash, but=run)
        check_neighbours(config, run, start["weights at start"])
        if checkpoint is not None and (target := universal_form(checkpoint, config)):
            console.print(f"resharding {checkpoint.name} for {config.world_size} process(es)")
            reshard(checkpoint, target)
        write_text(run.config, to_yaml(config))
        start_manifest(config, run, store, module.model, start["weights at start"], step, console)
    trainer = build_trainer(config, run, start, checkpoint, console, functions)
    if meeting is not None:
        meeting.wait_for_all("built")  # what follows waits for the slowest without hearing anything
    try:
        with determinism(config.training.deterministic):
            trainer.fit(
                module,
                datamodule=TokenDataModule(config, store),
                ckpt_path=str(universal_form(checkpoint, config) or checkpoint / STATE) if checkpoint else None,
                weights_only=True,  # DeepSpeed's shards of a ZeRO strategy are unpickled by it all the same
            )
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if first:
        finish_manifest(config, run)


def lost_lines(config: RunConfig, run: RunDir, step: int) -> list[str]:
    """A line where the journal lacks something up to the step that a start goes on from, which nobody writes again."""
    if not step:
        return []
    unlogged = read_marker(checkpoint_folder(run, step)).unlogged_steps
    validations = [k for k in due_validations(config.training.steps, config.validation.every_steps) if k <= step]
    logged = logged_steps(read_journal(run.metrics))
    gaps = journal_gaps(logged, 0 if unlogged is None else step - unlogged, validations)
    ends = "the certificate will say so; to have them, remove the cell's folder and train it from the beginning"
    return [f"{run.root}: {', '.join(gaps)}: {ends}"] if gaps else []


def initial_weights(config: RunConfig) -> dict[str, Tensor] | None:
    """The weights of training.initial_weights, where it names a file; UserError where they are of another model."""
    if config.training.initial_weights is None:
        return None
    weights = load_weights(Path(config.training.initial_weights).expanduser())
    model, shapes = without_memory(config.model), {name: w.shape for name, w in weights.items()}
    expected = {name: p.shape for name, p in model.named_parameters()}
    if not expected.items() <= shapes.items() or shapes.keys() - model.state_dict().keys():
        raise UserError(
            f"training.initial_weights: {config.training.initial_weights} holds the weights of another model than the "
            "keys of model describe; name a checkpoint of the same model"
        )
    return weights


def weights_at_start(config: RunConfig, run: RunDir, module: LanguageModel, checkpoint: Path | None) -> str:
    """Hash of the weights that a module begins with; UserError where only the manifest could have said it."""
    if checkpoint and (config.training.initial_weights or config.model.initial_weights):
        raise UserError(
            f"{run.manifest}: does not say what weights the cell began with; restore it, or remove {run.root} and "
            "train from the beginning"
        )
    return weights_sha256(dict(module.model.named_parameters()))


def shared_by_ranks(
    config: RunConfig, run: RunDir, store: TokenStore, checkpoint: Path | None, weights: str
) -> dict[str, str]:
    """By name, what all ranks of a start must have alike: hashes of config, data and weights at start, checkpoint."""
    return {
        "config hash": scientific_hash(config),
        "data hash": store.hash,
        "data sample": data_sample(store),
        "checkpoint": checkpoint.name if checkpoint else "none",
        "weights at start": weights,
    }


def build_trainer(
    config: RunConfig,
    run: RunDir,
    start: dict[str, str],
    checkpoint: Path | None,
    console: Console,
    functions: Functions = NO_FUNCTIONS,
) -> Trainer:
    """The Trainer of one cell, with nothing of Lightning's that writes, shows or shuffles on its own."""
    measure = Measure(config, run, functions)
    callbacks: list[Callback] = [Progress(config, console), Checks(config, run, start)]
    if config.token_gain.enabled:
        callbacks.append(TokenGain(config.token_gain, functions.gain))
    if config.layer_gain.enabled:
        callbacks.append(LayerGain(config.layer_gain, gradient_multiplier(config), functions.scale))
    callbacks.append(measure)  # after a gain on the rate, which it logs, and before a step's checkpoint
    host_copy = None if is_zero(config) else HostCopy()
    checkpoints = Checkpoints(config, run, start["data hash"], measure, checkpoint, host_copy)
    callbacks += [checkpoints, GracefulStop(config, checkpoints)]
    purge = step_of(checkpoint) + 1 if checkpoint else 0  # else a resumed run shows doubled points
    logger = TensorBoardLogger(run.root, name="", version="tensorboard", default_hp_metric=False, purge_step=purge)
    trainer = Trainer(
        accelerator=config.cluster.accelerator,
        strategy=build_strategy(config, load_universal=universal_form(checkpoint, config) is not None),
        devices=config.cluster.devices,
        num_nodes=config.cluster.nodes,
        precision=config.training.precision,
        max_steps=config.training.steps,
        accumulate_grad_batches=config.accumulation,
        val_check_interval=config.validation.every_steps * config.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # the ranks' places are in RANK and its neighbours, whoever set them
        plugins=[LightningEnvironment(), *([host_copy] if host_copy else [])],
        log_every_n_steps=10**9,
    )
    # Lightning's way with SIGTERM is taken out: on several ranks it broadcasts a flag and waits for it before every
    # micro-batch, and its handler starts a collective of its own, which hangs where one rank alone gets the signal.
    # Here SIGTERM interrupts the rank that gets it, and the launcher ends the others.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


class Progress(Callback):
    """Says where this rank is: a bar on a terminal, a line now and then elsewhere, and marks that a drill aims by.

    First of the callbacks; reads nothing from the device.
    """

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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        micro_batch = batch_idx % self.config.accumulation
        enter("accumulate" if micro_batch else "forward", trainer.global_step, micro_batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if pl_module.at_boundary:
            enter("update", trainer.global_step, self.config.accumulation - 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if self.bar.task_ids:
            self.bar.update(self.bar.task_ids[0], completed=trainer.global_step)
        elif trainer.is_global_zero and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"step {trainer.global_step}/{self.config.training.steps}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        enter("validate", trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        enter("end", trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.stop()
