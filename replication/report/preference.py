"""What the votes say of the treatment: results.json's `preference`, every interval with its scope."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter, itemgetter
from typing import TypeVar

import numpy as np
from scipy import stats as scipy_stats

from replication.config import AnalysisConfig
from replication.console import plural
from replication.protocol.paper import VOTES
from replication.report.comparisons import Number, Row
from replication.report.load import NAN
from replication.runs.layout import SuiteDir
from replication.statistics.alike import Alike, alike_judges, as_one
from replication.statistics.crossed import CrossedDesign, degrees
from replication.statistics.preference import (
    VENDOR,
    Ballots,
    agreement,
    ballots,
    binomial_p,
    bootstrap_share,
    chance_range,
    krippendorff_alpha,
    self_consistency,
    shares_by,
)
from replication.statistics.seeds import POWER, holm, mean_test, sign_flip_p, smallest_sign_flip_p
from replication.votes.record import Vote, read_note
from replication.votes.tally import chosen_arm, judge_votes, published_filters, votes_between, votes_per_judge

MOST_SEEDS = 1000
MIN_VENDORS = 4
"""Of models, for a verdict that holds for models of other vendors too."""
WAYS = ("win", "tie", "both_bad", "loss")
K = TypeVar("K")
PREFERRED, BASELINE_PREFERRED, NOT_DECIDED = "preferred", "baseline preferred", "not decided"


@dataclass(frozen=True)
class Counts:
    n_votes: int
    n_treatment: int
    n_baseline: int
    n_ties: int
    n_decisive: int
    n_seeds: int
    n_prompts: int
    n_judges: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share with its interval over seeds, prompts and judges."""

    estimate: Number = NAN
    low: Number = NAN
    high: Number = NAN
    p: Number = NAN
    """None where there is one seed, one prompt or one judge: nothing is tested beyond it."""
    se: Number = NAN
    df: Number = NAN
    level: float
    """Coverage of the interval."""
    components: dict[str, float]
    """Variance of a vote by its sources."""
    note: str
    """Why something is missing, or on what it is conditional."""


@dataclass(frozen=True)
class PerSeed:
    """t test over the seeds' shares."""

    scope: str
    rows: list[Row]
    estimate: Number
    low: Number
    high: Number
    p: Number


@dataclass(frozen=True)
class SeedsNeeded:
    """Seeds of a new study that is to find a preference of the published size, with as many prompts and judges."""

    seeds: int | None
    """None where no number of seeds is enough, and then `limit` names what is short."""
    limit: str
    effect: float
    power: float


@dataclass(frozen=True)
class JudgesAgreement:
    people_and_models: Row
    """See statistics.preference.Agreement."""
    krippendorff_alpha: Number
    repeats_same: int
    repeats: int
    left: Row | None
    """How often people's decisive votes chose the left, beside the 95 % that chance gives.

    Models see both orders, and the vote is of neither side.
    """


@dataclass(frozen=True)
class Outcome:
    """First votes on the pair of arms at one seed, on one prompt, or by one judge."""

    name: str
    wins: int
    ties: int
    both_bad: int
    losses: int


@dataclass(frozen=True, kw_only=True)
class Preference(Counts):
    """The primary question and all that stands beside it; the last five fields are those of `primary`."""

    baseline: str
    treatment: str
    left_out: list[str]
    """A sentence for each reason why votes are not used."""
    n_repeats: int
    seeds: list[int]
    n: int
    """Seeds with decisive votes: one of nothing but ties is no evidence of a share."""
    primary: Estimate
    win_half: Estimate
    per_seed: PerSeed | None
    sign_flip: dict[str, Number] | None
    """p, and the smallest that there is."""
    bootstrap: Row | None
    naive: dict[str, Number] | None
    """p and share with every vote as independent, as published."""
    decision: str = NOT_DECIDED
    """preferred, baseline preferred or not decided."""
    why: str = ""
    """Not decided. Before the decision: why the votes cannot be tested."""
    more_seeds: SeedsNeeded | None = None
    categories: list[Row]
    kinds: list[Row]
    filters: list[Row]
    agreement: JudgesAgreement
    other_pairs: list[Row]
    alike: list[Alike] = field(default_factory=list)
    """Judges who vote alike beyond chance."""
    criteria: list[Row] = field(default_factory=list)
    """Votes by other criteria than the primary one."""
    survey: list[Row] = field(default_factory=list)
    """People by what they said of themselves, which they were asked before they saw a pair."""
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    """Of each `seed`, `prompt_id` and `judge_id`."""
    estimate: Number
    low: Number
    high: Number
    p: Number
    level: float


