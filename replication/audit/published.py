"""An author's published data files as typed rows, in the files' own keys: votes, prompts, losses, divergences, finals.

The claims file says which file plays which role. What a file lacks is None or NaN, never 0. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replication.errors import UserError
from replication.runs.files import read_json
from replication.runs.records import WrongForm, from_json
from replication.votes.tally import JudgeVotes, Tally

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DIVERGENCE = "layer_gain/div_layer_"


def side_of(tally: Tally) -> str:
    """The side of a majority, in the paper's words: gain, baseline, even, or ties where no vote is decisive."""
    return "gain" if tally.leans == "treatment" else tally.leans


@dataclass(frozen=True)
class Judge:
    """One judge and the votes that the file counts for them."""

    name: str
    type: str  # Human or FM (foundation model)
    n: int
    a: int
    b: int
    ties: int
    background: str | None = None
    median_seconds_between_votes: float | None = None
    first_ts: str | None = None  # time of the first vote, as a sortable text

    @property
    def tally(self) -> Tally:
        return Tally(self.a, self.b, self.ties)

    @property
    def filtered(self) -> JudgeVotes:
        """As the published filters see a judge."""
        return JudgeVotes(self.name, self.type == "Human", self.tally, _nan(self.median_seconds_between_votes), self.n)


@dataclass(frozen=True)
class Question:
    """One prompt and the votes that the file counts for it."""

    question_id: int
    category: str
    a: int
    b: int
    tie: int

    @property
    def tally(self) -> Tally:
        return Tally(self.a, self.b, self.tie)


@dataclass(frozen=True)
class Majorities:
    """The prompts, and how many of them the file says lean to either side."""

    details: tuple[Question, ...]
    gain_majority: int | None = None
    baseline_majority: int | None = None
    tied: int | None = None


@dataclass(frozen=True)
class Sums:
    """Sums that the file states of some of its votes."""

    n: int | None = None
    a: int | None = None
    b: int | None = None
    t: int | None = None
    p_value: float | None = None  # null where no vote is decisive
    label: str = ""
    excluded: tuple[str, ...] | None = None  # judges whom a filter leaves out


@dataclass(frozen=True)
class MajorityByType:
    human_majority: str
    fm_majority: str


@dataclass(frozen=True)
class Agreement:
    details: tuple[MajorityByType, ...] = ()


@dataclass(frozen=True)
class Votes:
    """The file of votes; what has a default is what it states of itself."""

    judges: tuple[Judge, ...]
    question_majorities: Majorities
    headline: Sums = Sums()
    sensitivity_filters: tuple[Sums, ...] = ()
    category_breakdown: dict[str, Sums] = field(default_factory=dict)
    human_by_background: dict[str, Sums] = field(default_factory=dict)
    inter_annotator_agreement: Agreement = Agreement()

    @property
    def questions(self) -> tuple[Question, ...]:
        return self.question_majorities.details

    @property
    def categories(self) -> list[str]:
        """In the order of the prompts."""
        return list(dict.fromkeys(q.category for q in self.questions))


@dataclass(frozen=True)
class Prompt:
    id: int
    question: str


@dataclass(frozen=True)
class Point:
    step: int
    train_loss: float | None = None
    val_loss: float | None = None


@dataclass(frozen=True)
class Curve:
    """Losses of one run at its published checkpoints; arrays are [V], nats, in order of steps, NaN where missing."""

    trajectory: tuple[Point, ...]

    @cached_property
    def _points(self) -> list[Point]:
        return sorted(self.trajectory, key=lambda point: point.step)

    @cached_property
    def steps(self) -> Ints:
        return np.array([p.step for p in self._points], dtype=np.int64)

    @cached_property
    def train(self) -> Floats:
        return np.array([_nan(p.train_loss) for p in self._points])

    @cached_property
    def validation(self) -> Floats:
        return np.array([_nan(p.val_loss) for p in self._points])

    @property
    def gap(self) -> Floats:
        return self.validation - self.train


@dataclass(frozen=True)
class Published:
    """Everything that the audit reads; a field is the role of a file, `raw` the parsed files of each role."""

    votes: Votes
    prompts: tuple[Prompt, ...] = ()
    losses: dict[str, Curve] = field(default_factory=dict)  # by run
    divergences: tuple[dict[str, float | None], ...] = ()  # samples of one run: `_step`, and a key for each block
    finals: dict[str, dict[str, Any]] = field(default_factory=dict)  # last metrics by run
    raw: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def _samples(self) -> list[dict[str, float | None]]:
        if not self.divergences:
            raise LookupError("divergences")
        return sorted(self.divergences, key=lambda row: _nan(row["_step"]))

    @cached_property
    def sampled_steps(self) -> Ints:
        """int64 [T]."""
        return np.array([row["_step"] for row in self._samples], dtype=np.int64)

    @cached_property
    def divergences_TB(self) -> Floats:
        """float64 [T, B], one column a block; NaN where not published."""
        keys = sorted({key for row in self._samples for key in row if key.startswith(DIVERGENCE)})
        return np.array([[_nan(row.get(key)) for key in keys] for row in self._samples])

    def check(self) -> None:
        """A file that contradicts itself is not audited: raises WrongForm, whose first word is the file's role."""
        votes = self.votes
        if not (votes.judges and votes.questions):
            raise WrongForm("votes needs entries in judges and in question_majorities.details")
        for i, judge in enumerate(votes.judges):
            if judge.n != judge.tally.n:
                raise WrongForm(f"votes.judges[{i}]: n is {judge.n}, but a + b + ties is {judge.tally.n}")
        tallies = [judge.tally for judge in votes.judges] + [question.tally for question in votes.questions]
        if any(min(t.baseline, t.treatment, t.ties) < 0 for t in tallies):
            raise WrongForm("votes counts fewer than no votes of a judge or a prompt")
        if "divergences" in self.raw and not self.divergences:
            raise WrongForm("divergences has no samples")
        for i, sample in enumerate(self.divergences):
            if sample.get("_step") is None or not any(key.startswith(DIVERGENCE) for key in sample):
                raise WrongForm(f"divergences[{i}] needs the keys _step and {DIVERGENCE}NN")


ROLES = tuple(role.name for role in fields(Published) if role.name != "raw")


def load_published(folder: Path, files: Mapping[str, Sequence[str]]) -> Published:
    """Read the files of a paper, by role: `votes` is needed, the others may be absent.

    Raises UserError for no folder, or a file that is missing, is not JSON, has another form or contradicts itself.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of the author's data files")
    unknown = sorted(set(files) - set(ROLES))
    if unknown or "votes" not in files:
        what = f"unknown role '{unknown[0]}'" if unknown else "the role 'votes' is missing"
        raise UserError(f"claims: key files: {what}; the roles are {', '.join(ROLES)}")
    raw: dict[str, list[Any]] = {}
    content: dict[str, Any] = {"raw": raw}
    for role, names in files.items():
        raw[role] = [read_json(folder / name) for name in names]
        if None in raw[role]:
            path = folder / names[raw[role].index(None)]
            raise UserError(f"{path}: no such file; give the folder with all files that the claims name under `files`")
        without_keys = [value for value in raw[role] if not isinstance(value, dict)]
        content[role] = without_keys[0] if without_keys else reduce(or_, raw[role])  # the runs of several files as one
    try:
        found = from_json(Published, content)
        found.check()
    except WrongForm as error:
        paths = [str(folder / name) for name in files[re.split(r"\W", str(error))[0]]]
        raise UserError(f"{', '.join(paths)}: {error}; restore the published file") from None
    return found


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
