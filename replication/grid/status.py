"""The state of every cell from its files alone: the journal's tail, the markers, the lock. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from replication.grid.plan import Cell
from replication.rundir import read_json, read_tail

STYLE = {"complete": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "pending": "dim"}


@dataclass(frozen=True)
class CellStatus:
    """One row of the status table; None is unknown."""

    cell: Cell
    state: str
    step: int
    steps: int
    loss_nats: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    error: str | None


def cell_status(cell: Cell) -> CellStatus:
    state = cell.run.state()
    tail = read_tail(cell.run.metrics) or {}
    step, steps = tail.get("step", 0), cell.config.training.steps
    speed = tail.get("train/tokens_per_second")
    left = (steps - step) * cell.config.training.batch_tokens / speed if state == "running" and speed else None
    failure = read_json(cell.run.failed) if state == "failed" else None
    return CellStatus(
        cell, state, step, steps, tail.get("train/loss_nats"), speed, left, failure and failure.get("error")
    )


def status_table(rows: Sequence[CellStatus], title: str) -> Table:
    """cell, state, step, loss, tokens/s, time left, and a failed cell's first error line."""
    table = Table(title=title)
    for name, justify in (("cell", "left"), ("state", "left"), ("step", "right"), ("loss, nats", "right"),
                          ("tokens/s", "right"), ("left", "right"), ("error", "left")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            row.cell.name,
            f"[{STYLE[row.state]}]{row.state}[/]",
            f"{row.step}/{row.steps}",
            _number(row.loss_nats, ".3f"),
            _number(row.tokens_per_second, ",.0f"),
            clock(row.seconds_left),
            row.error or "",
        )
    return table


def clock(seconds: float | None) -> str:
    """h:mm:ss, or a dash where unknown."""
    if seconds is None:
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
