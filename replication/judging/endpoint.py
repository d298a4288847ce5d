"""One OpenAI-compatible endpoint: paced, budgeted, retried. What is said in messages and stored holds no credential."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit, urlunsplit

import openai
from openai.types.chat import ChatCompletion
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_base, wait_exponential_jitter

from replication.errors import UserError

PASSING_STATUS = {408, 409, 425, 429, *range(500, 600)}
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_SERVER_PAUSE_SECONDS = 3600.0
TEMPLATE_TOKENS = 256  # room for what a chat template adds to a message
DEFAULT_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class ModelSettings:
    """How a model is asked.

    Attributes:
        model: as the endpoint knows it.
        base_url: of the endpoint, up to and with its /v1.
        api_key_env: the environment variable with the key; the default one may be missing (a local server).
        parallel: requests in flight at once.
        requests_per_minute: at most, tries included; None: no limit.
        max_requests: sent by this run at most, tries included; None: no limit.
        max_tokens: input and output together that this run may use; None: no limit.
        timeout_seconds: of one try.
        retries: further tries of one request after the first.
        max_answer_tokens: length of an answer; a model that thinks before it answers needs thousands.
        temperature: None: the endpoint's own (some models take no other).
        first_pause_seconds: before the first further try; doubles from there.
    """

    model: str
    base_url: str
    api_key_env: str = DEFAULT_KEY
    parallel: int = 4
    requests_per_minute: float | None = None
    max_requests: int | None = None
    max_tokens: int | None = None
    timeout_seconds: float = 60.0
    retries: int = 8
    max_answer_tokens: int = 16
    temperature: float | None = 0.0
    first_pause_seconds: float = 0.5

    def check(self) -> None:
        """
        Raises:
            UserError: a value that cannot be.
        """
        if not self.model.strip():
            raise UserError("--model: is empty; give the name by which the endpoint knows the model")
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("--base-url: must start with http:// or https://, as in https://api.openai.com/v1")
        positive = ("parallel", "requests_per_minute", "max_requests", "max_tokens", "timeout_seconds")
        for name in (*positive, "max_answer_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')}: is {value:g}; must be more than 0")
        if self.retries < 0:
            raise UserError(f"--retries: is {self.retries}; must be at least 0")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UserError(f"--temperature: is {self.temperature:g}; must be between 0 and 2")

    @property
    def endpoint(self) -> str:
        """The address without user, password, query and fragment."""
        parts = urlsplit(self.base_url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))

    def key(self) -> str | None:
        """
        Raises:
            UserError: a variable was named that is not set.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.api_key_env != DEFAULT_KEY:
            raise UserError(f"--api-key-env: {self.api_key_env} is not set; put the endpoint's key into it")
        return key or None


@dataclass(frozen=True)
class Reply:
    """One chat completion.

    Attributes:
        text: the answer, or the words of the refusal.
        refused: whether the endpoint marks it as a refusal.
        model: as the endpoint names it; empty where it names none.
        asked_at: when the try that succeeded was sent, in seconds since 1970.
        seconds: it took.
    """

    text: str
    refused: bool
    finish_reason: str | None
    model: str
    input_tokens: int | None
    output_tokens: int | None
    asked_at: float
    seconds: float


class BudgetSpent(Exception):
    """The next request could exceed what this run may use."""


class GivenUp(Exception):
    """A request had no answer after its last try. The message is one line without credentials."""


class NotACompletion(Exception):
    """An answer with status 200 that is no chat completion."""


class Meter:
    """What a run may still send: at what pace, and within which budget. One for all that is in flight.

    A request reserves the most it can cost before it is sent: its bytes and the template's room for the input (no
    tokenizer makes more tokens than bytes), and the longest answer. What it did cost replaces that; where this is not
    known (a time-out, a broken connection, no usage in the answer) the reservation stands as spent.
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
        """Wait until one more request may be sent.

        Returns:
            The tokens reserved for it.

        Raises:
            BudgetSpent: it may not be, whatever becomes of those in flight.
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


