"""Checkpoints: written to a new folder, marked complete, then renamed into place; the newest complete one is taken.

checkpoints/step-000150/trainer.ckpt      Lightning's state: optimizer, schedule, loops, the hash chain; under ZeRO a
                                          folder with the shards of every rank, weights among them
checkpoints/step-000150/weights.pt        the consolidated weights by name, of any strategy, for any strategy
checkpoints/step-000150/rank-00000.pt     random generators of each rank
checkpoints/step-000150/COMPLETE          names, sizes and checksums, and the hashes that a resume checks
checkpoints/universal-step-000150/        what DeepSpeed made of it for another number of ranks, until the next save
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from replication.config import RunConfig, refuse_differences, scientific
from replication.console import say
from replication.data.module import Batch
from replication.errors import UserError, first_line, is_disk_full
from replication.model.transformer import weights_sha256
from replication.processes.launcher import tethered
from replication.processes.preemption import Times, record_times
from replication.runs.files import damage, mark_complete, naming, read_object, remove_tree, sync
from replication.runs.layout import WEIGHTS, RunDir, step_of
from replication.runs.manifest import Manifest, find_manifest
from replication.runs.records import WrongForm, from_json, to_json
from replication.runs.starts import refuse_other_keys
from replication.training.host_copy import STATE, HostCopy, save_hashed
from replication.training.measure import Measure
from replication.training.module import LanguageModel
from replication.training.phases import during, writing
from replication.training.ranks import barrier, is_first, rank
from replication.training.strategies import consolidated_weights

WHOLE = ("single", "ddp")  # these keep one whole state, which any number of ranks of either loads
RESHARDABLE = ("zero1", "zero2")
"""Between these, at any number of ranks, DeepSpeed's universal checkpoint was measured to carry a state (AdamW, fp32).
Between zero3 and them it fails; from zero3 to zero3 on other ranks it loads, and trains on 4e-3 away."""


@dataclass(frozen=True)
class Sharding:
    """The cut of a run's full state over processes."""

    strategy: str = "single"
    world_size: int = 1
    offload_optimizer: bool = False

    @classmethod
    def of_run(cls, config: RunConfig) -> Sharding:
        return cls(config.cluster.strategy, config.world_size, config.cluster.offload_optimizer)

    def __str__(self) -> str:
        return f"{self.strategy} on {self.world_size} process(es){' with offload' if self.offload_optimizer else ''}"


@dataclass(frozen=True, kw_only=True)
class Marker:
    """COMPLETE of a checkpoint folder, apart from the checksums of its files."""

    step: int
    tokens: int
    data_chain: str
    wall_seconds: float
    weights_sha256: str
    data_hash: str
    layout: Sharding
    scientific: Mapping[str, Any]
    unlogged_steps: int | None = None  # whose losses the journal does not have yet; older checkpoints do not say
    pruned_at: str | None = None  # when `replicate prune` left its weights alone


