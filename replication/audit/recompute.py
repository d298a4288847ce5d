"""The functions that a claims file may name, and how one is called; those on training are in recompute_training.py.

A function takes the claim's arguments and returns a number, a truth value or a text. Shares are fractions: the printed
percent sign says that the paper prints a hundred times as much. Votes are those that the file counts for each judge and
each prompt, never its own sums; `select` is how a claims file writes a filter.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from replication.audit.claims import Value
from replication.audit.published import Judge, Published, Question, side_of
from replication.audit.recompute_training import TrainingFigures
from replication.errors import UserError
from replication.statistics.preference import binomial_p
from replication.votes.tally import Tally, total

Rules = Mapping[str, Any]
EXTREME = {"min": min, "max": max}

OF_TALLY: dict[str, Callable[[Tally], float]] = {
    "n": lambda t: t.n,
    "baseline": lambda t: t.baseline,
    "gain": lambda t: t.treatment,
    "ties": lambda t: t.ties,
    "decisive": lambda t: t.decisive,
    "share": lambda t: t.share,
    "baseline_share": lambda t: 1 - t.share,
    "tie_share": lambda t: t.tie_share,
    "gain_of_all": lambda t: t.treatment / t.n,
    "baseline_of_all": lambda t: t.baseline / t.n,
    "p": lambda t: float(binomial_p(t.treatment, t.decisive)),
}
"""Everything that can be asked of a tally; shares are of the decisive votes unless they say `of_all`."""

LEAVES_OUT: dict[str, Callable[[Judge, Any], bool]] = {
    "humans_faster_than": lambda j, seconds: j.filtered.is_fast(seconds),
    "ties_above": lambda j, share: j.filtered.mostly_ties(share),
    "fewer_than": lambda j, n: j.filtered.is_partial(n),
    "without": lambda j, names: j.name in names,
    "decisive_below": lambda j, n: j.tally.decisive < n,
}
"""Rules that leave judges out."""

KEEPS: dict[str, Callable[[Judge, Any], bool]] = {
    "type": lambda j, kind: j.type == kind,
    "background": lambda j, background: j.background == background,
    "names": lambda j, names: j.name in names,
    "leans": lambda j, side: side_of(j.tally) == side,
    "share_from": lambda j, share: j.tally.share >= share,
    "answered": lambda j, yes: bool(j.background) == yes,
}
"""Rules that keep judges."""


def select(judges: Sequence[Judge], rules: Rules) -> list[Judge]:
    """Judges to whom the rules apply: the names of LEAVES_OUT and KEEPS with their bounds.

    `first` or `after_first` k go by time of the first vote; `caught: true` keeps those that the rules of LEAVES_OUT
    would leave out.
    """
    unknown = set(rules) - {*LEAVES_OUT, *KEEPS, "first", "after_first", "caught"}
    if unknown:
        raise LookupError(f"rule '{sorted(unknown)[0]}'; the rules are {', '.join([*LEAVES_OUT, *KEEPS])}")
    kept = sorted(judges, key=lambda j: j.first_ts or "")[rules.get("after_first", 0) : rules.get("first")]
    kept = [j for j in kept if all(KEEPS[rule](j, bound) for rule, bound in rules.items() if rule in KEEPS)]
    out = [rule for rule in rules if rule in LEAVES_OUT]
    return [j for j in kept if any(LEAVES_OUT[rule](j, rules[rule]) for rule in out) == bool(rules.get("caught"))]


class Figures(TrainingFigures):
    """Every public method is a function of a claims file.

    `count` is of OF_TALLY, `rules` and `filters` are those of `select`, `which` is min or max, and `leans` and `to` are
    sides: gain, baseline, even, or ties. The last ones take printed figures; YAML reads 2e9 as text, hence float().
    """

    def __init__(self, data: Published) -> None:
        self.data = data

    def _select(self, rules: Rules) -> list[Judge]:
        return select(self.data.votes.judges, rules)

    def _tally(self, rules: Rules) -> Tally:
        return total(j.tally for j in self._select(rules))

    def _questions(self, category: str | None = None, leans: str | None = None) -> list[Question]:
        if category is not None and category not in self.data.votes.categories:
            raise LookupError(f"category '{category}'")
        kept = [q for q in self.data.votes.questions if category in (None, q.category)]
        return [q for q in kept if leans in (None, side_of(q.tally))]

    def judges(self, **rules: Any) -> int:
        return len(self._select(rules))

    def votes(self, count: str, **rules: Any) -> float:
        return OF_TALLY[count](self._tally(rules))

    def filtered(self, count: str, **rules: Any) -> float:
        """A cell of a table of filters: `judges`, or a count of their votes."""
        return self.judges(**rules) if count == "judges" else self.votes(count, **rules)

    def moved(self, count: str, **rules: Any) -> float:
        """The change of a share by a filter: with the filter minus without."""
        return self.votes(count, **rules) - self.votes(count)

    def apart(self, of: Rules, minus: Rules) -> float:
        """The share for gain among some judges minus that among others."""
        return self._tally(of).share - self._tally(minus).share

    def judge(self, name: str, count: str) -> Value:
        """A cell of the table of judges: a count of their votes, or type, background, median_seconds."""
        found = next((j for j in self.data.votes.judges if j.name == name), None)
        if found is None:
            raise LookupError(f"judge '{name}'")
        if count in OF_TALLY:
            return OF_TALLY[count](found.tally)
        own: dict[str, Value] = {"type": found.type, "background": found.background or "-"}
        return found.filtered.pace_seconds if count == "median_seconds" else own[count]

    def judge_names(self, **rules: Any) -> str:
        return ", ".join(sorted(j.name for j in self._select(rules)))

    def extreme_judge(self, count: str, which: str, **rules: Any) -> str:
        values = {j.name: OF_TALLY[count](j.tally) for j in self._select(rules)}
        known = [name for name, value in values.items() if not math.isnan(value)]
        if not known:
            raise LookupError("judge that the rules keep")
        return EXTREME[which](known, key=values.__getitem__)

    def extreme_share(self, which: str, **rules: Any) -> float:
        return EXTREME[which]((j.tally.share for j in self._select(rules) if j.tally.decisive), default=math.nan)

    def mean_share(self, **rules: Any) -> float:
        """Mean over judges of their share for gain; judges without a decisive vote have none."""
        return float(np.nanmean([j.tally.share for j in self._select(rules)]))

    def part_of_votes(self, count: str, part: Rules, whole: Rules) -> float:
        return OF_TALLY[count](self._tally(part)) / OF_TALLY[count](self._tally(whole))

    def filters_above(self, filters: Sequence[Rules]) -> int:
        """Number of filters that give a higher share for gain than all judges do."""
        return sum(self.moved("share", **rules) > 0 for rules in filters)

    def filters_extreme(self, filters: Sequence[Rules], which: str) -> float:
        return EXTREME[which](self._tally(rules).share for rules in filters)

    def every_filter_leans(self, filters: Sequence[Rules], to: str) -> bool:
        return all(side_of(self._tally(rules)) == to for rules in filters)

    def backgrounds(self) -> int:
        return len({j.background for j in self.data.votes.judges if j.background})

    def vendors(self, of: Mapping[str, str], type: str) -> int:
        """Number of vendors of the judges of a type, by a table of names."""
        return len({of[j.name] for j in self.data.votes.judges if j.type == type})

    def listed_by_first_vote(self) -> bool:
        """Whether the file has the judges in the order of their first votes."""
        times = [j.first_ts or "" for j in self.data.votes.judges]
        return times == sorted(times)

    def prompt_votes(self, count: str, category: str | None = None) -> float:
        return OF_TALLY[count](total(q.tally for q in self._questions(category)))

    def prompts(self, category: str | None = None, leans: str | None = None) -> int:
        return len(self._questions(category, leans))

    def categories_of(self, leans: str, outside: Sequence[str] = ()) -> str:
        return ", ".join(sorted({q.category for q in self._questions(leans=leans)} - set(outside)))

    def categories(self, share_from: float = 0.0, share_below: float = math.inf) -> int:
        """Number of categories whose share for gain lies in a range."""
        return sum(share_from <= self.prompt_votes("share", name) < share_below for name in self.data.votes.categories)

    def categories_that_hold(self, leans: str) -> int:
        """Number of categories that hold a prompt that leans so."""
        return len({q.category for q in self._questions(leans=leans)})

    def fewest_votes_on_a_prompt(self) -> int:
        """No more judges than this can have judged every prompt."""
        return min(q.tally.n for q in self.data.votes.questions)

    def prompts_out_of_step(self) -> str:
        """Prompts, in a fixed order, with another number of votes than judges who got that far, with both numbers."""
        ordered = sorted(self.data.votes.questions, key=lambda q: q.question_id)
        reached = [sum(j.n >= place for j in self.data.votes.judges) for place in range(1, len(ordered) + 1)]
        odd = [(q, n) for q, n in zip(ordered, reached, strict=True) if q.tally.n != n]
        return ", ".join(f"{q.question_id} ({q.tally.n} votes, {n} judges)" for q, n in odd) or "none"

    def prompts_as_printed(self, hashes: Sequence[str]) -> int:
        """Number of published prompts with the text that the paper prints, by the hashes of the printed texts.

        Of letters and digits alone, so that quotes and line breaks do not count; 12 hex digits of SHA-256.
        """
        plain = ("".join(c for c in prompt.question.lower() if c.isalnum()) for prompt in self.data.prompts)
        return sum(hashlib.sha256(text.encode()).hexdigest()[:12] in hashes for text in plain)

    def agreeing_prompts(self, of: str = "agree") -> float:
        """From the published majorities of both types: `agree`, `decided` (neither tied), or `exceptions_SIDE`.

        `share` and `decided_share` are those that agree, of all and of the decided; `exceptions_gain` and
        `exceptions_baseline` count prompts where humans lean to the side and models do not.
        """
        rows = self.data.votes.inter_annotator_agreement.details
        if of.startswith("exceptions_"):
            side = of.removeprefix("exceptions_")
            return sum(row.human_majority == side != row.fm_majority for row in rows)
        same = sum(row.human_majority == row.fm_majority for row in rows)
        decided = sum("tied" not in (row.human_majority, row.fm_majority) for row in rows)
        return {"agree": same, "decided": decided, "share": same / len(rows), "decided_share": same / decided}[of]

    def difference(self, of: float, minus: float) -> float:
        return float(of) - float(minus)

    def ratio(self, of: float, to: float) -> float:
        return float(of) / float(to)

    def product(self, of: Sequence[float]) -> float:
        return math.prod(map(float, of))

    def total(self, of: Sequence[float]) -> float:
        return sum(map(float, of))

    def orders_of_magnitude(self, of: float, to: float) -> float:
        return math.log10(float(of) / float(to))

    def stated(self, role: str, path: str) -> Value:
        """The value at dotted keys, which a file states itself, where nothing published allows to recompute it."""
        value: Any = self.data.raw[role][0]
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                raise LookupError(f"key {path} in the file of {role}")
            value = value[key]
        return value if isinstance(value, (int, float, str)) else len(value)

    def holds(self, keys: Sequence[str], role: str | None = None, within: str = "") -> bool:
        """Whether a key that begins with one of some texts occurs in a file, or in any, perhaps only below one key."""

        def found(value: Any, within: str) -> bool:
            if isinstance(value, list):
                return any(found(entry, within) for entry in value)
            if not isinstance(value, dict):
                return False
            if not within and any(key.startswith(tuple(keys)) for key in value):
                return True
            return any(found(entry, "" if key == within else within) for key, entry in value.items())

        return found(list(self.data.raw.values()) if role is None else self.data.raw[role], within)


FUNCTIONS: dict[str, Callable[..., Value]] = {
    name: function for name, function in inspect.getmembers(Figures, inspect.isfunction) if not name.startswith("_")
}


def call(name: str, arguments: Mapping[str, Any], data: Published, place: str) -> Value:
    """Call the function of a claim; NaN where it divides by nothing.

    Raises UserError for no such function, arguments that it does not take, or names that the data do not hold.
    """
    if name not in FUNCTIONS:
        raise UserError(f"{place}: no function '{name}' recomputes a figure; there are {', '.join(sorted(FUNCTIONS))}")
    function = getattr(Figures(data), name)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{place}: {name}: {error}; see replication/audit/recompute*.py for its arguments") from None
    try:
        return function(**arguments)
    except LookupError as error:
        raise UserError(f"{place}: {name}: the data hold no {error}; fix the claim's arguments") from None
    except ArithmeticError:  # a share of nothing
        return math.nan
    except (TypeError, ValueError, AttributeError) as error:  # a text for a number, one name for a list
        raise UserError(f"{place}: {name}: {error}; an argument has the wrong type or value, fix it there") from None
