"""The count of votes: who won one, and how many each of two arms won. Pure; all that counts votes counts here.

A vote for both bad is a tie. A repeat is for self-consistency alone and enters no tally; `first_votes` leaves it out.
Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from replication.votes.record import Vote

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
BASELINE, TREATMENT, EVEN, TIES = "baseline", "treatment", "even", "ties"


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
            return TREATMENT if self.treatment > self.baseline else BASELINE
        return EVEN if self.decisive else TIES


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


def votes_per_judge(votes: Iterable[Vote], kinds: Sequence[str] = ("human", "model")) -> Counter[str]:
    """First votes of each judge of these kinds, on whatever pair."""
    return Counter(vote.judge_id for vote in first_votes(votes) if vote.judge_kind in kinds)
