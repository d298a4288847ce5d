"""A panel: made from completions, judges given their assignments and links, locked. Needs the sealed key.

What happens while judges vote is in store.py. What cannot be done raises UserError, and nothing has changed then.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from random import Random
from typing import Annotated, Any

from sqlalchemy import Connection, Row, func, insert, null, select, text, update

from replication.config.reading import Range, check_values
from replication.config.schema import Count, Natural
from replication.config.study import GoldPair, Study, load_study
from replication.errors import UserError
from replication.judging import schema
from replication.judging.completions import Completions, draw_items, matched
from replication.judging.database import Database
from replication.judging.design import Cell, Design, Place, session
from replication.judging.schema import COUNTS, IS_FIRST, TEST, assignments, items, judges, metadata, panel, unsealed
from replication.judging.seal import Key, read_key, remove_key, write_key
from replication.judging.store import Store, hash_token, is_locked, keep_study, panel_study

ATTENTION_QUESTION = "Nothing is to be compared here: please choose “{choice}”. It shows us that the page is read."
LOCKED = "the panel is locked; no judge can join it any more"
JUDGE_ID = re.compile(r"[\w.@-]([\w.@ -]{0,198}[\w.@-])?")


@dataclass(frozen=True)
class PanelOptions:
    """Settings of a new panel."""

    judges: Annotated[int, Range("[0, 100000]")]  # people it is planned for; each gets a set of assignments
    votes_per_judge: Count  # first votes of a set
    repeat_share: Annotated[float, Range("[0, 0.5]")] = 0.1  # of a set that comes again, sides swapped
    attention: Natural = 0  # attention items of a set
    survey: bool = True  # whether the page asks about the judge
    open_link: bool = True  # whether one link gives each who opens it a set that is free
    study: Study = field(default_factory=load_study)

    @property
    def n_repeats(self) -> int:
        return repeats(self.repeat_share, self.votes_per_judge)


def repeats(share: float, votes: int) -> int:
    """Pairs of a set that come again: of its first half, each once."""
    return min(math.ceil(share * votes), (votes + 1) // 2)


def check_votes(votes: int, n_pairs: int) -> None:
    """Raise UserError where a judge cannot be given so many first votes, as none is given a pair twice."""
    if votes > n_pairs:
        raise UserError(
            f"--votes: {votes} is more than the {n_pairs} pairs of completions there are; give at most {n_pairs}, or "
            "make a panel of more completions"
        )


def check_judge_id(name: str) -> None:
    """Raise UserError where files, links and tables do not all hold a name as it is."""
    if not JUDGE_ID.fullmatch(name):
        shown = name if len(name) <= 60 else name[:60] + "…"
        raise UserError(
            f"--judge-id: {shown!r} must be letters, digits and . _ - @, spaces inside only, at most 200 characters"
        )


@dataclass(frozen=True)
class Tokens:
    """Secrets of a new panel; the database keeps their hashes only."""

    admin: str
    join: str | None


def create_panel(
    database: Database,
    sealed: Path,
    suite: str,
    completions: Completions,
    arms: Sequence[str],
    options: PanelOptions,
    keep: Callable[[Tokens], None] | None = None,
) -> Tokens:
    """Make the items of (baseline, treatment, any further arms: each is then compared with each), seal their key in a
    folder, and give every planned judge a set.

    `keep` is given the tokens before the panel is there for good: a panel whose tokens are lost is of no use.
    """
    check_values(options)
    room = options.votes_per_judge + options.n_repeats - len(options.study.gold)
    if options.attention > room:
        raise UserError(
            f"--attention: {options.attention} is more than the {room} other places of a set; give at most {room}"
        )
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
        items={item: behind for item, (_, behind) in drawn.items()},
        samples=dict(zip(arms, found.samples, strict=True)) if len(arms) > 2 else {},
    )
    tokens = Tokens(secrets.token_urlsafe(24), secrets.token_urlsafe(24) if options.open_link else None)
    with database.write() as c:
        metadata.create_all(c)
        key_sha256 = write_key(sealed, key)
        try:
            c.execute(insert(items), [drawn[item][0] for item in sorted(drawn)])
            join_sha256 = hash_token(tokens.join) if tokens.join else None
            hashes = {"key_sha256": key_sha256, "admin_sha256": hash_token(tokens.admin), "join_sha256": join_sha256}
            planned = {"planned_judges": options.judges, "votes_per_judge": options.votes_per_judge}
            has_survey = options.survey and bool(options.study.survey)
            facts = {"panel_id": key.panel_id, "suite": suite, "created_at": time.time(), "survey": has_survey}
            c.execute(insert(panel).values({**facts, **planned, **hashes}))
            keep_study(c, options.study)
            names = [f"judge-{n:03d}" for n in range(1, options.judges + 1)]
            _add(c, key, names, options.votes_per_judge, "human", "", {})
            if keep is not None:
                keep(tokens)
        except BaseException:  # a key of no panel would stand in the way of the next one
            remove_key(sealed)
            raise
    return tokens


def add_judges(
    database: Database, sealed: Path, names: Sequence[str], kind: str = "human", vendor: str = "", votes: int = 0
) -> None:
    """Give judges the next assignments of the design; votes: first votes of each, 0: as many as the panel plans."""
    with database.write() as c:
        row = _hold_panel(c)
        key = read_key(sealed, row.key_sha256)
        taken = set(c.execute(select(judges.c.judge_id)).scalars())
        for name in names:
            check_judge_id(name)
            if name in taken:
                raise UserError(f"--judge-id: '{name}' is taken; choose another")
            taken.add(name)
        _add(c, key, names, votes or row.votes_per_judge, kind, vendor, {})


def _hold_panel(c: Connection) -> Row[Any]:
    """The panel, held until the transaction ends: what is given to a judge is nobody else's meanwhile."""
    row = c.execute(select(panel).with_for_update()).one()
    if row.locked_at is not None:
        raise UserError(LOCKED)
    return row


