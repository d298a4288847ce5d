"""A panel: made from completions, judges given their assignments and links, locked. Needs the sealed key.

What happens while judges vote is in store.py.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Annotated, Any

from sqlalchemy import Connection, Row, func, insert, null, select, text, update

from replication.config.reading import Range, check_values
from replication.config.schema import Count, Natural
from replication.errors import UserError
from replication.judging.completions import Completions, draw_items, matched
from replication.judging.database import Database
from replication.judging.design import Design, Place, session
from replication.judging.schema import COUNTS, IS_FIRST, TEST, assignments, items, judges, panel, unsealed
from replication.judging.seal import Key, read_key, remove_key, write_key
from replication.judging.store import Store, hash_token, is_locked

ATTENTION_QUESTION = "Nothing is to be compared here: please choose “{choice}”. It shows us that the page is read."
ATTENTION_TEXT = "(no text)"
LOCKED = "the panel is locked; no judge can join it any more"
JUDGE_ID = re.compile(r"[\w.@-]([\w.@ -]{0,198}[\w.@-])?")
LABELS = {"left": "Left is better", "right": "Right is better"}


MOST_JUDGES = 100_000


@dataclass(frozen=True)
class PanelOptions:
    """Settings of a new panel."""

    judges: Annotated[int, Range(f"[0, {MOST_JUDGES}]")]
    """People it is planned for; each gets a set of assignments."""
    votes_per_judge: Count
    """First votes of a set."""
    repeat_share: Annotated[float, Range("[0, 0.5]")] = 0.1
    """Share of a set that comes again, sides swapped."""
    attention: Natural = 0
    """Attention items of a set."""
    survey: bool = True
    """Whether the page asks about the judge."""
    open_link: bool = True
    """Whether one link gives each who opens it a set that is free."""

    @property
    def n_repeats(self) -> int:
        """Pairs of a set that come again."""
        return repeats(self.repeat_share, self.votes_per_judge)

    def check(self) -> None:
        """
        Raises:
            UserError: a value that no panel can have.
        """
        check_values(self)
        if self.attention > (room := self.votes_per_judge + self.n_repeats):
            raise UserError(
                f"--attention: {self.attention} is more than the {room} other places of a set; give at most {room}"
            )


def repeats(share: float, votes: int) -> int:
    """Pairs of a set that come again: of its first half, each once."""
    return min(math.ceil(share * votes), (votes + 1) // 2)


def check_votes(votes: int, n_pairs: int) -> None:
    """
    Raises:
        UserError: a judge cannot be given so many first votes, as none is given a pair twice.
    """
    if votes > n_pairs:
        raise UserError(
            f"--votes: {votes} is more than the {n_pairs} pairs of completions there are; give at most {n_pairs}, or "
            "make a panel of more completions"
        )


@dataclass(frozen=True)
class Tokens:
    """Secrets of a new panel; the database keeps their hashes only."""

    admin: str
    join: str | None


# ---------------------------------------------------------------- a new panel


def create_panel(
    database: Database,
    sealed: Path,
    suite: str,
    completions: Completions,
    arms: tuple[str, str],
    options: PanelOptions,
    keep: Callable[[Tokens], None] | None = None,
) -> Tokens:
    """Make the items, seal their key, and give every planned judge a set.

    Args:
        database: where no panel is yet.
        sealed: folder of the key.
        suite: its name, for the vote record.
        arms: (baseline, treatment).
        keep: is given the tokens before the panel is there for good: a panel whose tokens are lost is of no use.

    Raises:
        UserError: there is a panel already, or the completions do not match between arms and seeds.
    """
    options.check()
    found = matched(completions, arms)
    if database.exists():
        raise UserError(
            f"{database.name}: holds a panel already; a panel is made once. Take another --database or folder"
        )
    drawn = draw_items(found, arms)
    check_votes(options.votes_per_judge, len(drawn))
    key = Key(
        panel_id=secrets.token_hex(8),
        secret=secrets.token_hex(32),
        baseline=arms[0],
        treatment=arms[1],
        prompts=found.prompts,
        seeds=found.seeds,
        samples_baseline=found.samples[0],
        samples_treatment=found.samples[1],
        repeat_share=options.repeat_share,
        n_attention=options.attention,
        items={row["item_id"]: behind for row, behind in drawn},
    )
    tokens = Tokens(secrets.token_urlsafe(24), secrets.token_urlsafe(24) if options.open_link else None)
    with database.write() as c:
        database.create(c)
        key_sha256 = write_key(sealed, key)
        try:
            c.execute(insert(items), [row for row, _ in sorted(drawn, key=lambda pair: pair[0]["item_id"])])
            c.execute(
                insert(panel).values(
                    panel_id=key.panel_id,
                    suite=suite,
                    created_at=time.time(),
                    key_sha256=key_sha256,
                    admin_sha256=hash_token(tokens.admin),
                    join_sha256=hash_token(tokens.join) if tokens.join else None,
                    votes_per_judge=options.votes_per_judge,
                    planned_judges=options.judges,
                    survey=options.survey,
                )
            )
            names = [f"judge-{n:03d}" for n in range(1, options.judges + 1)]
            _add(c, key, names, "human", "", options.votes_per_judge)
            if keep is not None:
                keep(tokens)
        except BaseException:  # a key of no panel would stand in the way of the next one
            remove_key(sealed)
            raise
    return tokens


# ---------------------------------------------------------------- judges


def add_judges(
    database: Database, sealed: Path, names: Sequence[str], kind: str = "human", vendor: str = "", votes: int = 0
) -> None:
    """Give judges the next assignments of the design.

    Args:
        names: judge ids that are not taken yet.
        kind: human or model.
        votes: first votes of each; 0: as many as the panel plans.

    Raises:
        UserError: a name is taken, the panel is locked, or the key is not there.
    """
    with database.write() as c:
        row = _hold_panel(c)
        key = read_key(sealed, row.key_sha256)
        taken = set(c.execute(select(judges.c.judge_id)).scalars())
        for name in names:
            check_judge_id(name)
            if name in taken:
                raise UserError(f"--judge-id: '{name}' is taken; choose another")
            taken.add(name)
        _add(c, key, names, kind, vendor, votes or row.votes_per_judge)


def check_judge_id(name: str) -> None:
    """
    Raises:
        UserError: no name that files, links and tables hold as it is.
    """
    if not JUDGE_ID.fullmatch(name):
        shown = name if len(name) <= 60 else name[:60] + "…"
        raise UserError(
            f"--judge-id: {shown!r} must be letters, digits and . _ - @, spaces inside only, at most 200 characters"
        )


def _hold_panel(c: Connection) -> Row[Any]:
    """The panel, held until the transaction ends: what is given to a judge is nobody else's meanwhile."""
    row = c.execute(select(panel).with_for_update()).one()
    if row.locked_at is not None:
        raise UserError(LOCKED)
    return row


