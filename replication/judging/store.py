"""The store while judges vote: who is asked what, votes once each and durably, the last one undone.

Every public method is one transaction. None knows an arm.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, Select, and_, bindparam, func, insert, inspect, select, true, update
from sqlalchemy.exc import IntegrityError

from replication.config.identity import to_dict
from replication.config.study import Study, load_study
from replication.judging import schema
from replication.judging.database import Database
from replication.judging.schema import COUNTS, LEFT, TEST, assignments, items, judges, panel, recruits, votes
from replication.runs.records import from_json
from replication.votes.record import CHOICES


@dataclass(frozen=True)
class PanelFacts:
    """The panel as far as the page may know it: columns of its table, none of which names an arm."""

    panel_id: str
    suite: str
    created_at: float
    key_sha256: str
    admin_sha256: str
    join_sha256: str | None
    votes_per_judge: int
    planned_judges: int
    locked_at: float | None
    lock_note: str | None

    @property
    def is_locked(self) -> bool:
        return self.locked_at is not None


@dataclass(frozen=True)
class Visit:
    """A judge as their page is opened, and how far they are."""

    judge_id: str
    has_started: bool
    survey: Mapping[str, Any] | None  # None: not asked yet; empty: skipped
    is_test: bool  # whether their votes enter no record
    has_left: bool  # whether the set was reclaimed
    asks_survey: bool
    is_locked: bool
    n_assigned: int
    n_voted: int
    last_vote: str | None  # the impression of the judge's last vote that stands: what `undo` must name
    last_choice: str | None  # of that vote


@dataclass(frozen=True)
class Recruit:
    """Somebody whom a recruiting site sent, in the site's names."""

    participant: str
    study: str
    session: str


@dataclass(frozen=True)
class Impression:
    """A pair as it is shown to a judge, once."""

    assignment_id: int
    impression: str  # random, and named by the vote on it; the tables have it as `showing`
    position: int  # from 0
    question: str
    left: str
    right: str
    is_pair: bool  # whether two texts are compared: no attention item


class Cast(Enum):
    """Outcome of a vote."""

    STORED = "stored"
    REPEATED = "repeated"  # this impression has its vote, the same choice; nothing written
    CONFLICT = "conflict"  # this impression has its vote, or had one that was undone; nothing written
    UNKNOWN = "unknown"  # no such impression for this judge; nothing written
    LOCKED = "locked"  # the panel takes no more votes; nothing written


def hash_token(token: str) -> str:
    """The hash of a link's or an administrator's token, which is all that the database keeps."""
    return hashlib.sha256(token.encode()).hexdigest()


