"""Going on from a checkpoint of another strategy or number of processes.

single and DDP keep one whole state, which any number of ranks loads. ZeRO keeps shards: the same strategy on the same
number of ranks loads them as they are; DeepSpeed's universal checkpoint reshards them where RESHARDABLE says so. What
cannot cross is refused by name; weights alone cross everywhere (training.initial_weights).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from replication.config import RunConfig
from replication.errors import UserError
from replication.processes.launcher import tethered
from replication.runs.files import damage, mark_complete, read_object, remove_tree, sync
from replication.runs.records import from_json

WHOLE = ("single", "ddp")
RESHARDABLE = {("zero1", "zero1"), ("zero1", "zero2"), ("zero2", "zero1"), ("zero2", "zero2")}
"""(from, to), at any number of ranks: what DeepSpeed's universal checkpoint was measured to carry (AdamW, fp32).
Between zero3 and the others it fails; from zero3 to zero3 on other ranks it loads, and trains on 4e-3 away."""


@dataclass(frozen=True)
class Sharding:
    """The cut of a run's full state over processes; stored with each checkpoint, under `layout`."""

    strategy: str = "single"
    world_size: int = 1
    offload_optimizer: bool = False

    @classmethod
    def of_run(cls, config: RunConfig) -> Sharding:
        return cls(config.cluster.strategy, config.world_size, config.cluster.offload_optimizer)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Sharding:
        return from_json(cls, read_object(folder / "COMPLETE")["layout"])

    def __str__(self) -> str:
        return f"{self.strategy} on {self.world_size} process(es){' with offload' if self.offload_optimizer else ''}"


def loads_as_it_is(there: Sharding, config: RunConfig) -> bool:
    """Whether a state loads without being resharded.

    Raises:
        UserError: it does not, and cannot be resharded.
    """
    here = Sharding.of_run(config)
    if there == here or (there.strategy in WHOLE and here.strategy in WHOLE):
        return True
    if config.training.optimizer != "adamw":
        why = "DeepSpeed's universal checkpoint carries AdamW's state only"
    elif (there.strategy, here.strategy) not in RESHARDABLE:
        why = "DeepSpeed's universal checkpoint carries it between zero1 and zero2 only"
    elif config.training.precision != "32-true":
        why = "DeepSpeed's universal checkpoint is not measured in bf16-mixed"
    else:
        return False
    raise UserError(
        f"cluster.strategy: the checkpoint is of {there}, and its full state cannot go on as {here} ({why}); take the "
        "same strategy and number of processes, or start another cell from the weights alone with "
        "training.initial_weights"
    )


def needs_reshard(folder: Path | None, config: RunConfig) -> bool:
    """Whether a checkpoint folder loads only through its universal form (UserError as loads_as_it_is's)."""
    return folder is not None and not loads_as_it_is(Sharding.of_checkpoint(folder), config)


def state_to_load(folder: Path, config: RunConfig) -> Path:
    """Path to hand to Lightning for a checkpoint folder: its own state, or where the first rank reshards it."""
    return resharded_folder(folder) if needs_reshard(folder, config) else folder / "trainer.ckpt"


def resharded_folder(folder: Path) -> Path:
    return folder.with_name(f"universal-{folder.name}")


def reshard(folder: Path) -> None:
    """Convert a checkpoint folder for any number of ranks, into a folder beside it, once. Call on the first rank.

    Raises:
        UserError: DeepSpeed's converter failed; names the last line of what it said.
    """
    target = resharded_folder(folder)
    if target.exists() and damage(target) is None:
        return
    partial = folder.with_name(f"partial-universal-{folder.name}")
    for leftover in (target, partial):
        remove_tree(leftover)
    source = folder / "trainer.ckpt"
    command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source / "checkpoint"), "--output_folder", str(partial / "checkpoint")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    with tethered():  # a killed start must not leave a converter behind that writes into the next one's folder
        done = subprocess.run(command, capture_output=True, encoding="utf-8", preexec_fn=lambda: None)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remove_tree(partial)
        raise UserError(
            f"{folder}: DeepSpeed could not reshard it for another number of processes ({last[:200]}); go on with "
            f"{Sharding.of_checkpoint(folder)}"
        )
    mark_complete(partial)
    os.replace(partial, target)
    sync(target.parent)
