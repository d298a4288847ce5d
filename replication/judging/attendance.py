"""How far each judge came, and the panel from what was planned. Knows no arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, select

from replication.judging.database import Database
from replication.judging.schema import COUNTS, answers, assignments, judges
from replication.judging.store import standing_votes


@dataclass(frozen=True)
class Attendance:
    """How far one judge came; no arm.

    Attributes:
        n_assigned: pairs to vote on, repeats and attention items apart.
        n_first: first votes cast.
        n_no_choice: pairs without a vote because a model answered both orders for good, and not both with a choice.
        n_asked, n_passed: attention items answered, and answered as they asked.
    """

    judge_id: str
    kind: str
    vendor: str
    n_assigned: int
    n_first: int
    n_no_choice: int
    n_repeats: int
    n_asked: int
    n_passed: int
    survey: Mapping[str, Any]
    started_at: float | None

    @property
    def is_done(self) -> bool:
        """Whether no vote is to come any more, and some came."""
        return self.n_first > 0 and self.n_first + self.n_no_choice >= self.n_assigned


def attendance(database: Database) -> list[Attendance]:
    """Every judge of a panel, locked or not, in order of name; no test judge."""
    with database.read() as c:
        people = c.execute(select(judges).where(COUNTS).order_by(judges.c.judge_id)).all()
        cast: dict[str, list[Row[Any]]] = {row.judge_id: [] for row in people}
        for row in c.execute(standing_votes()):
            cast[row.judge_id].append(row)
        n_assigned, n_no_choice = _assigned(c), _no_choice(c)
    return [
        _attended(
            person, cast[person.judge_id], n_assigned.get(person.judge_id, 0), n_no_choice.get(person.judge_id, 0)
        )
        for person in people
    ]


_IS_FIRST = assignments.c.repeats.is_(None) & assignments.c.expected.is_(None)


def _assigned(c: Connection) -> dict[str, int]:
    query = select(assignments.c.judge_id, func.count().label("n")).where(_IS_FIRST)
    return {row.judge_id: row.n for row in c.execute(query.group_by(assignments.c.judge_id))}


def _no_choice(c: Connection) -> dict[str, int]:
    """Pairs that are answered in both orders, at least once by a refusal or garbage."""
    by = (assignments.c.judge_id, assignments.c.assignment_id)
    both = select(*by).join_from(answers, assignments).where(_IS_FIRST).group_by(*by)
    pairs = both.having(func.count() == 2, func.count(answers.c.choice) < 2).subquery()
    query = select(pairs.c.judge_id, func.count().label("n")).group_by(pairs.c.judge_id)
    return {row.judge_id: row.n for row in c.execute(query)}


def _attended(person: Row[Any], cast: Sequence[Row[Any]], n_assigned: int, n_no_choice: int) -> Attendance:
    asked = [row for row in cast if row.expected is not None]
    return Attendance(
        judge_id=person.judge_id,
        kind=person.kind,
        vendor=person.vendor,
        n_assigned=n_assigned,
        n_no_choice=n_no_choice,
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
        n_full: of them, those from whom no vote is to come any more.
        n_short: of these, those who gave fewer votes than planned: models that were assigned fewer, or gave no choice.
        n_people: people among n_voted; None where the plan counts one kind alone.
    """

    judges: int
    votes: int
    n_voted: int
    n_full: int
    n_short: int = 0
    n_people: int | None = None

    @property
    def is_full(self) -> bool:
        return self.n_full >= self.judges

    @property
    def sentence(self) -> str:
        all_votes = "their votes" if self.n_short else f"{self.votes} votes"
        who = "planned judges" if self.n_people is None else "planned judges, people and models together,"
        counts = f"{self.n_full} of {self.judges} {who} have given all {all_votes}"
        short = f"; {self.n_short} of them fewer than the {self.votes} planned" if self.n_short else ""
        voted = f"{self.n_voted} have voted"
        if self.n_people == 0 and self.n_voted:
            voted = f"0 people have voted, {self.n_voted} {'model has' if self.n_voted == 1 else 'models have'}"
        return f"{counts} ({voted}){short}"


def fill(database: Database, judges: int, votes: int, kinds: tuple[str, ...]) -> Fill:
    """Count who has voted, and who is done."""
    voted = [row for row in attendance(database) if row.kind in kinds and row.n_first]
    done = [row for row in voted if row.is_done]
    n_people = sum(row.kind == "human" for row in voted) if len(kinds) > 1 else None
    return Fill(judges, votes, len(voted), len(done), sum(row.n_first < votes for row in done), n_people)
