"""What `replicate prepare` shows while it works: a bar on a terminal, one line a source anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

POLL_SECONDS = 0.25


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
        if self._console is None or not self._console.is_terminal:
            yield lambda done: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def polled_bar(self, label: str, total: int, done: Callable[[], int]) -> Iterator[None]:
        """A bar whose count is asked for from time to time: for work in other processes."""
        with self.bar(label, total) as update:
            stop = threading.Event()

            def poll() -> None:
                while not stop.wait(POLL_SECONDS):
                    update(done())

            thread = threading.Thread(target=poll, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
