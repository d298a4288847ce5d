"""A copy of a panel to try its page on: every set is free, no vote is cast, and what is voted there goes nowhere."""

from __future__ import annotations

import secrets
from pathlib import Path

from sqlalchemy import insert, null, select, update

from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.schema import assignments, items, judges, panel
from replication.judging.store import Store, hash_token


def preview(database: Database, file: Path) -> tuple[Store, str]:
    """The copy in a new SQLite file, and the token of its open link; no link of the panel itself opens it.

    Raises:
        UserError: the panel has no set of pairs.
    """
    join, copy = secrets.token_urlsafe(24), Database(file)
    with database.read() as there, copy.write(durable=False) as here:
        copy.create(here)
        for table in (panel, items, judges, assignments):
            rows = [dict(row._mapping) for row in there.execute(select(table).order_by(*table.primary_key))]
            if not rows:
                raise UserError("--preview: nobody has pairs yet; `replicate judge invite` gives the first set")
            here.execute(insert(table), rows)
        is_open = {"locked_at": None, "lock_note": None, "baseline": None, "treatment": None}
        here.execute(update(panel).values(**is_open, join_sha256=hash_token(join)))
        fresh = {"kind": "human", "vendor": "", "token_sha256": None, "started_at": None, "survey": null()}
        here.execute(update(judges).values(fresh))
        here.execute(update(assignments).values(showing=None, shown_at=None))
    return Store(copy), join
