"""What `replicate prepare` shows while it works: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 30.0  # between lines of progress where there is no terminal


class Reporter:
    """Lines and bars on a console; on none, nothing."""

    def __init__(self, console: Console | None):
        self._console = console

    def line(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar for the time of the block; call what is given with the number done so far."""
        with self._progress(label, total, 0, MofNCompleteColumn(), TimeElapsedColumn()) as update:
            yield update or (lambda done: None)

    @contextmanager
    def tokens_bar(
        self, label: str, total: int, done: int, whole: Meter | None = None
    ) -> Iterator[Callable[[int], None]]:
        """bar for tokens, with their speed; where there is no terminal, a line every LINE_SECONDS.

        Args:
            label: of the source.
            total: tokens at which it is done.
            done: tokens that are there at the start.
            whole: of all sources, moved along with this one; none: there are no others.
        """
        speed = TextColumn("{task.completed:,} of {task.total:,} tokens, {task.fields[speed]:,.0f}/s")
        meter = Meter(total, done)
        with self._progress(label, total, done, speed, TextColumn("{task.fields[whole]}")) as show:

            def update(now: int) -> None:
                if whole is not None:
                    whole.now += now - meter.now
                meter.now = now
                others = f"all sources: {whole.share:.0%}, {whole.left} left" if whole is not None else ""
                if show is not None:
                    show(now, speed=meter.speed, whole=others)
                elif meter.is_due():
                    self.line(f"{label}: {meter}" + (f"; {others}" if others else ""))

            yield update

    @contextmanager
    def _progress(
        self, label: str, total: int | None, done: int, *columns: ProgressColumn
    ) -> Iterator[Callable[..., None] | None]:
        """A bar's update, or None where there is no terminal."""
        if self._console is None or not self._console.is_terminal:
            yield None
            return
        parts = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), *columns)
        with Progress(*parts, console=self._console, transient=True) as progress:
            task = progress.add_task(label, total=total, completed=done, speed=0.0, whole="")
            yield lambda now, **fields: progress.update(task, completed=now, **fields)


class Meter:
    """How fast something goes, and how long it will take: over the time since it was made.

    Attributes:
        now: how much is done.
    """

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic):
        self.total, self.now, self._first, self._clock = total, done, done, clock
        self._started = self._said = clock()

    @property
    def speed(self) -> float:
        """Per second."""
        return (self.now - self._first) / max(self._clock() - self._started, 1e-9)

    @property
    def share(self) -> float:
        return self.now / self.total

    @property
    def left(self) -> str:
        """How long the rest will take."""
        return str(timedelta(seconds=round((self.total - self.now) / self.speed))) if self.speed else "unknown time"

    def skip(self, n: int) -> None:
        """Take as done what will never have to be: it says nothing of the speed."""
        self.now += n
        self._first += n

    def is_due(self) -> bool:
        """Whether LINE_SECONDS have passed since it last was."""
        due = self._clock() - self._said >= LINE_SECONDS
        if due:
            self._said = self._clock()
        return due

    def __str__(self) -> str:
        done = f"{self.now:,} of {self.total:,} tokens ({self.share:.0%})"
        return f"{done}, {self.speed:,.0f} tokens/s, {self.left} left"
