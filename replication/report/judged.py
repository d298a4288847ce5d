"""Everything the report says of votes, as plain values: results["preference"]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from replication.config import AnalysisConfig
from replication.protocol.paper import VOTES
from replication.statistics.crossed import CrossedDesign, CrossedT
from replication.statistics.losses import POWER, holm, mean_test, sign_flip_p
from replication.statistics.preference import (
    Ballots,
    agreement,
    ballots,
    binomial_p,
    bootstrap_share,
    chance_range,
    fast_judges,
    krippendorff_alpha,
    self_consistency,
    shares_by,
    tie_judges,
)
from replication.statistics.seeds import smallest_sign_flip_p
from replication.votes.record import Vote

MOST_SEEDS = 1000
PREFERRED, BASELINE_PREFERRED, NOT_DECIDED = "preferred", "baseline preferred", "not decided"


def analyse_votes(
    votes: Sequence[Vote],
    suite: str,
    analysis: AnalysisConfig,
    certified: Mapping[str, Iterable[int]],
    categories: Mapping[int, str],
    is_planned: bool = False,
) -> dict[str, Any] | None:
    """The primary question and all that stands beside it.

    Args:
        votes: the whole record.
        suite: name of the suite; votes of another are left out, and counted.
        analysis: the plan's section, resolved: both arms named.
        certified: arm -> seeds at which its pair with the baseline passes the certificate.
        categories: prompt id -> category.
        is_planned: whether a plan is frozen, which the words then name.

    Returns:
        None without any vote; else plain values (NaN for what is missing), every interval with its scope.
    """
    assert analysis.baseline and analysis.treatment
    if not votes:
        return None
    used, left_out = _usable(votes, suite, analysis, certified)
    b = ballots(used, analysis.baseline, analysis.treatment)
    repeats = [vote for vote in used if vote.repeat_of]
    found: dict[str, Any] = {
        "baseline": analysis.baseline,
        "treatment": analysis.treatment,
        "left_out": left_out,
        "n_repeats": len(repeats),
        **_counts(b),
        "seeds": sorted({int(seed) for seed in b.seed}),
    }
    found["n"] = len(np.unique(b.seed[b.decisive]))  # a seed of nothing but ties is no evidence of a share
    found["primary"] = estimate(b, analysis.alpha)
    found["win_half"] = estimate(b, analysis.alpha, half_ties=True)
    found |= _beside(b, analysis)
    found["decision"], found["why"] = _decision(found, analysis, is_planned)
    found["more_seeds"] = more_seeds(found, analysis) if found["decision"] == NOT_DECIDED else None
    found["categories"] = _groups(b, [categories.get(int(p), "unknown") for p in b.prompt], analysis.alpha)
    found["kinds"] = _groups(b, ["human" if human else "model" for human in b.is_human], analysis.alpha)
    found["filters"] = _filters(
        b, analysis, votes_by_judge([v for v in votes if v.suite == suite], analysis.judge_kinds)
    )
    found["agreement"] = _agreement(b, used)
    found["other_pairs"] = _other_pairs(used, analysis)
    return found | {key: found["primary"][key] for key in ("estimate", "low", "high", "p", "level")}


def votes_by_judge(votes: Iterable[Vote], kinds: Sequence[str]) -> dict[str, int]:
    """First votes of each judge of the kinds that count, for the plan's check."""
    counted: dict[str, int] = {}
    for vote in votes:
        if vote.judge_kind in kinds and not vote.repeat_of:
            counted[vote.judge_id] = counted.get(vote.judge_id, 0) + 1
    return counted


# ---------------------------------------------------------------- which votes count


