"""The tables of a panel. Nothing here tells an arm, a seed or which completion it was, before `unsealed` is filled.

An item is two completions of one prompt in an order drawn at random, called first and second. Which arm is first stands
in the sealed key alone (seal.py). An assignment gives one item to one judge, on stated sides, at a stated place.
Times are seconds since 1970 (UTC). The tables' names begin with judging_, since a database may hold others too. Seeds,
prompts and samples are numbers of 64 bits, as in the vote record.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from replication.votes.record import CHOICES, JUDGE_KINDS

TEST = "test"
"""In place of a person's vendor: their votes are trials, and enter no record and no count."""
LEFT = "left"
"""In the same place: they gave up their set, and somebody else has its pairs."""
metadata = MetaData()
NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")


class Words(TypeDecorator[str]):
    """Text of any length, with U+FFFD for what a database may refuse: NUL, and halves of surrogate pairs."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else NOT_STORABLE.sub("\ufffd", value)


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(v) for v in values)})", name=f"{column}_is_known")


panel = Table(
    "judging_panel",
    metadata,
    Column("panel_id", String(32), primary_key=True),  # one row
    Column("suite", Words, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("key_sha256", String(64), nullable=False),  # commitment: hash of the sealed key, from before any vote
    Column("admin_sha256", String(64), nullable=False),  # of the administrator's token
    Column("join_sha256", String(64)),  # of the open link's token; null: by invitation only
    Column(
        "votes_per_judge", Integer, nullable=False
    ),  # first votes of a full set, without repeats and attention items
    Column("planned_judges", Integer, nullable=False),
    Column("survey", Boolean, nullable=False),  # whether the page asks about the judge
    Column("locked_at", Float),  # from then on no vote is taken
    Column("lock_note", Words),  # why it was locked early
    Column("baseline", Words),  # the two arms; null until the lock
    Column("treatment", Words),
)

# What the judges are told and asked: one row, as config/study.py has it; in no panel from before there were studies.
study = Table(
    "judging_study", metadata, Column("sha256", String(64), primary_key=True), Column("study", JSON, nullable=False)
)

items = Table(
    "judging_items",
    metadata,
    Column("item_id", String(32), primary_key=True),  # random
    Column("prompt_id", BigInteger),  # null: an attention item
    Column("category", Words, nullable=False),
    Column("question", Words, nullable=False),
    Column("first", Words, nullable=False),
    Column("second", Words, nullable=False),
)

judges = Table(
    "judging_judges",
    metadata,
    Column("judge_id", String(200), primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("vendor", Words, nullable=False),  # of a model judge; of a person empty, TEST or LEFT
    Column("token_sha256", String(64), unique=True),  # of the invitation link; null: a model judge, or not claimed yet
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),  # read the rubric
    Column("survey", JSON),  # null: not answered; {}: skipped
    _one_of("kind", JUDGE_KINDS),
)

COUNTS = (judges.c.kind != "human") | (judges.c.vendor != TEST)
"""Of a judge: not a test judge."""

assignments = Table(
    "judging_assignments",
    metadata,
    Column("assignment_id", Integer, primary_key=True),
    Column("judge_id", ForeignKey("judging_judges.judge_id"), nullable=False),
    Column("position", Integer, nullable=False),  # from 0, in the judge's order
    Column("item_id", ForeignKey("judging_items.item_id"), nullable=False, index=True),
    Column("first_is_left", Boolean, nullable=False),
    Column("repeats", ForeignKey("judging_assignments.assignment_id")),  # the same item before, sides swapped
    Column("expected", String(8)),  # of an attention item
    Column("showing", String(32), unique=True),  # random; what a vote must name; null: never shown, or undone since
    Column("shown_at", Float),  # the latest time
    UniqueConstraint("judge_id", "position"),
)

# What a recruiting site calls those whom it sent, apart from the votes.
recruits = Table(
    "judging_recruits",
    metadata,
    Column("judge_id", ForeignKey("judging_judges.judge_id"), primary_key=True),
    Column("participant", String(64), nullable=False, unique=True),
    Column("study", String(64), nullable=False),
    Column("session", String(64), nullable=False),
)

IS_FIRST = assignments.c.repeats.is_(None) & assignments.c.expected.is_(None)
"""Of an assignment: neither a repeat nor an attention item."""
Index(
    "judging_one_first_vote_an_item",
    assignments.c.judge_id,
    assignments.c.item_id,
    unique=True,
    sqlite_where=IS_FIRST,
    postgresql_where=IS_FIRST,
)

votes = Table(
    "judging_votes",
    metadata,
    Column("vote_id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("judging_assignments.assignment_id"), nullable=False),
    Column("showing", String(32), nullable=False, unique=True),  # of the assignment then: a showing is voted on once
    Column("choice", String(8), nullable=False),
    Column("shown_at", Float),  # null: unknown (a sheet)
    Column("cast_at", Float, nullable=False),
    Column("seconds", Float),  # null: unknown
    Column("undone_at", Float),
    _one_of("choice", CHOICES),
)
Index(
    "judging_one_vote_an_assignment",
    votes.c.assignment_id,
    unique=True,
    sqlite_where=votes.c.undone_at.is_(None),
    postgresql_where=votes.c.undone_at.is_(None),
)

# What people said besides votes, where a study asks; in no panel from before there were studies. About the pair of a
# showing: criterion -> choice, `strength`, `reason`. About check-0, check-1: the answers of a try, in order.
remarks = Table(
    "judging_remarks",
    metadata,
    Column("judge_id", ForeignKey("judging_judges.judge_id"), primary_key=True),
    Column("about", String(32), primary_key=True),
    Column("said", JSON, nullable=False),
)

# How a model judge is asked; settled before its first request, so that one judge is one model asked in one way.
model_judges = Table(
    "judging_model_judges",
    metadata,
    Column("judge_id", ForeignKey("judging_judges.judge_id"), primary_key=True),
    Column("asked", JSON, nullable=False),  # model as asked for, prompt, temperature, length of an answer; or a sheet
)

# What a model said, word for word: one row for each request that was answered for good.
answers = Table(
    "judging_answers",
    metadata,
    Column("answer_id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("judging_assignments.assignment_id"), nullable=False),
    Column("swapped", Boolean, nullable=False),  # whether the sides were the other way round than in the assignment
    Column("status", String(8), nullable=False),  # choice, refusal or garbage
    Column("choice", String(8)),  # as the model saw the sides; null unless status is choice
    Column("prompt", Words, nullable=False),
    Column("reply", Words, nullable=False),
    Column("model", Words, nullable=False),  # as the endpoint names it in its answer
    Column("endpoint", Words, nullable=False),  # without credentials; "sheet" where it was pasted by hand
    Column("finish_reason", Words),
    Column("input_tokens", Integer),
    Column("output_tokens", Integer),
    Column("asked_at", Float, nullable=False),
    Column("seconds", Float),
    UniqueConstraint("assignment_id", "swapped"),
    _one_of("status", ("choice", "refusal", "garbage")),
)

# Filled by the lock from the sealed key; empty until then.
unsealed = Table(
    "judging_unsealed",
    metadata,
    Column("item_id", ForeignKey("judging_items.item_id"), primary_key=True),
    Column("seed", BigInteger, nullable=False),
    Column("arm_first", Words, nullable=False),
    Column("arm_second", Words, nullable=False),
    Column("sample_first", BigInteger, nullable=False),
    Column("sample_second", BigInteger, nullable=False),
)