class Endpoint:
    """Asks one prompt at a time of one model, as often as it takes."""

    def __init__(self, settings: ModelSettings, notify: Callable[[str], None] = lambda line: None) -> None:
        """
        Args:
            settings: checked before.
            notify: gets one line for each failure that is tried again.
        """
        settings.check()
        self.settings, self.meter = settings, Meter(settings)
        self.n_retries = 0
        self._notify, self._key = notify, settings.key()
        self._length_key = "max_tokens"  # until the endpoint says that it wants max_completion_tokens
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=self._key or "none", timeout=settings.timeout_seconds, max_retries=0
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, prompt: str) -> Reply:
        """The model's answer.

        Raises:
            BudgetSpent: before it could be sent, or sent again.
            GivenUp: no answer after the last try.
            UserError: what no further try would mend: the key, the model, the request.
        """
        s = self.settings
        tries = AsyncRetrying(
            stop=stop_after_attempt(1 + s.retries),
            wait=_Pause(s.first_pause_seconds),
            retry=retry_if_exception(_may_pass),
            before_sleep=self._again,
            reraise=True,
        )
        try:
            return await tries(self._try, prompt)
        except openai.APIStatusError as error:
            if _may_pass(error):
                raise GivenUp(self._line(error)) from None
            raise await self._refusal(error) from None
        except (openai.APIError, NotACompletion) as error:
            raise GivenUp(self._line(error)) from None

    async def _try(self, prompt: str) -> Reply:
        reserved = await self.meter.admit(prompt)
        used = reserved
        try:
            reply = await self._send(prompt)
            if reply.input_tokens is not None and reply.output_tokens is not None:
                used = reply.input_tokens + reply.output_tokens
            return reply
        except openai.APIStatusError as error:
            used = 0  # refused before the model saw it
            if (pause := _retry_after(error)) is not None:
                self.meter.hold(pause)
            raise
        finally:
            await self.meter.settle(reserved, used)

    async def _send(self, prompt: str) -> Reply:
        s = self.settings
        asked_at, began = time.time(), time.monotonic()
        length_key = self._length_key
        options = {length_key: s.max_answer_tokens}
        if s.temperature is not None:
            options["temperature"] = s.temperature  # type: ignore[assignment]
        try:
            messages = [{"role": "user", "content": prompt}]
            said = await self._client.chat.completions.create(model=s.model, messages=messages, **options)  # type: ignore
        except openai.BadRequestError as error:
            if length_key == "max_tokens" and "max_completion_tokens" in str(error):
                self._length_key = "max_completion_tokens"
                raise _OtherKey(str(error), response=error.response, body=error.body) from None
            if error.code == "content_filter":  # some endpoints refuse with a status
                seconds = time.monotonic() - began
                return Reply(self._clean(_said(error)), True, "content_filter", "", None, None, asked_at, seconds)
            raise
        except ValueError as error:  # a body that is no JSON
            raise NotACompletion(f"its answer is no JSON ({type(error).__name__})") from None
        return _reply(said, asked_at, time.monotonic() - began)

    def _again(self, state: RetryCallState) -> None:
        self.n_retries += 1
        assert state.outcome is not None and state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        if not isinstance(error, _OtherKey):
            self._notify(f"{self._line(error)}; trying again in {state.next_action.sleep:.1f} s")

    def _line(self, error: BaseException) -> str:
        """What failed, in one line without credentials."""
        if isinstance(error, openai.APITimeoutError):
            text = f"no answer within {self.settings.timeout_seconds:g} s"
        elif isinstance(error, openai.APIStatusError):
            text = f"status {error.status_code}: {_said(error)}"
        elif isinstance(error, openai.APIConnectionError):
            text = f"connection failed ({type(error.__cause__ or error).__name__})"
        else:
            text = str(error)
        return f"{self.settings.endpoint}: {self._clean(text)}"

    def _clean(self, text: str) -> str:
        user = urlsplit(self.settings.base_url).netloc.rpartition("@")[0]
        for secret in filter(None, (self._key, user, *user.split(":"), urlsplit(self.settings.base_url).query)):
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]

    async def _refusal(self, error: openai.APIStatusError) -> UserError:
        s, said = self.settings, self._clean(_said(error))
        if error.status_code in (401, 403):
            what = "is missing" if self._key is None else "was refused"
            return UserError(
                f"--api-key-env: {s.endpoint} answers with status {error.status_code}, the key in {s.api_key_env} "
                f"{what}; put a key into it that may use {s.model}"
            )
        if getattr(error, "code", None) == "insufficient_quota":
            return UserError(f"--api-key-env: the account's quota is used up ({said}); add to it, then run this again")
        names = await self._offered()
        if names and s.model not in names:
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            return UserError(
                f"--model: {s.endpoint} has no {s.model} (status {error.status_code}); it offers "
                f"{', '.join(names[:12])}{more}"
            )
        if error.status_code == 404:
            return UserError(
                f"--base-url: {s.endpoint} has no model {s.model} or no chat completions (status 404: {said}); check "
                "--model, and that the address goes up to its /v1"
            )
        return UserError(
            f"--model: {s.endpoint} refuses the request for {s.model} (status {error.status_code}: {said}); check "
            "--model, --temperature (none: the endpoint's own) and --max-answer-tokens"
        )

    async def _offered(self) -> list[str]:
        """The models the endpoint offers; none where it does not tell."""
        try:
            page = await self._client.models.list()
            return sorted(model.id for model in page.data)
        except (openai.OpenAIError, ValueError, AttributeError, TypeError):
            return []


