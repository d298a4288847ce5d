"""Which checkpoints a run can go on from: the layout of a full state, and how it crosses to another one.

single and DDP keep one whole state, which any number of ranks loads. ZeRO keeps shards: the same strategy on the same
number of ranks loads them as they are; DeepSpeed's universal checkpoint re-cuts them where CROSSINGS says so. What
cannot cross is refused by name; weights alone cross everywhere (training.initial_weights).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from replication.config import RunConfig
from replication.errors import UserError
from replication.processes.children import tethered
from replication.runs.files import damage, mark_complete, read_json, remove_tree, sync

WHOLE = ("single", "ddp")
CROSSINGS = {("zero1", "zero1"), ("zero1", "zero2"), ("zero2", "zero1"), ("zero2", "zero2")}
"""(from, to), at any number of ranks: what DeepSpeed's universal checkpoint was measured to carry (AdamW, fp32).
Between zero3 and the others it fails; from zero3 to zero3 on other ranks it loads, and trains on 4e-3 away."""


def layout(config: RunConfig) -> dict[str, Any]:
    """How the full state of a run is cut; stored with each checkpoint."""
    return {
        "strategy": config.cluster.strategy,
        "world_size": config.world_size,
        "offload_optimizer": config.cluster.offload_optimizer,
    }


def is_direct(there: dict[str, Any], config: RunConfig) -> bool:
    """Whether a state of that layout loads as it is.

    Raises:
        UserError: it does not, and cannot be re-cut.
    """
    here = layout(config)
    if there == here or (there["strategy"] in WHOLE and here["strategy"] in WHOLE):
        return True
    if config.training.optimizer != "adamw":
        why = "DeepSpeed's universal checkpoint carries AdamW's state only"
    elif (there["strategy"], here["strategy"]) not in CROSSINGS:
        why = "DeepSpeed's universal checkpoint carries it between zero1 and zero2 only"
    elif config.training.precision != "32-true":
        why = "DeepSpeed's universal checkpoint is not measured in bf16-mixed"
    else:
        return False
    raise UserError(
        f"cluster.strategy: the checkpoint is of {_words(there)}, and its full state cannot go on as {_words(here)} "
        f"({why}); take the same strategy and number of processes, or start another cell from the weights alone with "
        "training.initial_weights"
    )


def needs_recut(folder: Path | None, config: RunConfig) -> bool:
    """Whether a checkpoint folder loads only through its universal form (UserError as is_direct's)."""
    return folder is not None and not is_direct(read_json(folder / "COMPLETE")["layout"], config)


def state_to_load(folder: Path, config: RunConfig) -> Path:
    """What to hand to Lightning for a checkpoint folder: its own state, or where the first rank re-cuts it."""
    return recut_folder(folder) if needs_recut(folder, config) else folder / "trainer.ckpt"


def recut_folder(folder: Path) -> Path:
    return folder.with_name(f"universal-{folder.name}")


def recut(folder: Path) -> None:
    """Re-cut a checkpoint folder for any number of ranks, into a folder beside it, once. Call on the first rank.

    Raises:
        UserError: DeepSpeed's converter failed; names the last line of what it said.
    """
    target = recut_folder(folder)
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
            f"{folder}: DeepSpeed could not re-cut it for another number of processes ({last[:200]}); go on with "
            f"{_words(read_json(folder / 'COMPLETE')['layout'])}"
        )
    mark_complete(partial)
    os.replace(partial, target)
    sync(target.parent)


def _words(layout: dict[str, Any]) -> str:
    offload = " with offload" if layout["offload_optimizer"] else ""
    return f"{layout['strategy']} on {layout['world_size']} process(es){offload}"
