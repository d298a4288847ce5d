"""A locked panel's votes with their arms, and their counts in the form of the published vote file.

An attention item is in no vote record. A repeat is there for self-consistency alone, and not without its first vote.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from replication.config import AnalysisConfig
from replication.console import utc
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.schema import items, judges, panel, unsealed
from replication.judging.store import PanelFacts, panel_facts, standing_votes, test_votes
from replication.statistics.preference import binomial_p
from replication.votes.filters import JudgeVotes, kept, published_filters, seconds_between_votes
from replication.votes.record import Vote
from replication.votes.tally import BASELINE, EVEN, TIES, TREATMENT, Tally, chosen_arm, count, count_by, total

MARGINALS_VERSION = 3
WINNERS = {TREATMENT: "gain", BASELINE: "baseline", EVEN: "tied", TIES: "tied"}
NOTE = (
    "p_value is binomial, as if every vote were independent: votes share judges, prompts and trained models, so it is "
    "no test of the arms. The unit is the training seed; see the report."
)


@dataclass(frozen=True)
class Unsealed:
    """Everything that was voted, with what stood behind it. Times are seconds since 1970."""

    panel: PanelFacts
    arms: tuple[str, str]  # (baseline, treatment)
    votes: tuple[Vote, ...]  # first votes and repeats, in order of casting
    cast_at: tuple[float, ...]  # of each vote
    category: Mapping[int, str]  # by prompt id
    surveys: Mapping[str, Mapping[str, Any]]  # by judge id, of those who answered
    lone_repeats: int  # repeats whose first vote was never cast: left out
    test_votes: int  # of test judges: left out

    @property
    def first(self) -> list[tuple[Vote, float]]:
        """First votes, and when each was cast."""
        return [(vote, at) for vote, at in zip(self.votes, self.cast_at, strict=True) if not vote.repeat_of]


def locked_panel(c: Connection) -> PanelFacts:
    """Raises UserError where the panel is not locked."""
    about = panel_facts(c)
    if about.locked_at is None:
        raise UserError("the panel is not locked, so its votes are blind; `replicate judge lock` comes first")
    return about


def unsealed_votes(database: Database) -> Unsealed:
    """Raises UserError where the panel is not locked, or its lock was interrupted."""
    with database.read() as c:
        return unsealed_within(c)


def unsealed_within(c: Connection) -> Unsealed:
    """unsealed_votes within a transaction: also of a panel that is about to be locked."""
    about = locked_panel(c)
    behind = {row.item_id: row for row in c.execute(select(unsealed))}
    if not behind:
        raise UserError("the lock was interrupted before the key was opened; call `replicate judge lock` again")
    rows = [row for row in c.execute(standing_votes()).all() if row.item_id in behind]
    voted = {row.assignment_id for row in rows}
    recorded = [row for row in rows if row.repeats is None or row.repeats in voted]
    surveys = c.execute(select(judges.c.judge_id, judges.c.survey)).all()
    prompts = c.execute(select(items.c.prompt_id, items.c.category).where(items.c.prompt_id.is_not(None)))
    baseline, treatment = c.execute(select(panel.c.baseline, panel.c.treatment)).one()
    return Unsealed(
        panel=about,
        arms=(baseline, treatment),
        votes=tuple(_vote(row, behind[row.item_id], about) for row in recorded),
        cast_at=tuple(row.cast_at for row in recorded),
        category=dict(sorted((row.prompt_id, row.category) for row in prompts)),
        surveys={row.judge_id: row.survey for row in surveys if row.survey},
        lone_repeats=len(rows) - len(recorded),
        test_votes=test_votes(c)[1],
    )


def _vote(row: Row[Any], behind: Row[Any], about: PanelFacts) -> Vote:
    shown = [(behind.arm_first, behind.sample_first), (behind.arm_second, behind.sample_second)]
    left, right = shown if row.first_is_left else reversed(shown)
    return Vote(
        vote_id=vote_id(about.panel_id, row.assignment_id),
        suite=about.suite,
        seed=behind.seed,
        arm_left=left[0],
        arm_right=right[0],
        prompt_id=row.prompt_id,
        sample_left=left[1],
        sample_right=right[1],
        judge_id=row.judge_id,
        judge_kind=row.kind,
        vendor=row.vendor,
        choice=row.choice,
        shown_at="" if row.shown_at is None else iso(row.shown_at),
        seconds=math.nan if row.seconds is None else round(row.seconds, 3),
        repeat_of="" if row.repeats is None else vote_id(about.panel_id, row.repeats),
    )


def vote_id(panel_id: str, assignment_id: int) -> str:
    return f"{panel_id}-{assignment_id}"


def iso(seconds: float) -> str:
    """Seconds since 1970 as an ISO 8601 time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def marginals(found: Unsealed, rules: AnalysisConfig) -> dict[str, object]:
    """Counts of first votes by judge, prompt, category, background and filter, so that `audit` and `power` read both.

    a is the baseline and b the treatment. Judges are known by their ids.

    Args:
        found: the votes.
        rules: what the filters go by: fast_seconds, tie_share, experimenters; a full set is the panel's.
    """
    by_prompt = count_by((vote for vote, _ in found.first), lambda vote: vote.prompt_id, *found.arms)
    prompts = {prompt: by_prompt.get(prompt, Tally()) for prompt in found.category}
    of_judge: dict[str, list[tuple[Vote, float]]] = defaultdict(list)
    for vote, at in found.first:
        of_judge[vote.judge_id].append((vote, at))
    background = {name: found.surveys.get(name, {}).get("background") for name in of_judge}
    voted = [_judge_votes(name, cast, found.arms) for name, cast in sorted(of_judge.items())]
    people = [judge for judge in voted if judge.is_human]
    rules = replace(rules, votes_per_judge=found.panel.votes_per_judge)
    won = [tally.leans for tally in prompts.values()]  # of ties alone is no majority, nor an even one
    return {
        "schema_version": MARGINALS_VERSION,
        "snapshot_date": time.strftime("%Y-%m-%d", time.gmtime(found.panel.locked_at)),
        "note": NOTE,
        "panel_id": found.panel.panel_id,
        "model_a": found.arms[0],
        "model_b": found.arms[1],
        "n_questions": len(prompts),
        "n_judges": len(voted),
        "n_judgments": len(found.first),
        "headline": _sums(prompts.values()),
        "judges": [
            {
                "name": judge.name,
                "type": "Human" if judge.is_human else "FM",
                "background": background[judge.name],
                "n": judge.tally.n,
                "a": judge.tally.baseline,
                "b": judge.tally.treatment,
                "ties": judge.tally.ties,
                **_shares(judge.tally),
                "median_seconds_between_votes": None if math.isnan(judge.pace_seconds) else judge.pace_seconds,
                "first_ts": utc(min(at for _, at in of_judge[judge.name])),
                "last_ts": utc(max(at for _, at in of_judge[judge.name])),
            }
            for judge in voted
        ],
        "sensitivity_filters": [
            {
                "label": row.label,
                **({} if row.by_kind else {"excluded": sorted(row.excluded)}),
                **_sums_of(kept(voted, row)),
            }
            for row in published_filters(voted, rules, "a vote (median)")
        ],
        "category_breakdown": {
            name: _sums(tally for prompt, tally in prompts.items() if found.category[prompt] == name)
            for name in dict.fromkeys(found.category.values())
        },
        "question_majorities": {
            "gain_majority": won.count(TREATMENT),
            "baseline_majority": won.count(BASELINE),
            "tied": won.count(EVEN),
            "details": [
                {
                    "question_id": prompt,
                    "category": found.category[prompt],
                    "a": tally.baseline,
                    "b": tally.treatment,
                    "tie": tally.ties,
                    "winner": WINNERS[tally.leans],
                }
                for prompt, tally in prompts.items()
            ],
        },
        "human_by_background": {
            name: _sums_of([judge for judge in people if background[judge.name] == name])
            for name in sorted(filter(None, {background[judge.name] for judge in people}))
        },
    }