class _OtherKey(openai.BadRequestError):
    """The endpoint wants the length of the answer under its other name."""


class _Pause(wait_base):
    """What the endpoint asks for, else doubling pauses with jitter."""

    def __init__(self, first_seconds: float) -> None:
        self._own = wait_exponential_jitter(initial=first_seconds, max=LONGEST_PAUSE_SECONDS, jitter=first_seconds)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if isinstance(error, _OtherKey):
            return 0.0
        asked = _retry_after(error)
        return self._own(retry_state) if asked is None else asked


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        if isinstance(error, _OtherKey):
            return True
        return error.status_code in PASSING_STATUS and getattr(error, "code", None) != "insufficient_quota"
    return isinstance(error, (openai.APIError, NotACompletion))


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds that the endpoint asks to wait; it may give a number or a date."""
    if not isinstance(error, openai.APIStatusError):
        return None
    text = error.response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_SERVER_PAUSE_SECONDS) if math.isfinite(seconds) else None


def _said(error: openai.APIStatusError) -> str:
    """The endpoint's own words: `error.message` of its body, or `detail`, or the body."""
    body = error.body
    if isinstance(body, dict):
        for key in ("message", "detail"):
            if body.get(key):
                return str(body[key])
    return str(body or error.message)


def _reply(said: ChatCompletion, asked_at: float, seconds: float) -> Reply:
    try:
        choice = said.choices[0]
        message, refusal = choice.message, getattr(choice.message, "refusal", None)
        text = message.content if isinstance(message.content, str) else ""
    except (AttributeError, TypeError, IndexError):
        raise NotACompletion("its answer is no chat completion; does --base-url go up to its /v1?") from None
    usage = said.usage
    return Reply(
        text=text or refusal or "",
        refused=bool(refusal),
        finish_reason=choice.finish_reason,
        model=said.model or "",
        input_tokens=usage.prompt_tokens if usage else None,
        output_tokens=usage.completion_tokens if usage else None,
        asked_at=asked_at,
        seconds=seconds,
    )
