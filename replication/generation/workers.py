"""Cells dealt out to worker processes, each on a device of its own; and what is shown meanwhile. Imports no torch."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from replication.console import Meter
from replication.errors import UserError
from replication.generation.parts import Samples, Share
from replication.processes.children import end
from replication.processes.launcher import how_it_was_ended, start
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
        self._progress: Progress | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task = self._progress.add_task("completions", total=self._meter.total, note="starting")
            yield

    def steps_of(self, max_new_tokens: int) -> Callable[[int, int], None]:
        """What a cell that is sampled in this process tells of each step (see sampling.complete)."""

        def step(n_tokens: int, n_ended: int) -> None:
            self._tokens += n_tokens
            self._done += n_ended
            # each open row got a token; those that ended take their average of them along
            left = 1 - n_ended / n_tokens if n_tokens else 1.0
            self._open_tokens = (self._open_tokens + n_tokens) * left
            self._show(self._open_tokens / max_new_tokens)

        return step

    def update(self, n_done: int, n_tokens: int) -> None:
        """What workers have done: completions in all, and the tokens of those that were not there before."""
        self._done, self._tokens = n_done, n_tokens
        self._show(0.0)

    def _show(self, begun: float) -> None:
        self._meter.now = self._done + begun  # in completions, the begun ones by parts
        if self._progress is not None:
            self._progress.update(self._task, completed=self._meter.now, note=str(self))
        elif self._meter.is_due():
            self.console.print(str(self), highlight=False)

    def __str__(self) -> str:
        speed = self._tokens / max(time.monotonic() - self._started, 1e-9)
        return f"{self._done} of {self._meter.total} completions, {speed:,.0f} tokens/s, {self._meter.left} left"


# ---------------------------------------------------------------- processes


@dataclass
class _Cell:
    """A cell whose shares are being sampled, and the lock on it."""

    samples: Samples
    shares: int
    lock: ExitStack = field(default_factory=ExitStack)
    ended: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass
class _Worker:
    cell: _Cell
    share: Share
    slot: Mapping[str, str]
    process: subprocess.Popen[bytes]


def deal(todo: Sequence[Samples], jobs: int) -> list[tuple[Samples, Share]]:
    """Cells whole, one after the other; where there are fewer than workers, in as many shares as keep these busy."""
    n = max(1, jobs // max(1, len(todo)))
    return [(s, Share(i, min(n, len(s.rows)))) for s in todo for i in range(min(n, len(s.rows)))]


def run_workers(
    todo: Sequence[Samples],
    slots: Sequence[Mapping[str, str]],
    command: Callable[[Samples, Share], list[str]],
    display: Display,
    finished: Callable[[Samples], None],
) -> dict[str, str]:
    """Sample cells in one process a slot. A worker that fails or dies fails its cell alone.

    Args:
        todo: the cells.
        slots: environment variables of each worker, such as its device.
        command: that samples one share of a cell.
        display: for progress.
        finished: called with each cell once all of its shares are on the disk, while its lock is held.

    Returns:
        Why cells failed, by name, one line each.

    Raises:
        Preempted: told to stop; the workers have been ended, and what they brought to the disk is kept.
    """
    cells: dict[str, _Cell] = {}
    failed: dict[str, str] = {}
    waiting, free, running = deal(todo, len(slots)), list(slots), list[_Worker]()
    counts = _Counts(todo)
    shown = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                samples, share = waiting.pop(0)
                if samples.name not in failed:
                    _begin(samples, share, cells, failed)
                if samples.name not in failed:
                    running.append(_start(cells[samples.name], share, free.pop(0), command))
            time.sleep(POLL_SECONDS)
            if stop_requested():
                raise Preempted("told to stop; completions of whole batches are kept")
            for worker in [w for w in running if w.process.poll() is not None]:
                running.remove(worker)
                free.append(worker.slot)
                _ended(worker, failed, counts, finished)
            if time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                display.update(*counts.now())
    except BaseException:
        end([w.process for w in running])
        raise
    finally:
        for cell in cells.values():
            cell.lock.close()
    return failed


def _begin(samples: Samples, share: Share, cells: dict[str, _Cell], failed: dict[str, str]) -> None:
    """Take hold of a cell at its first share."""
    if samples.name in cells:
        return
    cell = _Cell(samples, share.n)
    try:
        cell.lock.enter_context(samples.run.lock())
    except UserError as error:
        failed[samples.name] = str(error)
        return
    cells[samples.name] = cell
    samples.begin()
    samples.run.samples_part.mkdir(parents=True, exist_ok=True)


def _start(
    cell: _Cell, share: Share, slot: Mapping[str, str], command: Callable[[Samples, Share], list[str]]
) -> _Worker:
    stop_signal = cell.samples.config.cluster.stop_signal
    with open(share.path(cell.samples.run, ".log"), "wb") as log:
        return _Worker(cell, share, slot, start(command(cell.samples, share), slot, stop_signal, log))


def _ended(worker: _Worker, failed: dict[str, str], counts: _Counts, finished: Callable[[Samples], None]) -> None:
    """Note how a share ended; with a cell's last one, finish the cell or say why it failed."""
    cell, code = worker.cell, worker.process.returncode
    cell.ended += 1
    if code:
        log = worker.share.path(cell.samples.run, ".log")
        said = last_line(log).removeprefix("error: ") if code > 0 else how_it_was_ended(code)
        cell.errors.append(f"{said or f'its worker ended with code {code}'} (log: {log})")
    if cell.ended < cell.shares:
        return
    if cell.errors:
        failed[cell.samples.name] = cell.errors[0]
    else:
        counts.keep(cell.samples)
        finished(cell.samples)
    cell.lock.close()


class _Counts:
    """Completions and tokens that workers have brought to the disk; finished cells keep theirs."""

    def __init__(self, todo: Sequence[Samples]) -> None:
        self.todo, self.kept = todo, dict[str, tuple[int, int]]()
        self.tokens_before = sum(_on_disk(samples)[1] for samples in todo)

    def keep(self, samples: Samples) -> None:
        self.kept[samples.name] = _on_disk(samples)

    def now(self) -> tuple[int, int]:
        """(completions in all, tokens since the start)."""
        found = [self.kept.get(samples.name) or _on_disk(samples) for samples in self.todo]
        return sum(n for n, _ in found), sum(tokens for _, tokens in found) - self.tokens_before


def _on_disk(samples: Samples) -> tuple[int, int]:
    lines = samples.parts().values() if samples.run.samples_part.is_dir() else ()
    return len(lines), sum(line["tokens"] for line in lines)