class Store:
    """The panel in one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def panel(self) -> PanelFacts:
        with self.database.read() as c:
            return panel_facts(c)

    @cached_property
    def study(self) -> Study:
        with self.database.read() as c:
            return panel_study(c)

    def judge_by_token(self, token: str) -> str | None:
        """The judge whose link holds this token."""
        with self.database.read() as c:
            query = select(judges.c.judge_id).where(judges.c.token_sha256 == hash_token(token))
            return c.execute(query).scalar_one_or_none()

    def visit(self, token: str) -> Visit | None:
        """Who opened this link, and how far they are: one query; None where no judge has this token."""
        with self.database.read() as c:
            row = c.execute(_VISIT, {"hashed": hash_token(token)}).one_or_none()
        return None if row is None else Visit(**row._mapping)

    def claim(self, token: str, recruit: Recruit | None = None) -> str | None:
        """Give the first set that nobody has to a new judge, known by this token from now on; None: all are taken."""
        with self.database.write() as c:
            free = and_(judges.c.kind == "human", judges.c.token_sha256.is_(None))
            query = select(judges).where(free).order_by(judges.c.judge_id).limit(1)
            row = c.execute(query.with_for_update(skip_locked=True)).one_or_none()
            if row is None:
                return None
            hashed = {"token_sha256": hash_token(token)}
            c.execute(update(judges).where(judges.c.judge_id == row.judge_id).values(hashed))
            if recruit:
                c.execute(insert(recruits).values(judge_id=row.judge_id, **vars(recruit)))
            return str(row.judge_id)

    def start(self, judge_id: str) -> None:
        """Note that the judge has read the rubric; the first time counts."""
        with self.database.write() as c:
            unread = and_(judges.c.judge_id == judge_id, judges.c.started_at.is_(None))
            c.execute(update(judges).where(unread).values(started_at=time.time()))

    def tries(self, judge_id: str) -> list[bool]:
        """Whether the judge passed, of each try at the study's check."""
        with self.database.read() as c:
            return check_tries(c, self.study, judge_id).get(judge_id, [])

    def check(self, judge_id: str, attempt: int, given: Sequence[str | None]) -> None:
        """Keep a try at the study's check, the answers in order of its questions; what comes twice is kept once."""
        with suppress(IntegrityError), self.database.write() as c:
            c.execute(insert(schema.remarks).values(judge_id=judge_id, about=f"check-{attempt}", said=list(given)))

    def answer_survey(self, judge_id: str, answers: Mapping[str, Any]) -> None:
        """Keep a judge's answers about themselves; {} where they skip."""
        with self.database.write() as c:
            c.execute(update(judges).where(judges.c.judge_id == judge_id).values(survey=dict(answers)))

    def show(self, judge_id: str) -> Impression | None:
        """The first assignment without a vote, noted as shown now; None where there is none or the panel is locked."""
        with self.database.write(durable=False) as c:  # the vote on it brings it to the disk too
            if is_locked(c):
                return None
            # held, so that two windows of one judge are given the same impression
            row = c.execute(CURRENT, {"judge": judge_id}).one_or_none()
            if row is None:
                return None
            impression = row.showing or secrets.token_urlsafe(16)
            c.execute(_NOTE_SHOWN, {"this": row.assignment_id, "showing": impression, "shown_at": time.time()})
        left, right = (row.first, row.second) if row.first_is_left else (row.second, row.first)
        is_pair = row.category != "attention"
        return Impression(row.assignment_id, impression, row.position, row.question, left, right, is_pair)

    def vote(self, judge_id: str, impression: str, choice: str, said: Mapping[str, str] | None = None) -> Cast:
        """Store a judge's choice on what they were shown; at most once an impression, whoever asks how often.

        `said`: what else the study asks of a pair, as the table judging_remarks has it.
        When STORED is returned the vote is on the disk.
        """
        assert choice in CHOICES
        now = time.time()
        try:
            with self.database.write() as c:
                if is_locked(c):
                    return Cast.LOCKED
                named = {"judge": judge_id, "named": impression}
                row = c.execute(_SHOWN, named).one_or_none()
                # looked for while the assignment is held: a click that comes twice finds its first vote
                earlier = c.execute(_VOTE_ON, named).one_or_none()
                if earlier is not None:
                    stands = earlier.undone_at is None and earlier.choice == choice
                    return Cast.REPEATED if stands else Cast.CONFLICT
                if row is None:
                    return Cast.UNKNOWN
                cast = {"assignment_id": row.assignment_id, "showing": impression, "choice": choice, "cast_at": now}
                c.execute(_CAST, {**cast, "shown_at": row.shown_at, "seconds": max(0.0, now - row.shown_at)})
                if said:
                    c.execute(insert(schema.remarks).values(judge_id=judge_id, about=impression, said=dict(said)))
        except IntegrityError:  # what the locks above do not catch, the unique index does
            return Cast.CONFLICT
        return Cast.STORED

    def undo(self, judge_id: str, impression: str) -> bool:
        """Take back the judge's last vote, which must be the one on `impression`; its item comes next again.

        The vote stays in the table, marked; the item gets a new impression. False, with nothing written, where that
        vote is not the judge's last one or the panel is locked.
        """
        with self.database.write() as c:
            last = c.execute(_LAST_VOTE, {"judge": judge_id}).one_or_none()
            if is_locked(c) or last is None or last.showing != impression:
                return False
            standing = and_(votes.c.vote_id == last.vote_id, votes.c.undone_at.is_(None))
            if c.execute(update(votes).where(standing).values(undone_at=time.time())).rowcount != 1:
                return False  # another window was faster, and may have been shown the item already
            again = update(assignments).where(assignments.c.assignment_id == last.assignment_id)
            c.execute(again.values(showing=None, shown_at=None))
            return True


def panel_facts(c: Connection) -> PanelFacts:
    columns = [panel.c[field.name] for field in fields(PanelFacts)]
    return PanelFacts(*c.execute(select(*columns)).one())


def panel_study(c: Connection) -> Study:
    """Of a panel from before there were studies the default one."""
    query = select(schema.study.c.study)
    kept = c.execute(query).scalar_one_or_none() if inspect(c).has_table(schema.study.name) else None
    return load_study() if kept is None else from_json(Study, kept)


def check_tries(c: Connection, told: Study, judge_id: str | None = None) -> dict[str, list[bool]]:
    """Judge -> whether they passed, of each try at the study's check; of this judge alone where one is named."""
    tries: dict[str, list[bool]] = defaultdict(list)
    if told.check:  # else a panel of an earlier version, which may lack the table
        t, right = schema.remarks.c, [answers[0] for answers in told.check.values()]
        whose = true() if judge_id is None else t.judge_id == judge_id
        query = select(t.judge_id, t.said).where(whose, t.about.startswith("check-")).order_by(t.about)
        for name, given in c.execute(query):
            tries[name].append(given == right)
    return tries


