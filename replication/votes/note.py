"""Files that describe a vote record: votes.json, which the lock of a panel writes, and the panel's own panel.json.

Votes from elsewhere have neither. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from replication.console import plural
from replication.errors import UserError
from replication.runs.files import file_sha256, read_json
from replication.runs.layout import SuiteDir
from replication.runs.records import WrongForm, from_json, read_record

SCHEMA_VERSION = 1  # of both files; those from before it have no such key, and otherwise the same ones or fewer


@dataclass(frozen=True)
class PanelRecord:
    """DIR/judging/panel.json: what may be known of a panel before the lock; no arm. Older ones may lack any key."""

    panel_id: str | None = None
    suite: str | None = None
    key_sha256: str | None = None
    judges: int | None = None
    votes_per_judge: int | None = None
    repeat_share: float | None = None
    attention: int | None = None
    survey: bool | None = None
    open_link: bool | None = None
    database: str | None = None  # URL or file of the panel, if not the SQLite file of its folder
    schema_version: int | None = None


def read_panel_record(judging: Path) -> PanelRecord:
    """Of a judging folder; empty where it has none. Raises UserError where it is damaged."""
    return read_record(judging / "panel.json", PanelRecord) or PanelRecord()


@dataclass(frozen=True)
class VotesNote:
    """DIR/votes.json: what is to be known of a vote record beside its votes. Older ones may lack any key."""

    panel_id: str | None = None
    suite: str | None = None
    locked_at: str | None = None  # ISO 8601
    locked_early_because: str | None = None
    key_sha256: str | None = None  # of the sealed key
    votes_sha256: str | None = None  # of votes.csv as it was written
    n_votes: int | None = None
    n_repeats: int | None = None
    n_repeats_without_first_vote: int | None = None  # left out of the record
    n_judges: int | None = None
    n_judges_short: int | None = None  # judges with fewer votes than a full set has
    n_test_votes: int | None = None  # left out of the record
    n_refusals: int | None = None  # answers of models that refuse
    n_garbage: int | None = None  # answers of models that cannot be read
    n_attention_asked: int | None = None
    n_attention_passed: int | None = None
    schema_version: int | None = None

    @property
    def lines(self) -> list[str]:
        """A sentence for each thing that a reader of the votes must know."""
        at = f" at {self.locked_at}" if self.locked_at else ""
        locked = f"The panel was locked{at}, when nothing planned was missing." if at else ""
        if self.locked_early_because:
            reason = f"The reason given: {self.locked_early_because}"
            locked = f"The panel was locked{at}, before all planned votes were in. {reason}"
        refusals, garbage, lone = self.n_refusals or 0, self.n_garbage or 0, self.n_repeats_without_first_vote
        were = plural(refusals + garbage, "answer of a model was", "answers of models were")
        why = f"refusals: {refusals}; not readable: {garbage}"
        passed = f"{self.n_attention_passed or 0} of {self.n_attention_asked}"
        told = (
            (locked, locked),
            (self.key_sha256, f"The sealed key that says which arm stood where has the SHA-256 {self.key_sha256}."),
            (self.n_judges_short, f"Judges that ended with fewer votes than a full set has: {self.n_judges_short}."),
            (refusals + garbage, f"{were} no choice ({why}): on such a pair there is no vote of the model."),
            (lone, f"Repeated votes left out because the first vote on their pair was never cast: {lone}."),
            (self.n_test_votes, f"Votes of test judges, left out of every count: {self.n_test_votes}."),
            (self.n_attention_asked, f"Attention items: people chose what was asked of them in {passed}."),
        )
        return [sentence for is_told, sentence in told if is_told]


@dataclass(frozen=True)
class CheckedNote:
    """votes.json, held against the record that lies beside it."""

    note: VotesNote
    changed: bool | None
    """Whether the record is another file than the one that was written at the lock; None: that is not known."""
    warning: str  # empty where the record is as it was written, and of this folder's panel

    @property
    def lines(self) -> list[str]:
        return self.note.lines

    def to_dict(self) -> dict[str, Any]:
        """The form that results.json has of it."""
        not_reported = ("panel_id", "suite", "n_votes", "n_repeats", "n_judges", "schema_version")
        facts = {key: value for key, value in asdict(self.note).items() if key not in not_reported}
        return {**facts, "changed": self.changed, "lines": self.lines}


def read_note(note: Path, votes: Path) -> CheckedNote | None:
    """votes.json, held against votes.csv; None where there is no votes.json. Raises UserError where it is damaged."""
    value = read_json(note)
    if value is None:
        return None
    try:
        found = from_json(VotesNote, value)
    except WrongForm as error:
        raise UserError(f"{note}: {error}; `replicate judge export` writes it again") from None
    try:
        there = file_sha256(votes)
    except OSError:
        there = ""
    changed = None if found.votes_sha256 is None else there != found.votes_sha256
    beside = read_panel_record(SuiteDir(note.parent).judging).panel_id
    warning = ""
    if beside and found.panel_id not in (None, beside):
        warning = (
            f"{votes.name} is of another panel than {beside}, which lies beside it: it was copied from another folder, "
            "whose models it is about. `replicate judge export` writes this panel's."
        )
    elif changed:
        warning = (
            f"{votes.name} is not the file that was written when the panel was locked (votes.json has another "
            "SHA-256): votes were changed, added or removed since. `replicate judge export` writes it again from the "
            "panel."
        )
    return CheckedNote(found, changed, warning)
