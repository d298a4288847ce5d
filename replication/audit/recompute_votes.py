"""Figures of the votes, from what the file counts for each judge and each prompt, never from its own sums.

`select` is how a claims file writes a filter: each rule keeps or leaves out judges by their own row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from replication.audit.published import Judge, Published, Question, Tally
from replication.audit.recompute import Value, recomputes
from replication.statistics.preference import binomial_p

Rules = Mapping[str, Any]


def add_up(tallies: Iterable[Tally]) -> Tally:
    """The sum of tallies."""
    listed = list(tallies)
    return Tally(sum(t.baseline for t in listed), sum(t.gain for t in listed), sum(t.ties for t in listed))


OF_TALLY: dict[str, Callable[[Tally], float]] = {
    "n": lambda t: t.n,
    "baseline": lambda t: t.baseline,
    "gain": lambda t: t.gain,
    "ties": lambda t: t.ties,
    "decisive": lambda t: t.decisive,
    "share": lambda t: t.share,
    "baseline_share": lambda t: 1 - t.share,
    "tie_share": lambda t: t.tie_share,
    "gain_of_all": lambda t: t.gain / t.n,
    "baseline_of_all": lambda t: t.baseline / t.n,
    "p": lambda t: float(binomial_p(t.gain, t.decisive)),
}
"""What can be asked of a tally; shares are of the decisive votes unless they say `of_all`."""

LEAVES_OUT: dict[str, Callable[[Judge, Any], bool]] = {
    "humans_faster_than": lambda j, seconds: j.type == "Human" and j.median_seconds < seconds,
    "ties_above": lambda j, share: j.tally.tie_share > share,
    "fewer_than": lambda j, n: j.tally.n < n,
    "without": lambda j, names: j.name in names,
    "decisive_below": lambda j, n: j.tally.decisive < n,
}
"""Rules that leave judges out."""

KEEPS: dict[str, Callable[[Judge, Any], bool]] = {
    "type": lambda j, kind: j.type == kind,
    "background": lambda j, background: j.background == background,
    "names": lambda j, names: j.name in names,
    "leans": lambda j, side: j.tally.leans == side,
    "share_from": lambda j, share: j.tally.share >= share,
    "answered": lambda j, yes: (j.background is not None) == yes,
}
"""Rules that keep judges."""


def select(judges: Sequence[Judge], rules: Rules) -> list[Judge]:
    """Judges to whom the rules apply.

    Args:
        judges: all of them.
        rules: names of LEAVES_OUT and KEEPS with their bounds; `first` or `after_first` k by time of the first vote;
            `caught: true` keeps those that the rules of LEAVES_OUT would leave out.
    """
    unknown = set(rules) - {*LEAVES_OUT, *KEEPS, "first", "after_first", "caught"}
    if unknown:
        raise LookupError(f"rule '{sorted(unknown)[0]}'; the rules are {', '.join([*LEAVES_OUT, *KEEPS])}")
    kept = sorted(judges, key=lambda j: j.first_vote)
    kept = kept[rules.get("after_first", 0) : rules.get("first")]
    kept = [j for j in kept if all(KEEPS[rule](j, bound) for rule, bound in rules.items() if rule in KEEPS)]
    out = [rule for rule in rules if rule in LEAVES_OUT]
    return [j for j in kept if any(LEAVES_OUT[rule](j, rules[rule]) for rule in out) == bool(rules.get("caught"))]


def _tally(data: Published, rules: Rules) -> Tally:
    return add_up(j.tally for j in select(data.judges, rules))


def _questions(data: Published, category: str | None = None, leans: str | None = None) -> list[Question]:
    if category is not None and all(q.category != category for q in data.questions):
        raise LookupError(f"category '{category}'")
    return [
        q
        for q in data.questions
        if (category is None or q.category == category) and (leans is None or q.tally.leans == leans)
    ]


def _categories(data: Published) -> dict[str, Tally]:
    names = dict.fromkeys(q.category for q in data.questions)
    return {name: add_up(q.tally for q in _questions(data, name)) for name in names}


# ---------------------------------------------------------------- by judge


@recomputes
def judges(data: Published, **rules: Any) -> int:
    """How many judges a filter keeps."""
    return len(select(data.judges, rules))


@recomputes
def votes(data: Published, count: str, **rules: Any) -> float:
    """A count, share or p of the votes of the judges that a filter keeps."""
    return OF_TALLY[count](_tally(data, rules))


@recomputes
def filtered(data: Published, count: str, **rules: Any) -> float:
    """A cell of a filter table: `judges`, or a count of their votes."""
    return judges(data, **rules) if count == "judges" else votes(data, count, **rules)


@recomputes
def moved(data: Published, count: str, **rules: Any) -> float:
    """By how much a filter changes a share: with the filter minus without."""
    return votes(data, count, **rules) - votes(data, count)


@recomputes
def apart(data: Published, of: Rules, minus: Rules) -> float:
    """The share for gain among some judges minus that among others."""
    return _tally(data, of).share - _tally(data, minus).share


@recomputes
def judge(data: Published, name: str, count: str) -> Value:
    """A cell of the table of judges: a count of their votes, or type, background, median_seconds."""
    found = [j for j in data.judges if j.name == name]
    if not found:
        raise LookupError(f"judge '{name}'")
    if count in OF_TALLY:
        return OF_TALLY[count](found[0].tally)
    known: dict[str, Value] = {
        "type": found[0].type,
        "background": found[0].background or "-",
        "median_seconds": found[0].median_seconds,
    }
    return known[count]


@recomputes
def judge_names(data: Published, **rules: Any) -> str:
    """Names that a filter keeps, sorted."""
    return ", ".join(sorted(j.name for j in select(data.judges, rules)))


@recomputes
def extreme_judge(data: Published, count: str, which: str, **rules: Any) -> str:
    """The judge with the highest or lowest value (`which`: max, min) among those that a filter keeps."""
    kept = [j for j in select(data.judges, rules) if not math.isnan(OF_TALLY[count](j.tally))]
    if not kept:
        raise LookupError("judge that the rules keep")
    return {"max": max, "min": min}[which](kept, key=lambda j: OF_TALLY[count](j.tally)).name


@recomputes
def extreme_share(data: Published, which: str, **rules: Any) -> float:
    """The highest or lowest share for gain of one judge among those that a filter keeps."""
    shares = [j.tally.share for j in select(data.judges, rules) if j.tally.decisive]
    return {"max": max, "min": min}[which](shares, default=math.nan)


@recomputes
def mean_share(data: Published, **rules: Any) -> float:
    """Mean over judges of their share for gain; judges without a decisive vote have none."""
    return float(np.nanmean([j.tally.share for j in select(data.judges, rules)]))


@recomputes
def part_of_votes(data: Published, count: str, part: Rules, whole: Rules) -> float:
    """The votes of some judges as a share of those of others."""
    return OF_TALLY[count](_tally(data, part)) / OF_TALLY[count](_tally(data, whole))


@recomputes
def filters_above(data: Published, filters: Sequence[Rules]) -> int:
    """How many filters give a higher share for gain than all judges do."""
    return sum(_tally(data, rules).share > _tally(data, {}).share for rules in filters)


@recomputes
def filters_extreme(data: Published, filters: Sequence[Rules], which: str) -> float:
    """The lowest or highest share for gain over filters."""
    return {"max": max, "min": min}[which](_tally(data, rules).share for rules in filters)


@recomputes
def every_filter_leans(data: Published, filters: Sequence[Rules], to: str) -> bool:
    """Whether every filter leaves a majority for one side."""
    return all(_tally(data, rules).leans == to for rules in filters)


@recomputes
def backgrounds(data: Published) -> int:
    """How many backgrounds judges name."""
    return len({j.background for j in data.judges} - {None})


@recomputes
def vendors(data: Published, of: Mapping[str, str], type: str) -> int:
    """How many vendors the judges of a type come from, by a table of names."""
    return len({of[j.name] for j in data.judges if j.type == type})


@recomputes
def listed_by_first_vote(data: Published) -> bool:
    """Whether the judges stand in the order of their first votes."""
    times = [j.first_vote for j in data.judges]
    return times == sorted(times)


# ---------------------------------------------------------------- by prompt


@recomputes
def prompt_votes(data: Published, count: str, category: str | None = None) -> float:
    """A count, share or p of the votes on all prompts, or on those of a category."""
    return OF_TALLY[count](add_up(q.tally for q in _questions(data, category)))


@recomputes
def prompts(data: Published, category: str | None = None, leans: str | None = None) -> int:
    """How many prompts there are, or lean to a side (even: an exact split)."""
    return len(_questions(data, category, leans))


@recomputes
def categories_of(data: Published, leans: str, outside: Sequence[str] = ()) -> str:
    """The categories of the prompts that lean to a side, sorted, some left aside."""
    return ", ".join(sorted({q.category for q in _questions(data, leans=leans)} - set(outside)))


@recomputes
def categories(data: Published, share_from: float = 0.0, share_below: float = math.inf) -> int:
    """How many categories have a share for gain in a range."""
    return sum(share_from <= tally.share < share_below for tally in _categories(data).values())


@recomputes
def categories_that_hold(data: Published, leans: str) -> int:
    """How many categories hold a prompt that leans to a side."""
    return len({q.category for q in _questions(data, leans=leans)})


@recomputes
def fewest_votes_on_a_prompt(data: Published) -> int:
    """No more judges than this can have judged every prompt."""
    return min(q.tally.n for q in data.questions)


@recomputes
def prompts_out_of_step(data: Published) -> str:
    """Prompts, in a fixed order, with another number of votes than judges who got that far, with both numbers."""
    reached = [sum(j.tally.n >= place for j in data.judges) for place in range(1, len(data.questions) + 1)]
    ordered = sorted(data.questions, key=lambda q: q.id)
    odd = [(q, n) for q, n in zip(ordered, reached, strict=True) if q.tally.n != n]
    return ", ".join(f"{q.id} ({q.tally.n} votes, {n} judges)" for q, n in odd) or "none"


@recomputes
def prompts_as_printed(data: Published, hashes: Sequence[str]) -> int:
    """How many published prompts have the text that the paper prints, by the hashes of the printed texts."""
    return sum(text_hash(entry["question"]) in hashes for entry in data.prompts.values())


def text_hash(text: str) -> str:
    """Of letters and digits alone, so that quotes and line breaks do not count; 12 hex digits of SHA-256."""
    plain = "".join(c for c in text.lower() if c.isalnum())
    return hashlib.sha256(plain.encode()).hexdigest()[:12]


@recomputes
def agreeing_prompts(data: Published, of: str = "agree") -> float:
    """From the published majorities of both types: `agree`, `decided` (neither tied), or a side on which both must be.

    `exceptions_gain` and `exceptions_baseline` count prompts where humans lean to the side and models do not.
    """
    rows = data.raw["votes"][0]["inter_annotator_agreement"]["details"]
    human, model = [row["human_majority"] for row in rows], [row["fm_majority"] for row in rows]
    pairs = list(zip(human, model, strict=True))
    if of == "decided":
        return sum("tied" not in pair for pair in pairs)
    if of.startswith("exceptions_"):
        side = of.removeprefix("exceptions_")
        return sum(h == side and m != side for h, m in pairs)
    same = sum(h == m for h, m in pairs)
    return {"agree": same, "share": same / len(pairs), "decided_share": same / agreeing_prompts(data, "decided")}[of]
