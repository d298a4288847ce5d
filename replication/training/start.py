"""Which checkpoint a run goes on from: the first rank reads it whole and decides, the others follow.

A checkpoint of a large model is tens of GB, and every rank of every start would read all of it. No process group stands
yet when this is decided, so the word is passed through a file, signed with what is unique to this start.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from replication.config import RunConfig
from replication.errors import UserError
from replication.rundir import RunDir, read_object, write_json
from replication.training.checkpoints import newest_checkpoint, remove_abandoned
from replication.training.ranks import launched_rank

WAIT_SECONDS = 3600.0  # the first rank may read tens of GB from a slow file system
SIGNATURE = (
    "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip
_decisions = itertools.count()


def checkpoint_to_resume(run: RunDir, config: RunConfig, data_hash: str) -> tuple[Path | None, list[str]]:
    """The checkpoint folder to go on from, the same on every rank, and what the first rank has to say of damaged ones.

    Raises:
        UserError: see newest_checkpoint; on other ranks, where the first one never decides.
    """
    if launched_rank() == 0:
        remove_abandoned(run)  # it takes room that this run needs
    if config.world_size == 1:
        return newest_checkpoint(run, config, data_hash)
    path = run.start
    start = " ".join([str(next(_decisions)), *(os.environ.get(name, "-") for name in SIGNATURE)])
    if launched_rank() == 0:
        folder, notes = newest_checkpoint(run, config, data_hash)
        write_json(path, {"start": start, "checkpoint": folder.name if folder else None})
        return folder, notes
    name = _wait_for(path, start)
    return (run.checkpoints / name if name else None), []


def _wait_for(path: Path, start: str) -> str | None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            word = read_object(path)
        except UserError:
            word = {}  # an earlier start's, damaged: this one's replaces it
        if word.get("start") == start:
            return str(word["checkpoint"]) if word["checkpoint"] else None
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: the first rank has not decided within {WAIT_SECONDS:.0f} seconds which checkpoint to go on "
                "from; do all nodes see this folder?"
            )
        time.sleep(0.05)