def _usable(
    votes: Sequence[Vote], suite: str, analysis: AnalysisConfig, certified: Mapping[str, Iterable[int]]
) -> tuple[list[Vote], list[str]]:
    """Votes that may be used, and a sentence for each reason why others may not."""
    good = {arm: set(seeds) for arm, seeds in certified.items()}
    all_seeds = set.union(set(), *good.values())
    good[analysis.baseline or ""] = all_seeds
    reasons: dict[str, int] = {}
    used = []
    for vote in votes:
        arms = (vote.arm_left, vote.arm_right)
        why = (
            f"of another suite than {suite}" if vote.suite != suite
            else "by a kind of judge that the plan does not count" if vote.judge_kind not in analysis.judge_kinds
            else "on an arm that no certified pair has" if any(arm not in good or not good[arm] for arm in arms)
            else "on a seed whose pair does not pass the certificate" if any(vote.seed not in good[arm] for arm in arms)
            else ""
        )  # fmt: skip
        if why:
            reasons[why] = reasons.get(why, 0) + 1
        else:
            used.append(vote)
    return used, [f"{n:,} {'vote' if n == 1 else 'votes'} {why}: not used" for why, n in reasons.items()]


def _counts(b: Ballots) -> dict[str, int]:
    return {
        "n_votes": len(b),
        "n_treatment": int((b.score == 1).sum()),
        "n_baseline": int((b.score == 0).sum()),
        "n_ties": int((~b.decisive).sum()),
        "n_decisive": int(b.decisive.sum()),
        "n_seeds": len(np.unique(b.seed)),
        "n_prompts": len(np.unique(b.prompt)),
        "n_judges": len(np.unique(b.judge)),
    }


# ---------------------------------------------------------------- estimates


def estimate(b: Ballots, alpha: float, half_ties: bool = False) -> dict[str, Any]:
    """Preference with its interval over seeds, prompts and judges.

    Args:
        b: the votes.
        alpha: the interval covers 1 - alpha.
        half_ties: wins and half the ties, over all votes; else the share of decisive votes, as published.

    Returns:
        estimate, low, high, level of the interval, p, se, df, components, and note: why something is missing, or what
        it is conditional on. No p where there is one seed, one prompt or one judge: nothing is tested beyond it.
    """
    missing = dict.fromkeys(("estimate", "low", "high", "p", "se", "df"), float("nan"))
    blank: dict[str, Any] = {**missing, "level": 1 - alpha, "components": {}}
    if not len(b):
        return blank | {"note": "no votes on this pair"}
    part = b if half_ties else b.where(b.decisive)
    if not len(part):
        return blank | {"note": f"none of the {len(b):,} votes is decisive"}
    if len(part) < 2:
        return blank | {
            "estimate": float(part.score[0]),
            "note": f"a single {'' if half_ties else 'decisive '}vote has no interval",
        }
    if np.ptp(part.score) == 0:
        what = {0.0: "for the baseline", 0.5: "a tie", 1.0: "for the treatment"}[float(part.score[0])]
        votes = "vote" if half_ties else "decisive vote"
        note = f"every {votes} is {what}: nothing varies, so there is no interval"
        return blank | {"estimate": float(part.score[0]), "note": note}
    t = CrossedDesign(part.seed, part.prompt, part.judge).t(part.score, alpha=alpha)
    one = " and the one ".join(t.conditional_on)
    return blank | _plain(t) | {"note": f"conditional on the one {one}" if one else ""}


def _plain(t: CrossedT) -> dict[str, Any]:
    return {
        "estimate": float(t.mean),
        "low": max(0.0, float(t.low)),
        "high": min(1.0, float(t.high)),
        "p": float("nan") if t.conditional_on else float(t.p),
        "se": float(t.se),
        "df": float(t.df),
        "components": {name: float(value) for name, value in t.components.items()},
    }


