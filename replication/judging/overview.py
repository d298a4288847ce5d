"""How the judging goes: all that an administrator may see, read in one view. Blind until the lock; then by arm too."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, select

from replication.judging import numbers
from replication.judging.database import Database
from replication.judging.schema import COUNTS, answers, assignments, items, judges, panel, unsealed
from replication.judging.store import standing_votes, test_votes


@dataclass(frozen=True)
class JudgeState:
    """A judge as the administrator sees them."""

    kind: str
    vendor: str
    state: str
    numbers: numbers.JudgeNumbers


@dataclass(frozen=True)
class Overview:
    """All that the administrator's page, and `judge status`, show."""

    suite: str
    created_at: str
    locked_at: str | None
    lock_note: str | None
    planned_judges: int
    votes: numbers.Share
    left: numbers.Share
    judges: list[JudgeState]
    n_unclaimed: int
    coverage: list[numbers.PromptNumbers]
    """Every prompt that has an item, whether or not any is in a set."""
    agreement: dict[str, numbers.Share]
    answers: list[tuple[str, dict[str, int]]]
    """Model judge -> status -> requests."""
    n_surveyed: int
    survey: dict[str, dict[str, int]]
    results: list[numbers.Tally]
    n_test_judges: int
    n_test_votes: int
    """In no other number."""


def gather(database: Database) -> Overview:
    """Everything in one consistent view."""
    with database.read() as c:
        the_panel = c.execute(select(panel)).one()
        rows = c.execute(standing_votes()).all()
        people = c.execute(select(judges).where(COUNTS).order_by(judges.c.kind, judges.c.judge_id)).all()
        n_assigned = _assigned_by_judge(c)
        planned = _assigned_by_prompt(c)
        n_test_judges, n_test_votes = test_votes(c)
        replies = _replies(c)
        truth = {row.item_id: row for row in c.execute(select(unsealed))} if the_panel.locked_at else {}
    taken = [judge for judge in people if judge.kind == "model" or judge.token_sha256 is not None]
    of_judges = numbers.by_judge(rows, {judge.judge_id: n_assigned.get(judge.judge_id, 0) for judge in taken})
    n_surveyed, survey = numbers.survey_counts(judge.survey for judge in taken)
    return Overview(
        suite=the_panel.suite,
        created_at=minute(the_panel.created_at),
        locked_at=minute(the_panel.locked_at) if the_panel.locked_at else None,
        lock_note=the_panel.lock_note,
        planned_judges=the_panel.planned_judges,
        votes=numbers.Share(len(rows), sum(n_assigned.values())),
        left=numbers.left_share(rows),
        judges=[
            JudgeState(judge.kind, judge.vendor, _state(judge, n.votes), n)
            for judge, n in zip(taken, of_judges, strict=True)
        ],
        n_unclaimed=len(people) - len(taken),
        coverage=numbers.coverage(rows, planned),
        agreement=numbers.agreement(rows),
        answers=replies,
        n_surveyed=n_surveyed,
        survey={question: dict(counts) for question, counts in survey.items()},
        results=numbers.results(rows, truth),
        n_test_judges=n_test_judges,
        n_test_votes=n_test_votes,
    )


def _assigned_by_judge(c: Connection) -> dict[str, int]:
    query = select(assignments.c.judge_id, func.count().label("n")).join(judges).where(COUNTS)
    return {row.judge_id: row.n for row in c.execute(query.group_by(assignments.c.judge_id))}


def _assigned_by_prompt(c: Connection) -> dict[tuple[int, str, str], int]:
    by = (items.c.prompt_id, items.c.category, judges.c.kind)
    query = select(*by, func.count()).join_from(assignments, items).join(judges).where(COUNTS)
    first = query.where(items.c.prompt_id.is_not(None), assignments.c.repeats.is_(None)).group_by(*by)
    everything = select(items.c.prompt_id, items.c.category).where(items.c.prompt_id.is_not(None)).distinct()
    none = {(prompt_id, category, "human"): 0 for prompt_id, category in c.execute(everything)}
    return none | {(prompt_id, category, kind): n for prompt_id, category, kind, n in c.execute(first)}


def _replies(c: Connection) -> list[tuple[str, dict[str, int]]]:
    by = (assignments.c.judge_id, answers.c.status)
    query = select(*by, func.count()).join_from(answers, assignments).group_by(*by).order_by(*by)
    counts: dict[str, dict[str, int]] = {}
    for judge_id, status, n in c.execute(query):
        counts.setdefault(judge_id, {})[status] = n
    return list(counts.items())


def _state(judge: Any, votes: numbers.Share) -> str:
    if votes.whole and votes.part == votes.whole:
        return "finished"
    if votes.part:
        return "voting"
    return "started" if judge.started_at is not None else "not started"


def minute(seconds: float) -> str:
    """Seconds since 1970 as a date and time of day (UTC)."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
