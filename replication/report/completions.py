"""Rival explanations of a preference: what the completions are like, and whether the verdict hangs on it, or on a few.

Shapes: V votes on the pair of the primary question, D decisive ones among them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from replication.config import AnalysisConfig, SuiteConfig
from replication.evaluation.battery import WORD, battery, repetition
from replication.protocol.certificate import Certificate
from replication.report.comparisons import Number, Quantity, QuantityRow, Row, compare
from replication.report.description import on_one_prompt, sampling
from replication.report.load import NAN, CellData, Sample, samples_of
from replication.report.preference import outcomes
from replication.runs.layout import SuiteDir
from replication.statistics.adjusted import equal_texts_logit
from replication.statistics.alike import Alike, as_one
from replication.statistics.crossed import CrossedDesign
from replication.statistics.format import arm_name, p_value, percent, share, shares
from replication.statistics.preference import Ballots, ballots
from replication.votes.record import Vote, read_panel_record
from replication.votes.tally import votes_between


def completion_rows(suite: SuiteConfig, cells: Sequence[CellData], certificate: Certificate) -> list[QuantityRow]:
    """What the battery counts, compared as every quantity; cells sampled otherwise than the first count as missing."""
    having = sorted((cell for cell in cells if cell.samples), key=lambda cell: not cell.pooled)
    if not having:
        return []
    settings, found = sampling(having[0]), []
    for score in battery([]):

        def value(cell: CellData, score: str = score) -> float:
            counted = cell.completions.get(score) if sampling(cell) == settings else None
            return NAN if counted is None else counted

        found.append(compare(Quantity(f"completions/{score}", score, "", value), suite, cells, certificate))
    return found


@dataclass(frozen=True)
class EqualTexts:
    """Share of decisive votes for the treatment where both texts are as long and repeat themselves as much."""

    estimate: Number
    low: Number
    high: Number
    p: Number


@dataclass(frozen=True)
class LeftOut:
    """The lowest and the highest share without one seed, prompt or judge, and without which."""

    factor: str
    low: float
    without_low: str
    high: float
    without_high: str


@dataclass(frozen=True)
class Ease:
    """Votes on the prompts of one half, ordered by how often both texts were called bad."""

    half: str
    n_prompts: int
    n_votes: int
    ties: float
    both_bad: float


@dataclass(frozen=True)
class Robustness:
    equal: EqualTexts | None
    """None where a completion that was judged is not here."""
    left_out: list[LeftOut]
    flips: int | None
    """Decisive votes of the winner that, given to the other, end the decision; or of the other, to make it."""
    is_decided: bool
    ease: list[Ease]


Texts = Mapping[tuple[str, int, object, object], Sample]
"""(arm, seed, prompt id, sample) -> completion."""
CLEAREST = 4
"""Judged pairs whose texts a report shows."""


def judged_texts(suite_dir: SuiteDir, cells: Sequence[CellData]) -> Texts:
    """The completions of the way of sampling that the folder's panel was made of."""
    setting = read_panel_record(suite_dir.judging).setting or ""
    read = ((c, samples_of(suite_dir.cell(c.arm, c.seed, setting)) if setting else c.samples) for c in cells)
    return {(cell.arm, cell.seed, s.prompt_id, s.sample): s for cell, samples in read for s in samples}


def robustness(
    used: Sequence[Vote], a: AnalysisConfig, texts: Texts, alike: list[Alike], p_below: float
) -> Robustness | None:
    """Of the votes of the primary estimate, with judges who vote alike as one; None without two decisive ones. The
    preference is decided where p is below `p_below`; NaN: whatever p is, it is not."""
    assert a.baseline and a.treatment
    every = as_one(ballots(used, a.baseline, a.treatment), alike)
    b = every.where(every.decisive)
    if len(b) < 2 or np.ptp(b.score) == 0:
        return None
    rows = votes_between(used, a.baseline, a.treatment)
    design = CrossedDesign(b.seed, b.prompt, b.cluster)
    is_decided = bool(design.t(b.score).p < p_below)
    return Robustness(
        _equal_texts(rows, every, design, a, texts),
        [_left_out(b, name) for name in ("seed", "prompt", "judge")],
        None if design.conditional_on or math.isnan(p_below) else _flips(b, design, p_below, is_decided),
        is_decided,
        _ease(rows),
    )


def _equal_texts(
    rows: Sequence[Vote], b: Ballots, design: CrossedDesign, a: AnalysisConfig, texts: Texts
) -> EqualTexts | None:
    differences = []
    for vote, is_decisive in zip(rows, b.decisive, strict=True):
        if is_decisive:
            shown = ((vote.arm_left, vote.sample_left), (vote.arm_right, vote.sample_right))
            of = {arm: texts.get((arm, vote.seed, vote.prompt_id, sample)) for arm, sample in shown}
            treated, plain = of[a.treatment or ""], of[a.baseline or ""]
            if treated is None or plain is None:
                return None
            differences.append(np.subtract(_length_and_repetition(treated.text), _length_and_repetition(plain.text)))
    covariates_DC = np.array(differences)
    varying_DC = covariates_DC[:, np.ptp(covariates_DC, axis=0) > 0]  # texts none of which repeats itself need no more
    parts_D = equal_texts_logit(b.score[b.decisive], varying_DC)
    if np.isnan(parts_D).any():
        return EqualTexts(NAN, NAN, NAN, NAN)
    t = design.t(parts_D, null=0.0, alpha=a.alpha)
    estimate, low, high = (float(special.expit(bound)) for bound in (t.mean, t.low, t.high))
    return EqualTexts(estimate, low, high, NAN if t.conditional_on else float(t.p))


