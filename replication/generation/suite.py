"""Completions of a suite's trained cells, in this process or dealt out to several; torch loads when it samples."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress

from replication.config import ClusterConfig, load_run, load_suite
from replication.console import Meter, progress, say
from replication.errors import UserError
from replication.generation.completions import Samples, Shard
from replication.processes.launcher import end, how_it_was_ended, start
from replication.processes.preemption import Preempted, listen, stop_requested
from replication.runs.failures import last_line
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import is_trained, mark_cell_complete

POLL_SECONDS = 0.2
SHOW_SECONDS = 2.0  # between two looks at what the workers have brought to the disk


def trained_cells(suite_dir: SuiteDir, arm: str | None, seed: int | None) -> tuple[list[RunDir], list[str]]:
    """The folders of trained cells, and the names of those that are not, in the suite's order, seed by seed.

    Only those of an arm or a seed, where they are named; UserError where nothing is trained.
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
    trained: Sequence[RunDir],
    flags_of: Callable[[RunDir], Sequence[str]],
    again: bool,
    suite_dir: SuiteDir,
    console: Console,
) -> tuple[list[Samples], int]:
    """Cells whose completions are missing or of other settings (with `again`: all), and how many need nothing."""
    todo, n_there = [], 0
    for run in trained:
        config = load_run([run.config], flags_of(run))
        if suite_dir.cell(config.arm, config.seed).root != run.root:  # its completions would go into that one's folder
            say(console, f"{run.root}: holds {config.arm}/seed-{config.seed}, a copy; passed over", style="yellow")
            continue
        samples = Samples.of(config, run)
        if again or not samples.are_there():
            suite_dir.data_folder(config.data.dir)  # UserError where it is missing: now, not after hours
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
    if not samples.run.setting and own.generation.prompts and Samples.of(own, samples.run).record == samples.record:
        if not samples.run.complete.is_file():
            mark_cell_complete(own, samples.run)
        samples.run.failed.unlink(missing_ok=True)


def sample_cells(
    todo: Sequence[Samples], suite_dir: SuiteDir, jobs: int | None, flags: Sequence[str], console: Console
) -> dict[str, str]:
    """Sample cells in `jobs` processes (None: one a GPU, one on a CPU); why those that failed did, by name.

    UserError where the only cell failed.
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
        of_cell += ["--setting", samples.run.setting] if samples.run.setting else []
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


def slots(cluster: ClusterConfig, jobs: int | None) -> list[dict[str, str]]:
    """Environment of each process: a GPU of its own, or a share of the cores; UserError for more jobs than GPUs."""
    devices = [] if cluster.accelerator == "cpu" else visible_gpus()
    if devices:
        if jobs is not None and jobs > len(devices):
            raise UserError(
                f"--jobs: {jobs} processes on {len(devices)} GPU(s); at most one each, and generation.rows_at_once "
                "fills a GPU better"
            )
        return [{"CUDA_VISIBLE_DEVICES": device} for device in devices[:jobs]]
    jobs = jobs or 1
    threads = cluster.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // jobs)
    return [{"OMP_NUM_THREADS": str(threads)}] * jobs


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    named = [d.strip() for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    count = torch.cuda.device_count()
    return named[:count] or [str(i) for i in range(count)]


def deal(todo: Sequence[Samples], jobs: int) -> list[tuple[Samples, Shard]]:
    """Cells whole, one after the other; where there are fewer than workers, in as many shards as keep these busy."""
    n = max(1, jobs // max(1, len(todo)))
    return [(s, Shard(i, min(n, len(s.rows)))) for s in todo for i in range(min(n, len(s.rows)))]


@dataclass
class _Cell:
    """A cell whose shards workers sample, each a process with a device of its own; and the lock on it."""

    samples: Samples
    shards_left: int = 0
    lock: ExitStack = field(default_factory=ExitStack)
    error: str = ""
    done: int = 0
    tokens: int = 0

    def begin(self, shard: Shard) -> bool:
        """Take hold of the cell at its first shard; whether it can be sampled."""
        if not self.shards_left and not self.error:
            try:
                self.lock.enter_context(self.samples.run.lock())
            except UserError as error:
                self.error = str(error)
            else:
                self.shards_left = shard.n
                self.samples.begin()
                self.samples.run.samples_part.mkdir(parents=True, exist_ok=True)
        return bool(self.shards_left)

    def end_shard(self, shard: Shard, code: int, finished: Callable[[Samples], None]) -> None:
        """Note how a shard's process ended; with the last one, finish the cell."""
        log = shard.path(self.samples.run, ".log")
        self.shards_left -= 1
        if code and not self.error:
            said = last_line(log).removeprefix("error: ") if code > 0 else how_it_was_ended(code)
            self.error = f"{said or f'its worker ended with code {code}'} (log: {log})"
        if not self.shards_left:
            self.look()
            if not self.error:
                finished(self.samples)
            self.lock.close()

    def look(self) -> None:
        """Count completions and tokens on the disk."""
        parts = self.samples.parts().values()
        self.done, self.tokens = len(parts), sum(c.tokens or 0 for c in parts)


