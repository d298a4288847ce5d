"""Places that judges gave up: who did, and their pairs for whoever comes next. Nothing here knows an arm.

No vote moves: the next judge's set has rows of its own, with the same pairs, sides and order.
"""

from __future__ import annotations

import csv
from pathlib import Path

from sqlalchemy import insert, literal, select, update

from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.panel import LOCKED
from replication.judging.schema import LEFT, assignments, judges, recruits
from replication.judging.store import CURRENT, is_locked

RETURNED = "returned"
WHY = {"RETURNED": RETURNED, "TIMED OUT": "timed out", "SCREENED OUT": "screened out"}


def gave_up(database: Database, export: Path) -> dict[str, str]:
    """Judge -> why, of those whom the site's export of submissions lists as returned or timed out."""
    try:
        with export.open(encoding="utf-8-sig", newline="") as file:
            status = {row["Participant id"]: row["Status"].upper().replace("-", " ") for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        columns = "give the site's export of submissions, a CSV with `Participant id` and `Status`"
        raise UserError(f"{export}: cannot be read ({error}); {columns}") from None
    with database.read() as c:
        came = c.execute(select(recruits.c.judge_id, recruits.c.participant))
        return {row.judge_id: WHY[said] for row in came if (said := status.get(row.participant)) in WHY}


def reclaim(database: Database, judge_id: str) -> str | None:
    """Give the pairs of a judge who left to a set that nobody has yet; its name.

    The leaver's link takes no vote from now on. None, and nothing done, of one who finished, left before or has no set.
    """
    old, first, new = assignments, assignments.alias(), assignments.alias()
    leaver = select(judges).where(judges.c.judge_id == judge_id, judges.c.kind == "human", judges.c.vendor == "")
    name = f"{judge_id}.2"
    with database.write() as c:
        if is_locked(c):
            raise UserError(LOCKED)
        # held, so that of two who reclaim it one finds it reclaimed
        row = c.execute(leaver.where(judges.c.token_sha256.is_not(None)).with_for_update()).first()
        if row is None or c.execute(CURRENT, {"judge": judge_id}).first() is None:
            return None
        c.execute(update(judges).where(judges.c.judge_id == judge_id).values(vendor=LEFT))
        # the same created_at: where the design dealt the pairs
        c.execute(insert(judges).values(judge_id=name, kind="human", vendor="", created_at=row.created_at))
        place = [literal(name), old.c.position, old.c.item_id, old.c.first_is_left, old.c.expected]
        mine = old.c.judge_id == judge_id
        firsts = select(*place, old.c.repeats).where(mine, old.c.repeats.is_(None))
        again = select(*place, new.c.assignment_id).join_from(old, first, old.c.repeats == first.c.assignment_id)
        again = again.join(new, (new.c.judge_id == name) & (new.c.position == first.c.position)).where(mine)
        columns = ["judge_id", "position", "item_id", "first_is_left", "expected", "repeats"]
        for rows in (firsts, again):
            c.execute(insert(assignments).from_select(columns, rows.order_by(old.c.position)))
    return name
