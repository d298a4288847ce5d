"""The counts of a locked panel in the form of the published vote file, so that `audit` and `power` read both.

a is the baseline and b the treatment. Repeats and attention items are not counted. Judges are known by their ids. The
filters go by the paper's measure of pace, the median gap between votes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from replication.config import AnalysisConfig
from replication.console import utc
from replication.judging.unsealing import Unsealed
from replication.statistics.preference import binomial_p
from replication.votes.filters import JudgeVotes, kept, published_filters, seconds_between_votes
from replication.votes.record import Vote
from replication.votes.tally import (
    BASELINE,
    EVEN,
    TIES,
    TREATMENT,
    Tally,
    chosen_arm,
    count,
    count_by,
    first_votes,
    total,
)

SCHEMA_VERSION = 3
WINNERS = {TREATMENT: "gain", BASELINE: "baseline", EVEN: "tied", TIES: "tied"}
NOTE = (
    "p_value is binomial, as if every vote were independent: votes share judges, prompts and trained models, so it is "
    "no test of the arms. The unit is the training seed; see the report."
)


def marginals(found: Unsealed, rules: AnalysisConfig) -> dict[str, Any]:
    """Counts by judge, prompt, category, background and filter, as plain values.

    Args:
        found: the votes.
        rules: what the filters go by: fast_seconds, tie_share, experimenters; a full set is the panel's.
    """
    first = first_votes(found.votes)
    by_prompt = count_by(first, lambda vote: vote.prompt_id, *found.arms)
    prompts = {prompt: by_prompt.get(prompt, Tally()) for prompt in found.category}
    of_judge: dict[str, list[tuple[Vote, float]]] = {}
    for vote, at in zip(found.votes, found.cast_at, strict=True):
        if not vote.repeat_of:
            of_judge.setdefault(vote.judge_id, []).append((vote, at))
    described = [_judge(name, cast, found) for name, cast in sorted(of_judge.items())]
    judges = [judge for judge, _ in described]
    filters = published_filters(judges, replace(rules, votes_per_judge=found.votes_per_judge), "a vote (median)")
    people = [judge for judge in judges if judge.is_human]
    backgrounds = {judge.name: found.surveys.get(judge.name, {}).get("background") for judge in people}
    return {
        "schema_version": SCHEMA_VERSION,
        "snapshot_date": time.strftime("%Y-%m-%d", time.gmtime(found.locked_at)),
        "note": NOTE,
        "panel_id": found.panel_id,
        "model_a": found.arms[0],
        "model_b": found.arms[1],
        "n_questions": len(prompts),
        "n_judges": len(judges),
        "n_judgments": len(first),
        "headline": _sums(total(prompts.values())),
        "judges": [row for _, row in described],
        "sensitivity_filters": [
            {
                "label": row.label,
                **({} if row.by_kind else {"excluded": sorted(row.excluded)}),
                **_sums_of(kept(judges, row)),
            }
            for row in filters
        ],
        "category_breakdown": {
            name: _sums(total(t for prompt, t in prompts.items() if found.category[prompt] == name))
            for name in dict.fromkeys(found.category.values())
        },
        "question_majorities": _majorities(prompts, found.category),
        "human_by_background": {
            name: _sums_of([judge for judge in people if backgrounds[judge.name] == name])
            for name in sorted(filter(None, set(backgrounds.values())))
        },
    }


def _judge(name: str, cast: list[tuple[Vote, float]], found: Unsealed) -> tuple[JudgeVotes, dict[str, Any]]:
    """A judge for the filters, and the judge's entry; pace to 0.1 s, as it is published."""
    tally = count((chosen_arm(vote) for vote, _ in cast), *found.arms)
    times = [at for _, at in cast]
    is_timed = all(vote.shown_at for vote, _ in cast)  # a sheet that was filled elsewhere is not
    pace = round(seconds_between_votes(times), 1) if is_timed else math.nan
    judge = JudgeVotes(name, cast[0][0].judge_kind == "human", tally, pace, tally.n)
    return judge, {
        "name": name,
        "type": "Human" if judge.is_human else "FM",
        "background": found.surveys.get(name, {}).get("background"),
        "n": tally.n,
        "a": tally.baseline,
        "b": tally.treatment,
        "ties": tally.ties,
        **_shares(tally),
        "median_seconds_between_votes": None if math.isnan(pace) else pace,
        "first_ts": utc(min(times)),
        "last_ts": utc(max(times)),
    }


def _shares(t: Tally) -> dict[str, Any]:
    return {
        "decisive": t.decisive,
        "b_pct_decisive": round(100 * t.treatment / t.decisive, 2) if t.decisive else None,
        "tie_pct": round(100 * t.ties / t.n, 2) if t.n else None,
    }


def _sums(t: Tally) -> dict[str, Any]:
    p = float(binomial_p(t.treatment, t.decisive)) if t.decisive else None
    return {"n": t.n, "a": t.baseline, "b": t.treatment, "t": t.ties, **_shares(t), "p_value": p}


def _sums_of(judges: list[JudgeVotes]) -> dict[str, Any]:
    return {"n_judges": len(judges), **_sums(total(judge.tally for judge in judges))}


def _majorities(prompts: Mapping[int, Tally], category: Mapping[int, str]) -> dict[str, Any]:
    details = [
        {
            "question_id": prompt,
            "category": category[prompt],
            "a": t.baseline,
            "b": t.treatment,
            "tie": t.ties,
            "winner": WINNERS[t.leans],
        }
        for prompt, t in prompts.items()
    ]
    won = [t.leans for t in prompts.values()]  # of ties alone is no majority, nor an even one
    return {
        "gain_majority": won.count(TREATMENT),
        "baseline_majority": won.count(BASELINE),
        "tied": won.count(EVEN),
        "details": details,
    }