def keep_study(c: Connection, told: Study) -> None:
    c.execute(insert(schema.study).values(sha256=told.sha256, study=to_dict(told)))


def standing_votes() -> Select[Any]:
    """Every vote that was not undone and is no test judge's, in order of casting, with assignment, judge and item."""
    placed = ("assignment_id", "judge_id", "position", "item_id", "first_is_left", "repeats", "expected")
    return (
        select(
            *(votes.c[name] for name in ("vote_id", "showing", "choice", "shown_at", "cast_at", "seconds")),
            *(assignments.c[name] for name in placed),
            *(judges.c.kind, judges.c.vendor, items.c.prompt_id, items.c.category),
        )
        .join_from(votes, assignments)
        .join(judges)
        .join(items)
        .where(votes.c.undone_at.is_(None), COUNTS)
        .order_by(votes.c.vote_id)
    )


def test_votes(c: Connection) -> tuple[int, int]:
    """Number of test judges, and of their votes that stand: they are in no other number."""
    n_judges = c.execute(select(func.count()).select_from(judges).where(~COUNTS)).scalar_one()
    cast = votes.join(assignments).join(judges)
    return n_judges, c.execute(select(func.count()).select_from(cast).where(~COUNTS, _STANDS)).scalar_one()


def is_locked(c: Connection) -> bool:
    """Whether the panel is locked; holds off a lock until the transaction ends."""
    return c.execute(_LOCKED_AT).scalar_one() is not None


# What every request asks, built once: building a query takes longer than running it.
_BY_JUDGE = assignments.c.judge_id == bindparam("judge")
_STANDS = votes.c.undone_at.is_(None)
# Asked for each assignment by itself. As a join PostgreSQL would plan it from statistics, which a table that is being
# filled does not have: it then read every vote of the panel for each pair of the judge's, a quarter of a second.
_CHOICE = select(votes.c.choice).where(votes.c.assignment_id == assignments.c.assignment_id, _STANDS)
_HAS_VOTE = _CHOICE.correlate(assignments).scalar_subquery().is_not(None)
_LOCKED_AT = select(panel.c.locked_at).with_for_update(read=True)
CURRENT = (
    select(assignments, *(items.c[name] for name in ("category", "question", "first", "second")))
    .join(items)
    .where(_BY_JUDGE, ~_HAS_VOTE)
    .order_by(assignments.c.position)
    .limit(1)
    .with_for_update(of=assignments)
)
_NOTE_SHOWN = update(assignments).where(assignments.c.assignment_id == bindparam("this"))
_VOTE_ON = select(votes).join(assignments).where(_BY_JUDGE, votes.c.showing == bindparam("named"))
_SHOWN = select(assignments).where(_BY_JUDGE, assignments.c.showing == bindparam("named")).with_for_update()
_CAST = insert(votes)
_LAST = select(assignments.c.assignment_id).where(_HAS_VOTE).order_by(assignments.c.position.desc()).limit(1)
_LAST_VOTE = select(votes).where(_STANDS, votes.c.assignment_id == _LAST.where(_BY_JUDGE).scalar_subquery())


def _visit() -> Select[Any]:
    mine = assignments.c.judge_id == judges.c.judge_id
    n_assigned = select(func.count()).select_from(assignments).where(mine)
    n_voted = n_assigned.where(_HAS_VOTE)
    last = _LAST.with_only_columns(assignments.c.showing).where(mine)  # a vote names the showing that it is on
    parts = {"n_assigned": n_assigned, "n_voted": n_voted, "last_vote": last}
    choice = _CHOICE.correlate(assignments).scalar_subquery()
    parts["last_choice"] = last.with_only_columns(choice, maintain_column_froms=True)
    return (
        select(
            judges.c.judge_id,
            judges.c.started_at.is_not(None).label("has_started"),
            judges.c.survey,
            (judges.c.vendor == TEST).label("is_test"),
            (judges.c.vendor == LEFT).label("has_left"),
            panel.c.survey.label("asks_survey"),
            panel.c.locked_at.is_not(None).label("is_locked"),
            *(part.correlate(judges).scalar_subquery().label(name) for name, part in parts.items()),
        )
        .join_from(judges, panel, true())
        .where(judges.c.token_sha256 == bindparam("hashed"))
    )


_VISIT = _visit()


def claim_once(store: Store, token: str, recruit: Recruit | None = None) -> str | None:
    """`Store.claim`; a token that has its set already gets the same one, also where both ask at the same moment."""
    try:
        return store.judge_by_token(token) or store.claim(token, recruit)
    except IntegrityError:  # on PostgreSQL each had taken another set, and the later one has given its own back
        return store.judge_by_token(token)
