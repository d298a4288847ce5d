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
from replication.runs.records import WrongForm, from_json, read_record, write_record

SCHEMA_VERSION = 1
"""Of both files; those from before it have no such key, and otherwise the same ones or fewer."""


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
    database: str | None = None
    """URL or file of the panel, if not the SQLite file of its folder."""
    schema_version: int | None = None


def read_panel_record(judging: Path) -> PanelRecord:
    """Of a judging folder; empty where it has none.

    Raises:
        UserError: it is damaged.
    """
    return read_record(judging / "panel.json", PanelRecord) or PanelRecord()


@dataclass(frozen=True)
class VotesNote:
    """DIR/votes.json: what is to be known of a vote record beside its votes. Older ones may lack any key."""

    panel_id: str | None = None
    suite: str | None = None
    locked_at: str | None = None
    """ISO 8601."""
    locked_early_because: str | None = None
    key_sha256: str | None = None
    """Of the sealed key."""
    votes_sha256: str | None = None
    """Of votes.csv as it was written."""
    n_votes: int | None = None
    """First votes."""
    n_repeats: int | None = None
    n_repeats_without_first_vote: int | None = None
    """Left out of the record."""
    n_judges: int | None = None
    n_judges_short: int | None = None
    """Judges with fewer votes than a full set has."""
    n_test_votes: int | None = None
    """Left out of the record."""
    n_refusals: int | None = None
    """Answers of models that refuse."""
    n_garbage: int | None = None
    """Answers of models that cannot be read."""
    n_attention_asked: int | None = None
    n_attention_passed: int | None = None
    schema_version: int | None = None

    @property
    def lines(self) -> list[str]:
        """A sentence for each thing that a reader of the votes must know."""
        lines = []
        at = f" at {self.locked_at}" if self.locked_at else ""
        if self.locked_early_because:
            reason = f"The reason given: {self.locked_early_because}"
            lines.append(f"The panel was locked{at}, before all planned votes were in. {reason}")
        elif self.locked_at:
            lines.append(f"The panel was locked{at}, when nothing planned was missing.")
        if self.key_sha256:
            lines.append(f"The sealed key that says which arm stood where has the SHA-256 {self.key_sha256}.")
        if self.n_judges_short:
            lines.append(f"Judges that ended with fewer votes than a full set has: {self.n_judges_short}.")
        refusals, garbage = self.n_refusals or 0, self.n_garbage or 0
        if refusals or garbage:
            were = plural(refusals + garbage, "answer of a model was", "answers of models were")
            lines.append(
                f"{were} no choice (refusals: {refusals}; not readable: {garbage}): on such a pair there is no vote "
                "of the model."
            )
        if n := self.n_repeats_without_first_vote:
            lines.append(f"Repeated votes left out because the first vote on their pair was never cast: {n}.")
        if self.n_test_votes:
            lines.append(f"Votes of test judges, left out of every count: {self.n_test_votes}.")
        if self.n_attention_asked:
            passed = f"{self.n_attention_passed or 0} of {self.n_attention_asked}"
            lines.append(f"Attention items: people chose what was asked of them in {passed}.")
        return lines


def write_note(path: Path, note: VotesNote) -> None:
    write_record(path, note)


@dataclass(frozen=True)
class CheckedNote:
    """votes.json, held against the record that lies beside it."""

    note: VotesNote
    votes: str
    """Name of the record, for the words."""
    changed: bool | None
    """Whether it is another file than the one that was written at the lock; None: that is not known."""
    other_panel: str = ""
    """The panel that lies beside the record, where that is another than the record's."""

    @property
    def warning(self) -> str:
        """Empty where the record is as it was written, and of this folder's panel."""
        if self.other_panel:
            return (
                f"{self.votes} is of another panel than {self.other_panel}, which lies beside it: it was copied from "
                "another folder, whose models it is about. `replicate judge export` writes this panel's."
            )
        if not self.changed:
            return ""
        return (
            f"{self.votes} is not the file that was written when the panel was locked (votes.json has another "
            "SHA-256): votes were changed, added or removed since. `replicate judge export` writes it again from the "
            "panel."
        )

    @property
    def lines(self) -> list[str]:
        return self.note.lines

    def to_dict(self) -> dict[str, Any]:
        """The form that results.json has of it."""
        not_reported = ("panel_id", "suite", "n_votes", "n_repeats", "n_judges", "schema_version")
        facts = {key: value for key, value in asdict(self.note).items() if key not in not_reported}
        return {**facts, "changed": self.changed, "lines": self.lines}


def read_note(note: Path, votes: Path) -> CheckedNote | None:
    """votes.json, held against votes.csv; None where there is no votes.json.

    Raises:
        UserError: votes.json is damaged.
    """
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
        there = None
    beside = read_panel_record(SuiteDir(note.parent).judging).panel_id
    is_other = None not in (beside, found.panel_id) and beside != found.panel_id
    changed = None if found.votes_sha256 is None else there != found.votes_sha256
    return CheckedNote(found, votes.name, changed, str(beside) if is_other else "")