class Checkpoints(Callback):
    """Saves every `every_steps` and at the end; on a resume brings back what Lightning and DeepSpeed do not.

    It saves at the start of the following step, not at the end of the step itself: by then the step has been
    validated and Lightning counts its batch as completed, so that a resumed run neither skips nor repeats one.

    Where the first rank has the whole state, training goes on as soon as that is copied to the host, and a thread
    writes, hashes and moves the folder into place; one save at a time. ZeRO's ranks write their shards first.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        data_hash: str,
        measure: Measure,
        resume: Path | None = None,
        host_copy: HostCopy | None = None,
    ) -> None:
        """The marker repeats what `measure` has counted; `resume` is the checkpoint that this start goes on from.

        `host_copy` is the trainer's checkpoint plugin; without one all of a save is done before training goes on.
        """
        self.config, self.run, self.data_hash, self.measure, self.resume = config, run, data_hash, measure, resume
        self.host_copy = host_copy
        measure.finish_checkpoint = self.finish
        self._stand = {step_of(resume)} if resume else set()  # steps whose checkpoints this run has read or begun
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._boundary_at: float | None = None
        self._step_seconds = 0.0  # the longest, a validation included

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.resume is not None:
            restore_generators(self.resume)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.config.accumulation:
            return
        if self._boundary_at is not None:
            self._step_seconds = max(self._step_seconds, time.monotonic() - self._boundary_at)
        if self._writing is not None and self._writing.done():
            self.finish()  # what it raised, at once
        step = trainer.global_step
        if step > 0 and step % self.config.checkpoints.every_steps == 0:
            self.save(trainer)
        self._boundary_at = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self.finish()
        barrier()  # no rank leaves before the last checkpoint stands

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What is being written is of a step that was whole; where it fails, that is a line beside the exception's."""
        try:
            self.finish()
        except Exception as error:
            left = self.run.newest_marked() or "the beginning"
            lost = f"the checkpoint that was being written is lost ({first_line(error)}); the run goes on from {left}"
            say(Console(stderr=True, soft_wrap=True), lost, style="yellow")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Take back the count of the batch that has begun: a resumed run would validate one batch early."""
        for progress in _batch_progress(checkpoint):
            progress["ready"] = progress["completed"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Count the micro-batches anew: another number of ranks cuts the same steps into another number of them."""
        for progress in _batch_progress(checkpoint):
            for key in ("ready", "started", "processed", "completed"):
                progress[key] = checkpoint["global_step"] * self.config.accumulation

    def save(self, trainer: Trainer) -> None:
        """Begin the checkpoint of the current step, unless this run has; without a host copy, end it too.

        UserError where there is no room for it, here or at a later call: the run stops, and the earlier checkpoints are
        as they were.
        """
        step, started = trainer.global_step, time.monotonic()
        self.measure.check_finite(step)
        if step in self._stand:
            return
        folder = checkpoint_folder(self.run, step)
        partial = _partial(folder)
        with during("save"):
            self.finish()
            barrier()  # every rank has looked before the first one changes anything
            with self._without_room(folder):
                if is_first():
                    remove_tree(folder)  # damaged: this run replaces it
                    remove_abandoned(self.run)
                    partial.mkdir(parents=True)
                barrier()
                trainer.save_checkpoint(partial / STATE)
                _save_generators(partial)
                model = cast(LanguageModel, trainer.lightning_module).model
                weights = consolidated_weights(self.config, model) if self.host_copy is None else {}
                barrier()
            if is_first():
                if self.measure.journal is not None:
                    self.measure.journal.sync()  # a run that goes on from here does not write these lines again
                arguments = self._marker(step), weights, folder, started, time.monotonic() - started
                self._writing = self._writer.submit(self._write, *arguments)
            if self.host_copy is None:
                self.finish()
                barrier()
        self._stand.add(step)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written stands; raises what went wrong."""
        begun, self._writing = self._writing, None
        if begun is not None:
            begun.result()

    def _marker(self, step: int) -> Marker:
        """All but the weights' hash, as things stand now."""
        return Marker(
            step=step,
            tokens=self.measure.tokens,
            data_chain=self.measure.chain,
            wall_seconds=round(self.measure.elapsed(), 2),
            weights_sha256="",
            unlogged_steps=len(self.measure.losses),
            data_hash=self.data_hash,
            layout=Sharding.of_run(self.config),
            scientific=scientific(self.config),
        )

    def _write(
        self, marker: Marker, weights: dict[str, Tensor], folder: Path, started: float, copied_seconds: float
    ) -> None:
        """Write what the first rank has of a new folder, mark it, move it into place, remove what it replaces."""
        partial = _partial(folder)
        with writing(), self._without_room(folder):
            if self.host_copy is not None:
                weights, known = self.host_copy.write(partial)
            else:
                known = {WEIGHTS: save_hashed(weights, partial / WEIGHTS)}
            marker = replace(marker, weights_sha256=weights_sha256(weights))
            mark_complete(partial, to_json(marker), known)
            with naming(folder):
                os.replace(partial, folder)
            sync(self.run.checkpoints)  # before what it replaces goes
        # later ones are damaged, since this run went on from before them: they must not count as kept
        later = [p for p in self.run.checkpoint_folders() if step_of(p) > marker.step]
        whole, every = complete_folders(self.run), self.config.checkpoints.keep_every_steps
        old = [p for p in whole if p not in later][: -self.config.checkpoints.keep_last]
        resharded = self.run.checkpoints.glob("universal-*")
        for path in (*resharded, *later, *(p for p in old if every is None or step_of(p) % every)):
            remove_tree(path)
        seconds = time.monotonic() - started
        record_times(self.run, Times(seconds, self._step_seconds, copied_seconds if self.host_copy else seconds))

    @contextmanager
    def _without_room(self, folder: Path) -> Iterator[None]:
        """Make one line of a full disk."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not is_disk_full(error):
                raise
            remove_tree(_partial(folder))
            raise UserError(
                f"{folder}: no room to write the checkpoint ({first_line(error)}); make room and run again, it "
                f"goes on from {newest_checkpoint(self.run)[0] or 'the beginning'}"
            ) from None


def _partial(folder: Path) -> Path:
    return folder.with_name(f"partial-{folder.name}")


def _save_generators(folder: Path) -> None:
    """This rank's random generators."""
    generators = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    torch.save(generators, folder / f"rank-{rank():05d}.pt")


def _batch_progress(checkpoint: Mapping[str, Any]) -> list[dict[str, int]]:
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return [progress["total"], progress["current"]]


