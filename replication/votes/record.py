"""The vote record, DIR/votes.csv, one row a vote, and what describes it: votes.json and the panel's own panel.json.

What judges write and the report reads. The lock of a panel writes votes.json; votes from elsewhere have neither that
nor a panel. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from replication.console import plural
from replication.errors import UserError
from replication.runs.files import file_sha256, read_json
from replication.runs.layout import SuiteDir
from replication.runs.records import WrongForm, from_json, read_record
from replication.runs.withdrawn import read_withdrawals

CHOICES = ("left", "right", "tie", "both_bad")
JUDGE_KINDS = ("human", "model")
SCHEMA_VERSION = 1  # of votes.json and panel.json; those from before it have no such key, and else the same or fewer


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
    criteria: str = ""  # choices by other criteria than the vote's, such as "coherence:left diversity:tie"
    strength: str = ""  # how clearly one is better, in the study's word
    reason: str = ""  # in the judge's words

    @property
    def said(self) -> dict[str, str]:
        """Criterion -> choice."""
        return dict(part.split(":") for part in self.criteria.split())


COLUMNS = tuple(field.name for field in fields(Vote) if field.default is MISSING)
FURTHER = tuple(field.name for field in fields(Vote) if field.default is not MISSING)
"""Columns that a file has where a study asks for them."""
CRITERIA = re.compile(rf"(\w+:({'|'.join(CHOICES)})( |$))*")


def votes_text(votes: Iterable[Vote]) -> str:
    """The record as CSV; an unknown number of seconds is an empty cell."""
    text, votes = io.StringIO(), list(votes)
    further = [name for name in FURTHER if any(getattr(vote, name) for vote in votes)]
    writer = csv.DictWriter(text, (*COLUMNS, *further), extrasaction="ignore", lineterminator="\n")
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


def counted_votes(path: Path) -> list[Vote]:
    """Those of read_votes that a statistic may count: not those of uncounted_judges."""
    gone = uncounted_judges(SuiteDir(path.parent))
    return [vote for vote in read_votes(path) if vote.judge_id not in gone]


def uncounted_judges(suite_dir: SuiteDir) -> set[str]:
    """Judges who were withdrawn, or excluded by a rule of the study at the lock."""
    note = read_note(suite_dir.votes_note, suite_dir.votes)
    return {*read_withdrawals(suite_dir).of("judge"), *(note.note.excluded or {} if note else {})}


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
    values = {name: row[name].strip() for name in (*COLUMNS, *FURTHER) if name in row}
    if not CRITERIA.fullmatch(values.get("criteria", "")):
        raise UserError(f"{place}: criteria is '{values['criteria']:.60}', which must be such as 'coherence:left'")
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
    setting: str | None = None  # the named way of sampling of its completions; None: as the cells' configs ask for
    study_sha256: str | None = None  # of judging/study.yaml; None: the default study of a panel that has none
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
    key_read_at: str | None = None  # when it was last read before the lock, by anything but our commands
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
    n_gold_asked: int | None = None
    n_gold_passed: int | None = None
    study_sha256: str | None = None
    excluded: dict[str, str] | None = None  # judges who enter no statistic -> the study's rule that they broke
    surveys: dict[str, dict[str, str]] | None = None  # judge -> what they said of themselves: question -> answer
    first_chosen: dict[str, list[int]] | None = None  # model judge -> [answers for what came first, decisive ones]
    arms: list[str] | None = None  # that votes were cast on
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
        rules = "; ".join(f"{judge} ({why})" for judge, why in (self.excluded or {}).items())
        first = "; ".join(f"{judge} {n} of {whole}" for judge, (n, whole) in (self.first_chosen or {}).items() if whole)
        told = (
            (locked, locked),
            (self.key_sha256, f"The sealed key that says which arm stood where has the SHA-256 {self.key_sha256}."),
            (
                self.key_read_at,
                f"Its file was read at {self.key_read_at} by something else than the commands of the "
                "panel, as whoever opens it does, and a backup or a copy too.",
            ),
            (self.n_judges_short, f"Judges that ended with fewer votes than a full set has: {self.n_judges_short}."),
            (refusals + garbage, f"{were} no choice ({why}): on such a pair there is no vote of the model."),
            (lone, f"Repeated votes left out because the first vote on their pair was never cast: {lone}."),
            (self.n_test_votes, f"Votes of test judges, left out of every count: {self.n_test_votes}."),
            (self.n_attention_asked, f"Attention items: people chose what was asked of them in {passed}."),
            (self.n_gold_asked, f"Gold pairs: the better text won {self.n_gold_passed or 0} of {self.n_gold_asked}."),
            (rules, f"Judges in no statistic, by the study's rules, though their votes are in the record: {rules}."),
            (first, f"Decisive answers of models, in both orders, for the text that came first: {first}."),
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
        not_reported = ("panel_id", "suite", "arms", "n_votes", "n_repeats", "n_judges", "surveys", "schema_version")
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
