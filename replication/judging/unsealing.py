"""A locked panel's votes with their arms.

An attention item is in no vote record. A repeat is there for self-consistency alone, and not without its first vote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.schema import items, judges, panel, unsealed
from replication.judging.store import standing_votes, test_votes
from replication.votes.record import Vote

NOT_LOCKED = "the panel is not locked, so its votes are blind; `replicate judge lock` comes first"


@dataclass(frozen=True)
class Unsealed:
    """Everything that was voted, with what stood behind it. Times are seconds since 1970."""

    panel_id: str
    suite: str
    votes: tuple[Vote, ...]
    """First votes and repeats, in order of casting."""
    cast_at: tuple[float, ...]
    """Of each vote."""
    category: Mapping[int, str]
    """By prompt id."""
    surveys: Mapping[str, Mapping[str, Any]]
    """By judge id, of those who answered."""
    lone_repeats: int
    """Repeats whose first vote was never cast: left out."""
    test_votes: int
    """Of test judges: left out."""
    arms: tuple[str, str]
    """(baseline, treatment)"""
    votes_per_judge: int
    key_sha256: str
    locked_at: float
    lock_note: str
    """Why it was locked early; empty where it was not."""


def unsealed_votes(database: Database) -> Unsealed:
    """The votes of a locked panel.

    Raises:
        UserError: the panel is not locked, or its lock was interrupted.
    """
    with database.read() as c:
        return unsealed_within(c)


def unsealed_within(c: Connection) -> Unsealed:
    """unsealed_votes within a transaction: also of a panel that is about to be locked."""
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
        test_votes=test_votes(c)[1],
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
        vote_id=vote_id(about.panel_id, row.assignment_id),
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
        repeat_of="" if row.repeats is None else vote_id(about.panel_id, row.repeats),
    )


def vote_id(panel_id: str, assignment_id: int) -> str:
    return f"{panel_id}-{assignment_id}"


def iso(seconds: float) -> str:
    """Seconds since 1970 as an ISO 8601 time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
