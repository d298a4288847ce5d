"""Many judges at once, each as a person with a browser: they look, think, press, and press again where no answer came.

`python -m virtual_users FOLDER` reads FOLDER/crowd.json, goes through all sessions and writes
FOLDER/virtual_users.json: every request with its times, and what the server acknowledged. It is a process of its own,
so that it neither takes the server's time nor loses its memory when the server is killed.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import aiohttp
from browsing import FormOnPage, PageReader

from replication.judging.store import hash_token
from replication.runs.files import read_json, write_json
from replication.votes.record import CHOICES

SECONDS_TO_PRESS_AGAIN = 0.5
PATIENCE_SECONDS = 90.0
"""How long a person goes on pressing before the load test calls the server lost."""
ARRIVAL = 5
"""Mean times of thought over which the judges' first visits are spread, evenly."""
LEFT = "left"
"""In a line to whoever started this process, before the name of a participant."""
ASKED = "stored already"
"""In the page that answers a vote which came twice."""


@dataclass(frozen=True)
class Crowd:
    """Who comes, and how they behave.

    Attributes:
        base: the server's address.
        links: tokens of those who were invited by name.
        join: token of the open link.
        n_join: how many come through it, as a recruiting site sends them.
        n_leave: how many of these leave before the end, for good, each after this many pairs or fewer; the site sends
            another participant for each. Half of them press once more, when somebody else may have their pairs.
        think_seconds: mean time between a page and the choice; drawn uniformly from half to one and a half times that.
        undo, reload, leave, double: how often, at each pair, a judge takes the last vote back, loads the page again,
            closes the browser and comes back by the link, or presses the button twice.
        seed: of all draws.
    """

    base: str
    links: list[str]
    join: str | None
    n_join: int
    think_seconds: float
    n_leave: int = 0
    most_pairs: int = 0
    undo: float = 0.05
    reload: float = 0.05
    leave: float = 0.02
    double: float = 0.03
    seed: int = 0


@dataclass
class Request:
    """One press, from the moment at which the person meant it until the answer that they kept. Monotonic seconds."""

    kind: str
    meant: float
    ended: float
    status: int
    tries: int


@dataclass
class Said:
    """What a judge sent about one impression, and what they were told.

    told: `stored` (303), `stored already` (409 with those words), `refused` (another answer) or `nothing`.
    """

    what: str
    token_sha256: str
    impression: str
    choice: str
    told: str
    tries: int


@dataclass
class Notes:
    """All that the crowd remembers."""

    requests: list[Request] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    finished: int = 0
    lags: list[float] = field(default_factory=list)
    """By how many seconds this process's own loop was late: not the server's."""


@dataclass(frozen=True)
class HttpAnswer:
    """What came back for one request."""

    status_code: int
    headers: Mapping[str, str]
    text: str


class Lost(Exception):
    """The server did not answer for longer than a person waits."""


