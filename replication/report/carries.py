"""Which change carries the preference: the 2x2 on the votes between any two of its arms, within the seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from replication.config import AnalysisConfig
from replication.report.comparisons import Number, Row
from replication.report.load import NAN
from replication.report.preference import estimate, usable_votes, vendor_scope
from replication.report.questions import EFFECTS, TWO_BY_TWO
from replication.statistics.alike import alike_judges, as_one
from replication.statistics.factorial import contrast, effects_t
from replication.statistics.preference import Ballots, ballots
from replication.votes.record import Vote

IDS = ("preference_token_gain", "preference_layer_gain", "preference_interaction")
"""Of the plan's questions, in the order of EFFECTS."""


@dataclass(frozen=True)
class PreferenceEffect:
    """A main effect or the interaction, as a part of the share of decisive votes."""

    id: str
    name: str
    words: str
    n: int
    """Seeds with decisive votes."""
    mean: Number
    low: Number
    high: Number
    p: Number


@dataclass(frozen=True)
class PreferenceFactorial:
    """Main effects and interaction of preference over seeds, prompts and judges."""

    is_registered: bool
    n: int
    seeds: list[int]
    """Of all votes in use, decisive or not."""
    n_prompts: int
    n_judges: int
    n_decisive: int
    interval_level: float
    effects: list[PreferenceEffect]
    pairs: list[Row]
    """The six pairs of arms, with their votes and shares."""
    note: str
    """Why something is missing, or on what it is conditional."""


def preference_factorial(
    votes: Sequence[Vote],
    suite: str,
    a: AnalysisConfig,
    certified: Mapping[str, Iterable[int]],
    of_place: Mapping[str, str] | None,
) -> PreferenceFactorial | None:
    """The answer; arguments as of analyse_votes, and place -> arm of the 2x2. None where the suite has no 2x2, and, if
    the plan does not ask, where votes are on one pair alone."""
    if of_place is None or not votes:
        return None
    used, contrasts, parts, pairs = usable_votes(votes, suite, a, certified)[0], [], [], list[Row]()
    for first, second in combinations(TWO_BY_TWO, 2):
        b = ballots(used, of_place[first], of_place[second])
        decisive, e = b.where(b.decisive), estimate(b, a.alpha)
        parts.append(decisive)
        contrasts.append(np.tile(contrast(TWO_BY_TWO[first], TWO_BY_TWO[second]), (len(decisive), 1)))
        share: Row = {
            "n_votes": len(b),
            "n_decisive": len(decisive),
            "estimate": e.estimate,
            "low": e.low,
            "high": e.high,
        }
        pairs.append(Row(baseline=of_place[first], treatment=of_place[second]) | share)
    if sum(len(part) > 0 for part in parts) < 2 and not a.preference_factorial:
        return None
    b = Ballots(*(np.concatenate([getattr(part, name) for part in parts]) for name in Ballots.__dataclass_fields__))
    met = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    b = as_one(b, alike_judges(replace(b, prompt=b.prompt * len(parts) + met)))  # shared are pairs of the same two arms
    t, note = effects_t(b.score, np.concatenate(contrasts), (b.seed, b.prompt, b.cluster), a.alpha), vendor_scope(b)
    if t is None:
        note = "the decisive votes do not join all four arms: `replicate judge prepare --pairs all` makes such a panel"
    elif t.conditional_on:
        note = f"conditional on the one {' and the one '.join(t.conditional_on)}"
    effects, n = [], len(np.unique(b.seed))
    for i, (name, (_, title, words)) in enumerate(zip(IDS, EFFECTS, strict=True)):
        mean, low, high, p = (NAN,) * 4 if t is None else (float(of[i]) for of in (t.mean, t.low, t.high, t.p))
        p = NAN if t is None or t.conditional_on else p
        effects.append(PreferenceEffect(name, title, words, n, mean, low, high, p))
    seeds = sorted({vote.seed for vote in used if {vote.arm_left, vote.arm_right} <= {*of_place.values()}})
    sizes = len(np.unique(b.prompt)), len(np.unique(b.judge)), len(b)
    return PreferenceFactorial(a.preference_factorial, n, seeds, *sizes, 1 - a.alpha, effects, pairs, note)
