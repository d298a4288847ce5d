"""The files that a locked panel becomes: votes, counts, judges, models' answers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from sqlalchemy import Connection, func, select

from replication.config import AnalysisConfig
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.folder import PanelFolder
from replication.judging.marginals import marginals
from replication.judging.progress import judge_progress
from replication.judging.schema import answers, assignments, panel
from replication.judging.unsealing import NOT_LOCKED, iso, unsealed_votes, unsealed_within, vote_id
from replication.runs.files import file_sha256, write_text
from replication.runs.records import write_record
from replication.votes.note import SCHEMA_VERSION, VotesNote
from replication.votes.record import parse_votes, read_votes, votes_text
from replication.votes.tally import first_votes, votes_per_judge


def votes_csv(database: Database) -> str:
    """The vote record, as DIR/votes.csv holds it; see replication.votes.record.

    Raises:
        UserError: the panel is not locked.
    """
    return votes_text(unsealed_votes(database).votes)


def check_record(c: Connection) -> None:
    """Read the vote record as it would be written now, within the transaction that locks the panel.

    Raises:
        UserError: it holds what no vote record may, so that nothing could be made of it after the lock.
    """
    parse_votes(votes_text(unsealed_within(c).votes), "the panel's votes")


def marginals_json(database: Database, rules: AnalysisConfig | None = None) -> str:
    """Counts by judge, prompt, category, background and filter; see marginals.py.

    Args:
        database: of a locked panel.
        rules: what the filters go by; none: the defaults.

    Raises:
        UserError: the panel is not locked.
    """
    found = marginals(unsealed_votes(database), rules or AnalysisConfig())
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def judges_csv(database: Database) -> str:
    """A row a judge who voted: kind, vendor, counts, attention items passed of those asked, answers of the survey.

    Raises:
        UserError: the panel is not locked.
    """
    with database.read() as c:
        _refuse_unlocked(c)
    rows = [row for row in judge_progress(database) if row.votes.part]
    questions = sorted({question for row in rows for question in row.survey})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    counts = ["votes", "repeats", "attention_passed", "attention_asked"]
    writer.writerow(["judge_id", "kind", "vendor", *counts, *questions])
    for row in rows:
        numbers = [row.first.part, row.n_repeats, row.attention.part, row.attention.whole]
        said = [row.survey.get(question, "") for question in questions]
        writer.writerow([row.judge_id, row.kind, row.vendor, *numbers, *said])
    return text.getvalue()


def answers_jsonl(database: Database) -> str:
    """Every answer of the model judges, word for word, one JSON object a line; vote_id is that of the vote record.

    Raises:
        UserError: the panel is not locked.
    """
    with database.read() as c:
        _refuse_unlocked(c)
        panel_id = c.execute(select(panel.c.panel_id)).scalar_one()
        query = select(answers, assignments.c.judge_id).join(assignments).order_by(answers.c.answer_id)
        lines = []
        for row in c.execute(query):
            said = dict(row._mapping)
            vote = vote_id(panel_id, said.pop("assignment_id"))
            said |= {"asked_at": iso(said["asked_at"])}
            lines.append(json.dumps({"vote_id": vote, "judge_id": said.pop("judge_id"), **said}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def _refuse_unlocked(c: Connection) -> None:
    if not c.execute(select(func.count(panel.c.locked_at))).scalar_one():
        raise UserError(NOT_LOCKED)


# ---------------------------------------------------------------- files


def check_votes_file(folder: PanelFolder, panel_id: str) -> None:
    """Refuse to write over a vote record that is not this panel's.

    Raises:
        UserError: DIR/votes.csv is there and holds other votes.
    """
    if any(not vote.vote_id.startswith(f"{panel_id}-") for vote in read_votes(folder.suite.votes)):
        raise UserError(f"{folder.suite.votes}: holds votes of something else than this panel; move it away first")


def write_votes_record(folder: PanelFolder, database: Database, rules: AnalysisConfig) -> VotesNote:
    """Write votes.csv, votes.json and marginals.json of a locked panel; the same again for the same panel.

    Returns:
        votes.json: what the record is of, its hash, and why the panel was locked early.
    """
    found = unsealed_votes(database)
    check_votes_file(folder, found.panel_id)
    write_text(folder.suite.votes, votes_text(found.votes))
    first, per_judge = first_votes(found.votes), votes_per_judge(found.votes)
    attention = [judge.attention for judge in judge_progress(database) if judge.kind == "human"]
    with database.read() as c:
        query = select(answers.c.status, func.count().label("n")).group_by(answers.c.status)
        replies = {row.status: row.n for row in c.execute(query)}
    note = VotesNote(
        panel_id=found.panel_id,
        suite=found.suite,
        locked_at=iso(found.locked_at),
        locked_early_because=found.lock_note or None,
        key_sha256=found.key_sha256,
        votes_sha256=file_sha256(folder.suite.votes),
        n_votes=len(first),
        n_repeats=len(found.votes) - len(first),
        n_repeats_without_first_vote=found.lone_repeats,
        n_judges=len(per_judge),
        n_judges_short=sum(n < found.votes_per_judge for n in per_judge.values()),
        n_test_votes=found.test_votes,
        n_refusals=replies.get("refusal", 0),
        n_garbage=replies.get("garbage", 0),
        n_attention_asked=sum(part.whole for part in attention),
        n_attention_passed=sum(part.part for part in attention),
        schema_version=SCHEMA_VERSION,
    )
    write_record(folder.suite.votes_note, note)
    write_text(folder.marginals, marginals_json(database, rules))
    return note


def write_export(folder: PanelFolder, database: Database) -> list[Path]:
    """Write judges.csv and answers.jsonl of a locked panel; returns their paths."""
    texts = {"judges.csv": judges_csv(database), "answers.jsonl": answers_jsonl(database)}
    for name, text in texts.items():
        write_text(folder.judging / name, text)
    return [folder.judging / name for name in texts]