def run_workers(
    todo: Sequence[Samples],
    environments: Sequence[Mapping[str, str]],
    command: Callable[[Samples, Shard], list[str]],
    display: Display,
    finished: Callable[[Samples], None],
) -> dict[str, str]:
    """Sample cells in one process an environment (see slots); why cells failed, by name, one line each.

    A worker that fails or dies fails its cell alone. `finished` is called with each cell once all of its shards are on
    the disk, while its lock is held. Preempted where told to stop, once the workers have ended.
    """
    cells = {samples.name: _Cell(samples) for samples in todo}
    for cell in cells.values():
        cell.look()
    tokens_before = sum(cell.tokens for cell in cells.values())
    waiting, free = deal(todo, len(environments)), list(environments)
    running: dict[subprocess.Popen[bytes], tuple[_Cell, Shard, Mapping[str, str]]] = {}
    shown = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                samples, shard = waiting.pop(0)
                cell = cells[samples.name]
                if cell.begin(shard):
                    environment = free.pop(0)
                    with open(shard.path(samples.run, ".log"), "wb") as log:
                        process = start(command(samples, shard), environment, samples.config.cluster.stop_signal, log)
                    running[process] = cell, shard, environment
            time.sleep(POLL_SECONDS)
            if stop_requested():
                raise Preempted("told to stop; completions of whole batches are kept")
            for process in [p for p in running if p.poll() is not None]:
                cell, shard, environment = running.pop(process)
                free.append(environment)
                cell.end_shard(shard, process.returncode, finished)
            if time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                for cell, *_ in running.values():
                    cell.look()
                tokens = sum(cell.tokens for cell in cells.values()) - tokens_before
                display.update(sum(cell.done for cell in cells.values()), tokens)
    except BaseException:
        end(list(running))
        raise
    finally:
        for cell in cells.values():
            cell.lock.close()
    return {name: cell.error for name, cell in cells.items() if cell.error}


class Display:
    """Completions done, tokens a second and time left; on a terminal a bar, elsewhere a line now and then."""

    def __init__(self, console: Console, n_completions: int, n_done: int) -> None:
        self.console = console
        self._meter = Meter(n_completions, n_done)
        self._done, self._open_tokens, self._tokens = n_done, 0.0, 0
        self._started = time.monotonic()
        self._bars: Progress | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with progress(self.console, "bar", "{task.fields[note]}", transient=True) as self._bars:
            self._task = self._bars.add_task("completions", total=self._meter.total, note="starting")
            yield

    def steps_of(self, max_new_tokens: int) -> Callable[[int, int], None]:
        """For a cell that is sampled in this process: called after each step with its tokens and ended completions."""

        def step(n_tokens: int, n_ended: int) -> None:
            self._tokens += n_tokens
            self._done += n_ended
            # each open row got a token; those that ended take their average of them along
            left = 1 - n_ended / n_tokens if n_tokens else 1.0
            self._open_tokens = (self._open_tokens + n_tokens) * left
            self._show(self._open_tokens / max_new_tokens)

        return step

    def update(self, n_done: int, n_tokens: int) -> None:
        """Of workers: completions in all, and the tokens of those that were not there before."""
        self._done, self._tokens = n_done, n_tokens
        self._show(0.0)

    def _show(self, begun: float) -> None:
        self._meter.now = self._done + begun  # the begun ones by parts
        if self._bars is not None:
            self._bars.update(self._task, completed=self._meter.now, note=str(self))
        elif self._meter.is_due():
            say(self.console, str(self))

    def __str__(self) -> str:
        speed = self._tokens / max(time.monotonic() - self._started, 1e-9)
        return f"{self._done} of {self._meter.total} completions, {speed:,.0f} tokens/s, {self._meter.left} left"