def invite(database: Database, names: Sequence[str]) -> dict[str, str]:
    """A new link token for each judge, who must be people of this panel; an earlier link of theirs stops working."""
    tokens = {name: secrets.token_urlsafe(24) for name in names}
    with database.write() as c:
        if is_locked(c):
            raise UserError(LOCKED)
        for name, token in tokens.items():
            this = (judges.c.judge_id == name) & (judges.c.kind == "human") & (judges.c.vendor != schema.LEFT)
            if not c.execute(update(judges).where(this).values(token_sha256=hash_token(token))).rowcount:
                raise UserError(f"--judge-id: '{name}' is no person of this panel; `replicate judge status` names them")
    return tokens


def invite_people(database: Database, sealed: Path, n: int, test: bool = False) -> tuple[dict[str, str], int]:
    """Links to n sets: those that nobody has yet, first ones first, then further ones, which need the sealed key.

    One transaction: a further set has its judge from the start, so that nobody comes to it by the open link. Test
    judges get the design's first set, which stays for others to judge.

    Returns:
        Judge id -> token, and how many of them are further sets.
    """
    with database.write() as c:
        row = _hold_panel(c)
        free = (judges.c.kind == "human") & judges.c.token_sha256.is_(None)
        query = select(judges.c.judge_id).where(free).order_by(judges.c.created_at, judges.c.judge_id).limit(n)
        names = [] if test else c.execute(query.with_for_update(skip_locked=True)).scalars().all()
        taken = set(c.execute(select(judges.c.judge_id)).scalars())
        numbered = (f"{TEST if test else 'judge'}-{i:03d}" for i in range(1, len(taken) + n + 1))
        further = [name for name in numbered if name not in taken][: n - len(names)]
        tokens = {name: secrets.token_urlsafe(24) for name in (*names, *further)}
        for name in names:
            c.execute(update(judges).where(judges.c.judge_id == name).values(token_sha256=hash_token(tokens[name])))
        if further:
            key = read_key(sealed, row.key_sha256)
            _add(c, key, further, row.votes_per_judge, "human", TEST if test else "", tokens)
    return tokens, len(further)


def _add(
    c: Connection, key: Key, names: Sequence[str], votes: int, kind: str, vendor: str, tokens: Mapping[str, str]
) -> None:
    sizes = len(key.prompts), len(key.seeds), len(key.samples_baseline), len(key.samples_treatment)
    design = Design(*sizes, key.secret, len(key.by_arm))
    check_votes(votes, design.n_distinct)
    # first votes dealt to each judge so far, in the order of dealing; test judges take none from others, and a set
    # that was given up counts once, as that of its next judge
    counted = IS_FIRST & COUNTS & (judges.c.vendor != schema.LEFT)
    dealt = select(func.count()).select_from(assignments.join(judges)).where(counted)
    dealt = dealt.group_by(judges.c.judge_id).order_by(judges.c.created_at, func.min(assignments.c.assignment_id))
    given = c.execute(dealt).scalars().all()
    hands: Iterable[list[Cell]] = islice(design.deal([*given, *[votes] * len(names)]), len(given), None)
    if vendor == TEST and kind == "human":
        hands = repeat(next(design.deal([votes])), len(names))
    told = panel_study(c)
    known = {}  # (seed, prompt, arm and sample of both) -> item
    for item, prompt in c.execute(select(items.c.item_id, items.c.prompt_id).where(items.c.prompt_id.is_not(None))):
        behind = key.items[item]
        both = (behind.arm_first, behind.sample_first), (behind.arm_second, behind.sample_second)
        known[behind.seed, prompt, frozenset(both)] = item
    for name, cells in zip(names, hands, strict=True):
        hashed = hash_token(tokens[name]) if name in tokens else None
        person = {"judge_id": name, "kind": kind, "vendor": vendor, "token_sha256": hashed, "created_at": time.time()}
        c.execute(insert(judges).values(person))
        rng = Random(f"{key.secret}/session/{name}")
        n_attention = key.n_attention if kind == "human" else 0
        n_repeats = repeats(key.repeat_share, votes) if kind == "human" else 0  # a model sees both orders anyway
        places = session(cells, n_repeats, n_attention + len(told.gold), rng)
        special = [i for i, place in enumerate(places) if place.cell is None]
        gold = dict(zip(rng.sample(special, min(len(told.gold), len(special))), told.gold, strict=False))
        _assign(c, key, name, places, known, {i: _known_answer(c, told, places[i], gold.get(i)) for i in special})


