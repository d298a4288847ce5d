"""How far each judge came, and the panel from what was planned. Knows no arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select

from replication.judging.database import Database
from replication.judging.schema import judges
from replication.judging.store import standing_votes


@dataclass(frozen=True)
class Attendance:
    """How far one judge came; no arm.

    Attributes:
        n_first: first votes cast.
        n_asked, n_passed: attention items answered, and answered as they asked.
    """

    judge_id: str
    kind: str
    vendor: str
    n_first: int
    n_repeats: int
    n_asked: int
    n_passed: int
    survey: Mapping[str, Any]
    started_at: float | None


def attendance(database: Database) -> list[Attendance]:
    """Every judge of a panel, locked or not, in order of name."""
    with database.read() as c:
        people = c.execute(select(judges).order_by(judges.c.judge_id)).all()
        cast: dict[str, list[Row[Any]]] = {row.judge_id: [] for row in people}
        for row in c.execute(standing_votes()):
            cast[row.judge_id].append(row)
    return [_attended(person, cast[person.judge_id]) for person in people]


def _attended(person: Row[Any], cast: Sequence[Row[Any]]) -> Attendance:
    asked = [row for row in cast if row.expected is not None]
    return Attendance(
        judge_id=person.judge_id,
        kind=person.kind,
        vendor=person.vendor,
        n_first=sum(row.expected is None and row.repeats is None for row in cast),
        n_repeats=sum(row.repeats is not None for row in cast),
        n_asked=len(asked),
        n_passed=sum(row.choice == row.expected for row in asked),
        survey=person.survey or {},
        started_at=person.started_at,
    )


@dataclass(frozen=True)
class Fill:
    """How far a panel is from what was planned.

    Attributes:
        judges: planned.
        votes: planned first votes of each.
        n_voted: judges of the kinds that count who voted at all.
        n_full: of them, those who gave all their votes.
    """

    judges: int
    votes: int
    n_voted: int
    n_full: int

    @property
    def is_full(self) -> bool:
        return self.n_full >= self.judges

    @property
    def sentence(self) -> str:
        return (
            f"{self.n_full} of {self.judges} planned judges have given all {self.votes} votes "
            f"({self.n_voted} have voted)"
        )


def fill(database: Database, judges: int, votes: int, kinds: tuple[str, ...]) -> Fill:
    """Count who has voted."""
    counts = [row.n_first for row in attendance(database) if row.kind in kinds and row.n_first]
    return Fill(judges, votes, len(counts), sum(n >= votes for n in counts))
