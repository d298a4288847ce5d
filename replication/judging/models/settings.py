"""How a model judge is asked: the model, its endpoint, and the limits of a run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from replication.errors import UserError
from replication.judging.models.network import checked_key, split_url

DEFAULT_KEY = "OPENAI_API_KEY"
OPERATIONS = ("completions", "models", "responses", "messages", "embeddings")
"""Last words of addresses that an API has below its /v1."""


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
        parts = split_url(self.base_url, "--base-url")
        if (last := parts.path.rstrip("/").rpartition("/")[2]) in OPERATIONS:
            raise UserError(
                f"--base-url: ends in /{last}, which is added here; give the address up to and with its /v1"
            )
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
            UserError: a variable was named that is not set, or what it holds can be no key.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.api_key_env != DEFAULT_KEY:
            is_there = "is empty" if self.api_key_env in os.environ else "is not set"
            raise UserError(f"--api-key-env: {self.api_key_env} {is_there}; put the endpoint's key into it")
        return checked_key(key, self.api_key_env) if key else None
