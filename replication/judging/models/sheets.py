"""Models without an API: comparisons as Markdown to paste into a chat window, and the pasted answers read back.

A sheet has parts, each for a chat of its own. The first half of the parts holds every pair as assigned, the second half
the same pairs with the sides swapped, so that no part holds a pair twice. Numbers stay what they are when a sheet is
written again; parts that were answered are left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.models.answers import (
    Comparison,
    ModelAnswer,
    Reply,
    answer_counts,
    answered,
    comparisons,
    how_asked,
    keep,
    settle,
)
from replication.judging.models.parsing import Parsed, parse_reply
from replication.judging.models.prompt import ANSWERS, FENCE, RUBRIC, prompt_version, settled_code
from replication.judging.models.summary import Summary
from replication.judging.store import Store
from replication.runs.files import write_text

SHEET = "sheet"
ITEMS_PER_PART = 8
REFUSED = "REFUSED"
_ANSWER = re.compile(r"(\d{1,9})\s*[:.)]\s*(.*)")
_IGNORED = re.compile(r"\s*(```\w*|~~~\w*|-{3,})?\s*")  # empty, a fence around the answers, a rule between parts

HEAD = """\
{mark}
<!-- How to use this sheet: paste each part, from its heading to its last line, into a new chat of the model.
Copy what it answers into one text file, parts one below the other, lines such as `{example}: TIE`. If the model
declines a comparison, write `{example}: {refused}` for it. A part is read whole or not at all; it may be read before
the others. -->
"""
MARK = "<!-- Sheet of the model judge {judge}, panel {panel}. -->"
PART = """\
## Part {part} of {parts}

{rubric}

{fence}

Answer every comparison with one line, `NUMBER: WORD`, and write nothing else. The word is one of four:

{answers}

{comparisons}

Now answer: {count}."""
COMPARISON = """\
### Comparison {number}

