"""What a model judge has said, in numbers, and the table of it for the person who ran it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from sqlalchemy import func, select

from replication.console import table
from replication.judging.database import Database
from replication.judging.models.parsing import CUT_OFF, agree
from replication.judging.models.settings import ModelSettings
from replication.judging.schema import answers, assignments, votes


@dataclass(frozen=True)
class AnswerCounts:
    """All that a judge has said so far."""

    n_pairs: int
    n_answers: int  # of the 2 * n_pairs comparisons
    n_votes: int  # pairs with a vote
    n_agreeing: int  # pairs to which both orders gave the same choice
    n_disagreeing: int  # pairs whose vote is a tie because they did not
    n_refusals: int
    n_garbage: int
    n_a: int  # answers for the completion that came first; n_b: second
    n_b: int
    n_truncated: int  # answers that were cut off
    input_tokens: int  # as far as the endpoint tells; output_tokens too
    output_tokens: int

    @property
    def n_missing(self) -> int:
        """Comparisons without an answer."""
        return 2 * self.n_pairs - self.n_answers


def answer_counts(database: Database, judge_id: str) -> AnswerCounts:
    names = ("assignment_id", "status", "choice", "finish_reason", "input_tokens", "output_tokens")
    with database.read() as c:
        mine = assignments.c.judge_id == judge_id
        n_pairs = c.execute(select(func.count()).select_from(assignments).where(mine)).scalar_one()
        n_votes = c.execute(select(func.count()).select_from(assignments.join(votes)).where(mine)).scalar_one()
        query = select(*(answers.c[name] for name in names)).join(assignments).where(mine)
        said = c.execute(query.order_by(answers.c.assignment_id, answers.c.swapped)).all()
    by_pair = [[row.choice for row in rows] for _, rows in groupby(said, key=lambda row: row.assignment_id)]
    both = [choices for choices in by_pair if len(choices) == 2 and all(choices)]  # as assigned, and swapped
    n_agreeing = sum(agree(*choices) for choices in both)
    return AnswerCounts(
        n_pairs=n_pairs,
        n_answers=len(said),
        n_votes=n_votes,
        n_agreeing=n_agreeing,
        n_disagreeing=len(both) - n_agreeing,
        n_refusals=sum(row.status == "refusal" for row in said),
        n_garbage=sum(row.status == "garbage" for row in said),
        n_a=sum(row.choice == "left" for row in said),
        n_b=sum(row.choice == "right" for row in said),
        n_truncated=sum(row.finish_reason in CUT_OFF for row in said),
        input_tokens=sum(row.input_tokens or 0 for row in said),
        output_tokens=sum(row.output_tokens or 0 for row in said),
    )


@dataclass(frozen=True)
class Summary:
    """A judge's answers in all, and the work of this run."""

    judge_id: str
    counts: AnswerCounts  # of all runs together; what follows is of this run
    n_stored: int  # answers that were stored
    n_requests: int = 0
    n_retries: int = 0
    n_given_up: int = 0
    n_tokens: int = 0
    stopped: str = ""  # why it ended early, in one line; empty: it did not

    @property
    def exit_code(self) -> int:
        """0 where every comparison has its answer, else 1."""
        return 1 if self.counts.n_missing else 0


def print_summary(summary: Summary, console: Console, settings: ModelSettings | None = None) -> None:
    """The table at the end of a run, and what is to be done next."""
    t = summary.counts

    def share(part: int, whole: int) -> str:
        return f"{part} of {whole} ({part / whole:.1%})" if whole else "none"

    rows = [
        ("votes", f"{t.n_votes} of {t.n_pairs} pairs"),
        ("same choice in both orders", share(t.n_agreeing, t.n_agreeing + t.n_disagreeing)),
        ("ties by disagreement", t.n_disagreeing),
        ("first completion chosen (position bias)", share(t.n_a, t.n_a + t.n_b)),
        ("refusals", t.n_refusals),
        ("garbage", f"{t.n_garbage}, {t.n_truncated} of them cut off" if t.n_truncated else t.n_garbage),
        ("comparisons without an answer", t.n_missing),
    ]
    if settings is not None:
        used = f"{t.input_tokens:,} in, {t.output_tokens:,} out" if t.input_tokens else "not told by the endpoint"
        rows.append(("tokens of all answers", used))
        rows.append(("requests of this run", f"{summary.n_requests}, {summary.n_retries} of them further tries"))
    console.print(table(f"Judge {summary.judge_id}", ["", ""], rows, header=False))
    if settings is not None and t.n_truncated:
        console.print(
            f"{t.n_truncated} answers were cut off at {settings.max_answer_tokens} tokens; a model that thinks first "
            "needs a larger --max-answer-tokens, under another --judge-id",
            style="yellow",
        )
    why, after = summary.stopped, ""
    if t.n_missing and settings is None:
        why, after = "not finished", f": {t.n_missing} comparisons are left"
    elif t.n_missing:
        why = why or f"{summary.n_given_up} requests had no answer"
        after = f": {t.n_missing} comparisons are left; the same command asks for them"
    if why:
        console.print(why + after, style="yellow", markup=False)