def _beside(b: Ballots, analysis: AnalysisConfig) -> dict[str, Any]:
    """Per-seed t, sign flip, bootstrap, and the published way of counting."""
    nan = float("nan")
    if not len(b):
        return {"per_seed": None, "sign_flip": None, "bootstrap": None, "naive": None}
    seeds = np.unique(b.seed)
    means = shares_by(b.score, b.seed)
    t = mean_test(means - 0.5, 1 - analysis.alpha)
    generator = np.random.default_rng(analysis.bootstrap_seed)
    factors = (b.seed, b.prompt, b.judge)
    low, high = bootstrap_share(b.score, factors, generator, analysis.bootstrap_resamples, analysis.alpha)
    chosen, decisive = int((b.score == 1).sum()), int(b.decisive.sum())
    rows = [
        {"seed": int(seed), "estimate": float(mean), **_counts(b.where(b.seed == seed))}
        for seed, mean in zip(seeds, means, strict=True)
    ]
    return {
        "per_seed": {
            "scope": "conditional on these prompts and judges",
            "rows": rows,
            "estimate": float(t.mean) + 0.5,
            "low": float(np.clip(t.low + 0.5, 0, 1)),
            "high": float(np.clip(t.high + 0.5, 0, 1)),
            "p": float(t.p),
        },
        "sign_flip": {
            "p": float(sign_flip_p(means - 0.5)),
            "smallest": smallest_sign_flip_p(int(np.isfinite(means).sum())),
        },
        "bootstrap": {
            "low": float(low) if len(seeds) > 1 else nan,
            "high": float(high) if len(seeds) > 1 else nan,
            "resamples": analysis.bootstrap_resamples,
        },
        "naive": {"p": float(binomial_p(chosen, decisive)), "share": chosen / decisive if decisive else nan},
    }


def _decision(found: Mapping[str, Any], analysis: AnalysisConfig, is_planned: bool) -> tuple[str, str]:
    """(preferred, baseline preferred or not decided; why not)."""
    n, primary = found["n"], found["primary"]
    if not found["n_votes"]:
        return NOT_DECIDED, "there are no usable votes on this pair"
    if n < analysis.min_seeds:
        seeds = "one seed has" if n == 1 else f"{n} seeds have" if n else "no seed has"
        least = f"at least {analysis.min_seeds}"
        asked = f"the plan asks for {least}" if is_planned else f"{least} are asked for (analysis.min_seeds)"
        return NOT_DECIDED, f"{seeds} decisive votes, and {asked}"
    if not np.isfinite(primary["p"]):
        return NOT_DECIDED, primary["note"]
    if primary["p"] >= analysis.alpha:
        return NOT_DECIDED, "the interval holds one half, no preference"
    return (PREFERRED if primary["estimate"] > 0.5 else BASELINE_PREFERRED), ""


# ---------------------------------------------------------------- how many more seeds


def more_seeds(found: Mapping[str, Any], analysis: AnalysisConfig) -> dict[str, Any] | None:
    """How many further seeds give 80 % power for a preference of the published size, with these prompts and judges.

    The variance components are those of the votes, below 0 counted as 0; the t is taken as noncentral. None without
    components.

    Returns:
        k: further seeds; None where no number of seeds is enough, and then `limit` names what is short.
    """
    components, n = found["primary"]["components"], found["n"]
    if "seed" not in components or not np.isfinite(found["primary"]["se"]):
        return None
    effect = VOTES.share - 0.5
    values = {name: max(0.0, value) for name, value in components.items()}
    for k in range(max(0, analysis.min_seeds - n), MOST_SEEDS):
        if _power(values, n + k, found, effect, analysis.alpha) >= POWER:
            return {"k": k, "limit": "", "effect": VOTES.share, "power": POWER}
    short = max(("prompt", "judge"), key=lambda name: values.get(name, 0.0) / found[f"n_{name}s"])
    return {"k": None, "limit": f"{short}s", "effect": VOTES.share, "power": POWER}


def _power(values: Mapping[str, float], seeds: int, found: Mapping[str, Any], effect: float, alpha: float) -> float:
    prompts, judges, votes = found["n_prompts"], found["n_judges"], found["n_decisive"]
    shared = values.get("seed x prompt", 0.0) / (seeds * prompts) + values["rest"] / votes
    parts = {
        name: (values.get(name, 0.0) / size + shared, size - 1)
        for name, size in (("seed", seeds), ("prompt", prompts), ("judge", judges))
        if size > 1
    }
    variance = shared + sum(part - shared for part, _ in parts.values())
    df = max(1.0, variance**2 / sum(part**2 / size for part, size in parts.values()))
    critical = scipy_stats.t.ppf(1 - alpha / 2, df)
    return float(scipy_stats.nct.sf(critical, df, effect / np.sqrt(variance)))


# ---------------------------------------------------------------- subsets


