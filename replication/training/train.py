"""One cell from its config to its last checkpoint: one arm at one seed."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.console import Console
from torch import Tensor

from replication.config import RunConfig, arm_keys, refuse_other_config, scientific_hash, to_yaml
from replication.console import say, timestamp
from replication.data.module import TokenDataModule
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.model.transformer import Transformer, weights_sha256
from replication.objectives.callbacks import LayerGain, TokenGain
from replication.protocol.preregistration import first_stamp, plan_stamp
from replication.runs.files import write_text
from replication.runs.journal import due_validations, journal_gaps, logged_steps, read_journal
from replication.runs.layout import RunDir
from replication.runs.manifest import Data, Manifest, Start, is_trained, read_manifest, update_manifest, write_manifest
from replication.runs.starts import changes, code_facts, code_of, logged_cells, machine_of, refuse_other_data
from replication.training.checkpoints import Checkpoints, checkpoint_folder, load_weights, read_marker, step_of
from replication.training.checks import Checks, check_neighbours, data_sample
from replication.training.environment import arithmetic, describe_machine, prepare_torch
from replication.training.measure import Measure
from replication.training.module import LanguageModel
from replication.training.phases import is_watched
from replication.training.progress import PhaseMarks, Progress
from replication.training.ranks import launched_rank
from replication.training.reshard import Sharding, needs_reshard, reshard, state_to_load
from replication.training.start import Meeting, checkpoint_to_resume
from replication.training.stopping import GracefulStop
from replication.training.strategies import build_strategy, gradient_multiplier


def train(config: RunConfig, run: RunDir, store: TokenStore, console: Console) -> None:
    """Train one cell, going on from its newest complete checkpoint where there is one.

    Writes config.yaml, manifest.json, metrics.jsonl, tensorboard/ and checkpoints/ into the cell's folder. A cell that
    has trained to its last step is left as it is. The caller holds the cell's lock.

    Raises:
        UserError: the data do not fit the config, the folder or its checkpoint belongs to another config, the loss is
            not finite.
    """
    store.check(config)
    first = launched_rank() == 0
    if first:  # whether the others have the same config, the preflight asks
        refuse_other_config(config, run.config)
    meeting = Meeting(run, config.world_size) if config.world_size > 1 else None
    checkpoint, notes = checkpoint_to_resume(run, config, store.hash, meeting)
    step = step_of(checkpoint) if checkpoint else 0
    if first:
        notes += lost_lines(config, run, step)
    for note in notes if first else ():
        say(console, note, style="yellow")
    if step >= config.training.steps:
        if not first:
            return
        console.print(f"{config.arm}/seed-{config.seed}: trained to step {config.training.steps} already")
        finish_manifest(run, checkpoint_folder(run, config.training.steps))
        return

    prepare_torch(config)
    # a run that goes on needs no file to start from: it may be gone by then
    module = LanguageModel(config, store.end_of_text_id, None if checkpoint else initial_weights(config))
    start = shared_by_ranks(config, run, store, module, checkpoint)
    if first:
        refuse_other_data(logged_cells(run.root.parent.parent), config.data.dir or "data", store.hash, but=run)
        check_neighbours(config, run, start["weights at start"])
        if checkpoint is not None and needs_reshard(checkpoint, config):
            console.print(f"resharding {checkpoint.name} for {config.world_size} process(es)")
            reshard(checkpoint)
        write_text(run.config, to_yaml(config))
        start_manifest(config, run, store, module, start["weights at start"], step, console)
    trainer = build_trainer(config, run, start, checkpoint, console)
    if meeting is not None:
        meeting.wait_for_all("built")  # what follows waits for the slowest without hearing anything
    try:
        trainer.fit(
            module,
            datamodule=TokenDataModule(config, store),
            ckpt_path=str(state_to_load(checkpoint, config)) if checkpoint else None,
            weights_only=False,  # the checkpoint is our own; it holds Lightning's loop objects
        )
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if first:
        finish_manifest(run, checkpoint_folder(run, config.training.steps))


def shared_by_ranks(
    config: RunConfig, run: RunDir, store: TokenStore, module: LanguageModel, checkpoint: Path | None
) -> dict[str, str]:
    """By name, what all ranks of a start must have alike: hashes of config, data and weights at start, checkpoint.

    Raises:
        UserError: the cell goes on from weights of a file, and its manifest does not say which.
    """
    if checkpoint and config.training.initial_weights:
        weights = (read_manifest(run) or Manifest()).initial_weights_sha256
        if weights is None:
            raise UserError(f"{run.manifest}: does not say what weights the cell began with; restore it, or remove "
                            f"{run.root} and train from the beginning")  # fmt: skip
    else:
        weights = weights_sha256(dict(module.model.named_parameters()))
    return {
        "config hash": scientific_hash(config),
        "data hash": store.hash,
        "data sample": data_sample(store),
        "checkpoint": checkpoint.name if checkpoint else "none",
        "weights at start": weights,
    }


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
    """The weights of training.initial_weights, where it names a file.

    Raises:
        UserError: the file is missing, unreadable, or of another model.
    """
    if config.training.initial_weights is None:
        return None
    weights = load_weights(Path(config.training.initial_weights).expanduser())
    with torch.device("meta"):
        expected = {name: p.shape for name, p in Transformer(config.model).named_parameters()}
    if {name: w.shape for name, w in weights.items()} != expected:
        raise UserError(
            f"training.initial_weights: {config.training.initial_weights} holds the weights of another model than the "
            "keys of model describe; name a checkpoint of the same model"
        )
    return weights


def build_trainer(
    config: RunConfig, run: RunDir, start: dict[str, str], checkpoint: Path | None, console: Console
) -> Trainer:
    """The Trainer of one cell, with nothing of Lightning's that writes, shows or shuffles on its own.

    `start` is of shared_by_ranks.
    """
    resume_step = step_of(checkpoint) if checkpoint else 0
    measure = Measure(config, run)
    callbacks: list[Callback] = [PhaseMarks(config)] if is_watched() else []
    callbacks += [Checks(config, run, start), measure]  # it must see a step before a checkpoint of it is saved
    if config.token_gain.enabled:
        callbacks.append(TokenGain(config.token_gain))
    if config.layer_gain.enabled:
        callbacks.append(LayerGain(config.layer_gain, gradient_multiplier(config)))
    checkpoints = Checkpoints(config, run, start["data hash"], measure, checkpoint)
    callbacks += [checkpoints, GracefulStop(config, checkpoints), Progress(config, console)]
    logger = TensorBoardLogger(
        run.root,
        name="",
        version="tensorboard",
        default_hp_metric=False,
        purge_step=resume_step + 1 if resume_step else 0,  # else a resumed run shows doubled points
    )
    trainer = Trainer(
        accelerator=config.cluster.accelerator,
        strategy=build_strategy(config, needs_reshard(checkpoint, config)),
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
        plugins=[LightningEnvironment()],  # the ranks' places are in RANK and its neighbours, whoever set them
        deterministic=config.training.deterministic,
        log_every_n_steps=10**9,
    )
    leave_signals_alone(trainer)
    return trainer


def leave_signals_alone(trainer: Trainer) -> None:
    """Take Lightning's SIGTERM path out: SIGTERM interrupts the rank that gets it, and the launcher ends the others.

    On several ranks Lightning broadcasts a flag and waits for it before every micro-batch, and its handler starts a
    collective of its own, which hangs where one rank alone gets the signal.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