def analyse_votes(
    votes: Sequence[Vote],
    suite: str,
    analysis: AnalysisConfig,
    certified: Mapping[str, Iterable[int]],
    categories: Mapping[int, str],
    is_planned: bool = False,
    surveys: Mapping[str, Mapping[str, str]] | None = None,
) -> Preference | None:
    """The analysis of a record; None without any vote, or in a suite of one arm.

    Args:
        suite: name of the suite; votes of another are left out, and counted.
        analysis: the plan's section, resolved.
        certified: arm -> seeds at which its pair with the baseline passes the certificate.
        categories: prompt id -> category.
        is_planned: whether a plan is registered, which the words then name.
        surveys: judge -> question -> answer.
    """
    if not votes or analysis.baseline is None or analysis.treatment is None:
        return None
    alpha = analysis.alpha
    used, left_out = usable_votes(votes, suite, analysis, certified)
    pair = analysis.baseline, analysis.treatment
    alike = alike_judges(ballots(sorted(used, key=lambda vote: vote.shown_at), *pair))
    b = as_one(ballots(used, *pair), alike)
    primary = _to_vendors(estimate(b, alpha), b, alpha)
    given = votes_per_judge((vote for vote in votes if vote.suite == suite), analysis.judge_kinds)
    per_seed, sign_flip, bootstrap, naive = _beside(b, analysis) if len(b) else (None,) * 4
    found = Preference(
        baseline=analysis.baseline,
        treatment=analysis.treatment,
        left_out=left_out,
        n_repeats=sum(bool(vote.repeat_of) for vote in used),
        **vars(_counts(b)),
        seeds=sorted({int(seed) for seed in b.seed}),
        n=len(np.unique(b.seed[b.decisive])),
        primary=primary,
        win_half=estimate(b, alpha, half_ties=True),
        per_seed=per_seed,
        sign_flip=sign_flip,
        bootstrap=bootstrap,
        naive=naive,
        categories=_groups(b, [categories.get(int(p), "unknown") for p in b.prompt], alpha),
        kinds=_groups(b, ["human" if human else "model" for human in b.is_human], alpha),
        filters=_filters(b, used, analysis, given),
        agreement=_agreement(b, used),
        other_pairs=_other_pairs(used, analysis),
        alike=alike,
        criteria=_criteria(used, pair, alike, alpha),
        survey=_strata(b.where(b.is_human), surveys or {}, alpha),
        outcomes={of: [*outcomes(used, pair, attrgetter(of)).values()] for of in ("seed", "prompt_id", "judge_id")},
        **{key: getattr(primary, key) for key in ("estimate", "low", "high", "p", "level")},
    )
    n_clusters = len(np.unique(b.cluster))
    return replace(
        found, why=_lacking(found, analysis, is_planned), more_seeds=_seeds_needed(found, n_clusters, analysis)
    )


def outcomes(votes: Iterable[Vote], pair: tuple[str, str], key: Callable[[Vote], K]) -> dict[K, Outcome]:
    """How first votes between (baseline, treatment) went, by group, in the order of the keys."""
    counts: dict[K, Counter[str]] = {}
    for vote in votes_between(votes, *pair):
        chosen = chosen_arm(vote)
        went = vote.choice if chosen is None else "win" if chosen == pair[1] else "loss"
        counts.setdefault(key(vote), Counter())[went] += 1
    return {k: Outcome(str(k), *(n[went] for went in WAYS)) for k, n in sorted(counts.items(), key=itemgetter(0))}


