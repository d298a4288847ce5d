"""Comparisons for model judges and their answers, stored as they come; votes once both orders are in; their table."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from sqlalchemy import ColumnElement, Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from replication.config.study import Study
from replication.console import table
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.models.prompt import CUT_OFF, Parsed, agree, combine, parse_reply
from replication.judging.models.settings import ModelSettings
from replication.judging.panel import add_judges, check_judge_id
from replication.judging.schema import IS_FIRST, answers, assignments, items, judges, model_judges, remarks, votes
from replication.judging.store import Store, is_locked

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
    asked_at: float = field(default_factory=time.time)  # when the try that succeeded was sent, seconds since 1970
    seconds: float | None = None  # that it took; None: not known


@dataclass(frozen=True)
class ModelAnswer:
    """A model's final answer to one comparison."""

    comparison: Comparison
    parsed: Parsed
    prompt: str
    reply: Reply
    endpoint: str  # its address without credentials, or how else the model was asked

    def row(self) -> dict[str, object]:
        """Of the table of answers."""
        row = {name: value for name, value in vars(self.reply).items() if name in answers.c}
        row |= {"reply": self.reply.text, "prompt": self.prompt, "endpoint": self.endpoint}
        row |= {"assignment_id": self.comparison.assignment_id, "swapped": self.comparison.swapped}
        return row | {"status": self.parsed.status, "choice": self.parsed.choice}


@dataclass(frozen=True)
class AnswerCounts:
    """All that a judge has said so far."""

    n_pairs: int
    n_answers: int  # of the 2 * n_pairs comparisons
    n_votes: int  # pairs with a vote
    n_agreeing: int  # pairs to which both orders gave the same choice
    n_disagreeing: int  # pairs whose vote is a tie because they did not
    n_refusals: int
    n_garbage: int
    n_a: int  # answers for the completion that came first; n_b: second
    n_b: int
    n_truncated: int  # answers that were cut off
    gold: list[bool]  # of each vote on a gold pair, whether the better text won
    seconds: float | None  # of an answer, in the median
    input_tokens: int  # as far as the endpoint tells; output_tokens too
    output_tokens: int

    @property
    def n_missing(self) -> int:
        """Comparisons without an answer."""
        return 2 * self.n_pairs - self.n_answers


