"""Models without an API: comparisons as Markdown to paste into a chat window, and the pasted answers read back.

A sheet has parts, each for a chat of its own. The first half of the parts holds every pair as assigned, the second half
the same pairs with the sides swapped, so that no part holds a pair twice. Numbers stay what they are when a sheet is
written again; parts that were answered are left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from replication.config.study import Study
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.models import prompt
from replication.judging.models.answers import Comparison, ModelAnswer, ModelJudge, Reply, Summary
from replication.judging.models.prompt import Parsed, parse_reply
from replication.judging.store import Store
from replication.runs.files import write_text

SHEET = "sheet"
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

Answer every comparison with one line, {form}

{answers}

{comparisons}

Now answer: {count}."""
COMPARISON = "### Comparison {number}\n\n" + prompt.QUOTED.replace("{code}", "{code} {number}")

_Part = Mapping[int, Comparison]  # comparisons by the number printed in the sheet


def write_sheet(database: Database, judge_id: str, path: Path, items_per_part: int = 0, model: str = "") -> int:
    """Write the parts that have no answers yet, of a model judge that has its assignments; returns how many.

    Args:
        items_per_part: comparisons of a part, fixed once a part was read; 0: as before, or 8.
        model: what the chat window calls the model; empty: as before, or the judge's id.

    Raises UserError where the panel is locked, the judge was asked in another way, or every part was answered.
    """
    judge = ModelJudge(database, judge_id)
    before = judge.asked()
    model = model or before.get("model", judge_id)
    size = items_per_part or before.get("items_per_part", 8)
    judge.settle({"by": SHEET, "model": model, "prompt": prompt.prompt_version(judge.study), "items_per_part": size})
    parts, known = _parts(judge.comparisons(), size), judge.answered()
    is_open = [any(comparison.key not in known for comparison in part.values()) for part in parts]
    if not any(is_open):
        raise UserError(f"--judge-id: every comparison of '{judge_id}' has its answer; nothing is left for a sheet")
    check_target(database, judge_id, path)
    head = HEAD.format(mark=_mark(database, judge_id), example=min(parts[is_open.index(True)]), refused=REFUSED)
    texts = [text + "\n" for text, is_one in zip(_texts(judge.study, parts), is_open, strict=True) if is_one]
    write_text(path, "\n\n".join([head, *texts]))
    return len(texts)


def check_target(database: Database, judge_id: str, path: Path) -> None:
    """Raises UserError where the file is there and is anything but an earlier sheet of this judge and panel."""
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

    Raises UserError for a line that is no answer, or a number that is unknown, comes twice, is missing from its part or
    was answered otherwise before: all of them in one line, and nothing is stored.
    """
    judge = ModelJudge(database, judge_id)
    asked = judge.asked()
    if asked.get("by") != SHEET:
        raise UserError(f"--read: no sheet was written for '{judge_id}'; write one with --out")
    judge.settle(asked)
    parts, known = _parts(judge.comparisons(), asked["items_per_part"]), judge.answered()
    said, now = _read(path, parts, known, len(judge.study.criteria)), time.time()
    new = []
    for part, text in zip(parts, _texts(judge.study, parts), strict=True):
        if said.keys() >= part.keys():
            for number, comparison in part.items():
                words, parsed = said[number]
                reply = Reply(words, model=asked["model"], asked_at=now)
                new.append(ModelAnswer(comparison, parsed, text, reply, SHEET))
    stored = judge.keep(new)
    return Summary(judge_id, judge.counts(), stored)


def _parts(every: Sequence[Comparison], size: int) -> list[_Part]:
    """The parts: all pairs as assigned, then all of them swapped, each half cut into parts of one size."""
    parts: list[_Part] = []
    first = 1
    for swapped in (False, True):
        half = [comparison for comparison in every if comparison.swapped is swapped]
        for start in range(0, len(half), size):
            parts.append(dict(enumerate(half[start : start + size], first + start)))
        first += len(half)
    return parts


def _texts(study: Study, parts: Sequence[_Part]) -> list[str]:
    """What is pasted of each part: its heading, the question and its comparisons."""
    form, n_words = "`NUMBER: WORD`, and write nothing else. The word is one of four:", len(study.criteria)
    if n_words > 1:
        form = (
            f"`NUMBER: {' '.join(['WORD'] * n_words)}`, a word for each of these questions in their order, and write "
            f"nothing else:\n\n{prompt.questions(study)}\n\nA word is one of four:"
        )
    texts = []
    for n, part in enumerate(parts, 1):
        code = prompt.settled_code([text for c in part.values() for text in (c.question, c.a, c.b)])
        quoted = [
            COMPARISON.format(number=number, code=code, question=c.question, a=c.a, b=c.b) for number, c in part.items()
        ]
        text = PART.format(
            part=n,
            parts=len(parts),
            form=form,
            rubric=prompt.rubric(study),
            fence=prompt.FENCE.format(code=code),
            answers=prompt.answers(study),
            comparisons="\n\n".join(quoted),
            count=f"one line, for {min(part)}" if len(part) == 1 else f"a line for each of {min(part)} to {max(part)}",
        )
        texts.append(text)
    return texts


def _read(
    path: Path, parts: Sequence[_Part], known: Mapping[tuple[int, bool], Parsed], n_words: int
) -> dict[int, tuple[str, Parsed]]:
    """Number -> (reply, what it says), or every fault of the file in one error."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"--read: {path} does not exist; paste the model's answers into it") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"--read: {path} cannot be read ({error}); give a UTF-8 text file") from None
    by_number = {number: comparison for part in parts for number, comparison in part.items()}
    said: dict[int, tuple[str, Parsed]] = {}
    line_of: dict[int, int] = {}
    faults: list[str] = []
    for at, line in enumerate(lines, 1):
        if _IGNORED.fullmatch(line):
            continue
        found = _ANSWER.fullmatch(line.strip(" \t-*_`>"))
        reply = found.group(2).strip() if found else ""
        is_refused = reply.strip(" *_`.") == REFUSED
        parsed = Parsed("refusal") if is_refused else parse_reply(reply, n=n_words)
        if found is None or (parsed.status != "choice" and not is_refused):
            faults.append(f"line {at} is no answer such as '1: A' ({line.strip()[:40]!r})")
            continue
        number = int(found.group(1))
        if number not in by_number:
            faults.append(f"line {at}: there is no comparison {number}")
        elif number in said:
            faults.append(f"line {at}: {number} was answered in line {line_of[number]} already")
        elif known.get(by_number[number].key, parsed) != parsed:
            faults.append(f"line {at}: {number} was read before with another answer")
        said.setdefault(number, (reply, parsed))
        line_of.setdefault(number, at)
    for n, part in enumerate(parts, 1):
        missing = sorted(part.keys() - said.keys())
        if missing and len(missing) < len(part):
            faults.append(f"part {n} lacks {', '.join(map(str, missing))}")
    if not said and not faults:
        faults.append("there is no answer in it")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"--read: {path}: {'; '.join(faults[:8])}{more}; nothing was stored: fix the file")
    return said
