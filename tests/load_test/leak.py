"""A leak planted for the blinding test: the page as if it gave the arms away. Never part of the product's server.

The middleware runs in the test's own process, around the product's app, with the sealed key at hand. A test that does
not find it would not find a leak of that size in the page either.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import uvicorn
from server_child import START_SECONDS, answers, free_port
from sqlalchemy import select
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replication.judging.database import Database
from replication.judging.page.server import create_app
from replication.judging.schema import assignments, panel
from replication.judging.seal import read_key
from replication.judging.store import Store

LEAKS: Final = {
    "none": "none",
    "header": "a header's value says which side the treatment is on",
    "order": "two attributes change places where the treatment is on the left",
    "space": "one more space where the treatment is on the left",
    "delay": "3 milliseconds more where the treatment is on the left",
}
DELAY_SECONDS: Final = 0.003
IMPRESSION: Final = re.compile(rb'name="impression" value="([^"]+)"')


class Leak:
    """Middleware that gives the treatment's side away.

    Args:
        app: the page.
        kind: a key of LEAKS.
        treatment_left: of an impression; None where there is no such impression.
    """

    def __init__(self, app: ASGIApp, kind: str, treatment_left: Callable[[str], bool | None]) -> None:
        self.app, self.kind, self.treatment_left = app, kind, treatment_left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}
        body = b""

        async def keep(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._pass_on(start, body, send)

        await self.app(scope, receive, keep)

    async def _pass_on(self, start: Message, body: bytes, send: Send) -> None:
        found = IMPRESSION.findall(body)
        left = self.treatment_left(found[-1].decode()) if found else None  # the last one is the vote's, not the undo's
        headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        if left is not None and self.kind == "header":
            headers.append((b"x-cache", b"hit" if left else b"miss"))
        if left and self.kind == "order":
            body = body.replace(b'class="text" aria-labelledby="left"', b'aria-labelledby="left" class="text"')
        if left and self.kind == "space":
            body = body.replace(b"</main>", b" </main>")
        if left and self.kind == "delay":
            await asyncio.sleep(DELAY_SECONDS)
        headers.append((b"content-length", str(len(body)).encode()))
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def leaking_server(database: Database, sealed: Path, kind: str) -> Iterator[str]:
    """The page with a leak, in a thread of this process; its address."""
    app = Leak(create_app(Store(database)), kind, _reader(database, sealed))
    port = free_port()
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="warning", access_log=False, server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not answers(base):
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the leaking server did not start")
            time.sleep(0.05)
        yield base
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def _reader(database: Database, sealed: Path) -> Callable[[str], bool | None]:
    with database.read() as c:
        expected = c.execute(select(panel.c.key_sha256)).scalar_one()
    key = read_key(sealed, expected)

    def treatment_left(impression: str) -> bool | None:
        with database.read() as c:
            row = c.execute(select(assignments).where(assignments.c.showing == impression)).one_or_none()
        if row is None or row.item_id not in key.items:
            return None
        return (key.items[row.item_id].arm_first == key.treatment) == row.first_is_left

    return treatment_left