def _groups(b: Ballots, labels: Sequence[str], alpha: float) -> list[dict[str, Any]]:
    """The primary estimate within each group of votes, with Holm's p over the groups."""
    names = np.array(labels, dtype=np.str_)
    rows: list[dict[str, Any]] = []
    for name in sorted(set(labels)):
        part = b.where(names == name)
        rows.append({"name": name, **_counts(part), **_short(part, alpha)})
    adjusted = holm([row["p"] for row in rows])
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def _short(b: Ballots, alpha: float) -> dict[str, Any]:
    """Estimate without its components, and wins with half the ties."""
    found = estimate(b, alpha)
    half = float(b.score.mean()) if len(b) else float("nan")
    return {key: found[key] for key in ("estimate", "low", "high", "p", "note")} | {"win_half": half}


def _filters(b: Ballots, analysis: AnalysisConfig, given: Mapping[str, int]) -> list[dict[str, Any]]:
    """The published sensitivity filters by their published rules; the primary analysis excludes nobody.

    `given`: each judge's votes in the whole record, so that a pair that is not used makes nobody's set partial.
    """
    fast = fast_judges(b, analysis.fast_seconds)
    ties = tie_judges(b, analysis.tie_share)
    partial = {judge for judge, n in given.items() if n < analysis.votes_per_judge}
    own = {judge for judge in analysis.experimenters if judge in b.judge}
    rows: list[tuple[str, Any]] = [
        ("all judges", np.ones(len(b), dtype=np.bool_)),
        ("models only", ~b.is_human),
        ("people only", b.is_human),
        (f"without people faster than {analysis.fast_seconds:g} s in the median", _without(b, fast)),
        (f"without judges with more than {analysis.tie_share:.0%} ties", _without(b, ties)),
        *([("without those who run the experiment", _without(b, own))] if own else []),
        (f"without judges of fewer than {analysis.votes_per_judge} votes", _without(b, partial)),
        ("without all of these judges", _without(b, fast | ties | partial | own)),
    ]
    found = [{"name": name, **_counts(b.where(kept)), **_short(b.where(kept), analysis.alpha)} for name, kept in rows]
    return [row if row["n_votes"] or not len(b) else row | {"note": "leaves no votes"} for row in found]


def _without(b: Ballots, judges: set[str]) -> ArrayLike:
    return ~np.isin(b.judge, sorted(judges)) if judges else np.ones(len(b), dtype=np.bool_)


def _agreement(b: Ballots, used: Sequence[Vote]) -> dict[str, Any]:
    """Between people and models, between judges, and of judges with themselves; and how often the left was chosen."""
    units = b.seed * (int(b.prompt.max()) + 1) + b.prompt if len(b) else b.prompt
    same, repeats = self_consistency(used)
    return {
        "people_and_models": asdict(agreement(b.where(b.is_human), b.where(~b.is_human))),
        "krippendorff_alpha": krippendorff_alpha(b.score, units),
        "repeats_same": same,
        "repeats": repeats,
        "left": _left(b.where(b.is_human & b.decisive), bool((~b.is_human).any())),
    }


def _left(b: Ballots, has_models: bool) -> dict[str, Any] | None:
    """How often people's decisive votes chose the left, beside the 95 % that chance gives; None without such votes.

    Models see both orders, and the vote is of neither side.
    """
    if not len(b):
        return None
    n_left = int(((b.score == 1) == b.treatment_left).sum())
    share, (low, high) = n_left / len(b), chance_range(len(b))
    return {
        "share": share,
        "n": len(b),
        "low": low,
        "high": high,
        "is_outside": not low <= share <= high,
        "has_models": has_models,
    }


def _other_pairs(used: Sequence[Vote], analysis: AnalysisConfig) -> list[dict[str, Any]]:
    """Other pairs of arms that have votes: secondary questions, with Holm's p over them."""
    primary = {analysis.baseline, analysis.treatment}
    pairs = sorted({tuple(sorted((v.arm_left, v.arm_right))) for v in used} - {tuple(sorted(primary))})  # type: ignore[type-var]
    rows = []
    for first, second in pairs:
        base, other = (second, first) if second == analysis.baseline else (first, second)
        b = ballots(used, base, other)
        rows.append({"baseline": base, "treatment": other, **_counts(b), **_short(b, analysis.alpha)})
    adjusted = holm([row["p"] for row in rows])
    return [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]
