"""What judges were told against what the database holds: no vote lost, none twice, none that nobody sent."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, select
from virtual_users import Said

from replication.judging.database import Database
from replication.judging.schema import assignments, judges, votes

SHOWN_FAULTS = 20


@dataclass
class Comparison:
    """What was counted, and every difference in a line."""

    sent: int = 0
    acknowledged: int = 0
    """Votes whose judge was told that they are stored."""
    told_twice: int = 0
    """Of these, by `stored already` after a first answer that was lost or a second press."""
    undone: int = 0
    in_database: int = 0
    standing: int = 0
    faults: list[str] = field(default_factory=list)


def compare(said: Sequence[Said], database: Database) -> Comparison:
    """Hold every vote and every undo that was sent against the tables.

    A vote that was acknowledged must be there with its choice, on the judge's own assignment; one whose answer was lost
    may be there or not. A vote is undone where the undo was acknowledged, may be where its answer was lost or came to
    a second try, and must stand otherwise. No assignment has two standing votes, and no vote comes from nowhere.
    """
    query = select(votes, assignments.c.judge_id, assignments.c.position, judges.c.token_sha256)
    with database.read() as c:
        rows = c.execute(query.select_from(votes).outerjoin(assignments).outerjoin(judges)).all()
    sent = [one for one in said if one.what == "vote"]
    undos = {one.impression: one for one in said if one.what == "undo"}
    found = Comparison(
        sent=len(sent),
        acknowledged=sum(one.told in ("stored", "stored already") for one in sent),
        told_twice=sum(one.told == "stored already" for one in sent),
        undone=sum(row.undone_at is not None for row in rows),
        in_database=len(rows),
        standing=sum(row.undone_at is None for row in rows),
    )
    by_impression: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        by_impression[row.showing].append(row)
    for one in sent:
        found.faults += _of_vote(one, by_impression[one.impression], undos.get(one.impression))
    known = {one.impression for one in sent}
    found.faults += [f"{_named(row)}: was sent by nobody" for row in rows if row.showing not in known]
    standing = Counter(row.assignment_id for row in rows if row.undone_at is None)
    found.faults += [f"assignment {number}: has {n} standing votes" for number, n in standing.items() if n > 1]
    return found


def _of_vote(one: Said, rows: Sequence[Row[Any]], undo: Said | None) -> list[str]:
    name = f"vote on {one.impression} ({one.choice}, told {one.told})"
    if len(rows) > 1:
        return [f"{name}: stands there {len(rows)} times"]
    if not rows:
        return [f"{name}: is lost"] if one.told in ("stored", "stored already") else []
    row, faults = rows[0], []
    if row.choice != one.choice:
        faults.append(f"{name}: stands there as {row.choice}")
    if row.token_sha256 != one.token_sha256:
        faults.append(f"{name}: stands there as another judge's, {row.judge_id}")
    if one.told == "refused":
        faults.append(f"{name}: is there, though it was refused")
    is_undone = row.undone_at is not None
    if undo is None and is_undone:
        faults.append(f"{name}: was undone by nobody")
    elif undo is not None and undo.told == "stored" and not is_undone:
        faults.append(f"{name}: stands, though its undo was acknowledged")
    elif undo is not None and undo.told == "refused" and undo.tries == 1 and is_undone:
        faults.append(f"{name}: is undone, though that was refused")
    return faults


def _named(row: Row[Any]) -> str:
    return f"vote {row.vote_id} of {row.judge_id} at place {row.position} ({row.choice})"