def restore_generators(folder: Path) -> None:
    """Bring back this rank's generators; a rank that the saved run did not have keeps its own."""
    path = folder / f"rank-{rank():05d}.pt"
    if not path.is_file():
        return
    state = torch.load(path, weights_only=False)  # our own file; Python's state is a tuple of tuples
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoint_folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step:06d}"


def remove_abandoned(run: RunDir) -> None:
    """Remove the remains of saves and conversions that were cut short; call on the first rank."""
    for abandoned in run.checkpoints.glob("partial-*"):
        remove_tree(abandoned)


def complete_folders(run: RunDir) -> list[Path]:
    """Folders with a COMPLETE marker, oldest first (their files are not checked here)."""
    return [folder for folder in run.checkpoint_folders() if (folder / "COMPLETE").is_file()]


def read_marker(folder: Path) -> Marker:
    """WrongForm, where it is none of a checkpoint."""
    return from_json(Marker, read_object(folder / "COMPLETE"))


def newest_checkpoint(
    run: RunDir, config: RunConfig | None = None, data_hash: str = ""
) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint folder, and one line about each damaged one that was passed over.

    UserError where a config is given, and the checkpoint belongs to other data or another config.
    """
    notes = []
    for folder in reversed(run.checkpoint_folders()):
        if fault := damage(folder) or _fault_of_marker(folder):
            notes.append(f"{folder} {fault}; passed over")
            continue
        if config is not None:
            there, remedy = read_marker(folder), f"choose another --out, or remove {run.root}"
            keys, hashes = scientific(config), ({"data hash": there.data_hash}, {"data hash": data_hash})
            what, made = f"{folder.name} was made with another config", dict(there.scientific)
            extensions = (find_manifest(run) or Manifest()).extensions
            if extensions and extensions[-1].to_steps == config.training.steps:  # only so may steps be others than then
                earlier = {e.from_steps: config.training.steps for e in extensions}
                made["training.steps"] = earlier.get(made["training.steps"], made["training.steps"])
            refuse_other_keys(run, what, made, keys, remedy)
            refuse_differences(f"{folder}: made with another data", *hashes, remedy)
        return folder, notes
    return None, notes


def _fault_of_marker(folder: Path) -> str | None:
    try:
        step = read_marker(folder).step
    except WrongForm as error:
        return f"has a COMPLETE marker of another form ({error})"
    return None if step == step_of(folder) else f"is the checkpoint of step {step} by its marker"


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The consolidated weights of a checkpoint folder, or of a weights.pt, on the CPU; UserError where it is none."""
    file = path / WEIGHTS if path.is_dir() else path
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; name the {WEIGHTS} of a checkpoint folder") from None
    except Exception as error:  # torch has no one type for an archive that it cannot read
        raise UserError(f"{file}: cannot be read as weights ({first_line(error)}); take another checkpoint") from None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{file}: holds no weights by name; name the {WEIGHTS} of a checkpoint folder")
    return weights


def universal_form(folder: Path | None, config: RunConfig) -> Path | None:
    """The folder for the universal form of a checkpoint, where it loads in no other; None: it loads as it is.

    UserError where it was cut over processes in a way that cannot go on as the config's. The weights alone always can.
    """
    if folder is None:
        return None
    there, here = read_marker(folder).layout, Sharding.of_run(config)
    if there == here or (there.strategy in WHOLE and here.strategy in WHOLE):
        return None
    if config.training.optimizer != "adamw":
        why = "DeepSpeed's universal checkpoint carries AdamW's state only"
    elif there.strategy not in RESHARDABLE or here.strategy not in RESHARDABLE:
        why = "DeepSpeed's universal checkpoint carries it between zero1 and zero2 only"
    elif config.training.precision != "32-true":
        why = "DeepSpeed's universal checkpoint is not measured in bf16-mixed"
    else:
        return folder.with_name(f"universal-{folder.name}")
    raise UserError(
        f"cluster.strategy: the checkpoint is of {there}, and its full state cannot go on as {here} ({why}); take the "
        "same strategy and number of processes, or start another cell from the weights alone with "
        "training.initial_weights"
    )


def reshard(folder: Path, target: Path) -> None:
    """Convert a checkpoint folder for any number of ranks, into its `universal_form`, once. Call on the first rank."""
    if damage(target) is None:
        return
    partial = target.with_name(f"partial-{target.name}")
    for leftover in (target, partial):
        remove_tree(leftover)
    command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / STATE / "checkpoint"), "--output_folder", str(partial / "checkpoint")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    with tethered():  # a killed start must not leave a converter behind that writes into the next one's folder
        done = subprocess.run(command, capture_output=True, encoding="utf-8", preexec_fn=lambda: None)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remove_tree(partial)
        raise UserError(
            f"{folder}: DeepSpeed could not reshard it for another number of processes ({last[:200]}); go on with "
            f"{read_marker(folder).layout}"
        )
    mark_complete(partial)
    os.replace(partial, target)
    sync(target.parent)
