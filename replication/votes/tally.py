"""The count of votes, and the published filters: which judges each leaves out. All that counts votes counts here.

A vote for both bad is a tie. A repeat is for self-consistency alone and enters no tally; `first_votes` leaves it out.

The paper leaves out people who vote fast. "Fast" is measured in two ways, which disagree where a judge pauses between
pairs or lets one lie open:

- `seconds_between_votes`, the paper's: its file has it as `median_seconds_between_votes`; a panel's marginals.json and
  the audit go by it.
- `seconds_to_choose`: a vote record holds it for each vote, and the report goes by it, because it does not depend on
  what a judge did between two pairs.

The rules themselves are the same. The primary analysis leaves out nobody. Pure; imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TypeVar

from replication.config import AnalysisConfig
from replication.votes.record import Vote

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Tally:
    """Votes between a baseline and a treatment."""

    baseline: int = 0
    treatment: int = 0
    ties: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.baseline + other.baseline, self.treatment + other.treatment, self.ties + other.ties)

    @property
    def n(self) -> int:
        return self.baseline + self.treatment + self.ties

    @property
    def decisive(self) -> int:
        return self.baseline + self.treatment

    @property
    def share(self) -> float:
        """Of the decisive votes, those for the treatment; NaN without one."""
        return self.treatment / self.decisive if self.decisive else math.nan

    @property
    def tie_share(self) -> float:
        """Of all votes; NaN without one."""
        return self.ties / self.n if self.n else math.nan

    @property
    def leans(self) -> str:
        """The side of the majority: treatment, baseline, even, or ties where no vote is decisive."""
        if self.treatment != self.baseline:
            return "treatment" if self.treatment > self.baseline else "baseline"
        return "even" if self.decisive else "ties"


def winner(choice: str, left: T, right: T) -> T | None:
    """The one of the two shown that a choice is for; None for a tie and for both bad."""
    return left if choice == "left" else right if choice == "right" else None


def chosen_arm(vote: Vote) -> str | None:
    """The arm that a vote is for; None for a tie and for both bad."""
    return winner(vote.choice, vote.arm_left, vote.arm_right)


def count(chosen: Iterable[str | None], baseline: str, treatment: str) -> Tally:
    """The tally of votes on one pair of arms: the arm of each vote, None for a tie."""
    counts = Counter(chosen)
    assert counts.keys() <= {baseline, treatment, None}, f"votes on other arms than {baseline} and {treatment}"
    return Tally(counts[baseline], counts[treatment], counts[None])


def count_by(votes: Iterable[Vote], key: Callable[[Vote], K], baseline: str, treatment: str) -> dict[K, Tally]:
    """A tally of each group of votes on one pair of arms, such as those of a judge, in order of appearance."""
    chosen: dict[K, list[str | None]] = {}
    for vote in votes:
        chosen.setdefault(key(vote), []).append(chosen_arm(vote))
    return {group: count(arms, baseline, treatment) for group, arms in chosen.items()}


def total(tallies: Iterable[Tally]) -> Tally:
    return sum(tallies, Tally())


def first_votes(votes: Iterable[Vote]) -> list[Vote]:
    return [vote for vote in votes if not vote.repeat_of]


def votes_between(votes: Iterable[Vote], *pair: str) -> list[Vote]:
    """First votes on two arms."""
    return [vote for vote in first_votes(votes) if {vote.arm_left, vote.arm_right} == {*pair}]


def votes_per_judge(votes: Iterable[Vote], kinds: Sequence[str] = ("human", "model")) -> Counter[str]:
    """First votes of each judge of these kinds, on whatever pair."""
    return Counter(vote.judge_id for vote in first_votes(votes) if vote.judge_kind in kinds)


@dataclass(frozen=True)
class JudgeVotes:
    """One judge, as the filters see them."""

    name: str
    is_human: bool
    tally: Tally  # of the first votes on the pair of arms
    pace_seconds: float  # seconds_between_votes or seconds_to_choose; NaN where unknown
    n_votes: int  # first votes that were given in all, which a pair or seed that is not used does not lessen

    def is_fast(self, seconds: float) -> bool:
        return self.is_human and self.pace_seconds < seconds  # models are fast by nature, and exempt

    def mostly_ties(self, share: float) -> bool:
        return self.tally.tie_share > share

    def is_partial(self, full_set: int) -> bool:
        return self.n_votes < full_set


@dataclass(frozen=True)
class Filter:
    """One row of the table of filters."""

    label: str
    excluded: frozenset[str]  # judges whose votes it leaves out
    by_kind: bool = False  # whether it keeps one kind of judge, or all, and singles out nobody


def judge_votes(votes: Iterable[Vote], baseline: str, treatment: str) -> list[JudgeVotes]:
    """Each judge of first votes on this pair, in order of name; paced by seconds_to_choose."""
    of_judge: dict[str, list[Vote]] = {}
    for vote in votes_between(votes, baseline, treatment):
        of_judge.setdefault(vote.judge_id, []).append(vote)
    return [
        JudgeVotes(
            name=name,
            is_human=own[0].judge_kind == "human",
            tally=count(map(chosen_arm, own), baseline, treatment),
            pace_seconds=seconds_to_choose(vote.seconds for vote in own),
            n_votes=len(own),
        )
        for name, own in sorted(of_judge.items())
    ]


def seconds_to_choose(seconds: Iterable[float]) -> float:
    """Median time from shown to chosen, over the votes of which it is known; NaN where of none."""
    return median([s for s in seconds if math.isfinite(s)] or [math.nan])


def seconds_between_votes(cast_at: Iterable[float]) -> float:
    """Median gap from one vote to the next, each cast at a second, in any order; NaN below two votes."""
    return median([later - earlier for earlier, later in pairwise(sorted(cast_at))] or [math.nan])


def published_filters(judges: Sequence[JudgeVotes], rules: AnalysisConfig, pace: str = "in the median") -> list[Filter]:
    """The rows of the table, in order; that of experimenters only where one of them voted.

    `rules` has the bounds: fast_seconds, tie_share, votes_per_judge (a full set), experimenters; `pace`, for the label,
    says how pace is measured.
    """

    def row(label: str, leaves_out: Callable[[JudgeVotes], bool], by_kind: bool = False) -> Filter:
        return Filter(label, frozenset(judge.name for judge in judges if leaves_out(judge)), by_kind)

    fast, ties, full_set = rules.fast_seconds, rules.tie_share, rules.votes_per_judge
    experimenters = row("without those who run the experiment", lambda judge: judge.name in rules.experimenters)
    rows = [
        row(f"without people faster than {fast:g} s {pace}", lambda judge: judge.is_fast(fast)),
        row(f"without judges with more than {ties:.0%} ties", lambda judge: judge.mostly_ties(ties)),
        *([experimenters] if experimenters.excluded else []),
        row(f"without judges of fewer than {full_set} votes", lambda judge: judge.is_partial(full_set)),
    ]
    return [
        row("all judges", lambda judge: False, by_kind=True),
        row("models only", lambda judge: judge.is_human, by_kind=True),
        row("people only", lambda judge: not judge.is_human, by_kind=True),
        *rows,
        Filter("without all of these judges", frozenset().union(*(row.excluded for row in rows))),
    ]


def kept(judges: Collection[JudgeVotes], row: Filter) -> list[JudgeVotes]:
    return [judge for judge in judges if judge.name not in row.excluded]