def usable_votes(
    votes: Sequence[Vote], suite: str, analysis: AnalysisConfig, certified: Mapping[str, Iterable[int]]
) -> tuple[list[Vote], list[str]]:
    """Votes that may be used, and a sentence for each reason why others may not."""
    good = {arm: set(seeds) for arm, seeds in certified.items()}
    good[analysis.baseline or ""] = set().union(*good.values())
    reasons, used = Counter[str](), []
    for vote in votes:
        arms = (vote.arm_left, vote.arm_right)
        if vote.suite != suite:
            reasons[f"of another suite than {suite}"] += 1
        elif vote.judge_kind not in analysis.judge_kinds:
            reasons["by a kind of judge that the plan does not count"] += 1
        elif any(not good.get(arm) for arm in arms):
            reasons["on an arm that no certified pair has"] += 1
        elif any(vote.seed not in good[arm] for arm in arms):
            reasons["on a seed whose pair does not pass the certificate"] += 1
        else:
            used.append(vote)
    return used, [f"{plural(n, 'vote')} {why}: not used" for why, n in reasons.items()]


def _counts(b: Ballots) -> Counts:
    return Counts(
        n_votes=len(b),
        n_treatment=int((b.score == 1).sum()),
        n_baseline=int((b.score == 0).sum()),
        n_ties=int((~b.decisive).sum()),
        n_decisive=int(b.decisive.sum()),
        n_seeds=len(np.unique(b.seed)),
        n_prompts=len(np.unique(b.prompt)),
        n_judges=len(np.unique(b.judge)),
    )


def _lacking(f: Preference, analysis: AnalysisConfig, is_planned: bool) -> str:
    """Why the votes cannot be tested; "" where they can."""
    if not f.n_votes:
        return "there are no usable votes on this pair"
    if f.n < analysis.min_seeds:
        seeds = "one seed has" if f.n == 1 else f"{f.n} seeds have" if f.n else "no seed has"
        least = f"at least {analysis.min_seeds}"
        asked = f"the plan asks for {least}" if is_planned else f"{least} are asked for (analysis.min_seeds)"
        return f"{seeds} decisive votes, and {asked}"
    return "" if f.p is not None and np.isfinite(f.p) else f.primary.note


def estimate(b: Ballots, alpha: float, half_ties: bool = False) -> Estimate:
    """Preference with its interval, of coverage 1 - alpha, over seeds, prompts and judges.

    It is the share of decisive votes, as published, or, with half_ties, of wins and half the ties over all votes.
    """

    def without_interval(note: str, share: float = NAN) -> Estimate:
        return Estimate(estimate=share, level=1 - alpha, components={}, note=note)

    if not len(b):
        return without_interval("no votes on this pair")
    part = b if half_ties else b.where(b.decisive)
    if not len(part):
        return without_interval(f"none of the {len(b):,} votes is decisive")
    vote, first = "vote" if half_ties else "decisive vote", float(part.score[0])
    if len(part) < 2:
        return without_interval(f"a single {vote} has no interval", first)
    if np.ptp(part.score) == 0:
        what = {0.0: "for the baseline", 0.5: "a tie", 1.0: "for the treatment"}[first]
        return without_interval(f"every {vote} is {what}: nothing varies, so there is no interval", first)
    t = CrossedDesign(part.seed, part.prompt, part.cluster).t(part.score, alpha=alpha)
    of_one_vendor = len(np.unique(part.judge)) > 1 and part.cluster[0].startswith(VENDOR)
    one = [name.replace("judge", "vendor") if of_one_vendor else name for name in t.conditional_on]
    return Estimate(
        estimate=float(t.mean),
        low=max(0.0, float(t.low)),
        high=min(1.0, float(t.high)),
        p=NAN if t.conditional_on else float(t.p),
        se=float(t.se),
        df=float(t.df),
        level=1 - alpha,
        components={name: float(value) for name, value in t.components.items()},
        note=f"conditional on the one {' and the one '.join(one)}" if one else "",
    )


def _to_vendors(found: Estimate, b: Ballots, alpha: float) -> Estimate:
    """The estimate with its scope in words, where models of fewer than MIN_VENDORS vendors carry it.

    They do not where people alone have a preference on the same side.
    """
    scope = vendor_scope(b)
    if found.note or found.p is None or not scope:
        return found
    people = estimate(b.where(b.is_human), alpha)
    if (people.p or NAN) < alpha and ((people.estimate or NAN) > 0.5) == ((found.estimate or NAN) > 0.5):
        return found
    return replace(found, note=scope)


