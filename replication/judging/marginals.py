"""The counts of a locked panel in the form of the published vote file, so that `audit` and `power` read both.

a is the baseline and b the treatment. Repeats and attention items are not counted. Judges are known by their ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from scipy import stats as scipy_stats

from replication.config import AnalysisConfig
from replication.judging.folder import utc
from replication.judging.unsealing import Unsealed
from replication.votes.record import Vote

SCHEMA_VERSION = 3
TYPES = {"human": "Human", "model": "FM"}
NOTE = (
    "p_value is binomial, as if every vote were independent: votes share judges, prompts and trained models, so it is "
    "no test of the arms. The unit is the training seed; see the report."
)


def marginals(found: Unsealed, rules: AnalysisConfig) -> dict[str, Any]:
    """Counts by judge, prompt, category, background and filter, as plain values.

    Args:
        found: the votes.
        rules: what the filters go by: fast_seconds, tie_share, experimenters.
    """
    first = [(vote, at) for vote, at in zip(found.votes, found.cast_at, strict=True) if not vote.repeat_of]
    scores = [(vote, _winner(vote, found.arms)) for vote, _ in first]
    by_judge: dict[str, list[tuple[Vote, float]]] = {}
    for vote, at in first:
        by_judge.setdefault(vote.judge_id, []).append((vote, at))
    rows = [_judge(name, cast, found) for name, cast in sorted(by_judge.items())]
    categories = dict.fromkeys(found.category.values())
    backgrounds = sorted({row["background"] for row in rows if row["background"]})
    of_judge = {row["name"]: row for row in rows}
    return {
        "schema_version": SCHEMA_VERSION,
        "snapshot_date": time.strftime("%Y-%m-%d", time.gmtime(found.locked_at)),
        "note": NOTE,
        "panel_id": found.panel_id,
        "model_a": found.arms[0],
        "model_b": found.arms[1],
        "n_questions": len(found.category),
        "n_judges": len(rows),
        "n_judgments": len(first),
        "headline": _sums(winner for _, winner in scores),
        "judges": rows,
        "sensitivity_filters": _filters(scores, of_judge, found, rules),
        "category_breakdown": {
            name: _sums(winner for vote, winner in scores if found.category[vote.prompt_id] == name)
            for name in categories
        },
        "question_majorities": _majorities(scores, found.category),
        "human_by_background": {
            name: {"n_judges": len(kept), **_sums(w for v, w in scores if v.judge_id in kept)}
            for name in backgrounds
            for kept in [{row["name"] for row in rows if row["type"] == "Human" and row["background"] == name}]
        },
    }


def _winner(vote: Vote, arms: tuple[str, str]) -> str:
    """a, b or t: baseline, treatment or neither."""
    if vote.choice not in ("left", "right"):
        return "t"
    return "ab"[arms.index(vote.arm_left if vote.choice == "left" else vote.arm_right)]


@dataclass(frozen=True)
class _Count:
    a: int
    b: int
    t: int

    @property
    def n(self) -> int:
        return self.a + self.b + self.t

    @property
    def shares(self) -> dict[str, Any]:
        decisive = self.a + self.b
        return {
            "decisive": decisive,
            "b_pct_decisive": round(100 * self.b / decisive, 2) if decisive else None,
            "tie_pct": round(100 * self.t / self.n, 2) if self.n else None,
        }


def _count(winners: Iterable[str]) -> _Count:
    listed = list(winners)
    return _Count(*(listed.count(letter) for letter in "abt"))


def _sums(winners: Iterable[str]) -> dict[str, Any]:
    c = _count(winners)
    p = float(scipy_stats.binomtest(c.b, c.a + c.b).pvalue) if c.a + c.b else None
    return {"n": c.n, "a": c.a, "b": c.b, "t": c.t, **c.shares, "p_value": p}


def _judge(name: str, cast: list[tuple[Vote, float]], found: Unsealed) -> dict[str, Any]:
    c = _count(_winner(vote, found.arms) for vote, _ in cast)
    times = sorted(at for _, at in cast)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    is_timed = all(vote.shown_at for vote, _ in cast)  # a sheet that was filled elsewhere is not
    return {
        "name": name,
        "type": TYPES[cast[0][0].judge_kind],
        "background": found.surveys.get(name, {}).get("background"),
        "n": c.n,
        "a": c.a,
        "b": c.b,
        "ties": c.t,
        **c.shares,
        "median_seconds_between_votes": round(median(gaps), 1) if gaps and is_timed else None,
        "first_ts": utc(times[0]),
        "last_ts": utc(times[-1]),
    }


def _majorities(scores: list[tuple[Vote, str]], category: Mapping[int, str]) -> dict[str, Any]:
    details, won = [], []
    for prompt, name in category.items():
        c = _count(winner for vote, winner in scores if vote.prompt_id == prompt)
        winner = "gain" if c.b > c.a else "baseline" if c.a > c.b else "tied"
        details.append({"question_id": prompt, "category": name, "a": c.a, "b": c.b, "tie": c.t, "winner": winner})
        if c.a + c.b:  # of ties alone is no majority, nor an even one
            won.append(winner)
    return {
        "gain_majority": won.count("gain"),
        "baseline_majority": won.count("baseline"),
        "tied": won.count("tied"),
        "details": details,
    }


def _filters(
    scores: list[tuple[Vote, str]], judges: Mapping[str, dict[str, Any]], found: Unsealed, rules: AnalysisConfig
) -> list[dict[str, Any]]:
    fast, ties, full = rules.fast_seconds, rules.tie_share, found.votes_per_judge

    def is_fast(row: dict[str, Any]) -> bool:
        seconds = row["median_seconds_between_votes"]
        return row["type"] == "Human" and seconds is not None and seconds < fast

    left_out: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
        (f"without people faster than {fast:g} s a vote (median)", is_fast),
        (f"without judges of more than {100 * ties:g} % ties", lambda row: row["ties"] > ties * row["n"]),
        (f"without judges of fewer than {full} votes", lambda row: row["n"] < full),
    ]
    if rules.experimenters:
        left_out.append(("without experimenters", lambda row: row["name"] in rules.experimenters))
    rows: list[tuple[str, set[str] | None]] = [
        ("all judges", None),
        ("models only", {name for name, row in judges.items() if row["type"] == "Human"}),
        ("people only", {name for name, row in judges.items() if row["type"] == "FM"}),
    ]
    by_rule = [{name for name, row in judges.items() if applies(row)} for _, applies in left_out]
    rows += [(label, names) for (label, _), names in zip(left_out, by_rule, strict=True)]
    rows.append(("without all of these", set.union(*by_rule)))
    result = []
    for label, names in rows:
        kept = judges.keys() - (names or set())
        listed = {} if names is None or label.endswith("only") else {"excluded": sorted(names)}
        sums = _sums(winner for vote, winner in scores if vote.judge_id in kept)
        result.append({"label": label, **listed, "n_judges": len(kept), **sums})
    return result
