"""The one home of what a console shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Column
from rich.text import Text

from replication.console import Meter, duration, plural, progress, say, table, utc


def shown(width: int = 60) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width), file


def test_counts_and_times() -> None:
    assert [plural(n, "seed") for n in (0, 1, 2, 1200)] == ["0 seeds", "1 seed", "2 seeds", "1,200 seeds"]
    assert plural(2, "process", "processes") == "2 processes"
    assert [duration(s) for s in (None, 0, 61.9, 3600, 90000)] == ["-", "0:00:00", "0:01:01", "1:00:00", "25:00:00"]
    assert (utc(0), utc(86399.9, "minutes")) == ("1970-01-01 00:00:00", "1970-01-01 23:59")


def test_a_line_is_neither_wrapped_nor_read_as_markup() -> None:
    console, file = shown(20)
    say(console, ("failed", "red"), " both/seed-1: no [key] of that name in the config")
    assert file.getvalue() == "failed both/seed-1: no [key] of that name in the config\n"


def test_a_table_takes_plain_text_and_styled_text() -> None:
    console, file = shown()
    rows = [("a [b]", 12), (Text("yes", "green"), None)]
    console.print(table("title [x]", ["name", ">count", Column("note", no_wrap=True)], [(*row, "n") for row in rows]))
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("title [x]") and "a [b]" in lines[4]
    assert lines[4].split("┃")[0].split("│")[2] == "    12 " and "yes" in lines[5]


@pytest.mark.parametrize("columns", [(), ("bar", "count", "elapsed", "{task.fields[note]}")])
def test_bars_of_every_kind_are_drawn(columns: tuple[str, ...]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress(console, *columns) as bars:
        bars.advance(bars.add_task("cells", total=4, note="left 0:01:00"))
    assert "cells" in console.file.getvalue()  # type: ignore[attr-defined]
    with progress(None, "bar") as bars:
        bars.add_task("nothing is shown")


def test_the_rest_takes_as_long_as_the_speed_so_far_says() -> None:
    now = iter([0.0, 10.0, 10.0])
    meter = Meter(100, 0, clock=lambda: next(now))
    meter.now = 25
    assert meter.left == "0:00:30"
