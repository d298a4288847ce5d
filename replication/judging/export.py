"""What becomes of a panel once it is locked: the vote record, and what each judge said of themselves and of attention.

An attention item is in no vote record. A repeat is there for self-consistency alone, and not without its first vote.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, func, select

from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.schema import answers, assignments, items, judges, panel, unsealed
from replication.judging.store import standing_votes
from replication.votes import Vote, votes_text

NOT_LOCKED = "the panel is not locked, so its votes are blind; `replicate judge lock` comes first"


@dataclass(frozen=True)
class Unsealed:
    """A locked panel's votes with their arms.

    Attributes:
        votes: first votes and repeats, in order of casting.
        cast_at: of each, seconds since 1970.
        category: prompt id -> category.
        surveys: judge id -> answers; of those who answered.
        lone_repeats: repeats whose first vote was never cast: left out.
        arms: (baseline, treatment).
        locked_at: seconds since 1970.
        lock_note: why it was locked early; empty where it was not.
    """

    panel_id: str
    suite: str
    votes: tuple[Vote, ...]
    cast_at: tuple[float, ...]
    category: Mapping[int, str]
    surveys: Mapping[str, Mapping[str, Any]]
    lone_repeats: int
    arms: tuple[str, str]
    votes_per_judge: int
    key_sha256: str
    locked_at: float
    lock_note: str


def unsealed_votes(database: Database) -> Unsealed:
    """Everything that was voted, with what stood behind it.

    Raises:
        UserError: the panel is not locked, or its lock was interrupted.
    """
    with database.read() as c:
        about = c.execute(select(panel)).one()
        behind = {row.item_id: row for row in c.execute(select(unsealed))}
        if about.locked_at is None:
            raise UserError(NOT_LOCKED)
        if not behind:
            raise UserError("the lock was interrupted before the key was opened; call `replicate judge lock` again")
        rows = [row for row in c.execute(standing_votes()).all() if row.item_id in behind]
        surveys = c.execute(select(judges.c.judge_id, judges.c.survey)).all()
        prompts = c.execute(select(items.c.prompt_id, items.c.category).where(items.c.prompt_id.is_not(None)))
        category = dict(sorted((row.prompt_id, row.category) for row in prompts))
    voted = {row.assignment_id for row in rows}
    kept = [row for row in rows if row.repeats is None or row.repeats in voted]
    return Unsealed(
        panel_id=about.panel_id,
        suite=about.suite,
        votes=tuple(_vote(row, behind[row.item_id], about) for row in kept),
        cast_at=tuple(row.cast_at for row in kept),
        category=category,
        surveys={row.judge_id: row.survey for row in surveys if row.survey},
        lone_repeats=len(rows) - len(kept),
        arms=(about.baseline, about.treatment),
        votes_per_judge=about.votes_per_judge,
        key_sha256=about.key_sha256,
        locked_at=about.locked_at,
        lock_note=about.lock_note or "",
    )


def _vote(row: Row[Any], behind: Row[Any], about: Row[Any]) -> Vote:
    shown = [(behind.arm_first, behind.sample_first), (behind.arm_second, behind.sample_second)]
    left, right = shown if row.first_is_left else reversed(shown)
    return Vote(
        vote_id=_vote_id(about.panel_id, row.assignment_id),
        suite=about.suite,
        seed=behind.seed,
        arm_left=left[0],
        arm_right=right[0],
        prompt_id=row.prompt_id,
        sample_left=left[1],
        sample_right=right[1],
        judge_id=row.judge_id,
        judge_kind=row.kind,
        vendor=row.vendor,
        choice=row.choice,
        shown_at="" if row.shown_at is None else iso(row.shown_at),
        seconds=math.nan if row.seconds is None else round(row.seconds, 3),
        repeat_of="" if row.repeats is None else _vote_id(about.panel_id, row.repeats),
    )


def _vote_id(panel_id: str, assignment_id: int) -> str:
    return f"{panel_id}-{assignment_id}"


def iso(seconds: float) -> str:
    """Seconds since 1970 as an ISO 8601 time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def votes_csv(database: Database) -> str:
    """The vote record, as DIR/votes.csv holds it; see replication.votes.

    Raises:
        UserError: the panel is not locked.
    """
    return votes_text(unsealed_votes(database).votes)


# ---------------------------------------------------------------- judges, and models' answers


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


def judges_csv(database: Database) -> str:
    """A row a judge who voted: kind, vendor, counts, attention items passed of those asked, answers of the survey.

    Raises:
        UserError: the panel is not locked.
    """
    with database.read() as c:
        _refuse_unlocked(c)
    rows = [row for row in attendance(database) if row.n_first or row.n_repeats or row.n_asked]
    questions = sorted({question for row in rows for question in row.survey})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    counts = ["votes", "repeats", "attention_passed", "attention_asked"]
    writer.writerow(["judge_id", "kind", "vendor", *counts, *questions])
    for row in rows:
        numbers = [row.n_first, row.n_repeats, row.n_passed, row.n_asked]
        said = [row.survey.get(question, "") for question in questions]
        writer.writerow([row.judge_id, row.kind, row.vendor, *numbers, *said])
    return text.getvalue()


def answers_jsonl(database: Database) -> str:
    """Every answer of the model judges, word for word, one JSON object a line; vote_id is that of the vote record.

    Raises:
        UserError: the panel is not locked.
    """
    with database.read() as c:
        _refuse_unlocked(c)
        panel_id = c.execute(select(panel.c.panel_id)).scalar_one()
        query = select(answers, assignments.c.judge_id).join(assignments).order_by(answers.c.answer_id)
        lines = []
        for row in c.execute(query):
            said = dict(row._mapping)
            vote_id = _vote_id(panel_id, said.pop("assignment_id"))
            said |= {"asked_at": iso(said["asked_at"])}
            lines.append(json.dumps({"vote_id": vote_id, "judge_id": said.pop("judge_id"), **said}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def _refuse_unlocked(c: Connection) -> None:
    if not c.execute(select(func.count(panel.c.locked_at))).scalar_one():
        raise UserError(NOT_LOCKED)
