"""The vote record, DIR/votes.csv: one row a vote. What judges write and the report reads. Imports no torch."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from replication.errors import UserError

CHOICES = ("left", "right", "tie", "both_bad")
JUDGE_KINDS = ("human", "model")


@dataclass(frozen=True)
class Vote:
    """One judge's choice between two completions of one prompt by two arms of the same seed."""

    vote_id: str  # unique in its file; what `repeat_of` of another vote may name
    suite: str
    seed: int  # training seed of both models
    arm_left: str
    arm_right: str
    prompt_id: int
    sample_left: int  # number of the arm's completion of the prompt, from 0
    sample_right: int
    judge_id: str
    judge_kind: str
    vendor: str  # of a model judge; empty for a person
    choice: str  # both_bad counts as a tie
    shown_at: str  # ISO 8601 time at which the pair was shown; may be empty
    seconds: float  # from shown to chosen; NaN where unknown
    repeat_of: str  # vote_id of the vote that this one repeats, sides swapped; empty: a first vote


COLUMNS = tuple(field.name for field in fields(Vote))


def votes_text(votes: Iterable[Vote]) -> str:
    """The record as CSV; an unknown number of seconds is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for vote in votes:
        writer.writerow(asdict(vote) | {"seconds": "" if math.isnan(vote.seconds) else vote.seconds})
    return text.getvalue()


def read_votes(path: Path) -> list[Vote]:
    """Every vote, in the file's order; no file is no votes.

    Raises UserError where a column is missing, the end is torn off, or a row holds what no vote can.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); export the votes again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or export again") from None
    return parse_votes(text, str(path))


def parse_votes(text: str, path: str) -> list[Vote]:
    """read_votes of a text; `path` is its name in messages."""
    if text and not text.endswith(("\n", "\r")):  # a cell that lost its last digits would read as another number
        fault = "is torn in its last line, which has no line break"
        raise UserError(f"{path}: {fault}; export the votes again, or end the line if it is whole")
    csv.field_size_limit(1 << 20)
    reader = csv.DictReader(io.StringIO(text))
    try:
        found = list(reader.fieldnames or [])
        odd = next((name for name in COLUMNS if found.count(name) != 1), None)
        if odd:
            fault = f"has the column {odd} twice" if odd in found else f"lacks the column {odd}"
            raise UserError(f"{path}: {fault}; its first line must name {', '.join(COLUMNS)}")
        votes = [_vote(row, f"{path}: line {reader.line_num}") for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; export the votes again") from None
    _check_ids(votes, path)
    return votes


def _vote(row: dict[str | None, Any], place: str) -> Vote:
    if None in row or None in row.values():
        which = "more" if None in row else "fewer"
        raise UserError(f"{place}: has {which} cells than the first line names columns; export the votes again")
    values = {name: row[name].strip() for name in COLUMNS}
    for name, allowed in (("choice", CHOICES), ("judge_kind", JUDGE_KINDS)):
        if values[name] not in allowed:
            raise UserError(f"{place}: {name} is '{values[name]}', which must be one of {', '.join(allowed)}")
    for name in ("vote_id", "arm_left", "arm_right", "judge_id"):
        if not values[name]:
            raise UserError(f"{place}: {name} is empty; every vote needs it")
    if values["arm_left"] == values["arm_right"]:
        raise UserError(f"{place}: arm_left and arm_right are both '{values['arm_left']}'; a vote is between two arms")
    for name in ("seed", "prompt_id", "sample_left", "sample_right"):
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", values[name]):
            raise UserError(f"{place}: {name} is '{values[name]:.60}', which must be a whole number of 64 bits")
        values[name] = int(values[name])
        check_number(values[name], f"{place}: {name}")
    try:
        seconds = float(values["seconds"] or math.nan)
    except ValueError:
        seconds = -1.0
    if seconds < 0 or math.isinf(seconds):
        raise UserError(f"{place}: seconds is '{values['seconds']}', which must be a number of at least 0, or empty")
    return Vote(**values | {"seconds": seconds})


def check_number(value: int, place: str) -> None:
    """Raises UserError where no vote record, and no database, holds this as the number of a prompt, seed or sample."""
    if not -(2**63) <= value < 2**63:
        bits = f"one of {value.bit_length()} bits"
        raise UserError(f"{place} is {bits}, which must be a whole number of 64 bits; give a smaller one")


def _check_ids(votes: list[Vote], path: str) -> None:
    """Ids are unique, a repeat is of a first vote on the same pair by the same judge, and no first vote comes twice."""
    by_id: dict[str, Vote] = {}
    first: dict[tuple[Any, ...], str] = {}
    for vote in votes:
        if vote.vote_id in by_id:
            raise UserError(f"{path}: vote_id '{vote.vote_id}' comes twice; every vote needs its own")
        by_id[vote.vote_id] = vote
        if not vote.repeat_of and first.setdefault(_judged(vote), vote.vote_id) != vote.vote_id:
            raise UserError(
                f"{path}: vote '{vote.vote_id}' is on the same completions by the same judge as "
                f"'{first[_judged(vote)]}'; name that in repeat_of, or remove one"
            )
    for vote in votes:
        if vote.repeat_of and first.get(_judged(vote)) != vote.repeat_of:
            is_there = vote.repeat_of in by_id
            what = "a first vote on the same completions by the same judge" if is_there else "in the file"
            raise UserError(f"{path}: vote '{vote.vote_id}' repeats '{vote.repeat_of}', which is not {what}")


def _judged(vote: Vote) -> tuple[Any, ...]:
    """Who judged what, whatever the sides."""
    shown = sorted([(vote.arm_left, vote.sample_left), (vote.arm_right, vote.sample_right)])
    return vote.suite, vote.seed, vote.prompt_id, vote.judge_id, *shown
