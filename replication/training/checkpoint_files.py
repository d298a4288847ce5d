"""Checkpoint folders as they lie on disk: found, checked, read, and made fit for another number of ranks.

Loads no Lightning: what samples, scores or exports a model starts seconds earlier.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from replication.config import RunConfig, refuse_differences, scientific
from replication.errors import UserError, first_line
from replication.processes.launcher import tethered
from replication.runs.files import damage, mark_complete, read_object, remove_tree, sync
from replication.runs.layout import STATE, WEIGHTS, RunDir, step_of
from replication.runs.manifest import Manifest, find_manifest
from replication.runs.records import WrongForm, from_json
from replication.runs.starts import refuse_other_keys

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


def load_plain(file: Path) -> dict[str, Any]:
    """Tensors, arrays and plain values of a file, on the CPU; UserError where it asks for anything else to run."""
    # the state of NumPy's generator is rebuilt by these
    numpy: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), np.ndarray(0).__reduce__()[0]]
    try:
        with torch.serialization.safe_globals(numpy):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch has no one type for an archive that it cannot read
        raise UserError(f"{file}: cannot be read as weights ({first_line(error)}); take another checkpoint") from None


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The consolidated weights of a checkpoint folder, or of a weights.pt, on the CPU; UserError where it is none."""
    file = path / WEIGHTS if path.is_dir() else path
    try:
        weights = load_plain(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; name the {WEIGHTS} of a checkpoint folder") from None
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
