"""The judging page as a server: one process, one store; the checks of every request, and the headers of every answer.

A link is a secret: whoever holds it votes as that judge. So nothing here writes a path, a header or a body to the log;
a line of it names the route's template. The checks are written against ASGI itself. Hosts are checked by hand because
Starlette's TrustedHostMiddleware takes the first of two Host headers, knows no addresses, and answers outside of our
headers and pages.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FrameType
from typing import Final
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replication.errors import UserError
from replication.judging.page.rendering import BANNER, problem, way_back
from replication.judging.page.routes import Answered, routes
from replication.judging.store import Store

SHUTDOWN_SECONDS = 5  # for requests under way
SWITCH_SECONDS = 0.0005  # threads that come from the database wait this long for the interpreter, not ten times as long
LONGEST_BODY_BYTES: Final = 16 * 1024
DRAINED_BYTES: Final = 1024 * 1024  # of a body that is too long: a client that still sends would not read the answer
BODY_SECONDS: Final = 10
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
FORM: Final = "application/x-www-form-urlencoded"

HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
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

    Where the server listens on every address, a Host that is any IP address will do: another site's name can be made to
    lead here, an address cannot. A form of a public name may come from any port: a proxy may have changed the Host.
    """

    def __init__(
        self, app: ASGIApp, bound_to: str, public: Collection[str], log: Callable[[str], None] | None, preview: bool
    ) -> None:
        self.app, self.log, self.preview = app, log, preview
        self.any_address = is_everywhere(bound_to)
        own = socket.gethostname() if self.any_address else bound_to
        self.public = {name.lower().strip("[]") for name in public}
        self.hosts = {*LOOPBACK, own.lower().strip("[]"), *self.public}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.preview:
            BANNER.set("preview")
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
        is_ours = parts.netloc == headers["host"] or (parts.hostname or "") in self.public
        return is_ours and parts.scheme in ("http", "https")


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


def create_app(
    store: Store,
    *,
    bound_to: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    log: Callable[[str], None] | None = None,
    preview: bool = False,
) -> FastAPI:
    """The page over a store of one panel.

    Args:
        bound_to: the address the server listens on; the page answers to this name and to loopback names.
        allowed_hosts: more names that it answers to, such as that of a proxy in front of it.
        log: takes one line a request, without its link; None: no log.
        preview: whether every page says that its votes are thrown away.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Guard, bound_to=bound_to, public=allowed_hosts, log=log, preview=preview)
    app.state.store = store
    app.include_router(routes)

    @app.exception_handler(Answered)
    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, Answered):
            return error.answer
        status = 422 if isinstance(error, RequestValidationError) else getattr(error, "status_code", 500)
        answer = problem(status, back="" if status == 404 else way_back(request.url.path))
        # what was not foreseen is answered from outside the Guard, which adds these
        answer.headers.update({**HEADERS, **(getattr(error, "headers", None) or {})})
        return answer

    return app


def serve(
    store: Store,
    host: str,
    port: int,
    log: Callable[[str], None] | None,
    *,
    allowed_hosts: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
    preview: bool = False,
) -> None:
    """Serve the page until SIGTERM or Ctrl-C; requests under way are answered first. Options: see `create_app`.

    Port 0 is any free one; `ready` is called with the page's address once it is open. Raises UserError where that
    address cannot be had.
    """
    listening = listen(host, port)
    server = http_server(create_app(store, bound_to=host, allowed_hosts=allowed_hosts, log=log, preview=preview))

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    # uvicorn raises the signal again when it has stopped: this one then takes it, and we return
    is_main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)} if is_main else {}
    try:
        if ready is not None:
            name = socket.gethostname() if is_everywhere(host) else host
            ready(f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}")
        server.run(sockets=[listening])
    finally:
        listening.close()
        sys.setswitchinterval(interval)
        for number, handler in before.items():
            signal.signal(number, handler)


def http_server(app: FastAPI) -> uvicorn.Server:
    """A server that keeps no links and does not name itself; it is given its sockets when it runs."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # it would write the links
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        lifespan="off",
        ws="none",
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket for `http_server`. Raises UserError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        line = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # Python repeats the address
        raise UserError(f"--host, --port: cannot listen on {host}:{port} ({line}); give others") from None
    # asyncio sets it only on sockets that say they are TCP; without it a body waits 40 ms for its headers
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
