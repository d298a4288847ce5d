"""Pace and budget of a run against an endpoint."""

from __future__ import annotations

import asyncio
import time

from replication.judging.models.settings import ModelSettings

TEMPLATE_TOKENS = 256  # room for what a chat template adds to a message


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
