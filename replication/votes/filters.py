"""The published sensitivity filters: which judges each leaves out. One definition for report, panel and audit.

The paper leaves out people who vote fast. "Fast" is measured in two ways, which disagree where a judge pauses between
pairs or lets one lie open:

- `seconds_between_votes`: the median gap from one vote to the next. This is the paper's, whose file has it as
  `median_seconds_between_votes`; a panel's marginals.json and the audit go by it.
- `seconds_to_choose`: the median time from a pair being shown to its vote. A vote record holds it for each vote, and
  the report goes by it: it does not depend on what a judge did between two pairs.

The rules themselves are the same. The primary analysis leaves out nobody. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from replication.config import AnalysisConfig
from replication.votes.record import Vote
from replication.votes.tally import Tally, chosen_arm, count, first_votes


@dataclass(frozen=True)
class JudgeVotes:
    """One judge, as the filters see them."""

    name: str
    is_human: bool
    tally: Tally
    """First votes on the pair of arms."""
    pace_seconds: float
    """seconds_between_votes or seconds_to_choose; NaN where unknown."""
    n_votes: int
    """First votes that were given in all, which a pair or seed that is not used does not lessen."""

    def is_fast(self, seconds: float) -> bool:
        """A person faster than this; models are fast by nature, and exempt."""
        return self.is_human and self.pace_seconds < seconds

    def mostly_ties(self, share: float) -> bool:
        """More than this share of the votes are ties."""
        return self.tally.tie_share > share

    def is_partial(self, full_set: int) -> bool:
        """Fewer votes than a full set has."""
        return self.n_votes < full_set


@dataclass(frozen=True)
class Filter:
    """One row of the table of filters."""

    label: str
    excluded: frozenset[str]
    """Judges whose votes it leaves out."""
    by_kind: bool = False
    """Whether it keeps one kind of judge, or all, and singles out nobody."""


def judge_votes(votes: Iterable[Vote], baseline: str, treatment: str) -> list[JudgeVotes]:
    """Each judge of first votes on this pair, in order of name; paced by seconds_to_choose."""
    of_judge: dict[str, list[Vote]] = {}
    for vote in first_votes(votes):
        if {vote.arm_left, vote.arm_right} == {baseline, treatment}:
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
    """Median gap from one vote to the next, as the paper measures pace; NaN below two votes.

    Args:
        cast_at: when each vote was cast, in seconds, in any order.
    """
    return median([later - earlier for earlier, later in pairwise(sorted(cast_at))] or [math.nan])


def published_filters(judges: Sequence[JudgeVotes], rules: AnalysisConfig, pace: str = "in the median") -> list[Filter]:
    """The rows of the table, in order; that of experimenters only where one of them voted.

    Args:
        judges: all who voted.
        rules: the bounds: fast_seconds, tie_share, votes_per_judge (a full set), experimenters.
        pace: the words of how pace is measured, for the label.
    """

    def those(kept: Iterable[JudgeVotes]) -> frozenset[str]:
        return frozenset(judge.name for judge in kept)

    own = those(judge for judge in judges if judge.name in rules.experimenters)
    rows = [
        Filter(
            f"without people faster than {rules.fast_seconds:g} s {pace}",
            those(judge for judge in judges if judge.is_fast(rules.fast_seconds)),
        ),
        Filter(
            f"without judges with more than {rules.tie_share:.0%} ties",
            those(judge for judge in judges if judge.mostly_ties(rules.tie_share)),
        ),
        *([Filter("without those who run the experiment", own)] if own else []),
        Filter(
            f"without judges of fewer than {rules.votes_per_judge} votes",
            those(judge for judge in judges if judge.is_partial(rules.votes_per_judge)),
        ),
    ]
    return [
        Filter("all judges", frozenset(), by_kind=True),
        Filter("models only", those(judge for judge in judges if judge.is_human), by_kind=True),
        Filter("people only", those(judge for judge in judges if not judge.is_human), by_kind=True),
        *rows,
        Filter("without all of these judges", frozenset().union(*(row.excluded for row in rows))),
    ]


def kept(judges: Collection[JudgeVotes], row: Filter) -> list[JudgeVotes]:
    """The judges that a filter keeps."""
    return [judge for judge in judges if judge.name not in row.excluded]
