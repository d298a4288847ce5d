"""The checks of every request before a route sees it, and the headers of every answer. Written against ASGI itself.

A link is a secret: whoever holds it votes as that judge. So nothing here writes a path, a header or a body to the log;
a line of it names the route's template. Hosts are checked by hand because Starlette's TrustedHostMiddleware takes the
first of two Host headers, knows no addresses, and answers outside of our headers and pages.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Collection, Iterator
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replication.judging.page.rendering import BANNER, PREVIEW, problem, way_back

LONGEST_BODY_BYTES: Final = 16 * 1024
DRAINED_BYTES: Final = 1024 * 1024  # of a body that is too long: a client that still sends would not read the answer
BODY_SECONDS: Final = 10
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
FORM: Final = "application/x-www-form-urlencoded"

HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # not no-referrer: with it a browser says `Origin: null` of our own forms. To other sites this sends nothing either.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "x-robots-tag": "noindex, nofollow",
}


class Guard:
    """Middleware: refuses foreign hosts, foreign forms and long bodies; adds the headers; writes the log.

    Args:
        bound_to: the address the server listens on, which is a name of ours beside the loopback names. Where that is
            every address, a Host that is any IP address will do: another site's name can be made to lead here, an
            address cannot.
        trusted: our public names, from any port: a proxy may have changed the Host.
        log: takes one line a request; None: no log.
        preview: whether every page says that its votes are thrown away.
    """

    def __init__(
        self, app: ASGIApp, bound_to: str, trusted: Collection[str], log: Callable[[str], None] | None, preview: bool
    ) -> None:
        self.app, self.log, self.preview = app, log, preview
        self.any_address = is_everywhere(bound_to)
        own = socket.gethostname() if self.any_address else bound_to
        self.trusted = {name.lower().strip("[]") for name in trusted}
        self.hosts = {*LOOPBACK, own.lower().strip("[]"), *self.trusted}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.preview:
            BANNER.set(PREVIEW)
        began = time.monotonic()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._answer(scope, receive, send_with_headers)
        finally:
            if self.log is not None:
                route = getattr(scope.get("route"), "path", "(no such page)")
                self.log(f"{scope['method']} {route} {status} {1000 * (time.monotonic() - began):.0f} ms")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, back, answer = Request(scope, receive), way_back(scope["path"]), self.app
        headers = request.headers
        if not self._is_our_host(headers.getlist("host")):
            answer = problem(400)
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            if self._is_our_form(headers):
                body, status = await _read_body(request)
                if status == 200 and body and headers.get("content-type", "").split(";")[0].strip().lower() != FORM:
                    status = 415
                answer = self.app if status == 200 else problem(status, back=back)
                receive = _replay(body, receive)
            else:
                answer = problem(403, back=back)
        await answer(scope, receive, send)

    def _is_our_host(self, values: list[str]) -> bool:
        try:
            (value,) = values
            name = urlsplit(f"//{value}").hostname or ""
        except ValueError:  # none, two, or half a bracket
            return False
        return name in self.hosts or (self.any_address and _address(name) is not None)

    def _is_our_form(self, headers: Headers) -> bool:
        """Whether a form was sent by a page of ours, or by something that is no browser and sends neither header."""
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site not in (None, "same-origin", "none"):
            return False
        if origin is None or origin == "null":
            return origin is None or site == "same-origin"
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and (
            parts.netloc == headers["host"] or (parts.hostname or "") in self.trusted
        )


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_everywhere(host: str) -> bool:
    """Whether who listens there listens on all addresses."""
    found = _address(host)
    return host == "" or (found is not None and found.is_unspecified)


async def _read_body(request: Request) -> tuple[bytes, int]:
    """The whole body and 200; or nothing and 408, 413, or 400 where the client went away."""
    body, n_bytes = b"", 0
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > DRAINED_BYTES:
        return b"", 413
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                n_bytes += len(chunk)
                body = body + chunk if n_bytes <= LONGEST_BODY_BYTES else b""
                if n_bytes > DRAINED_BYTES:
                    break
    except TimeoutError:
        return b"", 408
    except ClientDisconnect:
        return b"", 400
    return (body, 200) if n_bytes <= LONGEST_BODY_BYTES else (b"", 413)


def _replay(body: bytes, receive: Receive) -> Receive:
    read: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Message:
        return next(read, None) or await receive()

    return replayed