def vendor_scope(b: Ballots) -> str:
    """Of what models of fewer than MIN_VENDORS vendors carry; "" where there are none, or more."""
    vendors = sorted({str(name).removeprefix(VENDOR) for name in b.cluster[~b.is_human]})
    these = f"over seeds, prompts and judges, as to models conditional on these vendors ({', '.join(vendors)})"
    return these if 0 < len(vendors) < MIN_VENDORS else ""


def _beside(b: Ballots, analysis: AnalysisConfig) -> tuple[PerSeed, dict[str, Number], Row, dict[str, Number]]:
    """The t test over seeds, sign flips, bootstrap, and the published test."""
    means = shares_by(b.score, b.seed)
    t = mean_test(means - 0.5, 1 - analysis.alpha)
    rows = [
        Row(seed=int(seed), estimate=float(mean), **vars(_counts(b.where(b.seed == seed))))
        for seed, mean in zip(np.unique(b.seed), means, strict=True)
    ]
    low, high = (float(np.clip(bound + 0.5, 0, 1)) for bound in (t.low, t.high))
    per_seed = PerSeed("conditional on these prompts and judges", rows, float(t.mean) + 0.5, low, high, float(t.p))
    smallest = smallest_sign_flip_p(int(np.isfinite(means).sum()))
    generator, resamples = np.random.default_rng(analysis.bootstrap_seed), analysis.bootstrap_resamples
    bounds = bootstrap_share(b.score, (b.seed, b.prompt, b.cluster), generator, resamples, analysis.alpha)
    low, high = (float(bound) if len(means) > 1 else NAN for bound in bounds)
    chosen, decisive = int((b.score == 1).sum()), int(b.decisive.sum())
    return (
        per_seed,
        {"p": float(sign_flip_p(means - 0.5)), "smallest": smallest},
        {"low": low, "high": high, "resamples": resamples},
        {"p": float(binomial_p(chosen, decisive)), "share": chosen / decisive if decisive else NAN},
    )


def _seeds_needed(f: Preference, n_clusters: int, analysis: AnalysisConfig) -> SeedsNeeded | None:
    """How many seeds give 80 % power for a preference of the published size, with as many prompts and judges, of which
    those that are related count as one.

    The variance components are those of the votes, below 0 counted as 0; the t is taken as noncentral. None without
    components, and where the interval does not hold the published size: seeds are not what is lacking there.
    """
    components = {name: max(0.0, value) for name, value in f.primary.components.items()}
    low, high = f.low, f.high
    if "seed" not in components or low is None or high is None or not low <= VOTES.share <= high:
        return None
    for n in range(analysis.min_seeds, MOST_SEEDS):
        if _power(components, n, f, n_clusters, VOTES.share - 0.5, analysis.alpha) >= POWER:
            return SeedsNeeded(n, "", VOTES.share, POWER)
    prompts, judges = components.get("prompt", 0.0) / f.n_prompts, components.get("judge", 0.0) / n_clusters
    return SeedsNeeded(None, "prompts" if prompts >= judges else "judges", VOTES.share, POWER)


def _power(
    components: Mapping[str, float], seeds: int, f: Preference, n_clusters: int, effect: float, alpha: float
) -> float:
    shared = components.get("seed x prompt", 0.0) / (seeds * f.n_prompts) + components["rest"] / f.n_decisive
    parts = {
        name: (components.get(name, 0.0) / size + shared, size - 1)
        for name, size in (("seed", seeds), ("prompt", f.n_prompts), ("judge", n_clusters))
        if size > 1
    }
    variance = shared + sum(part - shared for part, _ in parts.values())
    levels = np.array([size for _, size in parts.values()], dtype=np.float64)
    df = degrees(np.array(variance), np.array([part for part, _ in parts.values()]), levels, f.n_decisive)
    critical = scipy_stats.t.ppf(1 - alpha / 2, df)
    return float(scipy_stats.nct.sf(critical, df, effect / np.sqrt(variance)))


def _numbers(b: Ballots, alpha: float) -> Row:
    """The primary estimate over some of the votes, and the mean of wins and half the ties."""
    f, half = estimate(b, alpha), float(b.score.mean()) if len(b) else NAN
    found = {"estimate": f.estimate, "low": f.low, "high": f.high, "p": f.p, "note": f.note, "win_half": half}
    return vars(_counts(b)) | found