def invite(database: Database, names: Sequence[str]) -> dict[str, str]:
    """A new link token for each judge; an earlier link of theirs stops working.

    Raises:
        UserError: a name is no person's in this panel, or the panel is locked; then no link has changed.
    """
    tokens = {name: secrets.token_urlsafe(24) for name in names}
    with database.write() as c:
        _refuse_locked(c)
        for name, token in tokens.items():
            this = (judges.c.judge_id == name) & (judges.c.kind == "human")
            if not c.execute(update(judges).where(this).values(token_sha256=hash_token(token))).rowcount:
                raise UserError(f"--judge-id: '{name}' is no person of this panel; `replicate judge status` names them")
    return tokens


def invite_people(database: Database, sealed: Path, n: int) -> tuple[dict[str, str], int]:
    """Links to n sets: those that nobody has yet, first ones first, then further ones, which need the sealed key.

    One transaction: a further set has its judge from the start, so that nobody comes to it by the open link.

    Returns:
        Judge id -> token, and how many of them are further sets.

    Raises:
        UserError: the panel is locked, or a further set is needed and the key is not there; then no link was given.
    """
    with database.write() as c:
        row = _hold_panel(c)
        free = (judges.c.kind == "human") & judges.c.token_sha256.is_(None)
        query = select(judges.c.judge_id).where(free).order_by(judges.c.created_at, judges.c.judge_id).limit(n)
        names = c.execute(query.with_for_update(skip_locked=True)).scalars().all()
        further = _next_names(c, n - len(names))
        tokens = {name: secrets.token_urlsafe(24) for name in (*names, *further)}
        for name in names:
            c.execute(update(judges).where(judges.c.judge_id == name).values(token_sha256=hash_token(tokens[name])))
        if further:
            _add(c, read_key(sealed, row.key_sha256), further, "human", "", row.votes_per_judge, tokens)
    return tokens, len(further)