# ---------------------------------------------------------------- the manifest


def start_manifest(
    config: RunConfig,
    run: RunDir,
    store: TokenStore,
    module: LanguageModel,
    initial: str,
    step: int,
    console: Console,
) -> None:
    """Write the manifest before the first step of a start; what earlier starts said is kept, the weights are compared.

    One line says what of code and machine is not as at the start before; the run goes on.

    `initial` is the SHA-256 of the module's weights before the strategy shards it; `step` that of the checkpoint which
    this start goes on from, or 0.

    Raises:
        UserError: the initial weights differ from those of the first start.
    """
    earlier = read_manifest(run) or Manifest()
    if earlier.initial_weights_sha256 not in (None, initial):
        raise UserError(
            f"{run.manifest}: this machine makes other initial weights for the same seed than the first start did; "
            "resume where it began, or remove the cell and run it again"
        )
    try:
        keys = sorted(arm_keys(config.arm))
    except UserError:
        keys = []  # an arm without a file declares nothing, and the certificate will say so
    machine, plan, cut = describe_machine(), plan_stamp(run), arithmetic(config)
    sharding = vars(Sharding.of_run(config))
    here = Start(at=timestamp(), step=step, plan=plan, strategy=sharding, machine=cut, **vars(machine))
    if step:
        changed = [changes(code_of(earlier), code_facts(here)), changes(machine_of(earlier, None), cut)]
        if any(changed):
            said = ", ".join(filter(None, changed))
            say(console, ("goes on otherwise than it began:", "yellow"), f" {said}; the report will say so")
    first_plan, logged_before = first_stamp(run, earlier.plan, plan)
    manifest = Manifest(
        arm=config.arm,
        seed=config.seed,
        config_hash=scientific_hash(config),
        arm_keys=tuple(keys),
        plan=first_plan,
        logged_before=logged_before,
        data=Data(hash=store.hash, dir=str(config.data.dir or "data")),
        world_size=config.world_size,
        strategy=sharding,
        weights_seed=config.effective_weights_seed,
        parameters=sum(p.numel() for p in module.model.parameters()),
        initial_weights_sha256=initial,
        started_at=earlier.started_at or timestamp(),
        starts=(*earlier.starts, here),
        **vars(machine),
    )
    write_manifest(run, manifest)


def finish_manifest(run: RunDir, folder: Path) -> None:
    """Add what the last checkpoint says of the whole run; a kill between the two is made good by the next start.

    The checkpoint has just been read or written whole, and is not read again: the other ranks are leaving.
    """
    if not is_trained(run):
        marker = read_marker(folder)
        final = {k: getattr(marker, k) for k in ("step", "tokens", "data_chain", "wall_seconds")}
        update_manifest(run, **final, final_weights_sha256=marker.weights_sha256, finished_at=timestamp())
