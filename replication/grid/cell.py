"""One cell from nothing to COMPLETE: train, then generate. The only place that knows this order."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from replication.config import RunConfig
from replication.console import say
from replication.errors import UserError, is_lost_peer
from replication.processes.preemption import Preempted, stop_requested
from replication.runs.failures import clear_failure, record_failure
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import mark_cell_complete, refuse_untrained
from replication.runs.starts import refuse_other_config

if TYPE_CHECKING:
    from replication.data.store import TokenStore

Stage = Literal["all", "train", "generate"]

HELD_SECONDS = 600.0  # a SLURM job waits so long for a cell that another process holds


def run_cell(config: RunConfig, suite_dir: SuiteDir, console: Console, stage: Stage = "all") -> None:
    """Run one cell of an output folder to the end; a complete one is left alone, an interrupted one goes on.

    Stage `train` ends before the completions are generated; `generate`, in one process of a trained cell, makes them:
    so that a run on many GPUs does not hold them for what one does. A failure is recorded in the cell's FAILED file,
    with its first line, before it is raised. Raises Preempted where the run was told to stop, and did; UserError as
    training.train, where another process runs this cell, and where an untrained one is to generate.
    """
    from replication.data.store import TokenStore
    from replication.generation.generate import generate
    from replication.training.environment import import_torchmetrics
    from replication.training.ranks import launched_rank, leave_group

    run = suite_dir.cell(config.arm, config.seed)
    first = launched_rank() == 0
    with hold_cell(run, first, console):
        if first:
            refuse_other_config(config, run)
        if run.complete.is_file():
            say(console, f"{config.arm}/seed-{config.seed}: complete already")
            return
        if stage == "generate":
            refuse_untrained(run)  # here, where the error of its training stays
        if first:
            clear_failure(run)
        try:
            store = TokenStore.open(suite_dir.data_folder(config.data.dir))
            check_before_training(config, store)
            if first and (note := suite_dir.link_tensorboard(config.arm, config.seed)):
                say(console, note, style="yellow")
            if stage != "generate":
                import_torchmetrics()
                from replication.training.train import train  # brings Lightning

                train(config, run, store, console)
                leave_group()
            if not first or (stage == "train" and config.generation.prompts):
                return
            if config.generation.prompts:
                generate(config, run, store, console)
            mark_cell_complete(config, run)
        except Preempted:
            leave_group()
            raise
        except Exception as error:
            if not is_lost_peer(error):  # the rank that failed first says why
                record_failure(run, error)
            raise


@contextmanager
def hold_cell(run: RunDir, first: bool, console: Console) -> Iterator[None]:
    """Hold the cell; its first rank does so for all. UserError: another live process holds it.

    A SLURM job waits for it, up to HELD_SECONDS: a job that was requeued because its node was lost may find that its
    earlier life lives on there. Only the end of that process, which frees the lock, proves that it writes no more.
    Told to stop while it waits, it raises Preempted.
    """
    holder = run.root / ".lock"
    slurm = {name: os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")}
    here = f"job {slurm['JOB_ID']}.{slurm['STEP_ID']}, restart {slurm['RESTART_COUNT'] or 0}"
    if slurm["STEP_ID"]:
        _wait_for_cell(run, holder, here, console)
    if not first:
        yield
        return
    with run.lock():
        with suppress(OSError):  # of a full disk others speak
            who = here if slurm["STEP_ID"] else "a run"
            holder.write_text(f"{who}\nprocess {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield


def _wait_for_cell(run: RunDir, holder: Path, here: str, console: Console) -> None:
    """Return when no process of another job, or of another life of this one, holds the cell; see hold_cell."""
    deadline, said = time.monotonic() + HELD_SECONDS, False
    while run.is_locked():
        there = holder.read_text(encoding="utf-8", errors="replace").splitlines()
        if there[:1] == [here]:  # our own first rank
            return
        who = ", ".join(there) or "another process"
        if stop_requested():
            raise Preempted(f"{run.root}: told to stop while {who} held the cell")
        if time.monotonic() >= deadline:
            raise UserError(
                f"{run.root}: {who} has held the cell for {HELD_SECONDS / 60:g} minutes; a node that SLURM gave up may "
                "still work on it: end that process, or wait for its end, then `replicate grid retry`"
            )
        if not said:
            say(console, f"waiting up to {HELD_SECONDS / 60:g} minutes for {who}, which holds this cell")
        said = True
        time.sleep(0.5)


def check_before_training(config: RunConfig, store: TokenStore) -> None:
    """Raise UserError for what would otherwise be noticed only after hours: data, mixture, validation, prompts."""
    from replication.data.prompts import load_prompts, prompt_tokens
    from replication.data.store import training_order, validation_set

    store.check(config)
    training_order(config, store)
    validation_set(config, store)
    if config.generation.prompts:
        prompts = load_prompts(config.generation)
        prompt_tokens(config.generation.template, prompts, store.tokenizer, store.end_of_text_id)
