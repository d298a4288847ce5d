"""A table of a model judge's answers for the person who ran it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from replication.console import table
from replication.judging.models.answers import AnswerCounts
from replication.judging.models.settings import ModelSettings


@dataclass(frozen=True)
class Summary:
    """A judge's answers in all, and the work of this run."""

    judge_id: str
    counts: AnswerCounts
    """Of all runs together; what follows is of this run."""
    n_stored: int
    """Answers that were stored."""
    n_requests: int = 0
    n_retries: int = 0
    n_given_up: int = 0
    n_tokens: int = 0
    stopped: str = ""
    """Why it ended early, in one line; empty: it did not."""

    @property
    def exit_code(self) -> int:
        """0 where every comparison has its answer, else 1."""
        return 1 if self.counts.n_missing else 0


def print_summary(summary: Summary, console: Console, settings: ModelSettings | None = None) -> None:
    """The table at the end of a run, and what is to be done next."""
    t = summary.counts
    rows = [
        ("votes", f"{t.n_votes} of {t.n_pairs} pairs"),
        ("same choice in both orders", _share(t.n_agreeing, t.n_agreeing + t.n_disagreeing)),
        ("ties by disagreement", str(t.n_disagreeing)),
        ("first completion chosen (position bias)", _share(t.n_a, t.n_a + t.n_b)),
        ("refusals", str(t.n_refusals)),
        ("garbage", f"{t.n_garbage}, {t.n_truncated} of them cut off" if t.n_truncated else str(t.n_garbage)),
        ("comparisons without an answer", str(t.n_missing)),
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
    if summary.stopped and not t.n_missing:
        console.print(summary.stopped, style="yellow", markup=False)
    if t.n_missing:
        why = summary.stopped or f"{summary.n_given_up} requests had no answer"
        tail = "; the same command asks for them" if settings is not None else ""
        console.print(
            f"{why if settings else 'not finished'}: {t.n_missing} comparisons are left{tail}", style="yellow"
        )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none"