def _length_and_repetition(text: str) -> tuple[float, float]:
    words = WORD.findall(text)
    return math.log1p(len(words)), repetition(words) or 0.0


def clearest_pairs(used: Sequence[Vote], a: AnalysisConfig, texts: Texts) -> list[Row]:
    """The judged pairs of completions with most votes more for one than for the other, two at least; equally clear ones
    in the order of prompts and seeds."""
    assert a.baseline and a.treatment
    pair = a.baseline, a.treatment

    def shown(vote: Vote) -> tuple[int, int, int, int]:
        sample = {vote.arm_left: vote.sample_left, vote.arm_right: vote.sample_right}
        return vote.prompt_id, vote.seed, sample[pair[0]], sample[pair[1]]

    rows = []
    for (prompt, seed, *samples), votes in outcomes(used, pair, shown).items():
        of = {arm: texts.get((arm, seed, prompt, sample)) for arm, sample in zip(pair, samples, strict=True)}
        if (margin := abs(votes.wins - votes.losses)) > 1 and (first := of[a.treatment]) and of[a.baseline]:
            rows.append((margin, on_one_prompt(str(first.category), seed, of) | {"votes": votes}))
    return [row for _, row in sorted(rows, key=lambda row: -row[0])[:CLEAREST]]


def _left_out(b: Ballots, factor: str) -> LeftOut:
    names, of_vote = np.unique(getattr(b, factor), return_inverse=True)
    n, wins = np.bincount(of_vote), np.bincount(of_vote, b.score)
    with np.errstate(invalid="ignore"):
        shares = (wins.sum() - wins) / (n.sum() - n)
    shares = np.where(np.isnan(shares), b.score.mean(), shares)
    low, high = int(shares.argmin()), int(shares.argmax())
    return LeftOut(factor, float(shares[low]), str(names[low]), float(shares[high]), str(names[high]))


def _flips(b: Ballots, design: CrossedDesign, p_below: float, is_decided: bool) -> int | None:
    """The fewest votes; those that change sides are spread evenly over seeds, prompts and judges in turn."""
    winner = float(b.score.mean() >= 0.5)
    order = np.lexsort((b.judge, b.prompt, b.seed))
    givers = order[b.score[order] == (winner if is_decided else 1 - winner)]

    def changes(k: int) -> bool:
        scores: NDArray[np.float64] = b.score.copy()
        taken = givers[np.linspace(0, len(givers) - 1, k).round().astype(np.int64)]
        scores[taken] = 1 - scores[taken]
        return bool(design.t(scores).p < p_below) != is_decided

    most = math.ceil(len(givers) - len(b) / 2) if is_decided else len(givers)  # to an even share, or to none against
    numbers = range(1, most + 1)
    k = bisect_left(numbers, True, key=changes)
    return numbers[k] if k < len(numbers) else None


def _ease(rows: Sequence[Vote]) -> list[Ease]:
    choices: dict[int, list[str]] = {}
    for vote in rows:
        choices.setdefault(vote.prompt_id, []).append(vote.choice)
    ordered = sorted(choices, key=lambda prompt: (choices[prompt].count("both_bad") / len(choices[prompt]), prompt))
    if len(ordered) < 2:
        return []
    middle = len(ordered) // 2
    halves = []
    for name, prompts in (("easier", ordered[:middle]), ("harder", ordered[middle:])):
        votes = [choice for prompt in prompts for choice in choices[prompt]]
        shares = (votes.count(choice) / len(votes) for choice in ("tie", "both_bad"))
        halves.append(Ease(name, len(prompts), len(votes), *shares))
    return halves


def lines(r: Robustness, a: AnalysisConfig) -> Iterator[str]:
    """A sentence for each."""
    equal = r.equal
    if equal is None:
        yield "Not adjusted for length and repetition: completions that were judged are not in this folder."
    elif equal.estimate is None:
        yield "Not adjusted for length and repetition: they tell every vote, or do not vary."
    else:
        tested = "" if equal.p is None else f", p {p_value(equal.p)}"
        bounds = f"{percent(1 - a.alpha)} interval {shares(equal.low, equal.high)}{tested}"
        yield (
            f"At equal length and repetition of both texts the share for {arm_name(a.treatment)} is "
            f"{share(equal.estimate, equal.low, equal.high)} ({bounds}): a logistic regression on the differences of "
            "log words and of repeated 4-grams, with the clusters of the primary test."
        )
    ranges = (
        f"{percent(o.low, 1)} (without {o.factor} {o.without_low}) to {percent(o.high, 1)} (without {o.without_high})"
        for o in r.left_out
    )
    yield f"With one seed, prompt or judge left out, the share is {'; '.join(ranges)}."
    if r.flips is not None:
        what = "changed sides, the preference would no longer be" if r.is_decided else "changed sides, it would be"
        yield f"If {r.flips} decisive votes, spread evenly, {what} told from one half."
    if r.ease:
        each = (
            f"on the {e.half} {e.n_prompts} prompts {percent(e.ties, 1)} ties and {percent(e.both_bad, 1)} both bad"
            for e in r.ease
        )
        yield f"Ties by ease of prompt (fewer votes for both bad): {'; '.join(each)}."
