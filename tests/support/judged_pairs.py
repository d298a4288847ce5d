"""A small panel with one model judge, written straight into the tables."""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import insert

from replication.judging.database import Database
from replication.judging.schema import assignments, items, judges, metadata, panel

KINDS = ("first", "second", "tie", "both_bad", "loud", "refusal", "garbage", "cut")
"""What tiny_judge.py and scripted answers make of a pair, by its number modulo eight; loud: A in either order."""
WORDS = {
    "first": ("a lark sang", "the mire stank"),
    "second": ("in the mire", "lark upon branch"),
    "tie": ("a dull day", "rain"),
    "both_bad": ("mud", "and soil"),
    "loud": ("loud loud", "hush"),
    "refusal": ("taboo", "tea"),
    "garbage": ("clank", "calm"),
    "cut": ("one", "two"),
}


def kind_of(number: int) -> str:
    return KINDS[number % len(KINDS)]


def make_panel(path: Path | str, n_pairs: int, judge: str = "tiny-judge", kind: str = "model") -> Database:
    """Pairs by kind; of every second pair of eight the first completion is on the left."""
    database = Database(path)
    with database.write() as c:
        metadata.create_all(c)
        sizes = {"votes_per_judge": n_pairs, "planned_judges": 1, "survey": False}
        hashes = {"key_sha256": "0" * 64, "admin_sha256": "1" * 64}
        c.execute(insert(panel).values(panel_id="p", suite="s", created_at=time.time(), **hashes, **sizes))
        c.execute(insert(judges).values(judge_id=judge, kind=kind, vendor="us", created_at=time.time()))
        for number in range(n_pairs):
            first, second = WORDS[kind_of(number)]
            texts = {"first": f"[{number}/first] {first} and so on", "second": f"[{number}/second] {second} and so on"}
            item = {"item_id": f"item-{number}", "prompt_id": number, "category": "c", "question": "Say something."}
            c.execute(insert(items).values(**item, **texts))
            place = {"position": number, "item_id": f"item-{number}", "first_is_left": number // len(KINDS) % 2 == 0}
            c.execute(insert(assignments).values(assignment_id=100 + number, judge_id=judge, **place))
    return database


def expected_vote(number: int) -> str | None:
    """The vote that a pair comes to; None: none."""
    first_is_left, kind = number // len(KINDS) % 2 == 0, kind_of(number)
    if kind in ("first", "second"):
        return "left" if (kind == "first") == first_is_left else "right"
    return {"tie": "tie", "both_bad": "both_bad", "loud": "tie"}.get(kind)
