"""A run of one model judge: each pair in both orders, answers kept as they come, the same command goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from replication.errors import UserError
from replication.judging.answers import Answer, Comparison, Tally, answered, comparisons, keep, settle, tally
from replication.judging.database import Database
from replication.judging.endpoint import BudgetSpent, Endpoint, GivenUp, ModelSettings
from replication.judging.model_prompt import comparison_prompt, prompt_version
from replication.judging.parsing import parse_reply

GIVEN_UP_IN_A_ROW = 5  # then the endpoint is taken to be down
GARBAGE_AT_FIRST = 8  # when a judge's first answers are all garbage, a person should look before more is paid for
SECONDS_BETWEEN_LINES = 2.0  # of failures that are tried again; an endpoint that is busy says so to every request


@dataclass(frozen=True)
class Summary:
    """What a judge has said in all, and what this run did.

    Attributes:
        judge_id: whose.
        tally: all runs together.
        n_stored: answers that this run stored.
        n_requests, n_retries, n_given_up, n_tokens: of this run.
        stopped: why it ended early, in one line; empty: it did not.
    """

    judge_id: str
    tally: Tally
    n_stored: int
    n_requests: int = 0
    n_retries: int = 0
    n_given_up: int = 0
    n_tokens: int = 0
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """0 where every comparison has its answer, else 1."""
        return 1 if self.tally.n_missing else 0


def run_model_judge(database: Database, judge_id: str, settings: ModelSettings, console: Console) -> Summary:
    """Ask a model about each of a judge's pairs, in both orders, unless that was answered before.

    A choice is a vote where both orders give it; where they differ the vote is a tie (parsing.combine). Refusals and
    garbage are kept as they are, are not asked again, and give no vote.

    Args:
        database: of the panel; the judge has its assignments.
        judge_id: a model judge.
        settings: model, endpoint, limits.
        console: for progress, failures that are tried again, and the table at the end.

    Raises:
        UserError: the panel is locked, the judge was asked in another way, or no further try would help.
    """
    settings.check()
    asked = {
        "by": "endpoint",
        "model": settings.model,
        "prompt": prompt_version(),
        "temperature": settings.temperature,
        "max_answer_tokens": settings.max_answer_tokens,
    }
    settle(database, judge_id, asked)
    run = _Run(database, judge_id, settings, console)
    asyncio.run(run.all())
    summary = run.summary()
    print_summary(summary, console, settings)
    return summary


class _Run:
    def __init__(self, database: Database, judge_id: str, settings: ModelSettings, console: Console) -> None:
        self._database, self._judge_id, self._settings, self._console = database, judge_id, settings, console
        known = answered(database, judge_id)
        every = comparisons(database, judge_id)
        if not every:
            raise UserError(f"--judge-id: '{judge_id}' has no assignments; add it to the panel with votes to cast")
        self._todo = [c for c in every if (c.assignment_id, c.swapped) not in known]
        self._n_every, self._n_stored, self._n_given_up, self._in_a_row = len(every), 0, 0, 0
        self._n_sensible, self._stopped, self._told_at = 0, "", 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[so_far]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    async def all(self) -> None:
        """As many workers as requests may be in flight take comparisons until none is left, or none may be sent."""
        self._endpoint = Endpoint(self._settings, self._tell)
        todo = iter(self._todo)
        done = self._n_every - len(self._todo)
        self._task = self._progress.add_task(self._judge_id, total=self._n_every, completed=done, so_far=self._so_far())
        workers = [asyncio.create_task(self._work(todo)) for _ in range(min(self._settings.parallel, len(self._todo)))]
        try:
            with self._progress:
                await asyncio.gather(*workers)
        finally:
            for worker in workers:  # one failed, or Ctrl-C: what is in flight is dropped, and asked again next time
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._endpoint.close()

    async def _work(self, todo: Iterator[Comparison]) -> None:
        for comparison in todo:
            if self._stopped:
                return
            try:
                await self._one(comparison)
                self._in_a_row = 0
            except BudgetSpent:
                self._stopped = "the budget of this run is spent"
            except GivenUp as error:
                self._n_given_up += 1
                self._in_a_row += 1
                self._console.print(f"left unanswered: {error}", style="red", markup=False)
                if self._in_a_row >= GIVEN_UP_IN_A_ROW:
                    self._stopped = f"{self._in_a_row} requests in a row had no answer"

    def _tell(self, line: str) -> None:
        if time.monotonic() - self._told_at > SECONDS_BETWEEN_LINES:
            self._told_at = time.monotonic()
            self._console.print(line, style="yellow", markup=False)

    async def _one(self, comparison: Comparison) -> None:
        prompt = comparison_prompt(comparison.question, comparison.a, comparison.b)
        reply = await self._endpoint.ask(prompt)
        answer = Answer(
            comparison=comparison,
            parsed=parse_reply(reply.text, reply.finish_reason, reply.refused),
            prompt=prompt,
            reply=reply.text,
            model=reply.model,
            endpoint=self._settings.endpoint,
            finish_reason=reply.finish_reason,
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
            asked_at=reply.asked_at,
            seconds=reply.seconds,
        )
        self._n_stored += keep(self._database, self._judge_id, [answer])
        self._n_sensible += answer.parsed.status != "garbage"
        fresh = len(self._todo) == self._n_every
        if fresh and not self._n_sensible and self._n_stored == GARBAGE_AT_FIRST:
            self._stopped = f"the first {GARBAGE_AT_FIRST} answers are all garbage, such as {reply.text[-60:]!r}"
        self._progress.advance(self._task)
        if time.monotonic() - self._counted_at > 0.5:
            self._progress.update(self._task, so_far=self._so_far())

    def _so_far(self) -> str:
        t, self._counted_at = tally(self._database, self._judge_id), time.monotonic()
        return (
            f"{t.n_votes} votes, {t.n_disagreeing} ties by disagreement, {t.n_refusals} refusals, "
            f"{t.n_garbage} garbage, {t.input_tokens + t.output_tokens:,} tokens"
        )

    def summary(self) -> Summary:
        meter = self._endpoint.meter
        return Summary(
            self._judge_id,
            tally(self._database, self._judge_id),
            self._n_stored,
            meter.n_requests,
            self._endpoint.n_retries,
            self._n_given_up,
            meter.n_tokens,
            self._stopped,
        )


def print_summary(summary: Summary, console: Console, settings: ModelSettings | None = None) -> None:
    """The table at the end of a run, and what is to be done next."""
    t = summary.tally
    table = Table(title=f"Judge {summary.judge_id}", title_justify="left", show_header=False)
    rows = [
        ("votes", f"{t.n_votes} of {t.n_pairs} pairs"),
        ("same choice in both orders", _share(t.n_agreeing, t.n_agreeing + t.n_disagreeing)),
        ("ties by disagreement", str(t.n_disagreeing)),
        ("for the first completion, of those for either", _share(t.n_a, t.n_a + t.n_b)),
        ("refusals", str(t.n_refusals)),
        ("garbage", f"{t.n_garbage}, {t.n_truncated} of them cut off" if t.n_truncated else str(t.n_garbage)),
        ("comparisons without an answer", str(t.n_missing)),
    ]
    if settings is not None:
        used = f"{t.input_tokens:,} in, {t.output_tokens:,} out" if t.input_tokens else "not told by the endpoint"
        rows.append(("tokens of all answers", used))
        rows.append(("requests of this run", f"{summary.n_requests}, {summary.n_retries} of them further tries"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if settings is not None and t.n_truncated:
        console.print(
            f"{t.n_truncated} answers were cut off at {settings.max_answer_tokens} tokens; a model that thinks first "
            "needs a larger --max-answer-tokens, under another --judge-id",
            style="yellow",
        )
    if t.n_missing:
        why = summary.stopped or f"{summary.n_given_up} requests had no answer"
        tail = "; the same command asks for them" if settings is not None else ""
        console.print(
            f"{why if settings else 'not finished'}: {t.n_missing} comparisons are left{tail}", style="yellow"
        )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none"