@dataclass(frozen=True)
class ModelJudge:
    """A judge of a panel as the tables have it: how it is asked, what it is to compare, what it has said."""

    database: Database
    judge_id: str

    @cached_property
    def study(self) -> Study:
        return Store(self.database).study

    @property
    def _mine(self) -> ColumnElement[bool]:
        return assignments.c.judge_id == self.judge_id

    def settle(self, asked: Mapping[str, Any]) -> None:
        """Fix how the judge is asked, or check that it is asked as before.

        Raises UserError for no such model judge, a locked panel, or a judge whose answers came in another way.
        """
        name, row = self.judge_id, model_judges.c.judge_id == self.judge_id
        with self.database.write() as c:
            this = select(judges.c.kind).where(judges.c.judge_id == name)
            kind = c.execute(this.with_for_update()).scalar_one_or_none()  # another run that settles the same waits
            if kind != "model":
                has = "no such judge in this panel" if kind is None else "is a person"
                raise UserError(f"--judge-id: '{name}' {has}; name a model judge")
            if is_locked(c):
                raise UserError(LOCKED)
            before = c.execute(select(model_judges.c.asked).where(row)).scalar_one_or_none()
            started = select(answers.c.answer_id).join(assignments).where(self._mine).limit(1)
            if before is None:
                c.execute(insert(model_judges).values(judge_id=name, asked=asked))
            elif before != asked and c.execute(started).first() is None:
                c.execute(update(model_judges).where(row).values(asked=asked))
            elif before != asked:
                key = next(key for key in (*before, *asked) if before.get(key) != asked.get(key))
                raise UserError(
                    f"--judge-id: '{name}' has answers with {key} {before.get(key, 'not set')}, and this is "
                    f"{asked.get(key, 'not set')}; one judge is one model asked in one way: take another --judge-id"
                )

    def asked(self) -> Mapping[str, Any]:
        """How the judge is asked, as it was fixed; empty for one that was never asked."""
        with self.database.read() as c:
            settled = select(model_judges.c.asked).where(model_judges.c.judge_id == self.judge_id)
            return c.execute(settled).scalar_one_or_none() or {}

    def comparisons(self) -> list[Comparison]:
        """Every pair in both orders: in the judge's order of pairs, as assigned before swapped.

        Raises UserError where there is none.
        """
        query = select(assignments, items.c.question, items.c.first, items.c.second).join(items).where(self._mine)
        with self.database.read() as c:
            rows = c.execute(query.order_by(assignments.c.position)).all()
        if not rows:
            remedy = "take another --judge-id, which gets some"
            raise UserError(f"--judge-id: '{self.judge_id}' has no assignments; {remedy}")
        found = []
        for row in rows:
            left, right = (row.first, row.second) if row.first_is_left else (row.second, row.first)
            found.append(Comparison(row.assignment_id, False, row.question, left, right))
            found.append(Comparison(row.assignment_id, True, row.question, right, left))
        return found

    def answered(self) -> dict[tuple[int, bool], Parsed]:
        """What was said to each comparison that has an answer, by its key."""
        said = select(answers.c.assignment_id, answers.c.swapped, answers.c.status, answers.c.choice)
        with self.database.read() as c:
            rows = c.execute(said.join(assignments).where(self._mine))
            return {(row.assignment_id, row.swapped): Parsed(row.status, row.choice) for row in rows}

    def keep(self, new: Sequence[ModelAnswer]) -> int:
        """Store answers, and the votes that they complete, in one transaction; returns how many were stored.

        A comparison keeps the answer it has. Raises UserError where the panel was locked meanwhile, or the endpoint now
        names another model than in earlier answers.
        """
        ids = {answer.comparison.assignment_id for answer in new}
        of_these = select(answers.c.assignment_id, answers.c.swapped).where(answers.c.assignment_id.in_(ids))
        named = select(answers.c.model).join(assignments).where(self._mine, answers.c.model != "").limit(1)
        try:
            with self.database.write() as c:
                if is_locked(c):
                    raise UserError(LOCKED)
                c.execute(
                    select(assignments.c.assignment_id).where(assignments.c.assignment_id.in_(ids)).with_for_update()
                )
                before = {(row.assignment_id, row.swapped) for row in c.execute(of_these)}
                stored = [answer for answer in new if answer.comparison.key not in before]
                known = c.execute(named).scalar_one_or_none()
                for answer in stored:
                    model = answer.reply.model
                    if model and known and known != model:
                        raise UserError(
                            f"--judge-id: the answers of '{self.judge_id}' came from the model {known}, and the "
                            f"endpoint now answers as {model}; one judge is one model: take another --judge-id, or go "
                            "back to that model"
                        )
                    known = known or model
                    c.execute(insert(answers).values(answer.row()))
                for assignment_id in {answer.comparison.assignment_id for answer in stored}:
                    self._vote(c, assignment_id)
                return len(stored)
        except IntegrityError:  # another process asks for the same judge, and was faster
            return 0

    def _vote(self, c: Connection, assignment_id: int) -> None:
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
        further = [*self.study.criteria][1:]
        both = zip(*(parse_reply(row.reply, n=len(further) + 1).further for row in said), strict=True)
        if beside := {name: combine(*of) for name, of in zip(further, both, strict=False)}:
            c.execute(insert(remarks).values(judge_id=self.judge_id, about=seen["showing"], said=beside))

    def counts(self) -> AnswerCounts:
        names = ("assignment_id", "status", "choice", "finish_reason", "input_tokens", "output_tokens", "seconds")
        query = select(*(answers.c[name] for name in names)).join(assignments).where(self._mine)
        n_of = select(func.count()).where(self._mine)
        with self.database.read() as c:
            n_pairs = c.execute(n_of.select_from(assignments)).scalar_one()
            n_votes = c.execute(n_of.select_from(assignments.join(votes))).scalar_one()
            said = c.execute(query.order_by(answers.c.assignment_id, answers.c.swapped)).all()
            right = select(votes.c.choice == assignments.c.expected).join_from(votes, assignments)
            gold = c.execute(right.where(self._mine, assignments.c.expected.is_not(None))).scalars().all()
        seconds = [row.seconds for row in said if row.seconds is not None]
        by_pair = [[row.choice for row in rows] for _, rows in groupby(said, key=lambda row: row.assignment_id)]
        both = [choices for choices in by_pair if len(choices) == 2 and all(choices)]  # as assigned, and swapped
        n_agreeing = sum(agree(*choices) for choices in both)
        return AnswerCounts(
            n_pairs=n_pairs,
            n_answers=len(said),
            n_votes=n_votes,
            n_agreeing=n_agreeing,
            n_disagreeing=len(both) - n_agreeing,
            n_refusals=sum(row.status == "refusal" for row in said),
            n_garbage=sum(row.status == "garbage" for row in said),
            n_a=sum(row.choice == "left" for row in said),
            n_b=sum(row.choice == "right" for row in said),
            n_truncated=sum(row.finish_reason in CUT_OFF for row in said),
            gold=list(gold),
            seconds=median(seconds) if seconds else None,
            input_tokens=sum(row.input_tokens or 0 for row in said),
            output_tokens=sum(row.output_tokens or 0 for row in said),
        )


