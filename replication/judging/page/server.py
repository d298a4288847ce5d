"""The judging page as a server: one process, one store."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from replication.errors import UserError
from replication.judging.page.rendering import problem, way_back
from replication.judging.page.routes import Answered, routes
from replication.judging.page.security import HEADERS, Guard, is_everywhere
from replication.judging.store import Store

SHUTDOWN_SECONDS = 5  # for requests under way
SWITCH_SECONDS = 0.0005  # threads that come from the database wait this long for the interpreter, not ten times as long


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
    app.add_middleware(Guard, bound_to=bound_to, trusted=allowed_hosts, log=log, preview=preview)
    app.state.store = store
    app.include_router(routes)

    @app.exception_handler(Answered)
    async def answered(request: Request, error: Answered) -> Response:
        return error.answer

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
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
    """Serve the page until SIGTERM or Ctrl-C; requests under way are answered first.

    Raises UserError where the address cannot be had.

    Args:
        port: 0: any free one.
        log, allowed_hosts, preview: see `create_app`.
        ready: called with the page's address once it is open.
    """
    listening = listen(host, port)
    server = http_server(create_app(store, bound_to=host, allowed_hosts=allowed_hosts, log=log, preview=preview))

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    is_main = threading.current_thread() is threading.main_thread()
    # uvicorn raises the signal again when it has stopped: this one then takes it, and we return
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
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
