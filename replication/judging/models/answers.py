"""Comparisons for model judges and their answers, stored as they come; votes once both orders are in."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.models.parsing import Parsed, combine
from replication.judging.panel import add_judges, check_judge_id
from replication.judging.schema import IS_FIRST, answers, assignments, items, judges, model_judges, votes
from replication.judging.store import is_locked

LOCKED = "the panel is locked; it takes no more votes"


@dataclass(frozen=True)
class Comparison:
    """One pair in one order."""

    assignment_id: int
    swapped: bool  # whether the sides are the other way round than in the assignment
    question: str
    a: str
    b: str

    @property
    def key(self) -> tuple[int, bool]:
        return self.assignment_id, self.swapped


@dataclass(frozen=True)
class Reply:
    """One reply of a model."""

    text: str  # the answer, or the words of the refusal
    refused: bool = False  # whether the endpoint marks it as a refusal
    finish_reason: str | None = None
    model: str = ""  # as the endpoint names it; empty where it names none
    input_tokens: int | None = None
    output_tokens: int | None = None
    asked_at: float = field(default_factory=time.time)
    """When the try that succeeded was sent, in seconds since 1970."""
    seconds: float | None = None  # that it took; None: not known


@dataclass(frozen=True)
class ModelAnswer:
    """A model's final answer to one comparison."""

    comparison: Comparison
    parsed: Parsed
    prompt: str
    reply: Reply
    endpoint: str  # its address without credentials, or how else the model was asked


def join_panel(
    database: Database, sealed: Path, judge_id: str, vendor: str | None, n_votes: int | None
) -> Callable[[], None] | None:
    """A function that gives a new model judge its assignments; None where it has them.

    Args:
        sealed: folder of the panel's key.
        vendor: who makes the model; None only where the judge is there.
        n_votes: pairs of a new judge; None: as many as the panel plans.

    Raises:
        UserError: the panel is locked, the vendor is missing or another, the judge has another number of pairs, or a
            new one's name will not do.
    """
    with database.read() as c:
        if is_locked(c):
            raise UserError(LOCKED)
        known = c.execute(select(judges).where(judges.c.judge_id == judge_id)).one_or_none()
        n_has = c.execute(select(func.count()).where(IS_FIRST, assignments.c.judge_id == judge_id)).scalar_one()
    if known is None:
        check_judge_id(judge_id)
        maker = (vendor or "").strip()
        if not maker:
            raise UserError(f"--vendor: '{judge_id}' is a new judge; say who makes the model")
        return lambda: add_judges(database, sealed, [judge_id], "model", maker, n_votes or 0)
    if known.kind == "model" and vendor is not None and vendor.strip() != known.vendor:
        raise UserError(f"--vendor: '{judge_id}' is a model of {known.vendor}; take another --judge-id")
    if known.kind == "model" and n_votes not in (None, n_has):
        raise UserError(
            f"--votes: '{judge_id}' has its {n_has} pairs already, which stay as they are; leave --votes out, or take "
            "another --judge-id"
        )
    return None


def settle(database: Database, judge_id: str, asked: Mapping[str, Any]) -> None:
    """Fix how a judge is asked, or check that it is asked as before.

    Raises:
        UserError: no such model judge, the panel is locked, or the judge's answers came in another way.
    """
    with database.write() as c:
        this = select(judges.c.kind).where(judges.c.judge_id == judge_id)
        kind = c.execute(this.with_for_update()).scalar_one_or_none()  # held: another run settles the same, or is told
        if kind != "model":
            has = "no such judge in this panel" if kind is None else "is a person"
            raise UserError(f"--judge-id: '{judge_id}' {has}; name a model judge")
        if is_locked(c):
            raise UserError(LOCKED)
        before = c.execute(select(model_judges.c.asked).where(model_judges.c.judge_id == judge_id)).scalar_one_or_none()
        started = select(answers.c.answer_id).join(assignments).where(assignments.c.judge_id == judge_id).limit(1)
        if before is None:
            c.execute(insert(model_judges).values(judge_id=judge_id, asked=asked))
        elif before != asked and c.execute(started).first() is None:
            c.execute(update(model_judges).where(model_judges.c.judge_id == judge_id).values(asked=asked))
        elif before != asked:
            key = next(key for key in (*before, *asked) if before.get(key) != asked.get(key))
            raise UserError(
                f"--judge-id: '{judge_id}' has answers with {key} {before.get(key, 'not set')}, and this is "
                f"{asked.get(key, 'not set')}; one judge is one model asked in one way: take another --judge-id"
            )


