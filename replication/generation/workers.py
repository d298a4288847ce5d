"""Cells dealt out to worker processes, each on a device of its own; and what is shown meanwhile. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress

from replication.config import ClusterConfig
from replication.console import Meter, progress, say
from replication.errors import UserError
from replication.generation.samples import Samples, Shard
from replication.processes.launcher import end, how_it_was_ended, start
from replication.processes.preemption import Preempted, stop_requested
from replication.runs.failures import last_line

POLL_SECONDS = 0.2
SHOW_SECONDS = 2.0
"""Between two looks at what the workers have brought to the disk."""

# ---------------------------------------------------------------- what is shown


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


# ---------------------------------------------------------------- processes


def slots(cluster: ClusterConfig, jobs: int | None) -> list[dict[str, str]]:
    """Environment of each process: a GPU of its own, or a share of the cores.

    Raises:
        UserError: more jobs than GPUs.
    """
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
    """A cell whose shards are being sampled, and the lock on it."""

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

    def end_shard(self, worker: _Worker, finished: Callable[[Samples], None]) -> None:
        """Note how a shard ended; with the last one, finish the cell."""
        code, log = worker.process.returncode, worker.shard.path(self.samples.run, ".log")
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


@dataclass
class _Worker:
    cell: _Cell
    shard: Shard
    slot: Mapping[str, str]
    process: subprocess.Popen[bytes]


def run_workers(
    todo: Sequence[Samples],
    slots: Sequence[Mapping[str, str]],
    command: Callable[[Samples, Shard], list[str]],
    display: Display,
    finished: Callable[[Samples], None],
) -> dict[str, str]:
    """Sample cells in one process a slot. A worker that fails or dies fails its cell alone.

    Args:
        todo: the cells.
        slots: environment variables of each worker, such as its device.
        command: that samples one shard of a cell.
        display: for progress.
        finished: called with each cell once all of its shards are on the disk, while its lock is held.

    Returns:
        Why cells failed, by name, one line each.

    Raises:
        Preempted: told to stop; the workers have been ended, and what they brought to the disk is kept.
    """
    cells = {samples.name: _Cell(samples) for samples in todo}
    for cell in cells.values():
        cell.look()
    tokens_before = sum(cell.tokens for cell in cells.values())
    waiting, free, running = deal(todo, len(slots)), list(slots), list[_Worker]()
    shown = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                samples, shard = waiting.pop(0)
                if cells[samples.name].begin(shard):
                    running.append(_start(cells[samples.name], shard, free.pop(0), command))
            time.sleep(POLL_SECONDS)
            if stop_requested():
                raise Preempted("told to stop; completions of whole batches are kept")
            for worker in [w for w in running if w.process.poll() is not None]:
                running.remove(worker)
                free.append(worker.slot)
                worker.cell.end_shard(worker, finished)
            if time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                for worker in running:
                    worker.cell.look()
                tokens = sum(cell.tokens for cell in cells.values()) - tokens_before
                display.update(sum(cell.done for cell in cells.values()), tokens)
    except BaseException:
        end([w.process for w in running])
        raise
    finally:
        for cell in cells.values():
            cell.lock.close()
    return {name: cell.error for name, cell in cells.items() if cell.error}


def _start(
    cell: _Cell, shard: Shard, slot: Mapping[str, str], command: Callable[[Samples, Shard], list[str]]
) -> _Worker:
    run, stop_signal = cell.samples.run, cell.samples.config.cluster.stop_signal
    with open(shard.path(run, ".log"), "wb") as log:
        return _Worker(cell, shard, slot, start(command(cell.samples, shard), slot, stop_signal, log))
