"""A study: what judges are told and asked, who of them counts, and what they get for it. One YAML file, over
configs/studies/default.yaml, which has the words that everybody else is shown."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from replication.config.identity import without_neutral
from replication.config.load import find_config
from replication.config.reading import Range, build, read_yaml
from replication.config.schema import Count, Natural, NotNegative

OTHER_FIELDS = ("strength", "reason", "choice", "impression", "skip")  # of the page's forms


@dataclass(frozen=True)
class Answers:
    """Of each of the four answers its button, or when to give it."""

    left: str
    right: str
    tie: str
    both_bad: str

    def stacked(self, choice: str) -> str:
        """The label where the texts stand one below the other."""
        return str(getattr(self, choice)).replace("Left", "First").replace("Right", "Second")


@dataclass(frozen=True)
class SurveyQuestion:
    question: str
    answers: dict[str, str]  # answer -> its words


@dataclass(frozen=True)
class GoldPair:
    """Two texts of which everybody who reads them prefers one; every set holds it once."""

    question: str
    better: str
    worse: str


@dataclass(frozen=True)
class Consent:
    text: str  # an empty line begins a paragraph
    contact: str
    withdrawal: str


@dataclass(frozen=True)
class Exclusions:
    """Who enters no statistic: rules that are applied when the panel is locked, and look at no arm."""

    failed_attention: Natural | None = None
    failed_gold: Natural | None = None
    tie_share: Annotated[float, Range("[0, 1]")] | None = None  # of first votes
    fast_seconds: NotNegative | None = None  # people alone

    @property
    def rules(self) -> dict[str, str]:
        """Key -> the rule in words, of those that are set."""
        words = {
            "failed_attention": f"more than {self.failed_attention} failed attention items",
            "failed_gold": f"more than {self.failed_gold} failed gold pairs",
            "tie_share": f"more than {self.tie_share or 0:.0%} ties",
            "fast_seconds": f"a median time to a vote below {self.fast_seconds or 0:g} seconds",
        }
        return {key: rule for key, rule in words.items() if getattr(self, key) is not None}


@dataclass(frozen=True)
class CompletionPage:
    """What a judge is promised, and is shown or led to at the end."""

    pay: str = ""  # in words, told before the start
    code: str = ""
    url: str = ""
    screened_out_code: str = ""  # of those who fail the check
    screened_out_url: str = ""


@dataclass(frozen=True)
class Study:
    """Keys without a default here have it in configs/studies/default.yaml."""

    texts: str  # what is shown beside a prompt, such as "two texts that go on from it"
    task: str
    better: str  # what is asked for: which of the two is the ...?
    counts: str
    aspects: dict[str, str]  # what counts: name -> its words
    labels: Answers
    meanings: Answers
    read: str
    criteria: dict[str, str]  # name -> question; the first is the vote itself, which the primary analysis reads
    survey: dict[str, SurveyQuestion]  # about the judge, asked once and never required
    format: Literal["text", "markdown"] = "text"  # of completions
    language: str = ""  # of prompts and completions, as HTML has it, such as en, ar or zh-Hans; empty: not known
    strength: tuple[str, ...] = ()  # steps of how clearly one is better; none: not asked
    ask_reason: bool = False
    consent: Consent | None = None
    check: dict[str, tuple[str, ...]] | None = None  # question -> answers, the right one first; shown sorted
    check_tries: Count = 2
    gold: tuple[GoldPair, ...] = ()
    exclude: Exclusions = Exclusions()
    completion: CompletionPage = CompletionPage()

    @property
    def further(self) -> dict[str, tuple[str, ...]]:
        """What is asked of a pair beside the vote -> the answers that it takes."""
        asked = {name: tuple(vars(self.labels)) for name in [*self.criteria][1:]}
        return asked | ({"strength": self.strength} if self.strength else {})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(without_neutral(self)).encode()).hexdigest()


def load_study(*names: str | Path) -> Study:
    """The default study with these files over it, by path or by name in configs/studies; later ones win.

    Raises UserError that names file and key: an unknown key, a wrong type, or a name that no form can hold.
    """
    layers = [read_yaml(find_config(name, "studies")) for name in ("default", *names)]
    study = build(Study, layers)
    for key, named in (("criteria", study.criteria), ("survey", study.survey)):
        for name in named:
            if not name.isidentifier() or name in OTHER_FIELDS:
                raise layers[-1].error(
                    f"{key}.{name}", "must be a word of letters, digits and _, and another than these"
                )
    if not study.criteria:
        raise layers[-1].error("criteria", "needs at least one entry: the vote itself")
    return study