def invite_tests(database: Database, sealed: Path, n: int) -> dict[str, str]:
    """Judge id -> token of n test judges: each gets the design's first set, which stays for others to judge.

    Raises:
        UserError: the panel is locked, or the key is not there.
    """
    with database.write() as c:
        row = _hold_panel(c)
        key, tokens = read_key(sealed, row.key_sha256), {}
        for name in _next_names(c, n, TEST):
            tokens[name] = secrets.token_urlsafe(24)
            _add(c, key, [name], "human", TEST, row.votes_per_judge, tokens)
    return tokens


def _next_names(c: Connection, n: int, stem: str = "judge") -> list[str]:
    """n names of the form judge-007 that are not taken."""
    taken = set(c.execute(select(judges.c.judge_id)).scalars())
    free = (f"{stem}-{i:03d}" for i in range(1, len(taken) + n + 1))
    return [name for name in free if name not in taken][:n]


def _refuse_locked(c: Connection) -> None:
    if is_locked(c):
        raise UserError(LOCKED)


def _add(
    c: Connection,
    key: Key,
    names: Sequence[str],
    kind: str,
    vendor: str,
    votes: int,
    tokens: Mapping[str, str] = MappingProxyType({}),
) -> None:
    design = Design(len(key.prompts), len(key.seeds), len(key.samples_baseline), len(key.samples_treatment), key.secret)
    check_votes(votes, design.n_distinct)
    given = [] if (kind, vendor) == ("human", TEST) else _given(c)
    hands = islice(design.deal([*given, *[votes] * len(names)]), len(given), None)
    prompts = c.execute(select(items.c.item_id, items.c.prompt_id).where(items.c.prompt_id.is_not(None)))
    known = {}
    for item, prompt in prompts:
        b = key.items[item]
        known[_pair(b.seed, prompt, (b.arm_first, b.sample_first), (b.arm_second, b.sample_second))] = item
    for name, cells in zip(names, hands, strict=True):
        hashed = hash_token(tokens[name]) if name in tokens else None
        person = {"judge_id": name, "kind": kind, "vendor": vendor, "token_sha256": hashed}
        c.execute(insert(judges).values(**person, created_at=time.time()))
        rng = Random(f"{key.secret}/session/{name}")
        n_attention = key.n_attention if kind == "human" else 0
        n_repeats = repeats(key.repeat_share, votes) if kind == "human" else 0  # a model sees both orders anyway
        _assign(c, key, name, session(cells, n_repeats, n_attention, rng), known)


def _given(c: Connection) -> Sequence[int]:
    """First votes dealt to each judge, in the order of dealing; test judges take none from others."""
    query = select(func.count()).select_from(assignments.join(judges)).where(IS_FIRST, COUNTS)
    query = query.group_by(assignments.c.judge_id)
    return c.execute(query.order_by(func.min(assignments.c.assignment_id))).scalars().all()