class VirtualUser:
    """One judge."""

    def __init__(self, number: int, token: str | None, crowd: Crowd, notes: Notes, leaves: bool = False) -> None:
        self.name, self.token, self.crowd, self.notes = f"virtual user {number}", token, crowd, notes
        self.rng = Random(f"{crowd.seed}/visitor/{number}")
        self.participant = f"{number:024x}"
        self.pairs_before_leaving = self.rng.randint(0, crowd.most_pairs) if leaves else None
        self.client = self._open()

    async def session(self) -> None:
        """From the link to the last page, or to where this judge leaves."""
        n_pairs = 0
        try:
            await asyncio.sleep(self.rng.uniform(0, ARRIVAL * self.crowd.think_seconds))
            page = await self._arrive()
            await asyncio.gather(*(self._get("static", file) for file in page.files))
            while True:
                if form := page.form("/vote"):
                    if n_pairs == self.pairs_before_leaving:
                        await self._leave(form)
                        return
                    n_pairs += 1
                    page = await self._compare(form, page)
                elif form := page.form("/start") or page.form("/survey"):
                    meant = await self._think(0.3)
                    page = await self._send(form.action.rsplit("/", 1)[1], form, self._filled(form), meant)
                else:
                    break
            self.notes.finished += 1
        except Lost as error:
            self.notes.faults.append(f"{self.name}: {error}")
        finally:
            await self.client.close()

    async def _arrive(self) -> PageReader:
        if self.token is not None:
            return await self._get("page", f"/j/{self.token}")
        link = f"/join/{self.crowd.join}?PROLIFIC_PID={self.participant}&STUDY_ID=study&SESSION_ID={self.participant}"
        page, came = await self._get("join", link), time.monotonic()
        answer = await self._press("join", "POST", link, page.forms[0].hidden, await self._think(0.3))
        while answer.status_code == 409 and time.monotonic() - came < PATIENCE_SECONDS:  # until a place is given up
            answer = await self._press("join", "POST", link, page.forms[0].hidden, await self._think(0.3))
        place = answer.headers.get("location", "")
        if answer.status_code != 303 or "/j/" not in place:
            raise Lost(f"the open link gave no place (status {answer.status_code})")
        self.token = place.rsplit("/", 1)[1]
        return await self._get("page", place)

    async def _leave(self, form: FormOnPage) -> None:
        print(LEFT, self.participant, flush=True)
        if self.rng.random() < 0.5:
            await self._vote(form, form.hidden["impression"], await self._think(self.rng.random()))

    # ------------------------------------------------------------ one pair

    async def _compare(self, form: FormOnPage, page: PageReader) -> PageReader:
        """Think about a pair, perhaps do something else first, choose; the next page."""
        impression = form.hidden["impression"]
        meant = await self._think()
        act = self.rng.random()
        undo = page.form("/undo")
        if act < self.crowd.undo and undo is not None:
            return await self._undo(undo, meant)
        act -= self.crowd.undo
        if act < self.crowd.reload + self.crowd.leave:
            if act < self.crowd.leave:
                await self.client.close()
                self.client = self._open()
            again = await self._get("page", f"/j/{self.token}", meant)
            same = again.form("/vote")
            if same is None or same.hidden["impression"] != impression:
                self.notes.faults.append(f"{self.name}: another pair after loading the page again")
            return again
        return await self._vote(form, impression, meant)

    async def _vote(self, form: FormOnPage, impression: str, meant: float) -> PageReader:
        offered = [value for name, value in form.buttons if name == "choice"] or list(CHOICES)
        if sorted(offered) != sorted(CHOICES):
            self.notes.faults.append(f"{self.name}: was offered {offered}")
        choice = self.rng.choice(offered)
        data = {**form.hidden, "choice": choice}
        said = self._note("vote", impression, choice)
        if self.rng.random() < self.crowd.double:  # the browser keeps the answer to the second press
            first, answer = await asyncio.gather(*(self._press("vote", "POST", form.action, data, meant) for _ in "12"))
            answer = first if first.status_code == 303 else answer
        else:
            answer = await self._press("vote", "POST", form.action, data, meant)
        said.told, said.tries = _told(answer), self.notes.requests[-1].tries
        page = await self._get("page", answer.headers.get("location", f"/j/{self.token}"))
        # from the press to the next pair: what a judge waits for
        self.notes.requests.append(Request("vote and next pair", meant, time.monotonic(), 200, said.tries))
        following = page.form("/vote")
        if said.told != "refused" and following is not None and following.hidden["impression"] == impression:
            self.notes.faults.append(f"{self.name}: asked again for a vote that was acknowledged")
        return page

    async def _undo(self, form: FormOnPage, meant: float) -> PageReader:
        said = self._note("undo", form.hidden["impression"], "")
        answer = await self._press("undo", "POST", form.action, form.hidden, meant)
        said.told, said.tries = _told(answer), self.notes.requests[-1].tries
        return await self._get("page", answer.headers.get("location", f"/j/{self.token}"))

    def _note(self, what: str, impression: str, choice: str) -> Said:
        assert self.token is not None
        said = Said(what, hash_token(self.token), impression, choice, "nothing", 0)
        self.notes.said.append(said)
        return said

    # ------------------------------------------------------------ requests

    async def _think(self, share: float = 1.0) -> float:
        """Wait; the moment at which the person meant to press, which this process may be late for."""
        mean = self.crowd.think_seconds * share
        meant = time.monotonic() + self.rng.uniform(0.5 * mean, 1.5 * mean)
        await asyncio.sleep(meant - time.monotonic())
        self.notes.lags.append(time.monotonic() - meant)
        return meant

    def _filled(self, form: FormOnPage) -> dict[str, str]:
        return form.hidden | {name: self.rng.choice(values) for name, values in form.choices.items()}

    async def _send(self, kind: str, form: FormOnPage, data: dict[str, str], meant: float) -> PageReader:
        answer = await self._press(kind, "POST", form.action, data, meant)
        return await self._get("page", answer.headers.get("location", f"/j/{self.token}"))

    async def _get(self, kind: str, path: str, meant: float | None = None) -> PageReader:
        answer = await self._press(kind, "GET", path, None, time.monotonic() if meant is None else meant)
        return PageReader(answer.text if kind != "static" else "")

    async def _press(self, kind: str, method: str, path: str, data: dict[str, str] | None, meant: float) -> HttpAnswer:
        """A request, again and again until the server answers; one entry in the notes."""
        tries = 0
        answer: HttpAnswer | None
        while True:
            tries += 1
            try:
                async with self.client.request(method, path, data=data, allow_redirects=False) as response:
                    answer = HttpAnswer(response.status, response.headers, await response.text())
                if answer.status_code < 500:
                    self.notes.requests.append(Request(kind, meant, time.monotonic(), answer.status_code, tries))
                    return answer
            except (aiohttp.ClientError, TimeoutError):
                answer = None
            if time.monotonic() - meant > PATIENCE_SECONDS:
                status = "no answer" if answer is None else f"status {answer.status_code}"
                raise Lost(f"{kind}: {status} for {PATIENCE_SECONDS:.0f} seconds")
            if answer is not None:
                self.notes.faults.append(f"{self.name}: {kind}: status {answer.status_code}")
            await asyncio.sleep(SECONDS_TO_PRESS_AGAIN * self.rng.uniform(0.5, 1.5))

    def _open(self) -> aiohttp.ClientSession:
        """A browser's connections, closed after five idle seconds as it would have them closed."""
        connections = aiohttp.TCPConnector(limit=6, keepalive_timeout=4.0)
        patience = aiohttp.ClientTimeout(total=30)
        return aiohttp.ClientSession(self.crowd.base, connector=connections, timeout=patience)


def _told(answer: HttpAnswer) -> str:
    if answer.status_code == 303:
        return "stored"
    return "stored already" if answer.status_code == 409 and ASKED in answer.text else "refused"


async def visit(crowd: Crowd) -> Notes:
    """All sessions at once."""
    notes = Notes()
    tokens = [*[None] * crowd.n_join, *crowd.links]
    reporter = asyncio.create_task(_report(notes))

    async def place(n: int, token: str | None) -> None:
        leaves = n < crowd.n_leave
        await VirtualUser(n, token, crowd, notes, leaves).session()
        if leaves:  # the site sends somebody else
            await VirtualUser(n + len(tokens), None, crowd, notes).session()

    await asyncio.gather(*(place(n, token) for n, token in enumerate(tokens)))
    reporter.cancel()
    return notes


async def _report(notes: Notes) -> None:
    """A line a second for whoever started this process."""
    while True:
        await asyncio.sleep(1)
        told = Counter(said.told for said in notes.said if said.what == "vote")
        print(told["stored"] + told["stored already"], flush=True)


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    crowd = Crowd(**read_json(folder / "crowd.json"))
    gc.freeze()
    notes = asyncio.run(visit(crowd))
    write_json(folder / "virtual_users.json", asdict(notes))
