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
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from replication.config import RunConfig, scientific
from replication.console import say
from replication.data.module import Batch
from replication.errors import UserError, first_line, is_disk_full
from replication.model.transformer import weights_sha256
from replication.processes.preemption import Times, record_times
from replication.runs.files import mark_complete, naming, remove_tree, sync
from replication.runs.layout import WEIGHTS, RunDir, step_of
from replication.runs.records import to_json
from replication.training.checkpoint_files import (
    Marker,
    Sharding,
    checkpoint_folder,
    complete_folders,
    load_plain,
    newest_checkpoint,
    remove_abandoned,
)
from replication.training.host_copy import STATE, HostCopy, save_hashed
from replication.training.measure import Measure
from replication.training.module import LanguageModel
from replication.training.phases import during, writing
from replication.training.ranks import barrier, is_first, rank
from replication.training.strategies import consolidated_weights


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
    state = load_plain(path)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