def join_panel(
    database: Database, sealed: Path, judge_id: str, vendor: str | None, n_votes: int | None
) -> Callable[[], None] | None:
    """A function that gives a new model judge its assignments, by the key in `sealed`; None where it has them.

    A new judge needs its vendor, and gets as many pairs as the panel plans where no number is given. Raises UserError
    where the panel is locked, the vendor is missing or another, the judge has another number of pairs, or a new one's
    name will not do.
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


@dataclass(frozen=True)
class Summary:
    """A judge's answers in all, and the work of this run."""

    judge_id: str
    counts: AnswerCounts  # of all runs together; what follows is of this run
    n_stored: int  # answers that were stored
    n_requests: int = 0
    n_retries: int = 0
    n_given_up: int = 0
    n_tokens: int = 0
    stopped: str = ""  # why it ended early, in one line; empty: it did not

    @property
    def exit_code(self) -> int:
        """0 where every comparison has its answer, else 1."""
        return 1 if self.counts.n_missing else 0


def print_summary(summary: Summary, console: Console, settings: ModelSettings | None = None) -> None:
    """The table at the end of a run, and what is to be done next."""
    t = summary.counts

    def share(part: int, whole: int) -> str:
        return f"{part} of {whole} ({part / whole:.1%})" if whole else "none"

    rows = [
        ("votes", f"{t.n_votes} of {t.n_pairs} pairs"),
        ("same choice in both orders", share(t.n_agreeing, t.n_agreeing + t.n_disagreeing)),
        ("ties by disagreement", t.n_disagreeing),
        ("first completion chosen (position bias)", share(t.n_a, t.n_a + t.n_b)),
        *([("gold pairs passed", f"{sum(t.gold)} of {len(t.gold)}")] if t.gold else []),
        ("refusals", t.n_refusals),
        ("garbage", f"{t.n_garbage}, {t.n_truncated} of them cut off" if t.n_truncated else t.n_garbage),
        ("comparisons without an answer", t.n_missing),
    ]
    if settings is not None:
        used = f"{t.input_tokens:,} in, {t.output_tokens:,} out" if t.input_tokens else "not told by the endpoint"
        rows.append(("tokens of all answers", used))
        rows.append(("requests of this run", f"{summary.n_requests}, {summary.n_retries} of them further tries"))
    console.print(table(f"Judge {summary.judge_id}", ["", ""], rows, header=False))
    if settings is not None and t.n_truncated:
        console.print(
            f"{t.n_truncated} answers were cut off at {settings.max_answer_tokens} tokens; a model that thinks first "
            "needs a larger --max-answer-tokens, under another --judge-id",
            style="yellow",
        )
    why, after = summary.stopped, ""
    if t.n_missing and settings is None:
        why, after = "not finished", f": {t.n_missing} comparisons are left"
    elif t.n_missing:
        why = why or f"{summary.n_given_up} requests had no answer"
        after = f": {t.n_missing} comparisons are left; the same command asks for them"
    if why:
        console.print(why + after, style="yellow", markup=False)
