"""A study: what judges are told and asked, who of them counts, and what they get for it. One YAML file, over
configs/studies/default.yaml, which has the words that everybody else is shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from replication.config.identity import to_dict
from replication.config.load import find_config
from replication.config.reading import Range, build, read_yaml
from replication.config.schema import Count, Natural, NotNegative


@dataclass(frozen=True)
class Labels:
    """The four answers as they stand on the buttons."""

    left: str
    right: str
    tie: str
    both_bad: str


@dataclass(frozen=True)
class Meanings:
    """When to give which answer."""

    better: str
    tie: str
    both_bad: str


@dataclass(frozen=True)
class Criterion:
    """One comparison of the two texts, by the four answers."""

    name: str
    question: str = ""


@dataclass(frozen=True)
class SurveyQuestion:
    """A question about the judge, asked once and never required."""

    name: str
    question: str
    answers: dict[str, str]
    """Answer -> its words."""


@dataclass(frozen=True)
class CheckQuestion:
    """A question of the comprehension check."""

    question: str
    answers: tuple[str, ...]
    right: str


@dataclass(frozen=True)
class GoldPair:
    """Two texts of which everybody who reads them prefers one; every set holds each such pair once."""

    question: str
    better: str
    worse: str


@dataclass(frozen=True)
class Consent:
    """Told, and agreed to, before anything is shown; an empty line begins a paragraph."""

    text: str
    contact: str
    withdrawal: str


@dataclass(frozen=True)
class Exclusions:
    """Rules by which a judge enters no statistic, applied when the panel is locked; none looks at an arm."""

    failed_attention: Natural | None = None
    """More failed attention items than this."""
    failed_gold: Natural | None = None
    """More gold pairs answered otherwise than by the better text."""
    tie_share: Annotated[float, Range("[0, 1]")] | None = None
    """More ties among the first votes than this share."""
    fast_seconds: NotNegative | None = None
    """Less than this, of a person, in the median from shown to chosen."""

    @property
    def rules(self) -> dict[str, str]:
        """Key -> the rule in words, of those that are set."""
        words = {
            "failed_attention": "more than {} failed attention items",
            "failed_gold": "more than {} failed gold pairs",
            "tie_share": "more than {:.0%} ties",
            "fast_seconds": "a median time to a vote below {:g} seconds",
        }
        limits = vars(self)
        return {key: text.format(limits[key]) for key, text in words.items() if limits[key] is not None}


@dataclass(frozen=True)
class CompletionPage:
    """What a judge is promised, and is shown or led to at the end."""

    pay: str = ""
    """In words, told before the start."""
    code: str = ""
    url: str = ""
    screened_out_code: str = ""
    """Of those who fail the check."""
    screened_out_url: str = ""


@dataclass(frozen=True)
class Study:
    """Keys without a default here have it in configs/studies/default.yaml."""

    texts: str
    """What is shown beside a prompt, such as 'two texts that go on from it'."""
    task: str
    better: str
    """What is asked for: which of the two is the ...?"""
    counts: str
    aspects: dict[str, str]
    """What counts: name -> its words."""
    labels: Labels
    meanings: Meanings
    read: str
    criteria: tuple[Criterion, ...]
    """The first one is the vote, and what the primary analysis reads; others stand beside it."""
    survey: tuple[SurveyQuestion, ...] = ()
    format: Literal["text", "markdown"] = "text"
    """How completions are shown."""
    strength: tuple[str, ...] = ()
    """Steps of how clearly one is better; none: not asked."""
    ask_reason: bool = False
    """Whether a judge may say why, in words."""
    consent: Consent | None = None
    check: tuple[CheckQuestion, ...] = ()
    check_tries: Count = 2
    """Tries at the check; who fails the last one is shown no pair."""
    gold: tuple[GoldPair, ...] = ()
    exclude: Exclusions = Exclusions()
    completion: CompletionPage = CompletionPage()

    @property
    def further(self) -> dict[str, tuple[str, ...]]:
        """What is asked of a pair beside the vote -> the answers that it takes."""
        asked = {criterion.name: tuple(vars(self.labels)) for criterion in self.criteria[1:]}
        return asked | ({"strength": self.strength} if self.strength else {})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()


def load_study(*names: str | Path) -> Study:
    """The default study with these files over it, by path or by name in configs/studies; later ones win.

    Raises UserError that names file and key: an unknown key, a wrong type, or values that do not fit.
    """
    layers = [read_yaml(find_config(name, "studies")) for name in ("default", *names)]
    study = build(Study, layers)
    for key, problem in _faults(study):
        raise layers[-1].error(key, problem)
    return study


def _faults(study: Study) -> Iterator[tuple[str, str]]:
    if not study.criteria:
        yield "criteria", "needs at least one entry: the vote itself"
    named = {"criteria": [c.name for c in study.criteria], "survey": [q.name for q in study.survey]}
    for key, names in named.items():
        for i, name in enumerate(names):
            if not name.isidentifier() or name in ("strength", "reason", "skip", *names[:i]):
                yield f"{key}[{i}].name", f"'{name}' must be a word of its own: letters, digits and _"
    for i, question in enumerate(study.check):
        if question.right not in question.answers:
            yield f"check[{i}].right", f"'{question.right}' must be one of the answers"
