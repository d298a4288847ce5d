"""An author's published data files as typed rows: votes by judge and by prompt, losses, divergences, final metrics.

The claims file says which file plays which role. What a file lacks is None or NaN, never 0. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replication.errors import UserError
from replication.runs.files import read_json

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROLES = ("votes", "prompts", "losses", "divergences", "finals")
"""What a file can be: votes (judges and prompts), prompt texts, loss curves, divergences, last metrics of runs."""


@dataclass(frozen=True)
class Tally:
    """Votes of one judge, or on one prompt."""

    baseline: int
    gain: int
    ties: int

    @property
    def n(self) -> int:
        return self.baseline + self.gain + self.ties

    @property
    def decisive(self) -> int:
        return self.baseline + self.gain

    @property
    def share(self) -> float:
        """Of the decisive votes, those for gain; NaN without one."""
        return self.gain / self.decisive if self.decisive else float("nan")

    @property
    def tie_share(self) -> float:
        return self.ties / self.n if self.n else float("nan")

    @property
    def leans(self) -> str:
        """gain, baseline, even, or ties where no vote is decisive."""
        if not self.decisive:
            return "ties"
        return "even" if self.gain == self.baseline else "gain" if self.gain > self.baseline else "baseline"


@dataclass(frozen=True)
class Judge:
    """One judge and the votes that the file counts for them."""

    name: str
    type: str
    """Human or FM (foundation model)."""
    background: str | None
    tally: Tally
    median_seconds: float
    """Median time between votes; NaN where not published."""
    first_vote: str
    """Time of the first vote, as a sortable text; empty where not published."""


@dataclass(frozen=True)
class Question:
    """One prompt and the votes that the file counts for it."""

    id: int
    category: str
    tally: Tally


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of one run at its published checkpoints, in order of steps."""

    steps: Ints
    """int64 [V]."""
    train: Floats
    """float64 [V], nats; NaN where not published."""
    validation: Floats
    """float64 [V], nats; NaN where not published."""


@dataclass(frozen=True, eq=False)
class Divergences:
    """Per-block divergences of one run."""

    steps: Ints
    """int64 [T]."""
    values_TB: Floats
    """float64 [T, B], one column a block; NaN where not published."""


@dataclass(frozen=True, eq=False)
class Published:
    """Everything that the audit reads."""

    judges: tuple[Judge, ...]
    questions: tuple[Question, ...]
    prompts: Mapping[int, Mapping[str, Any]]
    """id -> entry of the prompt file; empty without one."""
    curves: Mapping[str, Curve]
    divergences: Divergences | None
    finals: Mapping[str, Mapping[str, Any]]
    """Run -> its last metrics."""
    raw: Mapping[str, Any]
    """Role -> the parsed file (finals: a list of them), for what the file states of itself."""


