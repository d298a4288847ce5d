"""Everything that is shown on a console, and the forms of times and counts: bars, tables, lines, dates, plurals."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import rich.progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

LINE_SECONDS = 30.0  # between lines of progress where there is no terminal


def plural(n: int, noun: str, more: str | None = None) -> str:
    """`1 seed`, `2 seeds`, `1,200 seeds`; `more` is the noun for other numbers than one, if it is not noun + s."""
    return f"{n:,} {noun if n == 1 else more or noun + 's'}"


def timestamp() -> str:
    """Now, to the second, with the offset from UTC: the form of every time in the files of a run."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def utc(seconds: float, to: Literal["minutes", "seconds"] = "seconds") -> str:
    """A moment, in seconds since 1970, as 2026-01-31 13:45[:00] in UTC."""
    return datetime.fromtimestamp(int(seconds), UTC).replace(tzinfo=None).isoformat(" ", to)


def duration(seconds: float | None) -> str:
    """h:mm:ss, with hours beyond 24; a dash where unknown."""
    if seconds is None:
        return "-"
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def own_command() -> str:
    """`replicate`, or its path where it is not on PATH."""
    own = Path(sys.executable).with_name("replicate")
    return "replicate" if shutil.which("replicate") or not own.exists() else str(own)


def say(console: Console, *parts: str | tuple[str, str], style: str = "") -> None:
    """Print one line as it is: not wrapped, no word taken for markup, no number coloured.

    The parts are joined without blanks; (text, style) colours one, as in say(console, ("failed", "red"), f" {name}").
    """
    console.print(Text.assemble(*parts, style=style), soft_wrap=True, highlight=False)


def table(
    title: str,
    columns: Sequence[str | Column],
    rows: Iterable[Sequence[object]] = (),
    *,
    header: bool = True,
    lines: bool = False,
    expand: bool = False,
) -> Table:
    """A table with its title on the left.

    Args:
        title: plain text; it may be empty.
        columns: their heads; ">head" is right-aligned, as numbers are. A rich Column where more is to be said, such as
            Column("item", no_wrap=True) or Column("found", overflow="fold").
        rows: cells, one a column. A string is plain text: brackets in it are no markup. A rich Text is shown in its
            style, anything else as str() of it; None is an empty cell.
        lines: whether there are some between the rows.
        expand: whether to the console's width.
    """
    made = [
        c if isinstance(c, Column) else Column(_plain(c.removeprefix(">")), justify="right" if c[:1] == ">" else "left")
        for c in columns
    ]
    heading = _plain(title) if title else None
    shown = Table(*made, title=heading, title_justify="left", show_header=header, show_lines=lines, expand=expand)
    for row in rows:
        shown.add_row(*map(_plain, row))
    return shown


def _plain(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text("" if cell is None else str(cell))


COLUMNS: dict[str, Callable[[], rich.progress.ProgressColumn]] = {
    "bar": lambda: rich.progress.BarColumn(bar_width=24),
    "count": rich.progress.MofNCompleteColumn,
    "share": rich.progress.TaskProgressColumn,
    "elapsed": rich.progress.TimeElapsedColumn,
    "left": rich.progress.TimeRemainingColumn,
}


def progress(console: Console | None, *columns: str, transient: bool = False) -> rich.progress.Progress:
    """Bars of tasks, each opened by its description; a context manager as rich makes it.

    Args:
        console: where; none: nothing is shown.
        columns: after the description, of COLUMNS: "bar", "count" (3/7), "share", "elapsed", "left"; any other string
            is text with the task's fields, such as "{task.fields[note]}". None given: bar, share and time left.
        transient: whether the bars go when they are done.
    """
    chosen = ("{task.description}", *(columns or ("bar", "share", "left")))
    shown = [COLUMNS[column]() if column in COLUMNS else rich.progress.TextColumn(column) for column in chosen]
    return rich.progress.Progress(*shown, console=console, transient=transient, disable=console is None)


class Reporter:
    """Lines and bars on a console; on none, nothing."""

    def __init__(self, console: Console | None):
        self._console = console

    def line(self, text: str) -> None:
        if self._console is not None:
            say(self._console, text)

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar for the time of the block; call what is given with the number done so far."""
        with self._bar(label, total, 0, "count", "elapsed") as update:
            yield update or (lambda done: None)

    @contextmanager
    def tokens_bar(
        self, label: str, total: int, done: int, whole: Meter | None = None
    ) -> Iterator[Callable[[int], None]]:
        """A bar for a source's tokens, with their speed; where there is no terminal, a line every LINE_SECONDS.

        Args:
            done: tokens that are there at the start.
            whole: of all sources, moved along with this one; none: there are no others.
        """
        speed = "{task.completed:,} of {task.total:,} tokens, {task.fields[speed]:,.0f}/s"
        meter = Meter(total, done)
        with self._bar(label, total, done, speed, "{task.fields[whole]}") as show:

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
    def _bar(self, label: str, total: int | None, done: int, *columns: str) -> Iterator[Callable[..., None] | None]:
        """A bar's update, or None where there is no terminal."""
        if self._console is None or not self._console.is_terminal:
            yield None
            return
        with progress(self._console, "bar", "left", *columns, transient=True) as shown:
            task = shown.add_task(label, total=total, completed=done, speed=0.0, whole="")
            yield lambda now, **fields: shown.update(task, completed=now, **fields)


class Meter:
    """Speed of something, and the time that the rest will take: over the time since the meter was made.

    Attributes:
        now: the amount done, in the unit of `total`; parts of a unit are fine.
    """

    def __init__(self, total: int, done: float, clock: Callable[[], float] = time.monotonic):
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
        """Time that the rest will take."""
        return duration(round((self.total - self.now) / self.speed)) if self.speed else "unknown time"

    def skip(self, n: int) -> None:
        """Take as done what will never have to be: it says nothing of the speed."""
        self.now += n
        self._first += n

    def is_due(self) -> bool:
        """Whether LINE_SECONDS have passed since it last was."""
        if due := self._clock() - self._said >= LINE_SECONDS:
            self._said = self._clock()
        return due

    def __str__(self) -> str:
        done = f"{self.now:,} of {self.total:,} tokens ({self.share:.0%})"
        return f"{done}, {self.speed:,.0f} tokens/s, {self.left} left"
