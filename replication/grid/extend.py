"""`replicate grid extend`: every cell of a folder is to have more steps, and says so; nothing is trained here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from rich.console import Console

from replication.config import SuiteConfig, flatten, set_by_flags, to_dict
from replication.console import timestamp
from replication.errors import UserError
from replication.grid.cells import Cell, load_cells, write_configs, write_suite
from replication.grid.submissions import jobs_of_cells, note, queue_of, submissions
from replication.grid.submit import one_at_a_time
from replication.protocol.preregistration import read_plan, register
from replication.runs.failures import clear_failure
from replication.runs.files import read_object
from replication.runs.layout import SuiteDir, step_of
from replication.runs.ledger import append_of_cell
from replication.runs.manifest import Extension, Manifest, read_manifest, update_manifest


def extend(suite: SuiteConfig, suite_dir: SuiteDir, steps: int, why: str, console: Console) -> tuple[int, list[str]]:
    """Amend the plan, rewrite suite.yaml, then mark each cell; the same call finishes one that was cut short.

    Returns how many cells have begun, and the flags with which `replicate grid run` goes on. Raises UserError, and
    changes nothing, where a cell of fewer steps is no beginning of one of more, cannot go on, or is in use.
    """
    if not (why := " ".join(why.split())):
        raise UserError("--why: is empty; plan and report quote the reason, so give one")
    longer = replace(suite, run=suite.run | {"training": {**suite.run.get("training", {}), "steps": steps}})
    with one_at_a_time(suite_dir), ExitStack() as held:
        cells = [cell for cell in load_cells(longer, suite_dir, again=True) if cell.run.config.is_file()]
        begun = [cell for cell in cells if cell.run.manifest.is_file()]
        if not begun:
            raise UserError(f"{suite_dir.root}: no cell has begun; run the suite with --training.steps={steps}")
        for cell in begun:
            held.enter_context(cell.run.lock())
        shorter = [cell for cell in cells if cell.config.training.steps != steps]
        for message in _refusals(suite_dir, shorter, steps, console):
            raise UserError(message)
        after = [replace(c, config=replace(c.config, training=replace(c.config.training, steps=steps))) for c in cells]
        keys = flatten(to_dict(after[0].config))
        flags = list(set_by_flags(longer, after[0].arm, after[0].seed, keys).values())
        if (record := read_plan(suite_dir)) is not None:
            plan = record.plan
            planned = replace(longer, seeds=plan.seeds, analysis=plan.analysis, diverged=plan.diverged)
            register(suite_dir, planned, flags, amend=f"extended to {steps:,} steps: {why}")
        write_suite(longer, suite_dir, suite)
        at = timestamp()
        for cell, more in zip(cells, after, strict=True):
            if cell in shorter:
                _mark(cell, more, why, at)
    return len(begun), flags


def _refusals(suite_dir: SuiteDir, cells: Sequence[Cell], steps: int, console: Console) -> Iterator[str]:
    if suite_dir.launch.is_dir() and jobs_of_cells(submissions(suite_dir), queue_of(suite_dir, console) or []):
        yield f"{suite_dir.root}: has jobs in the queue; wait for them, or `replicate grid cancel {suite_dir.root}`"
    if cells and (suite_dir.judging.exists() or suite_dir.votes.exists()):
        yield (
            f"{suite_dir.judging}: completions at the present steps are judged there, and an extension replaces them; "
            "extend a copy of the folder without judging, sealed and votes.csv"
        )
    begin = f"begin a suite with --training.steps={steps} in another --out"
    for cell in cells:
        t, budget, newest = cell.config.training, cell.config.data.token_budget, cell.run.newest_marked()
        if steps < t.steps:
            yield f"--steps: {steps:,}, and {cell.name} has {t.steps:,}; give more than that"
        if t.decay_steps:
            yield (
                f"training.decay_steps: the learning rate falls over the last {t.decay_steps:,} of {t.steps:,} steps, "
                f"which are none of a run of {steps:,}; only a constant rate after the warm-up can be extended: {begin}"
            )
        if cell.config.token_gain.function or cell.config.layer_gain.function:
            yield f"plugins: functions of {cell.arm} are told how many steps a run has, so they would act anew; {begin}"
        if budget is not None and (needed := steps * t.batch_tokens) > budget:
            yield (
                f"data.token_budget: {budget:,} tokens, and {steps:,} steps of {t.batch_tokens:,} read {needed:,}; "
                f"extend to {budget // t.batch_tokens:,} at most, or begin a suite with a larger budget: another corpus"
            )
        reached = step_of(newest) if newest and not read_object(newest / "COMPLETE").get("pruned_at") else 0
        if reached < ((read_manifest(cell.run) or Manifest()).step or 0):
            yield (
                f"{cell.run.checkpoints}: has no whole checkpoint to go on from (pruned, or removed); restore it, or "
                "begin another suite from its weights, with training.initial_weights"
            )


def _mark(cell: Cell, longer: Cell, why: str, at: str) -> None:
    """Make a cell one of more steps: its manifest, if it has begun; then its COMPLETE goes; then its config."""
    if (manifest := read_manifest(cell.run)) is not None:
        extension = Extension(at, cell.config.training.steps, longer.config.training.steps, why, cell.hash)
        kept = [e for e in manifest.extensions if e.from_steps != extension.from_steps]  # of a call that was cut short
        trained = ("step", "tokens", "data_chain", "wall_seconds", "final_weights_sha256", "finished_at", "speed")
        changes = dict.fromkeys(trained) | {"config_hash": longer.hash, "extensions": (*kept, extension)}
        append_of_cell(cell.run, "extension", from_steps=extension.from_steps, to_steps=extension.to_steps, why=why)
        update_manifest(cell.run, **changes)
        cell.run.complete.unlink(missing_ok=True)
        clear_failure(cell.run)
        if cell.run.jobs.is_file():
            note([cell.run], "extended")
    write_configs([longer])
