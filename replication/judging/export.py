"""The files that a locked panel becomes: votes, counts, judges, models' answers.

What makes a text of a panel raises UserError where the panel is not locked.
"""

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
from replication.judging.progress import judge_progress
from replication.judging.schema import answers, assignments
from replication.judging.unsealing import iso, locked_panel, marginals, unsealed_votes, unsealed_within, vote_id
from replication.runs.files import file_sha256, write_text
from replication.runs.records import write_record
from replication.votes.note import SCHEMA_VERSION, VotesNote
from replication.votes.record import parse_votes, read_votes, votes_text
from replication.votes.tally import votes_per_judge


def votes_csv(database: Database) -> str:
    """The vote record, as DIR/votes.csv holds it; see replication.votes.record."""
    return votes_text(unsealed_votes(database).votes)


def check_record(c: Connection) -> None:
    """Read the vote record as it would be written now, within the transaction that locks the panel.

    Raises UserError where it holds what no vote record may, so that nothing could be made of it after the lock.
    """
    parse_votes(votes_text(unsealed_within(c).votes), "the panel's votes")


def marginals_json(database: Database, rules: AnalysisConfig | None = None) -> str:
    """Counts by judge, prompt, category, background and filter; the filters go by `rules`, or the defaults."""
    found = marginals(unsealed_votes(database), rules or AnalysisConfig())
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def judges_csv(database: Database) -> str:
    """A row a judge who voted: kind, vendor, counts, attention items passed of those asked, answers of the survey."""
    with database.read() as c:
        locked_panel(c)
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
    """Every answer of the model judges, word for word, one JSON object a line; vote_id is that of the vote record."""
    query = select(answers, assignments.c.judge_id).join(assignments).order_by(answers.c.answer_id)
    with database.read() as c:
        panel_id = locked_panel(c).panel_id
        rows = [dict(row._mapping) for row in c.execute(query)]
    lines = []
    for said in rows:
        vote, judge = vote_id(panel_id, said.pop("assignment_id")), said.pop("judge_id")
        said["asked_at"] = iso(said["asked_at"])
        lines.append(json.dumps({"vote_id": vote, "judge_id": judge, **said}, ensure_ascii=False) + "\n")
    return "".join(lines)


def check_votes_file(folder: PanelFolder, panel_id: str) -> None:
    """Raise UserError where DIR/votes.csv holds votes of something else than this panel: it is not written over."""
    if any(not vote.vote_id.startswith(f"{panel_id}-") for vote in read_votes(folder.suite.votes)):
        raise UserError(f"{folder.suite.votes}: holds votes of something else than this panel; move it away first")


def write_votes_record(folder: PanelFolder, database: Database, rules: AnalysisConfig) -> VotesNote:
    """Write votes.csv, votes.json and marginals.json of a locked panel; the same again for the same panel.

    Returns:
        votes.json: what the record is of, its hash, and why the panel was locked early.
    """
    found = unsealed_votes(database)
    about, n_first, per_judge = found.panel, len(found.first), votes_per_judge(found.votes)
    assert about.locked_at is not None
    check_votes_file(folder, about.panel_id)
    write_text(folder.suite.votes, votes_text(found.votes))
    attention = [judge.attention for judge in judge_progress(database) if judge.kind == "human"]
    with database.read() as c:
        query = select(answers.c.status, func.count().label("n")).group_by(answers.c.status)
        replies = {row.status: row.n for row in c.execute(query)}
    note = VotesNote(
        panel_id=about.panel_id,
        suite=about.suite,
        locked_at=iso(about.locked_at),
        locked_early_because=about.lock_note or None,
        key_sha256=about.key_sha256,
        votes_sha256=file_sha256(folder.suite.votes),
        n_votes=n_first,
        n_repeats=len(found.votes) - n_first,
        n_repeats_without_first_vote=found.lone_repeats,
        n_judges=len(per_judge),
        n_judges_short=sum(n < about.votes_per_judge for n in per_judge.values()),
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