=== {code} {number} PROMPT ===
{question}
=== {code} {number} COMPLETION A ===
{a}
=== {code} {number} COMPLETION B ===
{b}
=== {code} {number} END ==="""


@dataclass(frozen=True)
class _Part:
    number: int
    comparisons: dict[int, Comparison]
    """By the number printed in the sheet."""


def write_sheet(database: Database, judge_id: str, path: Path, items_per_part: int = 0, model: str = "") -> int:
    """Write the parts that have no answers yet.

    Args:
        database: of the panel; the judge has its assignments.
        judge_id: a model judge.
        path: of the Markdown file.
        items_per_part: comparisons of a part, fixed once a part was read; 0: as before, or 8.
        model: what the chat window calls the model; empty: as before, or the judge's id.

    Returns:
        How many parts were written.

    Raises:
        UserError: the panel is locked, the judge was asked in another way, or every part was answered.
    """
    before = how_asked(database, judge_id)
    model = model or before.get("model", judge_id)
    size = items_per_part or before.get("items_per_part", ITEMS_PER_PART)
    settle(database, judge_id, {"by": SHEET, "model": model, "prompt": prompt_version(), "items_per_part": size})
    parts, known = _parts(comparisons(database, judge_id), size), answered(database, judge_id)
    open_parts = [part for part in parts if not all(_key(c) in known for c in part.comparisons.values())]
    if not open_parts:
        raise UserError(f"--judge-id: every comparison of '{judge_id}' has its answer; nothing is left for a sheet")
    check_target(database, judge_id, path)
    head = HEAD.format(mark=_mark(database, judge_id), example=min(open_parts[0].comparisons), refused=REFUSED)
    write_text(path, "\n\n".join([head, *(_part_text(part, len(parts)) + "\n" for part in open_parts)]))
    return len(open_parts)


def check_target(database: Database, judge_id: str, path: Path) -> None:
    """Refuse to write a sheet over anything but an earlier one of this judge and panel.

    Raises:
        UserError: the file is there and is something else.
    """
    try:
        first = path.read_bytes().partition(b"\n")[0]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}); name a file") from None
    if first.strip() != _mark(database, judge_id).encode():
        is_sheet = first.startswith(MARK.partition("{")[0].encode())
        what = "a sheet of another judge or panel" if is_sheet else "no sheet of this command"
        raise UserError(f"--out: {path} is there and is {what}; it is left as it is, name another file")


def _mark(database: Database, judge_id: str) -> str:
    return MARK.format(judge=judge_id, panel=Store(database).panel().panel_id)


def read_sheet(database: Database, judge_id: str, path: Path) -> Summary:
    """Store the pasted answers of whole parts. What was read before may stand in the file again, with the same answers.

    Raises:
        UserError: a line that is no answer, a number that is unknown, comes twice, is missing from its part or was
            answered otherwise before: all of them in one line, and nothing is stored.
    """
    asked = how_asked(database, judge_id)
    if asked.get("by") != SHEET:
        raise UserError(f"--read: no sheet was written for '{judge_id}'; write one with --out")
    settle(database, judge_id, asked)
    parts, known = _parts(comparisons(database, judge_id), asked["items_per_part"]), answered(database, judge_id)
    said = _read(path, parts, known)
    now, new = time.time(), []
    for part in parts:
        if set(part.comparisons) <= set(said):
            prompt = _part_text(part, len(parts))
            for number, comparison in part.comparisons.items():
                reply, parsed = said[number]
                said_so = Reply(reply, model=asked["model"], asked_at=now)
                new.append(ModelAnswer(comparison, parsed, prompt, said_so, SHEET))
    stored = keep(database, judge_id, new)
    return Summary(judge_id, answer_counts(database, judge_id), stored)


def _parts(every: Sequence[Comparison], size: int) -> list[_Part]:
    """The parts: all pairs as assigned, then all of them swapped, each half cut into parts of one size."""
    parts: list[_Part] = []
    number = 1
    for swapped in (False, True):
        half = [comparison for comparison in every if comparison.swapped is swapped]
        for start in range(0, len(half), size):
            numbered = dict(enumerate(half[start : start + size], number))
            parts.append(_Part(len(parts) + 1, numbered))
            number += len(numbered)
    return parts


def _part_text(part: _Part, n_parts: int) -> str:
    first, last = min(part.comparisons), max(part.comparisons)
    code = settled_code([text for c in part.comparisons.values() for text in (c.question, c.a, c.b)])
    quoted = (
        COMPARISON.format(number=number, code=code, question=c.question, a=c.a, b=c.b)
        for number, c in part.comparisons.items()
    )
    return PART.format(
        part=part.number,
        parts=n_parts,
        rubric=RUBRIC,
        fence=FENCE.format(code=code),
        answers=ANSWERS,
        comparisons="\n\n".join(quoted),
        count=f"one line, for {first}" if first == last else f"a line for each of {first} to {last}",
    )


def _read(path: Path, parts: Sequence[_Part], known: dict[tuple[int, bool], Parsed]) -> dict[int, tuple[str, Parsed]]:
    """Number -> (reply, what it says), or every fault of the file in one error."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"--read: {path} does not exist; paste the model's answers into it") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"--read: {path} cannot be read ({error}); give a UTF-8 text file") from None
    by_number = {number: c for part in parts for number, c in part.comparisons.items()}
    said: dict[int, tuple[str, Parsed]] = {}
    line_of: dict[int, int] = {}
    faults: list[str] = []
    for at, line in enumerate(lines, 1):
        if _IGNORED.fullmatch(line):
            continue
        found = _answer(line)
        if found is None:
            faults.append(f"line {at} is no answer such as '1: A' ({line.strip()[:40]!r})")
            continue
        number, reply, parsed = found
        before = known.get(_key(by_number[number])) if number in by_number else None
        if number not in by_number:
            faults.append(f"line {at}: there is no comparison {number}")
        elif number in said:
            faults.append(f"line {at}: {number} was answered in line {line_of[number]} already")
        elif before is not None and before != parsed:
            faults.append(f"line {at}: {number} was read before with another answer")
        said.setdefault(number, (reply, parsed))
        line_of.setdefault(number, at)
    for part in parts:
        missing = sorted(set(part.comparisons) - set(said))
        if missing and len(missing) < len(part.comparisons):
            faults.append(f"part {part.number} lacks {', '.join(map(str, missing))}")
    if not said and not faults:
        faults.append("there is no answer in it")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"--read: {path}: {'; '.join(faults[:8])}{more}; nothing was stored: fix the file")
    return said


def _answer(line: str) -> tuple[int, str, Parsed] | None:
    found = _ANSWER.fullmatch(line.strip(" \t-*_`>"))
    if found is None:
        return None
    number, reply = int(found.group(1)), found.group(2).strip()
    if reply.strip(" *_`.") == REFUSED:
        return number, reply, Parsed("refusal")
    parsed = parse_reply(reply)
    return (number, reply, parsed) if parsed.status == "choice" else None


def _key(comparison: Comparison) -> tuple[int, bool]:
    return comparison.assignment_id, comparison.swapped
