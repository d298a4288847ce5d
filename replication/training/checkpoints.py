"""Checkpoints: written to a new folder, marked complete, then renamed into place; the newest complete one is taken.

checkpoints/step-000150/trainer.ckpt    Lightning's full state: weights, optimizer, schedule, loops, the hash chain
checkpoints/step-000150/COMPLETE        names, sizes and checksums, and the hashes that a resume checks
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from replication.config import RunConfig, scientific_hash
from replication.data.module import Batch
from replication.errors import UserError
from replication.model.transformer import weights_sha256
from replication.rundir import RunDir, damage, mark_complete, read_json, remove_tree
from replication.training.measure import Measure
from replication.training.module import LanguageModel
from replication.training.ranks import barrier, is_first

STATE = "trainer.ckpt"


class Checkpoints(Callback):
    """Saves every `every_steps` and at the end.

    It saves at the start of the following step, not at the end of the step itself: by then the step has been
    validated and Lightning counts its batch as completed, so that a resumed run neither skips nor repeats one.
    """

    def __init__(self, config: RunConfig, run: RunDir, data_hash: str, measure: Measure) -> None:
        self.config, self.run, self.measure = config, run, measure
        self.identity = {"config_hash": scientific_hash(config), "data_hash": data_hash}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        at_boundary = batch_idx % self.config.accumulation == 0
        step = trainer.global_step
        if at_boundary and step > 0 and step % self.config.checkpoints.every_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take back the count of the batch that has begun: a resumed run would validate one batch early."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part]["ready"] = progress[part]["completed"]

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of the current step, unless it stands already, and remove the oldest."""
        step = trainer.global_step
        self.measure.check_finite(step)
        folder = checkpoint_folder(self.run, step)
        if folder.exists() and damage(folder) is None:
            return
        partial = folder.with_name(f"partial-{folder.name}")
        barrier()  # every rank has looked before the first one changes anything
        if is_first():
            remove_tree(folder)  # damaged: a run that went on from an earlier one replaces it
            remove_tree(partial)
            partial.mkdir(parents=True)
        trainer.save_checkpoint(partial / STATE)
        if is_first():
            self._complete(trainer, partial, folder)
        barrier()

    def _complete(self, trainer: Trainer, partial: Path, folder: Path) -> None:
        """Mark the new folder, move it into place, and remove the oldest; the first rank alone."""
        step = trainer.global_step
        facts = {
            "step": step,
            "tokens": self.measure.tokens,
            "data_chain": self.measure.chain,
            "wall_seconds": round(self.measure.elapsed(), 2),
        }
        if step == self.config.training.steps:
            facts["final_weights_sha256"] = weights_sha256(cast(LanguageModel, trainer.lightning_module).model)
        mark_complete(partial, {**facts, **self.identity})
        os.replace(partial, folder)
        for old in complete_folders(self.run)[: -self.config.checkpoints.keep_last]:
            remove_tree(old)


def checkpoint_folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step:06d}"


def complete_folders(run: RunDir) -> list[Path]:
    """Folders with a COMPLETE marker, oldest first (their files are not checked here)."""
    return sorted(p for p in run.checkpoints.glob("step-*") if (p / "COMPLETE").is_file())


def newest_checkpoint(run: RunDir, identity: dict[str, str] | None = None) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint folder, and one line about each damaged one that was passed over.

    Args:
        run: the cell.
        identity: config_hash and data_hash that the checkpoint must carry; None does not check.

    Raises:
        UserError: the checkpoint belongs to another config or other data.
    """
    notes = []
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        problem = damage(folder)
        if problem:
            notes.append(f"{folder} {problem}; passed over")
            continue
        marker = read_json(folder / "COMPLETE")
        for key, expected in (identity or {}).items():
            if marker.get(key) != expected:
                raise UserError(
                    f"{folder}: made with another {key.removesuffix('_hash')} ({marker.get(key)}, this run has "
                    f"{expected}); choose another --out, or remove {run.root}"
                )
        return folder, notes
    return None, notes
