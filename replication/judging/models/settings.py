"""Settings of a model judge: the model, the limits of a run with the meter that keeps them, the way to its endpoint.

A proxy, certificates and a key come from the environment; each fault names its variable.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from replication.config.reading import Range, check_values
from replication.config.schema import Count, Natural, NotNegative, Positive
from replication.errors import UserError

DEFAULT_KEY = "OPENAI_API_KEY"
OPERATIONS = ("completions", "models", "responses", "messages", "embeddings")  # addresses below the /v1 end so
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")  # the first that is set counts
QUOTES = "\"'`“”‘’«»"
TEMPLATE_TOKENS = 256  # room for what a chat template adds to a message


@dataclass(frozen=True)
class ModelSettings:
    """The model, its endpoint and the limits of a run."""

    model: str  # as the endpoint knows it
    base_url: str  # of the endpoint, up to and with its /v1
    api_key_env: str = DEFAULT_KEY  # the variable with the key; the default one may be missing (a local server)
    parallel: Count = 4  # requests in flight at once
    requests_per_minute: Positive | None = None  # at most, tries included; None: no limit
    max_requests: Count | None = None  # sent by this run at most, tries included; None: no limit
    max_tokens: Annotated[int, Range(f"[1, {2**53}]")] | None = None  # of input and output together; None: no limit
    timeout_seconds: Positive = 60.0  # of one try
    retries: Natural = 8  # further tries of one request after the first
    max_answer_tokens: Count = 16  # length of an answer; a model that thinks before it answers needs thousands
    temperature: Annotated[float, Range("[0, 2]")] | None = 0.0  # None: the endpoint's own (some take no other)
    price: tuple[NotNegative, ...] = ()  # of a million tokens in, and out; none: no cost is told
    first_pause_seconds: Positive = 0.5  # before the first further try; doubles from there

    def check(self) -> None:
        """Raises UserError where a value cannot be, or the address is none that can be asked."""
        try:
            check_values(self, "--")
        except UserError as error:
            flag, colon, words = str(error).partition(":")
            raise UserError(f"{flag.replace('_', '-')}{colon}{words}") from None
        if not self.model.strip():
            raise UserError("--model: is empty; give the name by which the endpoint knows the model")
        if any(c.isspace() or not c.isprintable() for c in self.base_url):
            raise UserError("--base-url: holds a space, a line break or a character that cannot be seen; take it out")
        try:
            parts = urlsplit(self.base_url)
            is_possible = parts.port != 0
            host = (parts.hostname or "").encode("idna")
        except ValueError as error:
            why = "its port must be a number from 1 to 65535" if "ort" in str(error) else str(error)
            raise UserError(f"--base-url: is no address that can be asked: {why}; fix it") from None
        if parts.scheme not in ("http", "https") or not host:
            raise UserError("--base-url: must start with http:// or https://, as in https://api.openai.com/v1")
        if not is_possible:
            raise UserError(
                "--base-url: its port must be a number from 1 to 65535; give the one the endpoint listens on"
            )
        if (last := parts.path.rstrip("/").rpartition("/")[2]) in OPERATIONS:
            raise UserError(
                f"--base-url: ends in /{last}, which is added here; give the address up to and with its /v1"
            )

    @property
    def endpoint(self) -> str:
        """The address without user, password, query and fragment."""
        parts = urlsplit(self.base_url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))

    def key(self) -> str | None:
        """The key, as a header can hold it; messages never show it.

        Raises UserError where a variable was named that is not set, or the key was copied with something around it.
        """
        name, key = self.api_key_env, os.environ.get(self.api_key_env, "").strip()
        if not key:
            if name == DEFAULT_KEY:
                return None
            is_there = "is empty" if name in os.environ else "is not set"
            raise UserError(f"--api-key-env: {name} {is_there}; put the endpoint's key into it")
        if key[0] in QUOTES or key[-1] in QUOTES:
            raise UserError(f"--api-key-env: the key in {name} stands in quotation marks; put it there without them")
        for place, c in enumerate(key, 1):
            if not "!" <= c <= "~":
                what = "a line break" if c in "\r\n" else "a space" if c.isspace() else "a character that no key has"
                raise UserError(
                    f"--api-key-env: the key in {name} holds {what} (place {place} of {len(key)}); put the key there "
                    "alone, as the endpoint's owner gave it"
                )
        return key


def route(url: str) -> tuple[str | None, str]:
    """The proxy that the environment names for an address, with its password, and words that say so, without.

    Read as other programs do; the words are empty where no variable says anything. Raises UserError where one names
    what is no proxy, or one that cannot be spoken to here.
    """
    to, proxies = urlsplit(url), getproxies()
    kind = next((kind for kind in (to.scheme, "all") if proxies.get(kind)), None)
    if kind is None:
        return None, ""
    name = f"{kind}_proxy" if os.environ.get(f"{kind}_proxy") else f"{kind}_proxy".upper()
    if any(proxy_bypass(host) for host in (to.netloc.rpartition("@")[2], to.hostname or "")):
        return None, f"directly, as NO_PROXY takes this host out of {name}"
    value = (proxies[kind] if "://" in proxies[kind] else f"http://{proxies[kind]}").strip()
    remedy = f"fix or unset {name}, or put the endpoint's host into NO_PROXY"
    try:
        parts = urlsplit(value)
        is_one = parts.scheme in ("http", "https", "socks5", "socks5h") and parts.hostname and parts.port != 0
        value.encode("ascii")
    except ValueError:
        is_one = False
    if not is_one:
        raise UserError(f"{name}: names no proxy such as http://proxy.example.org:3128; {remedy}")
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise UserError(
            f"{name}: names a SOCKS proxy, for which the package socksio is missing; pip install socksio, or {remedy}"
        )
    return value, f"through the proxy {parts.scheme}://{parts.netloc.rpartition('@')[2]} that {name} names"


def certificates() -> ssl.SSLContext | None:
    """The certificates that the environment trusts, where it names some.

    Raises UserError where a variable names what is not there, or holds no certificates.
    """
    name = next((name for name in CERTIFICATES if os.environ.get(name)), None)
    if name is None:
        return None
    path = Path(os.environ[name])
    try:
        os.stat(path)
        file, folder = (None, path) if path.is_dir() else (path, None)
        return ssl.create_default_context(cafile=file, capath=folder)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{name}: {path} cannot be read as certificates ({why}); name a file of PEM certificates, or unset it"
        ) from None


class BudgetSpent(Exception):
    """The next request could exceed what this run may use."""


class Meter:
    """Pace and budget of a run: one for all that is in flight.

    A request reserves the most it can cost before it is sent: its bytes and the template's room for the input (no
    tokenizer makes more tokens than bytes), and the longest answer. What it did cost replaces that; where this is not
    known (a time-out, a server's error, a broken connection, no usage in the answer) the reservation stands as spent.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._pause = 60.0 / settings.requests_per_minute if settings.requests_per_minute else 0.0
        self._next_at = 0.0
        self._reserved = 0
        self._settled = asyncio.Condition()
        self.n_requests = 0
        self.n_tokens = 0

    async def admit(self, prompt: str) -> int:
        """Wait until one more request may be sent; the tokens reserved for it.

        Raises BudgetSpent where it may not be, whatever becomes of those in flight.
        """
        s = self._settings
        cost = len(prompt.encode()) + TEMPLATE_TOKENS + s.max_answer_tokens
        async with self._settled:
            while s.max_tokens is not None and self.n_tokens + self._reserved + cost > s.max_tokens:
                if not self._reserved:
                    raise BudgetSpent
                await self._settled.wait()
            if s.max_requests is not None and self.n_requests >= s.max_requests:
                raise BudgetSpent
            self.n_requests += 1
            self._reserved += cost
        try:
            while (wait := self._next_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            self._next_at = time.monotonic() + self._pause
        except asyncio.CancelledError:
            await self.settle(cost, 0)
            raise
        return cost

    async def settle(self, reserved: int, used: int) -> None:
        """Replace a reservation by what was used."""
        async with self._settled:
            self._reserved -= reserved
            self.n_tokens += used
            self._settled.notify_all()

    def hold(self, seconds: float) -> None:
        """Send nothing for a while: the endpoint asked for it."""
        self._next_at = max(self._next_at, time.monotonic() + seconds)
