"""One OpenAI-compatible endpoint: paced, budgeted, retried. What is said in messages and stored holds no credential."""

from __future__ import annotations

import asyncio
import html
import json
import math
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.stop import stop_base
from tenacity.wait import wait_base, wait_exponential_jitter

from replication.errors import UserError
from replication.judging.models.answers import Reply
from replication.judging.models.meter import Meter
from replication.judging.models.settings import ModelSettings, certificates, route

UNSEEN_STATUS = {*range(300, 500)} - {408, 409}  # the model never saw it; what others cost nobody knows
PASSING_STATUS = {408, 409, 425, 429, *range(500, 600)} - {501, 505}
PAIR_STATUS = {400, 403, 413, 422, 451}  # may be about this one text: its length, or what it says
QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
NO_API_STATUS = {404, 405, 415, 501}
REACH_SECONDS = 10.0
_PAGES = ("<!doctype html", "<html")
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_SERVER_PAUSE_SECONDS = 3600.0
LONGEST_ANSWER_BYTES = 8 << 20
CERTIFICATE_REMEDIES = (
    ("expired", "it must be renewed there, or this machine's clock is wrong"),
    ("not yet valid", "it must be renewed there, or this machine's clock is wrong"),
    ("mismatch", "give the address by a name that the certificate holds"),
    ("", "put the certificate of who signed it into a file, and that file's name into SSL_CERT_FILE"),
)
ODD_TRIES = 3  # of a request that is answered with something that is no completion


class GivenUp(Exception):
    """A request had no answer after its last try. The message is one line without credentials."""


class Refused(GivenUp):
    """The endpoint will not answer this request, and perhaps it alone.

    Attributes:
        words: the endpoint's own, in one line.
        status: of its answer.
        as_final: what to say where it refuses every request.
    """

    def __init__(self, words: str, status: int, as_final: UserError) -> None:
        super().__init__(words)
        self.words, self.status, self.as_final = words, status, as_final


