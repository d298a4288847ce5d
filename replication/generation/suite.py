"""Completions of a suite's trained cells, in this process or dealt out to several; torch loads when it samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console

from replication.config import load_run, load_suite
from replication.console import say
from replication.errors import UserError
from replication.generation.samples import Samples, Shard
from replication.generation.workers import Display, run_workers, slots
from replication.processes.preemption import listen
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import is_trained, mark_cell_complete


def trained_cells(suite_dir: SuiteDir, arm: str | None, seed: int | None) -> tuple[list[RunDir], list[str]]:
    """The folders of trained cells, and the names of those that are not, in the suite's order, seed by seed.

    Args:
        suite_dir: the output folder.
        arm: only this one.
        seed: only this one.

    Raises:
        UserError: nothing is trained.
    """
    begun = [(seed, arm) for arm, seed, run in suite_dir.cells() if run.config.is_file()]
    places = [(arm, f"seed-{seed}") for seed, arm in sorted(begun)]
    if suite_dir.suite.is_file():
        suite = load_suite(suite_dir.suite)
        places = [(a, f"seed-{s}") for s in suite.seeds for a in suite.arms] + places
    wanted = [(a, s) for a, s in dict.fromkeys(places) if arm in (None, a) and (seed is None or s == f"seed-{seed}")]
    runs = {f"{a}/{s}": RunDir(suite_dir.runs / a / s) for a, s in wanted}
    trained = [run for run in runs.values() if run.config.is_file() and is_trained(run)]
    if not trained:
        which = f"{arm or '*'}/seed-{'*' if seed is None else seed}"
        raise UserError(f"{suite_dir.runs}: no trained cell matches {which}; train first, with `replicate grid run`")
    return trained, [name for name, run in runs.items() if run not in trained]


def cells_to_sample(
    trained: Sequence[RunDir], flags: Sequence[str], again: bool, suite_dir: SuiteDir, console: Console
) -> tuple[list[Samples], int]:
    """Cells whose completions are missing or of other settings, and how many need nothing.

    Args:
        trained: folders of cells.
        flags: keys over each cell's config.
        again: take those too that need nothing.
        suite_dir: the output folder; a cell that is another's copy is passed over.
        console: for what is there already.
    """
    todo, n_there = [], 0
    for run in trained:
        config = load_run([run.config], flags)
        if suite_dir.cell(config.arm, config.seed) != run:  # its completions would go into that one's folder
            say(console, f"{run.root}: holds {config.arm}/seed-{config.seed}, a copy; passed over", style="yellow")
            continue
        samples = Samples.of(config, run)
        if again or not samples.are_there():
            suite_dir.data_folder(config.data.dir)
            todo.append(samples)
            continue
        n_there += 1
        say(console, f"{samples.name}: {len(samples.rows)} completions, there already")
        if not run.complete.is_file():
            with suppress(UserError), run.lock():  # a process that runs it will do so itself
                _settle(samples)
    return todo, n_there


def _settle(samples: Samples) -> None:
    """Mark a trained cell complete, if these are the completions that its own config asks for."""
    own = load_run([samples.run.config])
    if own.generation.prompts and Samples.of(own, samples.run).record == samples.record:
        if not samples.run.complete.is_file():
            mark_cell_complete(own, samples.run)
        samples.run.failed.unlink(missing_ok=True)


def sample_cells(
    todo: Sequence[Samples], suite_dir: SuiteDir, jobs: int | None, flags: Sequence[str], console: Console
) -> dict[str, str]:
    """Sample cells; why those that failed did, by name.

    Args:
        todo: the cells.
        suite_dir: the output folder.
        jobs: processes side by side; None: one a GPU, one on a CPU.
        flags: keys over each cell's config, for the workers.
        console: for progress.

    Raises:
        UserError: the only cell failed, or there are more jobs than GPUs.
        Preempted: told to stop.
    """
    if not todo:
        return {}
    workers = slots(todo[0].config.cluster, jobs)
    listen(todo[0].config.cluster.stop_signal)
    display = Display(console, sum(len(s.rows) for s in todo), sum(len(s.parts()) for s in todo))

    def finish(samples: Samples) -> None:
        count = samples.finish()
        _settle(samples)
        say(console, f"{samples.name}: {count} completions of {len(samples.prompts)} prompts")

    def command(samples: Samples, shard: Shard) -> list[str]:
        of_cell = ["--arm", samples.config.arm, f"--seed={samples.config.seed}", f"--shard={shard.i}/{shard.n}"]
        return [sys.executable, "-P", "-m", "replication", "generate", str(suite_dir.root), *of_cell, *flags]

    with display.shown():
        if len(workers) > 1:
            return run_workers(todo, workers, command, display, finish)
        failed = {}
        for samples in todo:
            try:
                with samples.run.lock():
                    samples.begin()
                    _sample_here(samples, Shard(), suite_dir, display)
                    finish(samples)
            except UserError as error:
                if len(todo) == 1:
                    raise
                failed[samples.name] = str(error)
        return failed


def sample_as_worker(run: RunDir, shard: Shard, suite_dir: SuiteDir, flags: Sequence[str]) -> None:
    """Sample one shard of a cell, whose lock the process that started this one holds."""
    samples = Samples.of(load_run([run.config], flags), run)
    listen(samples.config.cluster.stop_signal)
    _sample_here(samples, shard, suite_dir)


def _sample_here(samples: Samples, shard: Shard, suite_dir: SuiteDir, display: Display | None = None) -> None:
    from replication.data.store import TokenStore
    from replication.generation.generate import sample_shard

    on_step = display.steps_of(samples.config.generation.max_new_tokens) if display else None
    sample_shard(samples, shard, TokenStore.open(suite_dir.data_folder(samples.config.data.dir)), on_step)
