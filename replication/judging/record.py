"""The lock's other half: is the panel as full as planned, and what is written when it is locked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from replication.config import AnalysisConfig
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.export import answers_jsonl, attendance, iso, judges_csv, unsealed_votes
from replication.judging.folder import PanelFolder
from replication.judging.marginals import marginals_json
from replication.rundir import file_sha256, write_json, write_text
from replication.votes import read_votes, votes_text


@dataclass(frozen=True)
class Fill:
    """How far a panel is from what was planned.

    Attributes:
        judges: planned.
        votes: planned first votes of each.
        n_voted: judges of the kinds that count who voted at all.
        n_full: of them, those who gave all their votes.
    """

    judges: int
    votes: int
    n_voted: int
    n_full: int

    @property
    def is_full(self) -> bool:
        return self.n_full >= self.judges

    @property
    def sentence(self) -> str:
        return (
            f"{self.n_full} of {self.judges} planned judges have given all {self.votes} votes "
            f"({self.n_voted} have voted)"
        )


def fill(database: Database, judges: int, votes: int, kinds: tuple[str, ...]) -> Fill:
    """Count who has voted."""
    counts = [row.n_first for row in attendance(database) if row.kind in kinds and row.n_first]
    return Fill(judges, votes, len(counts), sum(n >= votes for n in counts))


def check_votes_file(folder: PanelFolder, panel_id: str) -> None:
    """Refuse to write over a vote record that is not this panel's.

    Raises:
        UserError: DIR/votes.csv is there and holds other votes.
    """
    if any(not vote.vote_id.startswith(f"{panel_id}-") for vote in read_votes(folder.votes)):
        raise UserError(f"{folder.votes}: holds votes of something else than this panel; move it away first")


def write_record(folder: PanelFolder, database: Database, rules: AnalysisConfig) -> Mapping[str, Any]:
    """Write votes.csv, votes.json and marginals.json of a locked panel; the same again for the same panel.

    Returns:
        votes.json: what the record is of, its hash, and why the panel was locked early.
    """
    found = unsealed_votes(database)
    check_votes_file(folder, found.panel_id)
    write_text(folder.votes, votes_text(found.votes))
    first = [vote for vote in found.votes if not vote.repeat_of]
    note = {
        "panel_id": found.panel_id,
        "suite": found.suite,
        "locked_at": iso(found.locked_at),
        "locked_early_because": found.lock_note or None,
        "key_sha256": found.key_sha256,
        "votes_sha256": file_sha256(folder.votes),
        "n_votes": len(first),
        "n_repeats": len(found.votes) - len(first),
        "n_repeats_without_first_vote": found.lone_repeats,
        "n_judges": len({vote.judge_id for vote in first}),
    }
    write_json(folder.votes_note, note)
    write_text(folder.marginals, marginals_json(database, rules))
    return note


def write_export(folder: PanelFolder, database: Database) -> list[Any]:
    """Write judges.csv and answers.jsonl of a locked panel; returns their paths."""
    texts = {"judges.csv": judges_csv(database), "answers.jsonl": answers_jsonl(database)}
    for name, text in texts.items():
        write_text(folder.judging / name, text)
    return [folder.judging / name for name in texts]
