"""How the judging goes, in numbers: pure functions over the rows of `standing_votes()`. Blind until `results` is asked.

A first vote is one on an item that the judge had not seen before and that is no attention item. A vote for both bad
counts as a tie wherever it is compared.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

Z_95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A part of a whole; of nothing where the whole is 0."""

    part: int
    whole: int

    @property
    def value(self) -> float | None:
        return self.part / self.whole if self.whole else None

    @property
    def chance_margin(self) -> float | None:
        """Half the width of the range in which a share that is .5 in truth lies 95 times in 100."""
        return Z_95 * math.sqrt(0.25 / self.whole) if self.whole else None


@dataclass(frozen=True)
class JudgeNumbers:
    """One judge's votes. Shares of ties and both bad are of first votes; that of left is of the decisive ones."""

    judge_id: str
    votes: Share
    """Of what is assigned, repeats and attention items included."""
    ties: Share
    both_bad: Share
    left: Share
    median_seconds: float | None
    last_vote_at: float | None
    attention: Share
    """Answered as expected, of those answered."""
    repeats: Share
    """Answered alike with the sides swapped, of those answered."""


@dataclass(frozen=True)
class PromptNumbers:
    """First votes on one prompt, of those assigned."""

    prompt_id: int
    category: str
    votes: Mapping[str, Share]
    """By kind of judge."""


@dataclass(frozen=True)
class Tally:
    """First votes between two arms."""

    kind: str
    arm_a: str
    arm_b: str
    seed: int | None
    """None: all seeds."""
    wins_a: int
    wins_b: int
    ties: int


def is_first(row: Any) -> bool:
    return row.expected is None and row.repeats is None


def verdict(choice: str, first_is_left: bool) -> str:
    """A choice without its sides: first, second or tie."""
    if choice not in ("left", "right"):
        return "tie"
    return "first" if (choice == "left") == first_is_left else "second"


def left_share(rows: Iterable[Any]) -> Share:
    """Left among decisive first votes; .5 is expected, for sides are drawn at random."""
    decisive = [row.choice for row in rows if is_first(row) and row.choice in ("left", "right")]
    return Share(decisive.count("left"), len(decisive))


def by_judge(rows: Iterable[Any], n_assigned: Mapping[str, int]) -> list[JudgeNumbers]:
    """One entry for each judge of `n_assigned` (judge_id -> assignments), in its order."""
    mine: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        mine[row.judge_id].append(row)
    return [_of_judge(judge_id, mine[judge_id], n) for judge_id, n in n_assigned.items()]


def _of_judge(judge_id: str, rows: list[Any], n_assigned: int) -> JudgeNumbers:
    first = [row.choice for row in rows if is_first(row)]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    attention = [row.choice == row.expected for row in rows if row.expected is not None]
    earlier = {row.assignment_id: verdict(row.choice, row.first_is_left) for row in rows}
    repeats = [earlier[row.repeats] == verdict(row.choice, row.first_is_left) for row in rows if row.repeats in earlier]
    return JudgeNumbers(
        judge_id,
        votes=Share(len(rows), n_assigned),
        ties=Share(first.count("tie"), len(first)),
        both_bad=Share(first.count("both_bad"), len(first)),
        left=left_share(rows),
        median_seconds=median(seconds) if seconds else None,
        last_vote_at=max((row.cast_at for row in rows), default=None),
        attention=Share(sum(attention), len(attention)),
        repeats=Share(sum(repeats), len(repeats)),
    )


def coverage(rows: Iterable[Any], n_assigned: Mapping[tuple[int, str, str], int]) -> list[PromptNumbers]:
    """One entry a prompt, in order of their numbers.

    Args:
        rows: votes.
        n_assigned: (prompt_id, category, kind of judge) -> assignments without repeats.
    """
    cast = Counter((row.prompt_id, row.category, row.kind) for row in rows if is_first(row))
    votes: dict[tuple[int, str], dict[str, Share]] = defaultdict(dict)
    for prompt_id, category, kind in sorted(n_assigned):
        key = (prompt_id, category, kind)
        votes[prompt_id, category][kind] = Share(cast[key], n_assigned[key])
    return [PromptNumbers(prompt_id, category, of) for (prompt_id, category), of in votes.items()]


def agreement(rows: Iterable[Any]) -> dict[str, Share]:
    """Pairs of judges of the same item that say the same of it (first, second or tie), of all such pairs.

    Keys: "human", "model" for pairs within a kind, "human and model" for those across; a judge's first vote counts.
    """
    of_item: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        if is_first(row):
            of_item[row.item_id].append((row.kind, verdict(row.choice, row.first_is_left)))
    alike: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for said in of_item.values():
        for (kind, one), (other_kind, other) in combinations(said, 2):
            name = kind if kind == other_kind else "human and model"
            pairs[name] += 1
            alike[name] += one == other
    return {name: Share(alike[name], pairs[name]) for name in ("human", "model", "human and model")}


def survey_counts(surveys: Iterable[Mapping[str, str] | None]) -> tuple[int, dict[str, Counter[str]]]:
    """How many judges answered any question, and question -> answer -> judges."""
    answered = [survey for survey in surveys if survey]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for survey in answered:
        for question, answer in survey.items():
            counts[question][answer] += 1
    return len(answered), dict(counts)


def results(rows: Iterable[Any], unsealed: Mapping[str, Any]) -> list[Tally]:
    """First votes by arm: for each kind of judge and pair of arms all seeds together, then each seed.

    Args:
        rows: votes.
        unsealed: item_id -> row of the table `unsealed`.
    """
    counts: dict[tuple[str, str, str, int | None], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if not is_first(row) or row.item_id not in unsealed:
            continue
        truth = unsealed[row.item_id]
        said = {"first": truth.arm_first, "second": truth.arm_second, "tie": ""}[verdict(row.choice, row.first_is_left)]
        arm_a, arm_b = sorted((truth.arm_first, truth.arm_second))
        for seed in (None, truth.seed):
            counts[row.kind, arm_a, arm_b, seed][said] += 1
    in_order = sorted(counts, key=lambda key: (*key[:3], -math.inf if key[3] is None else key[3]))
    return [Tally(*key, counts[key][key[1]], counts[key][key[2]], counts[key][""]) for key in in_order]
