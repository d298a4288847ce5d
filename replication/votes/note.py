"""DIR/votes.json, which the lock of a panel writes beside the vote record: what it is of, and whether it is still that.

Votes from elsewhere have none. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replication.errors import UserError
from replication.runs.files import file_sha256, read_json
from replication.runs.layout import SuiteDir

TYPES: dict[str, type] = {
    "locked_at": str, "locked_early_because": str, "key_sha256": str, "votes_sha256": str,
    "n_judges_short": int, "n_refusals": int, "n_garbage": int, "n_repeats_without_first_vote": int,
    "n_attention_asked": int, "n_attention_passed": int, "n_test_votes": int,
}  # fmt: skip
"""Keys that the report reads; each may be missing or null."""


@dataclass(frozen=True)
class VotesNote:
    """What is to be known of the record beside its votes.

    Attributes:
        facts: TYPES' keys that the file has.
        changed: whether votes.csv is another file than the one that was written at the lock; None: that is not known.
        votes: name of the record, for the words.
    """

    facts: dict[str, Any]
    changed: bool | None
    votes: str
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
        """A sentence for each thing that a reader of the votes must know."""
        f = self.facts
        lines = []
        why, when = f.get("locked_early_because"), f.get("locked_at")
        at = f" at {when}" if when else ""
        if why:
            lines.append(f"The panel was locked{at}, before all planned votes were in. The reason given: {why}")
        elif when:
            lines.append(f"The panel was locked{at}, when nothing planned was missing.")
        if f.get("key_sha256"):
            lines.append(f"The sealed key that says which arm stood where has the SHA-256 {f['key_sha256']}.")
        if f.get("n_judges_short"):
            lines.append(f"Judges that ended with fewer votes than a full set has: {f['n_judges_short']}.")
        refusals, garbage = f.get("n_refusals", 0), f.get("n_garbage", 0)
        if refusals or garbage:
            n = refusals + garbage
            were = "answer of a model was" if n == 1 else "answers of models were"
            lines.append(
                f"{n} {were} no choice (refusals: {refusals}; not readable: {garbage}): on such a pair there is no "
                "vote of the model."
            )
        if f.get("n_repeats_without_first_vote"):
            n = f["n_repeats_without_first_vote"]
            lines.append(f"Repeated votes left out because the first vote on their pair was never cast: {n}.")
        if f.get("n_test_votes"):
            lines.append(f"Votes of test judges, left out of every count: {f['n_test_votes']}.")
        if f.get("n_attention_asked"):
            asked, passed = f["n_attention_asked"], f.get("n_attention_passed", 0)
            lines.append(f"Attention items: people chose what was asked of them in {passed} of {asked}.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {**dict.fromkeys(TYPES), **self.facts, "changed": self.changed, "lines": self.lines}


def read_note(note: Path, votes: Path) -> VotesNote | None:
    """What votes.json says of votes.csv; None where there is no votes.json.

    Raises:
        UserError: votes.json is damaged.
    """
    found = read_json(note)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise UserError(f"{note}: must be an object; `replicate judge export` writes it again")
    for key, kind in TYPES.items():
        if found.get(key) is not None and (not isinstance(found[key], kind) or isinstance(found[key], bool)):
            raise UserError(f"{note}: key '{key}' is {found[key]!r:.60}; `replicate judge export` writes it again")
    facts = {key: found[key] for key in TYPES if found.get(key) is not None}
    recorded = facts.get("votes_sha256")
    try:
        there = file_sha256(votes)
    except OSError:
        there = None
    panel = read_json(SuiteDir(note.parent).judging / "panel.json")
    beside = panel.get("panel_id") if isinstance(panel, dict) else None
    is_other = None not in (beside, found.get("panel_id")) and beside != found["panel_id"]
    return VotesNote(
        facts, None if recorded is None else there != recorded, votes.name, str(beside) if is_other else ""
    )
