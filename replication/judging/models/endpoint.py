"""One OpenAI-compatible endpoint: paced, budgeted, retried. What is said in messages and stored holds no credential."""

from __future__ import annotations

import asyncio
import html
import json
import math
import random
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai

from replication.errors import UserError
from replication.judging.models.answers import Reply
from replication.judging.models.settings import Meter, ModelSettings, certificates, route

UNSEEN_STATUS = {*range(300, 500)} - {408, 409}  # the model never saw it; what others cost nobody knows
PASSING_STATUS = {408, 409, 425, 429, *range(500, 600)} - {501, 505}
PAIR_STATUS = {400, 403, 413, 422, 451}  # may be about this one text: its length, or what it says
NO_API_STATUS = {405, 415, 501}
QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
REACH_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_SERVER_PAUSE_SECONDS = 3600.0
LONGEST_ANSWER_BYTES = 8 << 20
ODD_TRIES = 3  # of a request that is answered with something that is no completion
CERTIFICATE_REMEDIES = (
    ("expired", "it must be renewed there, or this machine's clock is wrong"),
    ("not yet valid", "it must be renewed there, or this machine's clock is wrong"),
    ("mismatch", "give the address by a name that the certificate holds"),
    ("", "put the certificate of who signed it into a file, and that file's name into SSL_CERT_FILE"),
)


class GivenUp(Exception):
    """A request had no answer after its last try. The message is one line without credentials."""


class Refused(GivenUp):
    """The endpoint will not answer this request, and perhaps it alone."""

    def __init__(self, words: str, status: int, as_final: UserError) -> None:
        super().__init__(words)
        self.words, self.status = words, status  # the endpoint's own, in one line
        self.as_final = as_final  # what to say where it refuses every request


class NotACompletion(openai.OpenAIError):
    """An answer with status 200 that is no chat completion."""

    def __init__(self, text: str, is_api: bool = False) -> None:
        super().__init__(text)
        self.is_api = is_api  # it has the form of an API's answer all the same: an error, or no choice


class _OtherKey(Exception):
    """The endpoint wants the length of the answer under its other name."""


