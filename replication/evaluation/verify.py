"""Checkpoints drawn at random, validated again: whether the journal's losses are those of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lightning import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from replication.config import RunConfig, load_run
from replication.console import Reporter
from replication.data.module import ValidationBatches, batch_loader
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.model.transformer import weights_sha256
from replication.objectives.plugins import functions_of
from replication.runs.files import read_object
from replication.runs.journal import logged_steps, read_journal
from replication.runs.layout import RunDir, SuiteDir, step_of
from replication.runs.manifest import Manifest, package_versions, read_manifest
from replication.runs.starts import lasting_starts
from replication.training.checkpoint_files import complete_folders, load_weights
from replication.training.environment import arithmetic, determinism, prepare_torch
from replication.training.module import LanguageModel

TOLERANCE_NATS = {"64-true": 1e-9, "32-true": 1e-4}
"""By precision, of a mean over the validation set on another kind of machine; another precision has ROUGH_NATS."""
ROUGH_NATS = 5e-3


@dataclass(frozen=True)
class Verified:
    """A checkpoint, and what it was found to be."""

    cell: str
    step: int
    journal: float | None  # the validation loss in nats that the journal has
    now: float
    tolerance: float  # 0: the same kind of machine, so every bit has to be the same
    weights: str  # in what the weights are others than recorded; "" where they are not

    @property
    def holds(self) -> bool:
        return not self.weights and self.journal is not None and abs(self.now - self.journal) <= self.tolerance


def verify_cells(
    suite_dir: SuiteDir, n: int, seed: int, tolerance: float | None, reporter: Reporter
) -> Iterator[Verified]:
    """Validate n checkpoints again, of those whose step the journal has a validation of, drawn by a seed.

    UserError where there are fewer, or the corpus is another one.
    """
    found = []
    for arm, of_seed, run in suite_dir.cells():
        lines = logged_steps(read_journal(run.metrics))
        validated = {step for step, line in lines.items() if line.validation_loss is not None}
        found += [(f"{arm}/seed-{of_seed}", run, path) for path in complete_folders(run) if step_of(path) in validated]
    if len(found) < n:
        raise UserError(f"--cells: {n}, and {suite_dir.root} has {len(found)} validated checkpoints; ask for fewer")
    with reporter.bar("verify", n) as done:
        for i, (name, run, folder) in enumerate(Random(seed).sample(found, n), 1):
            yield verify_checkpoint(suite_dir, name, run, folder, tolerance)
            done(i)


def verify_checkpoint(suite_dir: SuiteDir, name: str, run: RunDir, folder: Path, tolerance: float | None) -> Verified:
    """Validate one checkpoint as its training did, on one device; without a tolerance, one by the machine."""
    config, manifest = load_run([run.config]), read_manifest(run) or Manifest()
    store = TokenStore.open(suite_dir.data_folder(config.data.dir))
    if store.hash != manifest.data.hash:
        raise UserError(f"{store.dir}: is another corpus than {name} was trained on; restore that")
    prepare_torch(config)
    functions_of(config, suite_dir.plugins.glob("*"))  # and where a plugin's model is
    weights, step = load_weights(folder), step_of(folder)
    sha256, complete = weights_sha256(weights), read_object(run.complete)
    recorded = {"the checkpoint's COMPLETE": read_object(folder / "COMPLETE").get("weights_sha256")}
    if step == config.training.steps and complete:
        recorded["the cell's COMPLETE"] = complete.get("final_weights_sha256")
    others = [place for place, value in recorded.items() if value not in (None, sha256)]
    module = LanguageModel(config, store.end_of_text_id, weights)
    trainer = Trainer(
        accelerator=config.cluster.accelerator,
        devices=1,
        precision=config.training.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[LightningEnvironment()],
    )
    with determinism(config.training.deterministic):
        trainer.validate(module, batch_loader(config, ValidationBatches(config, store), None), verbose=False)
    return Verified(
        name,
        step,
        logged_steps(read_journal(run.metrics))[step].validation_loss,
        float(module.validation.compute()["val/loss_nats"]),
        _tolerance(config, manifest, step) if tolerance is None else tolerance,
        f"not those of {' and '.join(others)}" if others else "",
    )


def _tolerance(config: RunConfig, manifest: Manifest, step: int) -> float:
    """0 where the start that validated at a step ran on this kind of machine with this torch, in one process."""
    starts, here = lasting_starts(manifest), arithmetic(config)
    last = next((start for start in reversed(starts) if (start.step or 0) < step), starts[0])
    same = last.machine is not None and dict(last.machine) == dict(here) and config.world_size == 1
    if same and last.packages.get("torch") == package_versions()["torch"]:
        return 0.0
    return TOLERANCE_NATS.get(config.training.precision, ROUGH_NATS)
