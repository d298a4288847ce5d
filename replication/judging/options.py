"""What a panel may be, before there is one; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from replication.errors import UserError

MOST_JUDGES = 100_000


@dataclass(frozen=True)
class PanelOptions:
    """How a panel is made.

    Attributes:
        judges: people it is planned for; each gets a set of assignments.
        votes_per_judge: first votes of a set.
        repeat_share: share of a set that comes again, sides swapped.
        attention: attention items of a set.
        survey: whether the page asks about the judge.
        open_link: whether one link gives each who opens it a set that is free.
    """

    judges: int
    votes_per_judge: int
    repeat_share: float = 0.1
    attention: int = 0
    survey: bool = True
    open_link: bool = True

    @property
    def n_repeats(self) -> int:
        """Pairs of a set that come again."""
        return repeats(self.repeat_share, self.votes_per_judge)

    def check(self) -> None:
        """
        Raises:
            UserError: a value that no panel can have.
        """
        least_of = {"judges": (self.judges, 0), "votes": (self.votes_per_judge, 1), "attention": (self.attention, 0)}
        for flag, (value, least) in least_of.items():
            if value < least:
                raise UserError(f"--{flag}: {value} must be at least {least}")
        if self.judges > MOST_JUDGES:
            raise UserError(f"--judges: {self.judges} must be at most {MOST_JUDGES}; `judge invite` adds further sets")
        if not 0 <= self.repeat_share <= 0.5:
            raise UserError(f"--repeats: {self.repeat_share} must lie between 0 and 0.5 (a share of the votes)")
        if self.attention > (room := self.votes_per_judge + self.n_repeats):
            raise UserError(
                f"--attention: {self.attention} is more than the {room} other places of a set; give at most {room}"
            )


def repeats(share: float, votes: int) -> int:
    """How many pairs of a set come again: of its first half, each once."""
    return min(math.ceil(share * votes), (votes + 1) // 2)


def check_votes(votes: int, n_pairs: int) -> None:
    """
    Raises:
        UserError: a judge cannot be given so many first votes, as none is given a pair twice.
    """
    if votes > n_pairs:
        raise UserError(
            f"--votes: {votes} is more than the {n_pairs} pairs of completions there are; give at most {n_pairs}, or "
            "make a panel of more completions"
        )