class Endpoint:
    """Asks one prompt at a time of one model, as often as it takes."""

    def __init__(self, settings: ModelSettings, notify: Callable[[str], None] = lambda line: None) -> None:
        """`notify` gets one line for each failure that is tried again."""
        settings.check()
        self.settings, self.meter = settings, Meter(settings)
        self.n_retries = 0
        self._notify, self._key = notify, settings.key()
        self._length_key = "max_tokens"  # until the endpoint says that it wants max_completion_tokens
        proxy, way = route(settings.base_url)
        self._at = settings.endpoint + (f" ({way})" if way else "")
        self._or_no_proxy = "" if proxy is None else ", or put its host into NO_PROXY"
        # a redirect is told, not followed: prompts and key are for the address that was given
        http = openai.DefaultAsyncHttpxClient(
            trust_env=False,
            proxy=proxy,
            follow_redirects=False,
            event_hooks={"response": [_read_bounded]},
            timeout=settings.timeout_seconds,
            verify=certificates() or True,
        )
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=self._key or "none", http_client=http, max_retries=0
        )

    async def close(self) -> None:
        await self._client.close()

    async def reach(self) -> None:
        """One request without further tries, before anything else: a mistyped address is to be found at once.

        An endpoint that is slow, busy or has no list of models passes. Raises UserError where nothing listens there, or
        what answers is a page for people, or leads elsewhere.
        """
        seconds = min(REACH_SECONDS, self.settings.timeout_seconds)
        try:
            said = await self._client.models.with_raw_response.list(timeout=seconds)
        except openai.APIConnectionError as error:
            why = self._words(error)
            if isinstance(error, openai.APITimeoutError):
                if type(error.__cause__).__name__ != "ConnectTimeout":
                    return
                why = f"no connection within {seconds:g} s"
            raise UserError(
                f"--base-url: {self._at}: {why}; check the address, and that the endpoint is up{self._or_no_proxy}"
            ) from None
        except openai.APIStatusError as error:
            to = urlsplit(error.response.headers.get("location", "")).hostname
            if error.status_code == 407 or (error.status_code < 400 and to not in (None, self._client.base_url.host)):
                raise await self._refusal(error) from None
        except (openai.OpenAIError, ValueError):
            return
        else:
            if page := _page(said.http_response):
                raise self._no_api(said.http_response.status_code, self._clean(page))

    async def ask(self, prompt: str) -> Reply:
        """The model's answer.

        Raises:
            BudgetSpent: before it could be sent, or sent again.
            GivenUp: no answer after the last try.
            Refused: an answer that no further try would change, and that may be about this prompt alone.
            UserError: what no further try would fix for any prompt: the key, the model, the quota.
        """
        n_failed = n_odd = 0
        while True:
            try:
                return await self._try(prompt)
            except _OtherKey:
                self.n_retries += 1
            except (openai.APIError, NotACompletion) as error:
                n_failed += 1
                n_odd += isinstance(error, NotACompletion)
                if n_failed > self.settings.retries or n_odd >= ODD_TRIES or not _may_pass(error):
                    raise await self._final(error) from None
                self.n_retries += 1
                own = self.settings.first_pause_seconds * (2.0 ** min(n_failed - 1, 99) + random.random())
                pause = _retry_after(error, min(own, LONGEST_PAUSE_SECONDS))
                self._notify(f"{self._at}: {self._words(error)}; trying again in {pause:.1f} s")
                await asyncio.sleep(pause)

    async def _try(self, prompt: str) -> Reply:
        """One request, within pace and budget."""
        s, length_key = self.settings, self._length_key
        options: dict[str, float] = {length_key: s.max_answer_tokens}
        if s.temperature is not None:
            options["temperature"] = s.temperature
        messages = [{"role": "user", "content": prompt}]
        create = self._client.chat.completions.with_raw_response.create
        used = reserved = await self.meter.admit(prompt)
        asked_at, began = time.time(), time.monotonic()
        try:
            async with asyncio.timeout(2 * s.timeout_seconds):  # the client's own begins anew with every byte
                said = await create(model=s.model, messages=messages, **options)  # type: ignore[call-overload]
            reply = _reply(said.http_response, asked_at, time.monotonic() - began)
            if reply.input_tokens is not None and reply.output_tokens is not None:
                used = reply.input_tokens + reply.output_tokens
            return reply
        except TimeoutError:
            raise NotACompletion(f"its answer had not ended within {2 * s.timeout_seconds:g} s") from None
        except openai.APIStatusError as error:
            self.meter.hold(_retry_after(error, 0.0))
            if error.status_code == 400 and error.code == "content_filter":  # some endpoints refuse with a status
                seconds, words = time.monotonic() - began, self._clean(_said(error))
                return Reply(words, True, "content_filter", asked_at=asked_at, seconds=seconds)
            used = 0 if error.status_code in UNSEEN_STATUS else reserved
            if error.status_code == 400 and length_key == "max_tokens" and "max_completion_tokens" in str(error):
                self._length_key = "max_completion_tokens"
                raise _OtherKey from None
            raise
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, NotACompletion):  # openai wraps it
                raise error.__cause__ from None
            raise
        except ValueError as error:  # a header that is none
            raise UserError(
                f"--base-url: {self._at}: the request cannot be written ({self._clean(str(error))}); check the "
                "address, and OPENAI_ORG_ID and OPENAI_PROJECT_ID where they are set"
            ) from None
        finally:
            await self.meter.settle(reserved, used)

    async def _final(self, error: openai.APIError | NotACompletion) -> Exception:
        """What a failure comes to that is not tried again."""
        words = self._words(error)
        if isinstance(error, NotACompletion) and error.is_api:
            final = UserError(f"--model: {self._at}: {words}; check --model and --max-answer-tokens")
            return Refused(words, 200, final)
        if not isinstance(error, openai.APIStatusError) or _may_pass(error):
            return GivenUp(f"{self._at}: {words}")
        final = await self._refusal(error)
        if error.status_code not in PAIR_STATUS or _is_quota(error):
            return final
        return Refused(words, error.status_code, final)

    def _words(self, error: openai.APIError | NotACompletion) -> str:
        """A failure in one line without credentials; a connection's with its remedy, where its kind has one."""
        cause = error.__cause__ or error
        said = f"the connection failed ({type(cause).__name__}: {cause})"
        if isinstance(error, openai.APITimeoutError):
            said = f"no answer within {self.settings.timeout_seconds:g} s"
        elif isinstance(error, openai.APIStatusError):
            said = f"status {error.status_code}: {_said(error)}"
        elif not isinstance(error, openai.APIConnectionError):
            said = str(error)
        elif "CERTIFICATE_VERIFY_FAILED" in said:
            said += f": {next(remedy for word, remedy in CERTIFICATE_REMEDIES if word in said)}"
        elif "[SSL" in said:
            said += ": is it http:// there, in place of https://?"
        elif type(cause).__name__ == "DecodingError":
            said = f"its answer cannot be unpacked ({cause})"
        return self._clean(said)

    def _clean(self, text: str) -> str:
        user = urlsplit(self.settings.base_url).netloc.rpartition("@")[0]
        for secret in filter(None, (self._key, user, *user.split(":"), urlsplit(self.settings.base_url).query)):
            text = text.replace(secret, "***")
        return " ".join(_storable(text).split())[:300]

    def _no_api(self, status: int, said: str) -> UserError:
        return UserError(
            f"--base-url: {self._at} is no OpenAI-compatible API (status {status}: {said}); give the "
            "address up to and with its /v1"
        )

    async def _refusal(self, error: openai.APIStatusError) -> UserError:
        """What to say where every request is answered so: the flag that is wrong, and its remedy."""
        s, at, said, code = self.settings, self._at, self._clean(_said(error)), error.status_code
        status = f"status {code}: {said}"
        if _is_quota(error):
            return UserError(
                f"--api-key-env: {at}: the account's quota is used up ({status}); add to it, then run this again"
            )
        if code in (401, 403) and _page(error.response):
            return UserError(
                f"--base-url: {at} answers with {said} (status {code}), as a filter before an API does, not an API; "
                f"check the address, ask who runs that network{self._or_no_proxy}"
            )
        if code in (401, 403):
            what = "is missing" if self._key is None else "was refused"
            return UserError(
                f"--api-key-env: {at} answers with status {code} ({said}): the key in {s.api_key_env} {what}; put a "
                f"key into it that may use {s.model}"
            )
        if code == 407:
            how = "put them into its address, as in http://user:password@host:port"
            return UserError(f"{at}: the proxy wants a user and a password ({status}); {how}")
        if code < 400:
            parts = urlsplit(error.response.headers.get("location", ""))
            to = self._clean(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
            return UserError(
                f"--base-url: {at} leads on to {to} (status {code}), where nothing was sent; give the address of the "
                "API itself, or sign in where the network asks for it"
            )
        if code in NO_API_STATUS or (code == 404 and _page(error.response)):
            return self._no_api(code, said)
        try:
            names = sorted(model.id for model in (await self._client.models.list()).data)
        except (openai.OpenAIError, ValueError, AttributeError, TypeError):  # it does not tell
            names = []
        if names and s.model not in names:
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            return UserError(f"--model: {at} has no {s.model} ({status}); it offers {', '.join(names[:12])}{more}")
        if code == 404:
            return UserError(
                f"--base-url: {at} has no model {s.model} or no chat completions ({status}); check --model, and that "
                "the address goes up to its /v1"
            )
        return UserError(
            f"--model: {at} refuses the request for {s.model} ({status}); check --model, --temperature (none: the "
            "endpoint's own) and --max-answer-tokens"
        )


def _may_pass(error: openai.APIError | NotACompletion) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in PASSING_STATUS and not _is_quota(error)
    return True


def _is_quota(error: openai.APIStatusError) -> bool:
    """Whether the account may buy no more answers: no wait helps."""
    body = error.body if isinstance(error.body, dict) else {}
    return error.status_code == 402 or any(body.get(key) in QUOTA for key in ("code", "type"))


async def _read_bounded(response: Any) -> None:
    """Read an answer as far as one may be long; httpx itself reads whatever comes."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > LONGEST_ANSWER_BYTES:
            raise NotACompletion(f"its answer is longer than {LONGEST_ANSWER_BYTES >> 20} MiB", is_api=True)
    response._content = bytes(body)  # what aread() would have put there


def _retry_after(error: Exception, otherwise: float) -> float:
    """Seconds that the endpoint asks to wait; it may give a number or a date."""
    text = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return otherwise
    return min(max(seconds, 0.0), LONGEST_SERVER_PAUSE_SECONDS) if math.isfinite(seconds) else otherwise


def _said(error: openai.APIStatusError) -> str:
    """The endpoint's own words: `error.message` of its body, or `detail`, or the body; of a page its title."""
    body = error.body if isinstance(error.body, dict) else {}
    return _page(error.response) or str(body.get("message") or body.get("detail") or error.body or error.message)


def _page(response: Any) -> str:
    """A page for people, by its title without markup; empty where the answer is none."""
    is_html = "html" in response.headers.get("content-type", "")
    if not is_html and not response.text.lstrip().lower().startswith(("<!doctype html", "<html")):
        return ""
    title = re.search(r"<title[^>]*>([^<]*)", response.text[:10_000], re.IGNORECASE)
    named = repr(html.unescape(" ".join(title.group(1).split()))[:80]) if title else "without a title"
    return f"a page, {named}"


def _reply(response: Any, asked_at: float, seconds: float) -> Reply:
    """The first choice of an answer with status 200. Raises NotACompletion where there is none in it."""
    try:
        said = json.loads(response.text)
    except (ValueError, RecursionError):
        what = _page(response) or repr(" ".join(response.text.split())[:80])
        raise NotACompletion(f"its answer is no JSON ({what}); does --base-url go up to its /v1?") from None
    match said:
        case {"choices": [{"message": dict(message)} as choice, *_]}:
            pass
        case {"error": {"message": words}} | {"error": (str() | int() | list()) as words} if words:
            raise NotACompletion(f"its answer is an error: {words}", is_api=True)
        case dict():
            raise NotACompletion("its answer holds no choice", is_api="choices" in said)
        case _:
            raise NotACompletion("its answer is no chat completion; does --base-url go up to its /v1?")
    refusal, reason, usage = message.get("refusal"), choice.get("finish_reason"), said.get("usage")
    counts = [usage.get(f"{way}_tokens") if isinstance(usage, dict) else None for way in ("prompt", "completion")]
    n_in, n_out = (n if isinstance(n, int) and 0 <= n < 2**31 else None for n in counts)
    return Reply(
        text=_storable(_text(message.get("content")) or _text(refusal)),
        refused=bool(refusal),
        finish_reason=reason if isinstance(reason, str) else None,
        model=_storable(_text(said.get("model"))),
        input_tokens=n_in,
        output_tokens=n_out,
        asked_at=asked_at,
        seconds=seconds,
    )


def _text(content: Any) -> str:
    """A message's content: a text, or a list of parts that hold some."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _storable(text: str) -> str:
    """The text without what JSON can write and a database cannot keep: halves of surrogate pairs, and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
