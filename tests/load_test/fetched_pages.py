"""Every item of a panel fetched through the real server, and everything that the server sent with it written down.

A row holds the page that showed the item, the redirect before it, the answer to the vote on it, and the two static
files where they were fetched: status lines, headers in their order, bytes, times. Which side the treatment was on comes
from the sealed key afterwards; nothing that fetches knows it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from browsing import FormOnPage, PageReader
from sqlalchemy import select

from replication.judging.database import Database
from replication.judging.schema import assignments, items, panel
from replication.judging.seal import read_key
from replication.votes.record import CHOICES

THREADS = 2


@dataclass(frozen=True)
class Fetched:
    """What came back on one request."""

    head: str
    """Status line and headers, a line each, in the order and the letters in which they came."""
    body: str
    """Bytes, read as Latin-1: one character each."""
    first_byte_seconds: float
    total_seconds: float


NOTHING = Fetched("", "", 0.0, 0.0)


@dataclass
class Seen:
    """One item as one judge met it."""

    judge: int
    """Number of the link."""
    position: int
    """In the judge's session, from 0."""
    impression: str
    page: Fetched
    before: Fetched
    """The redirect that led to the page."""
    after: Fetched = NOTHING
    """The answer to the vote on it."""
    files: list[Fetched] = field(default_factory=list)
    """Static files, fetched with the first item as a browser does."""


@dataclass(frozen=True)
class Truth:
    """What stands behind an impression."""

    treatment_left: bool
    judge: str
    prompt: int
    seed: int


def fetch_all(base: str, links: Sequence[str], seed: int, say: Callable[[str], None]) -> list[Seen]:
    """Go through every judge's session, voting at random to go on.

    Args:
        base: the server's address.
        links: tokens.
        seed: of the choices.
        say: told how far it is.
    """
    done: list[Seen] = []

    def one(number: int) -> list[Seen]:
        seen = _session(base, number, links[number], random.Random(f"{seed}/probe/{number}"))
        done.extend(seen)
        say(f"{len(done):,} items fetched")
        return seen

    with ThreadPoolExecutor(THREADS) as pool:
        return [seen for session in pool.map(one, range(len(links))) for seen in session]


def truths(database: Database, sealed: Path) -> dict[str, Truth]:
    """Impression -> what stands behind it, from the sealed key."""
    with database.read() as c:
        expected = c.execute(select(panel.c.key_sha256)).scalar_one()
        shown = select(assignments, items.c.prompt_id).join(items).where(assignments.c.showing.is_not(None))
        rows = c.execute(shown.where(assignments.c.expected.is_(None))).all()
    key = read_key(sealed, expected)
    found = {}
    for row in rows:
        behind = key.items[row.item_id]
        left = behind.arm_first if row.first_is_left else behind.arm_second
        found[row.showing] = Truth(left == key.treatment, row.judge_id, row.prompt_id, behind.seed)
    return found


def _session(base: str, number: int, token: str, rng: random.Random) -> list[Seen]:
    seen: list[Seen] = []
    with httpx.Client(base_url=base, timeout=30, trust_env=False, verify=False) as client:
        before, answer = NOTHING, _ask(client, "GET", f"/j/{token}")
        while True:
            page = PageReader(answer.body)
            if form := page.form("/vote"):
                item = Seen(number, len(seen), form.hidden["impression"], answer, before)
                if not seen:
                    item.files = [_ask(client, "GET", file) for file in page.files]
                seen.append(item)
                before = item.after = _submit(client, form, {"choice": rng.choice(CHOICES)})
            elif form := page.form("/start") or page.form("/survey"):
                before = _submit(client, form, {})
            else:
                return seen
            answer = _ask(client, "GET", f"/j/{token}")


def _submit(client: httpx.Client, form: FormOnPage, more: dict[str, str]) -> Fetched:
    answer = _ask(client, "POST", form.action, form.hidden | more)
    if " 303 " not in answer.head.split("\n")[0]:
        raise RuntimeError(f"the server answered a form with {answer.head.splitlines()[0]!r}")
    return answer


def _ask(client: httpx.Client, method: str, path: str, data: dict[str, str] | None = None) -> Fetched:
    request = client.build_request(method, path, data=data)
    began = time.perf_counter()
    response = client.send(request, stream=True)  # returns with the headers
    first = time.perf_counter() - began
    body = b"".join(response.iter_raw())
    total = time.perf_counter() - began
    response.close()
    line = f"{response.http_version} {response.status_code} {response.reason_phrase}"
    headers = (f"{name.decode('latin-1')}: {value.decode('latin-1')}" for name, value in response.headers.raw)
    return Fetched("\n".join((line, *headers)), body.decode("latin-1"), first, total)