class NotACompletion(openai.OpenAIError):
    """An answer with status 200 that is no chat completion.

    Attributes:
        is_api: whether it has the form of an API's answer all the same: an error, or no choice.
    """

    def __init__(self, text: str, is_api: bool = False) -> None:
        super().__init__(text)
        self.is_api = is_api


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
        way, trusted = route(settings.base_url), certificates()
        self._has_proxy = way.proxy is not None
        self._at = settings.endpoint + (f" ({way.words})" if way.words else "")
        # a redirect is told, not followed: prompts and key are for the address that was given
        http = openai.DefaultAsyncHttpxClient(
            trust_env=False,
            proxy=way.proxy,
            follow_redirects=False,
            event_hooks={"response": [_read_bounded]},
            timeout=settings.timeout_seconds,
            verify=trusted or True,
        )
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=self._key or "none", http_client=http, max_retries=0
        )

    async def close(self) -> None:
        await self._client.close()

    async def reach(self) -> None:
        """One request without further tries, before anything else: a mistyped address is to be found at once.

        An endpoint that is slow, busy or has no list of models passes.

        Raises:
            UserError: nothing listens there, or what answers is a page for people, or leads elsewhere.
        """
        seconds = min(REACH_SECONDS, self.settings.timeout_seconds)
        try:
            said = await self._client.models.with_raw_response.list(timeout=seconds)
        except openai.APITimeoutError as error:
            if type(error.__cause__).__name__ != "ConnectTimeout":
                return
            why = f"no connection within {seconds:g} s"
        except openai.APIConnectionError as error:
            why = self._clean(_connection(error))
        except openai.APIStatusError as error:
            to = urlsplit(error.response.headers.get("location", "")).hostname
            if error.status_code == 407 or (error.status_code < 400 and to not in (None, self._client.base_url.host)):
                raise await self._refusal(error) from None
            return
        except (openai.OpenAIError, ValueError):
            return
        else:
            if not _is_page(said.http_response):
                return
            raise self._no_api(said.http_response.status_code, f"a page, {self._clean(_page(said.http_response))}")
        or_else = ", or put its host into NO_PROXY" if self._has_proxy else ""
        raise UserError(
            f"--base-url: {self._at}: {why}; check the address, and that the endpoint is up{or_else}"
        ) from None

    def _no_api(self, status: int, said: str) -> UserError:
        return UserError(
            f"--base-url: {self._at} is no OpenAI-compatible API (status {status}: {said}); give the "
            "address up to and with its /v1"
        )

    async def ask(self, prompt: str) -> Reply:
        """The model's answer.

        Raises:
            BudgetSpent: before it could be sent, or sent again.
            GivenUp: no answer after the last try.
            Refused: an answer that no further try would change, and that may be about this prompt alone.
            UserError: what no further try would fix for any prompt: the key, the model, the quota.
        """
        s = self.settings
        tries = AsyncRetrying(
            stop=_Stop(1 + s.retries),
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
            final = await self._refusal(error)
            if error.status_code not in PAIR_STATUS or _is_quota(error):
                raise final from None
            raise Refused(
                self._clean(f"status {error.status_code}: {_said(error)}"), error.status_code, final
            ) from None
        except NotACompletion as error:
            if not error.is_api:
                raise GivenUp(self._line(error)) from None
            raise Refused(self._clean(str(error)), 200, UserError(f"--model: {self._line(error)}; check --model "
                          "and --max-answer-tokens")) from None  # fmt: skip
        except openai.APIError as error:
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
            used = 0 if error.status_code in UNSEEN_STATUS else reserved
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
            create = self._client.chat.completions.with_raw_response.create
            async with asyncio.timeout(2 * s.timeout_seconds):  # the client's own begins anew with every byte
                said = await create(model=s.model, messages=messages, **options)  # type: ignore[call-overload]
        except TimeoutError:
            raise NotACompletion(f"its answer had not ended within {2 * s.timeout_seconds:g} s") from None
        except ValueError as error:  # a header that is none
            raise UserError(
                f"--base-url: {self._at}: the request cannot be written ({self._clean(str(error))}); check the "
                "address, and OPENAI_ORG_ID and OPENAI_PROJECT_ID where they are set"
            ) from None
        except openai.BadRequestError as error:
            if length_key == "max_tokens" and "max_completion_tokens" in str(error):
                self._length_key = "max_completion_tokens"
                raise _OtherKey(str(error), response=error.response, body=error.body) from None
            if error.code == "content_filter":  # some endpoints refuse with a status
                seconds = time.monotonic() - began
                text = self._clean(_said(error))
                return Reply(text, True, "content_filter", asked_at=asked_at, seconds=seconds)
            raise
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, NotACompletion):  # openai 2 wraps it
                raise error.__cause__ from None
            raise
        return _reply(said.http_response, asked_at, time.monotonic() - began)

    def _again(self, state: RetryCallState) -> None:
        self.n_retries += 1
        assert state.outcome is not None and state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        if not isinstance(error, _OtherKey):
            self._notify(f"{self._line(error)}; trying again in {state.next_action.sleep:.1f} s")

    def _line(self, error: BaseException) -> str:
        """The failure in one line without credentials."""
        if isinstance(error, openai.APITimeoutError):
            text = f"no answer within {self.settings.timeout_seconds:g} s"
        elif isinstance(error, openai.APIStatusError):
            text = f"status {error.status_code}: {_said(error)}"
        elif isinstance(error, openai.APIConnectionError):
            text = _connection(error)
        else:
            text = str(error)
        return f"{self._at}: {self._clean(text)}"

    def _clean(self, text: str) -> str:
        user = urlsplit(self.settings.base_url).netloc.rpartition("@")[0]
        for secret in filter(None, (self._key, user, *user.split(":"), urlsplit(self.settings.base_url).query)):
            text = text.replace(secret, "***")
        return " ".join(_storable(text).split())[:300]

    async def _refusal(self, error: openai.APIStatusError) -> UserError:
        s, at, said = self.settings, self._at, self._clean(_said(error))
        status = f"status {error.status_code}: {said}"
        if _is_quota(error):
            return UserError(f"--api-key-env: {at}: the account's quota is used up ({status}); add to it, then run "
                             "this again")  # fmt: skip
        if error.status_code in (401, 403) and _is_page(error.response):
            or_else = ", or put the endpoint's host into NO_PROXY" if self._has_proxy else ""
            return UserError(
                f"--base-url: {at} answers with {said} (status {error.status_code}), as a filter before an API does, "
                f"not an API; check the address, ask who runs that network{or_else}"
            )
        if error.status_code in (401, 403):
            what = "is missing" if self._key is None else "was refused"
            return UserError(
                f"--api-key-env: {at} answers with status {error.status_code} ({said}): the key in {s.api_key_env} "
                f"{what}; put a key into it that may use {s.model}"
            )
        if error.status_code == 407:
            return UserError(f"{at}: the proxy wants a user and a password ({status}); put them into its address, as "
                             "in http://user:password@host:port")  # fmt: skip
        if error.status_code < 400:
            parts = urlsplit(error.response.headers.get("location", ""))
            to = self._clean(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
            return UserError(
                f"--base-url: {at} leads on to {to} (status {error.status_code}), where nothing was sent; give the "
                "address of the API itself, or sign in where the network asks for it"
            )
        if error.status_code in NO_API_STATUS - {404} or (error.status_code == 404 and _is_page(error.response)):
            return self._no_api(error.status_code, said)
        names = await self._offered()
        if names and s.model not in names:
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            return UserError(f"--model: {at} has no {s.model} ({status}); it offers {', '.join(names[:12])}{more}")
        if error.status_code == 404:
            return UserError(
                f"--base-url: {at} has no model {s.model} or no chat completions (status 404: {said}); check "
                "--model, and that the address goes up to its /v1"
            )
        return UserError(
            f"--model: {at} refuses the request for {s.model} ({status}); check "
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


class _Stop(stop_base):
    """After the last try; earlier where the answers are no completions."""

    def __init__(self, tries: int) -> None:
        self._tries, self._n_odd = tries, 0

    def __call__(self, retry_state: RetryCallState) -> bool:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        self._n_odd += isinstance(error, NotACompletion)
        return retry_state.attempt_number >= self._tries or self._n_odd >= ODD_TRIES


class _Pause(wait_base):
    """The pause that the endpoint asks for, else doubling pauses with jitter."""

    def __init__(self, first_seconds: float) -> None:
        self._own = wait_exponential_jitter(multiplier=first_seconds, max=LONGEST_PAUSE_SECONDS, jitter=first_seconds)

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
        return error.status_code in PASSING_STATUS and not _is_quota(error)
    return isinstance(error, (openai.APIError, NotACompletion))


def _is_quota(error: openai.APIStatusError) -> bool:
    """Whether the account may buy no more answers: no wait helps."""
    body = error.body if isinstance(error.body, dict) else {}
    return error.status_code == 402 or any(body.get(key) in QUOTA for key in ("code", "type"))


def _connection(error: openai.APIConnectionError) -> str:
    """Reason that no answer came, and the remedy of those kinds that have one of their own."""
    cause = error.__cause__ or error
    said = f"the connection failed ({type(cause).__name__}: {cause})"
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return f"{said}: {next(remedy for word, remedy in CERTIFICATE_REMEDIES if word in said)}"
    if "[SSL" in said:
        return f"{said}: is it http:// there, in place of https://?"
    if type(cause).__name__ == "DecodingError":
        return f"its answer cannot be unpacked ({cause})"
    return said


async def _read_bounded(response: Any) -> None:
    """Read an answer as far as one may be long; httpx itself reads whatever comes."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > LONGEST_ANSWER_BYTES:
            raise NotACompletion(f"its answer is longer than {LONGEST_ANSWER_BYTES >> 20} MiB", is_api=True)
    response._content = bytes(body)  # what aread() would have put there


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
    """The endpoint's own words: `error.message` of its body, or `detail`, or the body; of a page its title."""
    if _is_page(error.response):
        return f"a page, {_page(error.response)}"
    body = error.body
    if isinstance(body, dict):
        for key in ("message", "detail"):
            if body.get(key):
                return str(body[key])
    return str(body or error.message)


def _is_page(response: Any) -> bool:
    return "html" in response.headers.get("content-type", "") or response.text.lstrip().lower().startswith(_PAGES)


def _page(response: Any) -> str:
    """The title of a page, without markup."""
    title = re.search(r"<title[^>]*>([^<]*)", response.text[:10_000], re.IGNORECASE)
    return repr(html.unescape(" ".join(title.group(1).split()))[:80]) if title else "without a title"


def _reply(response: Any, asked_at: float, seconds: float) -> Reply:
    """The first choice of an answer with status 200.

    Raises:
        NotACompletion: there is none in it.
    """
    try:
        said = json.loads(response.text)
    except (ValueError, RecursionError):
        what = f"a page, {_page(response)}" if _is_page(response) else repr(" ".join(response.text.split())[:80])
        raise NotACompletion(f"its answer is no JSON ({what}); does --base-url go up to its /v1?") from None
    if not isinstance(said, dict):
        raise NotACompletion("its answer is no chat completion; does --base-url go up to its /v1?")
    choices = said.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    choice = first if isinstance(first, dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        error = said.get("error")
        words = error.get("message") if isinstance(error, dict) else error
        why = f"its answer is an error: {words}" if words else "its answer holds no choice"
        raise NotACompletion(why, bool(words) or "choices" in said)
    refusal, reason = message.get("refusal"), choice.get("finish_reason")
    text = _text(message.get("content")) or _text(refusal)
    return Reply(
        text=_storable(text),
        refused=bool(refusal),
        finish_reason=reason if isinstance(reason, str) else None,
        model=_storable(_text(said.get("model"))),
        input_tokens=_count(said, "prompt_tokens"),
        output_tokens=_count(said, "completion_tokens"),
        asked_at=asked_at,
        seconds=seconds,
    )


def _text(content: Any) -> str:
    """A message's content: a text, or a list of parts that hold some."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _count(said: dict[str, Any], name: str) -> int | None:
    """One of the token counts, where the endpoint tells it."""
    usage = said.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def _storable(text: str) -> str:
    """The text without what JSON can write and a database cannot keep: halves of surrogate pairs, and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
