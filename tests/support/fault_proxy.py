"""Endpoints that fail: a proxy that injects faults by a seeded schedule, and a scripted endpoint for single ones."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import uvicorn
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

FAULTS = {"timeout": 1, "429": 1, "500": 3, "cut": 3, "html": 3, "babble": 2}  # with weights: two of them take long
RETRY_AFTER_SECONDS = 1
MARK = re.compile(r"\[(\d+)/(first|second)\]")


@dataclass(frozen=True)
class Seen:
    """One request that arrived."""

    at: float
    """time.monotonic()"""
    key: tuple[int, str]
    """Number of the pair and which of its completions came first, by the marks in them."""
    fault: str
    body: dict[str, Any]


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """An ASGI app on a free port of this machine; its address with /v1. The options are uvicorn's."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def key_of(prompt: str) -> tuple[int, str]:
    number, which = next(iter(MARK.findall(prompt)), (-1, ""))
    return int(number), which


def completion(text: str | None, **changes: Any) -> dict[str, Any]:
    """The body of a chat completion; `message`, `finish_reason`, `model`, `usage` may be changed."""
    message = {"role": "assistant", "content": text} | changes.pop("message", {})
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("finish_reason", "stop")}
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny-1"}
    return head | {"choices": [choice], "usage": usage} | changes


class Silence(Response):
    """No answer for a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__(status_code=504)
        self._seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(self._seconds)
        await super().__call__(scope, receive, send)


@dataclass
class Scripted:
    """An endpoint that answers as a function says: a text, the body of an answer, or a whole response."""

    answer: Callable[[dict[str, Any], int], Any]
    """(body, number of the request from 0) -> str, dict or Response"""
    models: tuple[str, ...] = ("tiny", "other")
    seen: list[Seen] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        if request.url.path.endswith("/models"):
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in self.models]
            return await JSONResponse({"object": "list", "data": data})(scope, receive, send)
        body = await request.json()
        self.headers.append(dict(request.headers))
        self.seen.append(Seen(time.monotonic(), key_of(body["messages"][0]["content"]), "", body))
        said = self.answer(body, len(self.seen) - 1)
        if isinstance(said, str):
            said = completion(said)
        return await (said if isinstance(said, Response) else JSONResponse(said))(scope, receive, send)


class FaultProxy:
    """Hands requests on to a real endpoint, save those for which the schedule has a fault."""

    def __init__(self, upstream: str, seed: int, share: float, silence_seconds: float) -> None:
        """
        Args:
            upstream: address of the real endpoint, with /v1.
            seed: of the schedule; the n-th request meets the n-th entry.
            share: of requests that meet a fault.
            silence_seconds: of a time-out.
        """
        self._upstream, self._random, self._share, self._silence = upstream, Random(seed), share, silence_seconds
        self.seen: list[Seen] = []
        self.n_tokens = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).json()
        fault = self._next_fault()
        self.seen.append(Seen(time.monotonic(), key_of(body["messages"][0]["content"]), fault, body))
        await (await self._answer(fault, body, send))(scope, receive, send)

    def _next_fault(self) -> str:
        (fault,) = self._random.choices(list(FAULTS), list(FAULTS.values()))
        return fault if self._random.random() < self._share else ""

    async def _answer(self, fault: str, body: dict[str, Any], send: Any) -> Response:
        match fault:
            case "timeout":
                return Silence(self._silence)
            case "429":
                busy = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
                return JSONResponse(busy, 429, {"Retry-After": str(RETRY_AFTER_SECONDS)})
            case "500":
                return JSONResponse({"error": {"message": "boom"}}, 500)
            case "html":
                return HTMLResponse("<h1>Bad gateway</h1>")
            case "babble":
                return JSONResponse(completion("Both have their charms.", model=body["model"]))
            case "cut":
                headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": b'{"id": "x", "cho', "more_body": True})
                raise ConnectionAbortedError  # the server drops the connection
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"{self._upstream}/chat/completions", json=body)
        self.n_tokens += answer.json().get("usage", {}).get("total_tokens", 0)
        return Response(answer.content, answer.status_code, media_type="application/json")
