"""A model that judges: each pair in both orders, answers kept as they come; the same command goes on."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from replication.console import duration, progress
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.models.answers import Comparison, ModelAnswer, ModelJudge, Reply, Summary, print_summary
from replication.judging.models.endpoint import Endpoint, GivenUp, Refused
from replication.judging.models.prompt import Parsed, comparison_prompt, parse_reply, prompt_version
from replication.judging.models.settings import BudgetSpent, ModelSettings

GIVEN_UP_IN_A_ROW = 5  # then the endpoint is taken to be down
REFUSED_IN_A_ROW = 5  # pairs that the endpoint will not answer; then a person should look why
SPENT = "the budget of this run is spent"
GARBAGE_AT_FIRST = 8  # when a judge's first answers are all garbage, a person should look before more is paid for
SECONDS_BETWEEN_LINES = 2.0  # of failures that are tried again; an endpoint that is busy says so to every request
BYTES_OF_A_TOKEN = 4  # of English, by most tokenizers
ABOUT_THE_TEXT = re.compile(
    r"context|token|too (long|large)|flag|filter|content|moderat|inappropriate|polic|safety", re.I
)
FIRST_CONTACT = "This only shows that you can be reached. Answer with one word: TIE"


def run_model_judge(
    database: Database, judge_id: str, settings: ModelSettings, console: Console, join: Callable[[], None] | None = None
) -> Summary:
    """Ask a model about each of a judge's pairs, in both orders, unless that was answered before.

    A choice is a vote where both orders give it; where they differ the vote is a tie (prompt.combine). Refusals and
    garbage are kept as they are, are not asked again, and give no vote. So is what the endpoint says where it will not
    answer one pair (too long, flagged), once it has answered another request, which shows that the pair was the reason.

    `join` gives a new judge its assignments; it is called when the model has answered a first request, so that a wrong
    key or name leaves no judge behind. Raises UserError where the panel is locked, the judge was asked in another way,
    or no further try would help.
    """
    summary = asyncio.run(_Run(ModelJudge(database, judge_id), settings, console).all(join))
    print_summary(summary, console, settings)
    return summary


class _Run:
    def __init__(self, judge: ModelJudge, settings: ModelSettings, console: Console) -> None:
        self._judge, self._settings, self._console = judge, settings, console
        self._endpoint = Endpoint(settings, self._tell)
        self._n_stored = self._n_sensible = self._n_given_up = self._in_a_row = self._n_refused_in_a_row = 0
        self._stopped, self._told_at = "", 0.0
        self._is_fresh = self._has_answered = False
        self._refused: list[ModelAnswer] = []  # since the last request that was answered
        self._confirming = asyncio.Lock()

    async def all(self, join: Callable[[], None] | None) -> Summary:
        endpoint = self._endpoint
        try:
            missing = self._missing() if join is None else []  # what is wrong here is said before anybody is asked
            await endpoint.reach()
            seconds = self._judge.counts().seconds if join is None else None
            if join is not None:
                try:
                    seconds = (await endpoint.ask(FIRST_CONTACT)).seconds
                except Refused as error:
                    raise error.as_final from None
                except GivenUp as error:
                    raise UserError(f"--base-url: {error}; check the address, and that the endpoint is up") from None
                except BudgetSpent:
                    raise UserError("--max-tokens: is less than one request may need") from None
                self._has_answered = True
                join()
                missing = self._missing()
            if missing:
                self._console.print(self._to_come(missing, seconds))
            await self._ask(missing)
        finally:
            await endpoint.close()
        return Summary(
            judge_id=self._judge.judge_id,
            counts=self._judge.counts(),
            n_stored=self._n_stored,
            n_requests=endpoint.meter.n_requests,
            n_retries=endpoint.n_retries,
            n_given_up=self._n_given_up,
            n_tokens=endpoint.meter.n_tokens,
            stopped=self._stopped,
        )

    def _missing(self) -> list[Comparison]:
        """The comparisons without an answer, once it is settled how the judge is asked."""
        s = self._settings
        asked = {
            "by": "endpoint",
            "model": s.model,
            "prompt": prompt_version(self._judge.study),
            "temperature": s.temperature,
            "max_answer_tokens": s.max_answer_tokens,
        }
        self._judge.settle(asked)
        known = self._judge.answered()
        self._is_fresh = not known
        return [c for c in self._judge.comparisons() if c.key not in known]

    def _to_come(self, todo: list[Comparison], seconds: float | None) -> str:
        """An estimate of what the requests take that are left, by the seconds of an answer so far."""
        s, n = self._settings, len(todo)
        n_bytes = sum(len(comparison_prompt(self._judge.study, c.question, c.a, c.b).encode()) for c in todo)
        n_in, n_out = n_bytes // BYTES_OF_A_TOKEN, n * s.max_answer_tokens
        told = f"to come: {n:,} requests, about {n_in:,} tokens in, at most {n_out:,} out"
        if seconds is not None:
            pace = max(seconds / s.parallel, 60 / (s.requests_per_minute or math.inf))
            told += f"; {duration(n * pace)}, at {seconds:.1f} s an answer"
        if s.price:
            told += f"; at most {(n_in * s.price[0] + n_out * s.price[1]) / 1e6:.2f} by --price"
        return told

    async def _ask(self, todo: list[Comparison]) -> None:
        """As many workers as requests may be in flight take comparisons until none is left, or none may be sent."""
        n_every = 2 * self._judge.counts().n_pairs
        columns = ("bar", "count", "{task.fields[so_far]}", "left")
        with progress(self._console, *columns, transient=True) as self._progress:
            done = n_every - len(todo)
            self._task = self._progress.add_task(
                self._judge.judge_id, total=n_every, completed=done, so_far=self._so_far()
            )
            each = iter(todo)
            workers = [asyncio.create_task(self._work(each)) for _ in range(min(self._settings.parallel, len(todo)))]
            try:
                await asyncio.gather(*workers)
                await self._confirm()
            finally:
                for worker in workers:  # one failed, or Ctrl-C: what is in flight is dropped, and asked again next time
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, todo: Iterator[Comparison]) -> None:
        for comparison in todo:
            if self._stopped:
                return
            prompt = comparison_prompt(self._judge.study, comparison.question, comparison.a, comparison.b)
            try:
                reply = await self._endpoint.ask(prompt)
            except BudgetSpent:
                self._stopped = SPENT
            except Refused as error:
                await self._hold(comparison, prompt, error)
            except GivenUp as error:
                self._n_given_up += 1
                self._in_a_row += 1
                self._console.print(f"left unanswered: {error}", style="red", markup=False)
                if self._in_a_row >= GIVEN_UP_IN_A_ROW:
                    self._stopped = f"{self._in_a_row} requests in a row had no answer"
            else:
                self._keep(comparison, prompt, reply)

    def _keep(self, comparison: Comparison, prompt: str, reply: Reply) -> None:
        parsed = parse_reply(reply.text, reply.finish_reason, reply.refused, len(self._judge.study.criteria))
        answer = ModelAnswer(comparison, parsed, prompt, reply, self._settings.endpoint)
        self._n_stored += self._judge.keep([answer])
        self._n_sensible += parsed.status != "garbage"
        self._in_a_row = self._n_refused_in_a_row = 0
        self._keep_refused()
        if self._is_fresh and not self._n_sensible and self._n_stored == GARBAGE_AT_FIRST:
            self._stopped = f"the first {GARBAGE_AT_FIRST} answers are all garbage, such as {reply.text[-60:]!r}"
        self._progress.advance(self._task)
        if time.monotonic() - self._counted_at > 0.5:
            self._progress.update(self._task, so_far=self._so_far())

    async def _hold(self, comparison: Comparison, prompt: str, error: Refused) -> None:
        """Note a refusal, to be kept when another request has been answered: else the reason is no pair's."""
        is_first = self._is_fresh and not self._has_answered
        if is_first and error.status in (400, 403) and not ABOUT_THE_TEXT.search(error.words):
            raise error.as_final  # a flag or the key, most likely: nothing more is asked to find out
        reply = Reply(error.words, True, f"status {error.status}")
        self._refused.append(ModelAnswer(comparison, Parsed("refusal"), prompt, reply, self._settings.endpoint))
        self._n_refused_in_a_row += 1
        if self._n_refused_in_a_row == REFUSED_IN_A_ROW:
            self._stopped = f"{REFUSED_IN_A_ROW} pairs in a row were refused, the last with {error.words!r}"
        self._console.print(f"refused, so without a vote: {error.words}", style="yellow", markup=False)
        async with self._confirming:
            if not self._has_answered:
                await self._confirm()

    async def _confirm(self) -> None:
        """Keep the refusals that are held if a harmless request is answered; else they are asked again next time.

        Raises UserError where that is refused as well: the reason is the key, the model or a setting.
        """
        if self._refused:
            try:
                await self._endpoint.ask(FIRST_CONTACT)
            except Refused as error:
                raise error.as_final from None
            except (GivenUp, BudgetSpent) as error:
                self._stopped = self._stopped or str(error) or SPENT
                self._refused.clear()
            else:
                self._keep_refused()

    def _keep_refused(self) -> None:
        """A request was answered: what was refused before it was refused for its own sake."""
        self._has_answered, held = True, self._refused
        self._refused = []
        self._n_stored += self._judge.keep(held) if held else 0
        self._n_sensible += len(held)
        self._progress.advance(self._task, len(held))

    def _tell(self, line: str) -> None:
        if time.monotonic() - self._told_at > SECONDS_BETWEEN_LINES:
            self._told_at = time.monotonic()
            self._console.print(line, style="yellow", markup=False)

    def _so_far(self) -> str:
        t, self._counted_at = self._judge.counts(), time.monotonic()
        return (
            f"{t.n_votes} votes, {t.n_disagreeing} ties by disagreement, {t.n_refusals} refusals, "
            f"{t.n_garbage} garbage, {t.input_tokens + t.output_tokens:,} tokens"
        )
