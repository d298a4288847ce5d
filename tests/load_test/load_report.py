"""Measurements of a load test, and their table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from durability import SHOWN_FAULTS, Comparison
from latency import Latency
from rich.console import Console
from rich.markup import escape
from rich.table import Table

JUDGED = ("all requests", "page", "vote")
"""Rows of the table whose p99 the verdict is about; a turn, which is two requests, stands beside them."""


@dataclass(frozen=True)
class LoadTest:
    """What was asked for."""

    judges: int
    think_seconds: float
    votes_per_judge: int
    kills: int
    seed: int
    p99_ms: float
    drop_out: float = 0.0
    """Share of the judges who leave for good."""

    @property
    def n_leave(self) -> int:
        return round(self.drop_out * self.judges)


@dataclass(frozen=True)
class Kill:
    """One SIGKILL. Monotonic seconds."""

    at: float
    up_at: float
    """When the server answered again."""


@dataclass
class Outcome:
    """All that was measured."""

    asked: LoadTest
    database: str
    seconds: float
    kills: list[Kill]
    quiet: list[Latency]
    overall: list[Latency]
    votes_per_second: float
    requests: int
    server_cpu_ms_per_request: float
    server_cpu_share: float
    lag_ms_p99: float
    """By how much the judges' own process was late; counted in their latencies."""
    finished: int
    votes: Comparison
    faults: list[str]
    left: int = 0
    """Judges who left for good; each place was reclaimed, and finished by somebody else."""

    @property
    def p99_ms(self) -> float:
        """Of single requests, the worst of all together, pages and votes, outside of the seconds around a kill."""
        return max(row.p99 for row in self.quiet if row.kind in JUDGED)

    @property
    def is_fast(self) -> bool:
        return self.p99_ms < self.asked.p99_ms

    @property
    def holds(self) -> bool:
        """Nothing was lost or made up, and everyone came to the end."""
        return not self.votes.faults and not self.faults and self.finished == self.asked.judges


def as_json(outcome: Outcome) -> dict[str, Any]:
    verdict = {"p99_ms": outcome.p99_ms, "is_fast": outcome.is_fast, "holds": outcome.holds}
    return asdict(outcome) | {"verdict": verdict}


def print_outcome(o: Outcome, console: Console) -> None:
    """Tables and the verdict."""
    table = Table(title="milliseconds, as the judge meets them")
    for column in ("request", "n", "p50", "p95", "p99", "max", "max with kills"):
        table.add_column(column, justify="left" if column == "request" else "right")
    whole = {row.kind: row for row in o.overall}
    for row in o.quiet:
        figures = (row.p50, row.p95, row.p99, row.max, whole[row.kind].max)
        table.add_row(row.kind, f"{row.n:,}", *(f"{value:,.0f}" for value in figures))
    console.print(table)
    everything = whole["all requests"]
    console.print(
        f"{o.finished} of {o.asked.judges} judges to the end, {o.left} more left for good, in {o.seconds:.0f} s on "
        f"{o.database}: {o.votes_per_second:.1f} votes/s, {o.requests:,} requests, "
        f"{o.server_cpu_ms_per_request:.1f} ms of the server's CPU each ({100 * o.server_cpu_share:.0f} % of a core)"
    )
    down = ", ".join(f"{kill.up_at - kill.at:.1f}" for kill in o.kills) or "none"
    console.print(
        f"{len(o.kills)} kills (seconds until it answered: {down}); with the seconds around them p99 is "
        f"{everything.p99:,.0f} ms; the judges' own process was late by {o.lag_ms_p99:.0f} ms at p99"
    )
    v = o.votes
    console.print(
        f"{v.acknowledged:,} votes acknowledged ({v.told_twice} by `stored already`), {v.in_database:,} in the "
        f"database, {v.undone} of them undone, {v.standing:,} standing"
    )
    for fault in [*v.faults, *o.faults][:SHOWN_FAULTS]:
        console.print(f"[red]{escape(fault)}[/red]")
    lost = "nothing lost, nothing twice, nothing from nowhere" if o.holds else "DOES NOT HOLD"
    speed = f"p99 of requests {o.p99_ms:,.0f} ms {'<' if o.is_fast else 'is NOT under'} {o.asked.p99_ms:,.0f} ms"
    console.print(f"[bold]{lost}; {speed}[/bold]")