def how_asked(database: Database, judge_id: str) -> Mapping[str, Any]:
    """The settings that were fixed for a judge; empty for one that was never asked."""
    with database.read() as c:
        mine = model_judges.c.judge_id == judge_id
        return c.execute(select(model_judges.c.asked).where(mine)).scalar_one_or_none() or {}


def comparisons(database: Database, judge_id: str) -> list[Comparison]:
    """Every pair of a judge in both orders: in the judge's order of pairs, as assigned before swapped.

    Raises:
        UserError: the judge has none.
    """
    with database.read() as c:
        mine = assignments.c.judge_id == judge_id
        query = select(assignments, items.c.question, items.c.first, items.c.second).join(items).where(mine)
        rows = c.execute(query.order_by(assignments.c.position)).all()
    if not rows:
        raise UserError(f"--judge-id: '{judge_id}' has no assignments; take another --judge-id, which gets some")
    found = []
    for row in rows:
        left, right = (row.first, row.second) if row.first_is_left else (row.second, row.first)
        found.append(Comparison(row.assignment_id, False, row.question, left, right))
        found.append(Comparison(row.assignment_id, True, row.question, right, left))
    return found


def answered(database: Database, judge_id: str) -> dict[tuple[int, bool], Parsed]:
    """What was said to each comparison that has an answer, by its key."""
    with database.read() as c:
        rows = c.execute(select(answers).join(assignments).where(assignments.c.judge_id == judge_id))
        return {(row.assignment_id, row.swapped): Parsed(row.status, row.choice) for row in rows}


def keep(database: Database, judge_id: str, new: Sequence[ModelAnswer]) -> int:
    """Store answers, and the votes that they complete, in one transaction. A comparison that has its answer keeps it.

    Returns:
        How many were stored.

    Raises:
        UserError: the panel was locked meanwhile, or the endpoint now names another model than in earlier answers.
    """
    mine = assignments.c.judge_id == judge_id
    try:
        with database.write() as c:
            if is_locked(c):
                raise UserError(LOCKED)
            ids = {answer.comparison.assignment_id for answer in new}
            c.execute(select(assignments.c.assignment_id).where(assignments.c.assignment_id.in_(ids)).with_for_update())
            of_these = select(answers.c.assignment_id, answers.c.swapped).where(answers.c.assignment_id.in_(ids))
            before = {(row.assignment_id, row.swapped) for row in c.execute(of_these)}
            stored = [answer for answer in new if answer.comparison.key not in before]
            named = select(answers.c.model).join(assignments).where(mine, answers.c.model != "").limit(1)
            known = c.execute(named).scalar_one_or_none()
            for answer in stored:
                comparison, parsed, reply = answer.comparison, answer.parsed, answer.reply
                if reply.model and known and known != reply.model:
                    raise UserError(
                        f"--judge-id: the answers of '{judge_id}' came from the model {known}, and the endpoint now "
                        f"answers as {reply.model}; one judge is one model: take another --judge-id, or go back to "
                        "that model"
                    )
                known = known or reply.model
                row = {name: value for name, value in vars(reply).items() if name in answers.c}
                row |= {"reply": reply.text, "prompt": answer.prompt, "endpoint": answer.endpoint}
                row |= {"assignment_id": comparison.assignment_id, "swapped": comparison.swapped}
                c.execute(insert(answers).values(row | {"status": parsed.status, "choice": parsed.choice}))
            for assignment_id in {answer.comparison.assignment_id for answer in stored}:
                _vote(c, assignment_id)
            return len(stored)
    except IntegrityError:  # another process asks for the same judge, and was faster
        return 0


def _vote(c: Connection, assignment_id: int) -> None:
    """Cast the vote of a pair, once, when both orders were answered by a choice."""
    query = select(answers).where(answers.c.assignment_id == assignment_id).order_by(answers.c.swapped)
    said = c.execute(query).all()
    if len(said) < 2 or not all(row.choice for row in said):
        return
    known = [row.seconds for row in said if row.seconds is not None]
    seen = {"showing": secrets.token_urlsafe(16), "shown_at": min(row.asked_at for row in said) if known else None}
    c.execute(update(assignments).where(assignments.c.assignment_id == assignment_id).values(seen))
    cast = {"assignment_id": assignment_id, "cast_at": max(row.asked_at + (row.seconds or 0) for row in said)}
    choice = combine(said[0].choice, said[1].choice)
    c.execute(insert(votes).values(**cast, **seen, choice=choice, seconds=sum(known) if known else None))