def _corrected(labels: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Rows behind their labels, with Holm's p over all of them."""
    adjusted = holm(np.array([row["p"] for row in rows], dtype=np.float64))
    return [label | row | {"p_holm": float(p)} for label, row, p in zip(labels, rows, adjusted, strict=True)]


def _groups(b: Ballots, groups: Sequence[str], alpha: float) -> list[Row]:
    """One kind of judge, or category of prompt, each; `groups` are those of every vote."""
    of_vote, names = np.array(groups, dtype=np.str_), sorted(set(groups))
    rows = [_numbers(b.where(of_vote == name), alpha) for name in names]
    return _corrected([{"name": name} for name in names], rows)


def _criteria(used: Sequence[Vote], pair: tuple[str, str], alike: Sequence[Alike], alpha: float) -> list[Row]:
    """One row each; of the votes that say something of it."""
    names = list(dict.fromkeys(name for vote in used for name in vote.said))
    said = ([replace(vote, choice=vote.said[name]) for vote in used if name in vote.said] for name in names)
    each = [ballots(votes, *pair) for votes in said]
    rows = [_numbers(as_one(b, [two for two in alike if {*two.judges} <= {*b.judge}]), alpha) for b in each]
    return _corrected([{"name": name} for name in names], rows)


def _strata(people: Ballots, surveys: Mapping[str, Mapping[str, str]], alpha: float) -> list[Row]:
    """One row for each answer of each question."""
    answers = sorted({given for said in surveys.values() for given in said.items()})
    gave = ([name for name, said in surveys.items() if given in said.items()] for given in answers)
    rows = [_numbers(people.where(np.isin(people.judge, names)), alpha) for names in gave]
    return _corrected([{"name": ": ".join(given)} for given in answers], rows)


def surveys(suite_dir: SuiteDir) -> dict[str, dict[str, str]]:
    """Judge -> question -> answer, as the lock of the panel wrote them."""
    note = read_note(suite_dir.votes_note, suite_dir.votes)
    return (note.note.surveys if note else None) or {}


def _other_pairs(used: Sequence[Vote], analysis: AnalysisConfig) -> list[Row]:
    """Other pairs of arms that have votes: secondary questions."""
    pairs = []
    for pair in sorted({tuple(sorted((vote.arm_left, vote.arm_right))) for vote in used}):
        base, other = reversed(pair) if pair[1] == analysis.baseline else pair
        if {base, other} != {analysis.baseline, analysis.treatment}:
            pairs.append((base, other))
    rows = [_numbers(ballots(used, *pair), analysis.alpha) for pair in pairs]
    return _corrected([{"baseline": base, "treatment": other} for base, other in pairs], rows)


def _filters(b: Ballots, used: Sequence[Vote], analysis: AnalysisConfig, given: Mapping[str, int]) -> list[Row]:
    """The published sensitivity filters; the primary analysis excludes nobody.

    `given`: each judge's votes in the whole record, so that a pair that is not used makes nobody's set partial.
    """
    assert analysis.baseline and analysis.treatment
    judges = [replace(j, n_votes=given[j.name]) for j in judge_votes(used, analysis.baseline, analysis.treatment)]
    rows = []
    for kept in published_filters(judges, analysis):
        part = b.where(~np.isin(b.judge, sorted(kept.excluded))) if kept.excluded else b
        note = {} if len(part) or not len(b) else {"note": "leaves no votes"}
        rows.append({"name": kept.label} | _numbers(part, analysis.alpha) | note)
    return rows


def _agreement(b: Ballots, used: Sequence[Vote]) -> JudgesAgreement:
    units = b.seed * (int(b.prompt.max()) + 1) + b.prompt if len(b) else b.prompt
    same, repeats = self_consistency(used)
    people, left = b.where(b.is_human & b.decisive), None
    if n := len(people):
        share, (low, high) = int(((people.score == 1) == people.treatment_left).sum()) / n, chance_range(n)
        left = Row(share=share, n=n, low=low, high=high, is_outside=not low <= share <= high)
        left["has_models"] = bool((~b.is_human).any())
    return JudgesAgreement(
        people_and_models=vars(agreement(b.where(b.is_human), b.where(~b.is_human))),
        krippendorff_alpha=krippendorff_alpha(b.score, units),
        repeats_same=same,
        repeats=repeats,
        left=left,
    )