def _judge_votes(name: str, cast: list[tuple[Vote, float]], arms: tuple[str, str]) -> JudgeVotes:
    """A judge as the filters see them; paced by the median gap between votes to 0.1 s, as the paper publishes it."""
    tally = count((chosen_arm(vote) for vote, _ in cast), *arms)
    is_timed = all(vote.shown_at for vote, _ in cast)  # a sheet that was filled elsewhere is not
    pace = round(seconds_between_votes(at for _, at in cast), 1) if is_timed else math.nan
    return JudgeVotes(name, cast[0][0].judge_kind == "human", tally, pace, tally.n)


def _shares(t: Tally) -> dict[str, float | None]:
    return {
        "decisive": t.decisive,
        "b_pct_decisive": round(100 * t.treatment / t.decisive, 2) if t.decisive else None,
        "tie_pct": round(100 * t.ties / t.n, 2) if t.n else None,
    }


def _sums(tallies: Iterable[Tally]) -> dict[str, float | None]:
    t = total(tallies)
    p = float(binomial_p(t.treatment, t.decisive)) if t.decisive else None
    return {"n": t.n, "a": t.baseline, "b": t.treatment, "t": t.ties, **_shares(t), "p_value": p}


def _sums_of(some: list[JudgeVotes]) -> dict[str, float | None]:
    return {"n_judges": len(some), **_sums(judge.tally for judge in some)}