def _pair(seed: int, prompt: int, *shown: tuple[str, int]) -> tuple[Any, ...]:
    """(seed, prompt, (arm, sample) of both) in a form that the order does not change."""
    return seed, prompt, *sorted(shown)


def _assign(c: Connection, key: Key, name: str, places: Sequence[Place], known: Mapping[tuple[Any, ...], str]) -> None:
    ids: dict[int, int] = {}  # place -> assignment

    def row(position: int) -> dict[str, Any]:
        place, first_is_left = places[position], True
        if place.cell is None:
            assert place.expected is not None
            item = _attention_item(c, place.expected)
        else:
            cell = place.cell
            baseline = key.baseline, key.samples_baseline[cell.sample_baseline]
            treatment = key.treatment, key.samples_treatment[cell.sample_treatment]
            item = known[_pair(key.seeds[cell.seed], key.prompts[cell.prompt], baseline, treatment)]
            first_is_left = (key.items[item].arm_first == key.treatment) == place.treatment_left
        return {
            "judge_id": name,
            "position": position,
            "item_id": item,
            "first_is_left": first_is_left,
            "repeats": None if place.repeats is None else ids[place.repeats],
            "expected": place.expected,
        }

    # first votes before repeats, which name them
    for is_repeat in (False, True):
        at = [i for i, place in enumerate(places) if (place.repeats is not None) == is_repeat]
        if at:
            query = insert(assignments).returning(assignments.c.assignment_id, sort_by_parameter_order=True)
            ids |= zip(at, c.execute(query, [row(i) for i in at]).scalars(), strict=True)


def _attention_item(c: Connection, expected: str) -> str:
    """The item that asks for this choice; made at its first use."""
    item_id = hashlib.sha256(f"attention/{expected}".encode()).hexdigest()[:16]
    if c.execute(select(items.c.item_id).where(items.c.item_id == item_id)).one_or_none() is None:
        question = ATTENTION_QUESTION.format(choice=LABELS[expected])
        row = {"item_id": item_id, "category": "attention", "question": question}
        c.execute(insert(items).values(**row, first=ATTENTION_TEXT, second=ATTENTION_TEXT))
    return item_id


# ---------------------------------------------------------------- the lock


def lock_panel(
    database: Database, sealed: Path, note: str = "", check: Callable[[Connection], object] | None = None
) -> None:
    """Close the panel for good and put what stands behind its items into the database.

    Locking again changes nothing, and puts in what an interrupted lock had not come to.

    Args:
        check: looks at the panel as it is about to be locked, and raises where its record could not be read: the panel
            then stays open, as it was.

    Raises:
        UserError: the key is not there, or is another one.
    """
    with database.read() as c:
        expected = c.execute(select(panel.c.key_sha256)).scalar_one()
    key = read_key(sealed, expected)
    with database.write() as c:
        if not database.is_sqlite:
            # waits for the votes that are being stored, ahead of those that come meanwhile: these then see the lock.
            # A lock of the row alone could wait for ever, as long as one vote overlaps the next.
            c.execute(text(f"LOCK TABLE {panel.name} IN EXCLUSIVE MODE"))
        row = c.execute(select(panel)).one()
        if row.locked_at is None:
            arms = {"baseline": key.baseline, "treatment": key.treatment}
            c.execute(update(panel).values(locked_at=time.time(), lock_note=note, **arms))
        if not c.execute(select(func.count()).select_from(unsealed)).scalar_one():
            rows = [{"item_id": item, **vars(behind)} for item, behind in key.items.items()]
            c.execute(insert(unsealed), rows)
        if row.locked_at is None and check is not None:
            check(c)


# ---------------------------------------------------------------- a copy to try the page on


def preview(database: Database, file: Path) -> tuple[Store, str]:
    """A copy in a new SQLite file, every set free and no vote cast, and the token of its open link.

    No link of the panel itself opens it.

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