def _known_answer(c: Connection, told: Study, place: Place, pair: GoldPair | None) -> tuple[str, bool]:
    """(item, whether its first text is left) of a gold pair, or else an attention item, which is made if need be."""
    name, first_is_left = f"attention/{place.expected}", True
    label = str(place.expected)
    said = "” or “".join(dict.fromkeys((getattr(told.labels, label), told.labels.stacked(label))))
    question = ATTENTION_QUESTION.format(choice=said)
    texts = {"category": "attention", "question": question, "first": "(no text)", "second": "(no text)"}
    if pair is not None:
        name, first_is_left = f"gold/{pair.question}/{pair.better}/{pair.worse}", place.expected == "left"
        texts = {"category": "gold", "question": pair.question, "first": pair.better, "second": pair.worse}
    item = hashlib.sha256(name.encode()).hexdigest()[:16]
    if c.execute(select(items.c.item_id).where(items.c.item_id == item)).one_or_none() is None:
        c.execute(insert(items).values(item_id=item, **texts))
    return item, first_is_left


def _assign(
    c: Connection,
    key: Key,
    name: str,
    places: Sequence[Place],
    known: Mapping[tuple[int, int, frozenset[tuple[str, int]]], str],
    special: Mapping[int, tuple[str, bool]],
) -> None:
    rows, arms = [], list(key.by_arm)
    for position, place in enumerate(places):
        if place.cell is None:
            item, first_is_left = special[position]
        else:
            cell = place.cell
            first, second = (arms[i] for i in cell.arms)
            samples = key.by_arm[first][cell.sample_baseline], key.by_arm[second][cell.sample_treatment]
            both = frozenset(zip((first, second), samples, strict=True))
            item = known[key.seeds[cell.seed], key.prompts[cell.prompt], both]
            first_is_left = (key.items[item].arm_first == second) == place.treatment_left
        shown = {"item_id": item, "first_is_left": first_is_left, "expected": place.expected}
        rows.append({"judge_id": name, "position": position, **shown})
    ids: dict[int, int] = {}  # place -> assignment
    for is_repeat in (False, True):  # first votes before repeats, which name them
        at = [i for i, place in enumerate(places) if (place.repeats is not None) == is_repeat]
        if at:
            query = insert(assignments).returning(assignments.c.assignment_id, sort_by_parameter_order=True)
            firsts = [places[i].repeats for i in at]
            batch = [rows[i] | {"repeats": None if k is None else ids[k]} for i, k in zip(at, firsts, strict=True)]
            ids |= zip(at, c.execute(query, batch).scalars(), strict=True)


def lock_panel(
    database: Database, sealed: Path, note: str = "", check: Callable[[Connection], object] | None = None
) -> None:
    """Close the panel for good and put what stands behind its items into the database.

    Locking again changes nothing, and puts in what an interrupted lock had not come to. `check` looks at the panel as
    it is about to be locked; where it raises, the panel stays open, as it was.
    """
    key = read_key(sealed, Store(database).panel().key_sha256)
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


def preview(database: Database, file: Path) -> tuple[Store, str]:
    """A copy to try the page on, in a new SQLite file: every set free, no vote cast, no link but the token given."""
    join, copy = secrets.token_urlsafe(24), Database(file)
    with database.read() as there, copy.write(durable=False) as here:
        metadata.create_all(here)
        for table in (panel, items, judges, assignments):
            rows = [dict(row._mapping) for row in there.execute(select(table).order_by(*table.primary_key))]
            if not rows:
                raise UserError("--preview: nobody has pairs yet; `replicate judge invite` gives the first set")
            here.execute(insert(table), rows)
        keep_study(here, panel_study(there))
        is_open = {"locked_at": None, "lock_note": None, "baseline": None, "treatment": None}
        here.execute(update(panel).values(**is_open, join_sha256=hash_token(join)))
        fresh = {"kind": "human", "vendor": "", "token_sha256": None, "started_at": None, "survey": null()}
        here.execute(update(judges).values(fresh))
        here.execute(update(assignments).values(showing=None, shown_at=None))
    return Store(copy), join