def load_published(folder: Path, files: Mapping[str, Any]) -> Published:
    """Read the files of a paper.

    Args:
        folder: where they lie.
        files: role -> file name, or a list of names for `finals`; `votes` is needed, the others may be absent.

    Raises:
        UserError: no folder, a file that is missing, is not JSON or lacks a key; one line that names it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of the author's data files")
    unknown = sorted(set(files) - set(ROLES), key=str)
    if unknown or "votes" not in files:
        what = f"unknown role '{unknown[0]}'" if unknown else "the role 'votes' is missing"
        raise UserError(f"claims: key files: {what}; the roles are {', '.join(ROLES)}")
    names = {role: [name] if isinstance(name, str) else list(name) for role, name in files.items()}
    read = {role: [(folder / name, _read(folder / name)) for name in listed] for role, listed in names.items()}
    votes_path, votes = read["votes"][0]
    return Published(
        judges=tuple(_judge(entry, f"{votes_path}: judges[{i}]") for i, entry in _entries(votes, "judges", votes_path)),
        questions=_questions(votes, votes_path),
        prompts={
            prompt["id"]: prompt for path, content in read.get("prompts", []) for prompt in _prompts(content, path)
        },
        curves={k: _curve(v, path, k) for path, content in read.get("losses", []) for k, v in _runs(content, path)},
        divergences=next((_divergences(content, path) for path, content in read.get("divergences", [])), None),
        finals={run: metrics for path, content in read.get("finals", []) for run, metrics in _runs(content, path)},
        raw={role: [content for _, content in listed] for role, listed in read.items()},
    )


def _read(path: Path) -> Any:
    content = read_json(path)
    if content is None:
        raise UserError(f"{path}: no such file; give the folder with all files that the claims name under `files`")
    return content


def _entries(content: Any, key: str, path: Path) -> Iterable[tuple[int, Any]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise UserError(f"{path}: key {key} must be a list with entries; is this the file of votes?")
    return enumerate(found)


def _need(entry: Any, key: str, kind: type, place: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    negative = isinstance(value, int) and value < 0
    if not isinstance(value, kind) or isinstance(value, bool) or negative:
        word = {int: "a whole number from 0", str: "text", list: "a list"}[kind]
        raise UserError(f"{place}: key {key} must be {word}, not {value!r}; restore the published file")
    return value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def _runs(content: Any, path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    if not isinstance(content, dict) or not all(isinstance(run, dict) for run in content.values()):
        raise UserError(f"{path}: must map the names of runs to their values; restore the published file")
    return content.items()


def _prompts(content: Any, path: Path) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        raise UserError(f"{path}: must be a list of prompts; is this the file of prompts?")
    for i, entry in enumerate(content):
        _need(entry, "id", int, f"{path}: [{i}]")
        _need(entry, "question", str, f"{path}: [{i}]")
    return content


def _judge(entry: Any, place: str) -> Judge:
    """A judge's n must be the sum of their votes: a file that contradicts itself is not audited as if it did not."""
    tally = Tally(*(_need(entry, key, int, place) for key in ("a", "b", "ties")))
    if _need(entry, "n", int, place) != tally.n:
        raise UserError(f"{place}: n is {entry['n']}, but a + b + ties is {tally.n}; restore the published file")
    return Judge(
        name=_need(entry, "name", str, place),
        type=_need(entry, "type", str, place),
        background=entry.get("background") or None,
        tally=tally,
        median_seconds=_number(entry.get("median_seconds_between_votes")),
        first_vote=str(entry.get("first_ts") or ""),
    )


def _questions(votes: Any, path: Path) -> tuple[Question, ...]:
    found = []
    for i, entry in _entries(votes.get("question_majorities"), "details", path):
        place = f"{path}: question_majorities.details[{i}]"
        tally = Tally(*(_need(entry, key, int, place) for key in ("a", "b", "tie")))
        found.append(Question(_need(entry, "question_id", int, place), _need(entry, "category", str, place), tally))
    return tuple(found)


def _curve(entry: Any, path: Path, run: str) -> Curve:
    place = f"{path}: {run}"
    points = _need(entry, "trajectory", list, place)
    steps = [_need(point, "step", int, place) for point in points]
    order = np.argsort(steps)
    columns = [np.array([_number(p.get(key)) for p in points])[order] for key in ("train_loss", "val_loss")]
    return Curve(np.array(steps, dtype=np.int64)[order], *columns)


def _divergences(content: Any, path: Path) -> Divergences:
    prefix = "layer_gain/div_layer_"
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: must be a list of samples; is this the file of divergences?")
    steps = [_need(row, "_step", int, f"{path}: [{i}]") for i, row in enumerate(content)]
    keys = sorted({key for row in content for key in row if key.startswith(prefix)})
    if not keys:
        raise UserError(f"{path}: no key {prefix}NN; is this the file of divergences?")
    values_TB = np.array([[_number(row.get(key)) for key in keys] for row in content])
    order = np.argsort(steps)
    return Divergences(np.array(steps, dtype=np.int64)[order], values_TB[order])
