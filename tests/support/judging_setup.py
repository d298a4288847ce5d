"""Panels made as every panel is made, from texts that tell no arm, in SQLite or PostgreSQL; and those who vote."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import event, select

from replication.generation.completions import Completion
from replication.judging.database import Database
from replication.judging.panel import PanelOptions, create_panel, invite, lock_panel
from replication.judging.schema import assignments, judges, votes
from replication.judging.store import _LAST_VOTE, Cast, Store
from replication.votes.record import CHOICES

ARMS = ("baseline", "both")


def completions(
    n_prompts: int = 4, seeds: Iterable[int] = (1, 2), samples: tuple[int, int] = (2, 2), arms: tuple[str, str] = ARMS
) -> dict[int, dict[str, list[Completion]]]:
    """Seed -> arm -> completions, whose texts name their arm to nobody who cannot hash."""

    def one(arm: str, seed: int, prompt: int, sample: int) -> Completion:
        text = hashlib.sha256(f"{arm}/{seed}/{prompt}/{sample}".encode()).hexdigest()
        return Completion(arm, seed, prompt, ("factual", "creative")[prompt % 2], f"Question {prompt}?", sample, text)

    return {
        seed: {
            arm: [one(arm, seed, prompt, sample) for prompt in range(n_prompts) for sample in range(n)]
            for arm, n in zip(arms, samples, strict=True)
        }
        for seed in seeds
    }


@dataclass
class MadePanel:
    database: Database
    sealed: Path
    admin: str
    join: str | None

    @property
    def store(self) -> Store:
        return Store(self.database)

    @property
    def names(self) -> list[str]:
        with self.database.read() as c:
            return list(c.execute(select(judges.c.judge_id).order_by(judges.c.judge_id)).scalars())

    def rows(self, table: Any = assignments) -> list[Any]:
        with self.database.read() as c:
            return list(c.execute(select(table).order_by(*table.primary_key.columns)).all())

    def standing(self) -> list[Any]:
        return [row for row in self.rows(votes) if row.undone_at is None]

    def link(self, name: str = "judge-001") -> str:
        return invite(self.database, [name])[name]

    def lock(self, note: str = "") -> None:
        lock_panel(self.database, self.sealed, note)


def hasty(url: str | Path) -> Database:
    """A database that does not wait for the disk: for tests that are not about that."""
    database = Database(url)
    if database.is_sqlite:
        event.listen(database.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
    return database


def make_panel(
    url: str | Path,
    sealed: Path,
    made_of: Any = None,
    arms: tuple[str, str] = ARMS,
    durable: bool = False,
    **options: Any,
) -> MadePanel:
    """A panel of two judges with six votes each, unless told otherwise.

    Args:
        durable: whether SQLite waits for the disk, as it does outside of tests.
    """
    database = Database(url) if durable else hasty(url)
    chosen = PanelOptions(**({"judges": 2, "votes_per_judge": 6} | options))
    tokens = create_panel(database, sealed, "suite", made_of or completions(arms=arms), arms, chosen)
    return MadePanel(database, sealed, tokens.admin, tokens.join)


def vote_all(
    store: Store, judge_id: str, choose: Callable[[Any], str], most: int = 10_000, said: dict[str, str] | None = None
) -> list[tuple[Any, str]]:
    """Vote until nothing is shown, or the panel is locked; (impression, choice) of each vote that was acknowledged."""
    cast = []
    while len(cast) < most and (shown := store.show(judge_id)) is not None:
        choice = choose(shown)
        outcome = store.vote(judge_id, shown.impression, choice, said)
        if outcome is Cast.LOCKED:
            break
        assert outcome is Cast.STORED, outcome
        cast.append((shown, choice))
    return cast


def last_vote(store: Store, judge_id: str) -> str | None:
    """The impression of the judge's last vote that stands, as `undo` looks for it."""
    with store.database.read() as c:
        last = c.execute(_LAST_VOTE, {"judge": judge_id}).one_or_none()
    return last and last.showing


def at_random(seed: int) -> Callable[[Any], str]:
    rng = Random(seed)
    return lambda shown: rng.choice(CHOICES)


def at_once(n: int, act: Callable[[int], Any]) -> list[Any]:
    """What n threads return that start together; an exception in one of them is raised here."""
    barrier, results, errors = threading.Barrier(n), [None] * n, []

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = act(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
