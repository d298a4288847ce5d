"""The verdict in plain words. Reads results, computes nothing new."""

from __future__ import annotations

from collections.abc import Iterator
from operator import eq, gt

from replication.console import plural
from replication.report import beside_loss, completions, sweeps
from replication.report.comparisons import Row
from replication.report.decisions import not_rejected
from replication.report.description import Noise
from replication.report.preference import BASELINE_PREFERRED, PREFERRED, Estimate, Preference
from replication.report.questions import LossAnswer
from replication.report.results import Results
from replication.statistics.format import arm_name, between, count, p_value, percent, points, rounded, share, shares
from replication.statistics.seeds import DIFFERENT, EQUIVALENT, NOT_DECIDED


def sentences(r: Results) -> Row:
    """The words at the top of the report: a headline, the primary question first, and lists of sentences."""
    preference, loss = preference_lines(r.preference), list(_loss(r))
    preference += completions.lines(r.robustness, r.analysis) if r.robustness else []
    answers: list[Row] = []
    if not r.suite.cells_complete:
        headline = f"Nothing can be said: none of the {r.suite.cells_total} cells of this suite is complete."
    elif not r.pairs_used or r.loss is None:
        why = "only one arm was run" if len(r.suite.arms) < 2 else "no pair with the baseline passes the certificate"
        headline = f"No comparison can be made: {why}."
    else:
        both = r.decisions[:2]  # the primary one first
        lines = [(loss if d.id == r.loss.id else preference)[0] for d in both]
        headline = " ".join(lines)
        short = (line.replace(" not decided:", "", 1) for line in lines)
        answers = [Row(outcome=OUTCOMES[d.outcome], line=line) for d, line in zip(both, short, strict=True)]
    return Row(
        headline=headline,
        answers=answers,
        preference=preference + _looks(r, "preference"),
        loss=loss + _looks(r, "loss_equivalence"),
        carries=list(_carries(r)),
        rates=list(sweeps.lines(r.sweeps)),
        noise=[_noise(r.noise, r.loss), *_beside_loss(r, r.loss)] if r.loss else [],
    )


OUTCOMES = {PREFERRED: "Win", BASELINE_PREFERRED: "Baseline wins", EQUIVALENT: "Tie", DIFFERENT: "No tie"}
OUTCOMES[NOT_DECIDED] = "Not decided"


def _looks(r: Results, name: str) -> list[str]:
    return r.decision(name).looks if r.decisions else []


def preference_lines(f: Preference | None) -> list[str]:
    """The first sentence is the decision."""
    return [*_preference(f), *f.left_out] if f else ["Preference: no votes yet."]


def _preference(f: Preference) -> Iterator[str]:
    treatment, baseline = arm_name(f.treatment), arm_name(f.baseline)
    estimate = share(f.estimate, f.low, f.high)
    found = f"{estimate} of {count(f.n_decisive)} decisive votes for {treatment}{_bounds(f.primary)}"
    if f.decision in (PREFERRED, BASELINE_PREFERRED):
        won, lost = (treatment, baseline) if f.decision == PREFERRED else (baseline, treatment)
        yield f"Preference: {won} is preferred to {lost} ({found}, p {p_value(f.p)})."
    else:
        yield f"Preference: not decided: {f.why}{f' ({found})' if f.n_decisive else ''}."
    if f.decision == NOT_DECIDED and (more := f.more_seeds):
        size = percent(more.effect, 1)
        power = f"a power of {percent(more.power)} to find a preference of the published size ({size})"
        if more.seeds is None:
            yield f"No number of seeds would give a new study {power} with these {more.limit}: more {more.limit} would."
        else:
            yield f"A new study of {more.seeds} seeds, with as many prompts and judges, would have {power}."
    if f.per_seed:
        decisive = [seed for seed in f.outcomes["seed"] if seed.wins + seed.losses]
        above, at = (sum(test(seed.wins, seed.losses) for seed in decisive) for test in (gt, eq))
        yield (
            f"{above} of {len(decisive)} seeds lie above one half{f', {at} at it' if at else ''}. "
            f"{count(f.n_ties)} of {count(f.n_votes)} votes are ties; wins and half the ties are "
            f"{share(f.win_half.estimate, f.win_half.low, f.win_half.high)}{_bounds(f.win_half)}."
        )
    for pair in f.alike:
        yield (
            f"{' and '.join(pair.judges)} vote alike beyond chance ({pair.same} of {pair.shared} votes {pair.where}, p "
            f"{p_value(pair.p)} for all pairs of judges together): one judge under two names, or copied votes? They "
            "count as one judge."
        )
    both = f.agreement.people_and_models
    if both["n_prompts"]:
        same = f"{both['same_majority']} of {both['n_prompts']} prompts"
        r = f", correlation {both['pearson']:.2f}" if both["pearson"] is not None else ""
        yield f"People and models have the same majority on {same}{r}."
    if f.agreement.krippendorff_alpha is not None:
        yield f"Agreement between judges: Krippendorff's alpha {f.agreement.krippendorff_alpha:.2f}."
    if n := f.agreement.repeats:
        yield f"Judges repeated their own choice in {f.agreement.repeats_same} of {n} pairs shown again."


def _bounds(e: Estimate) -> str:
    if e.low is None:
        return ""
    scope = f", {e.note}" if e.note else " over seeds, prompts and judges"
    return f", {percent(e.level)} interval {shares(e.low, e.high)}{scope}"


def _loss(r: Results) -> Iterator[str]:
    """Whether the loss is equivalent; the first sentence is the decision."""
    loss = r.loss
    if loss is None:
        return
    n, margin, decision = loss.n, f"{loss.margin_nats:g} nats", r.decision(loss.id)
    what = f"Validation loss of {arm_name(loss.arm)} beside {arm_name(loss.baseline)}:"
    found = f"mean difference {_interval(loss, loss.interval_level)}, {n} seeds"
    if not n:
        yield f"{what} not decided: no certified pair has both losses."
    elif n == 1:
        one = f"{rounded(loss.mean, loss.low, loss.high)} nats at one seed, which has no interval"
        lacking = f"{plural(loss.more_seeds, 'more seed')} to reach the {loss.min_seeds} that a verdict needs"
        yield f"{what} not decided: {one}; {lacking}."
    elif decision.why:
        yield f"{what} not decided: {decision.why} ({found})."
    elif loss.verdict == EQUIVALENT:
        yield f"{what} equivalent within {margin} ({found})."
    elif loss.verdict == DIFFERENT:
        yield f"{what} {'higher' if (loss.mean or 0) > 0 else 'lower'} by more than {margin} ({found})."
    else:
        yield f"{what} not shown to be equivalent within {margin}: {not_rejected(decision, loss.alpha)} ({found})."
    if loss.verdict == NOT_DECIDED and n > 1:
        yield _seeds_for_equivalence(loss)


def _interval(found: LossAnswer, level: float) -> str:
    """'+0.0041 nats, 90 % interval -0.0021 to +0.0103'."""
    estimate = rounded(found.mean, found.low, found.high)
    return f"{estimate} nats, {percent(level)} interval {between(found.low, found.high)}"


def _seeds_for_equivalence(loss: LossAnswer) -> str:
    """How far away equivalence is; of a mean within the margin, what it would take in a new study."""
    margins, study = abs(loss.mean or 0.0) / loss.margin_nats, loss.further
    if margins >= 1:
        implausible = ": equivalence is implausible" if margins >= 2 else ", outside of what would be equivalent"
        return f"The mean difference is {margins:.2g} margins away from zero{implausible}."
    if study is None or study.seeds is None:
        return "How many seeds equivalence would need cannot be told from these."
    upper = "more than can be counted" if study.seeds_upper is None else f"{study.seeds_upper}"
    return (
        f"At no true difference, a new study of {plural(study.seeds, 'seed')} would have a power of 80 % to show "
        f"equivalence (standard deviation over seeds {study.sd:.2g} nats; so few seeds say little of it: at its "
        f"upper 80 % bound, {study.sd_upper:.2g} nats, {upper})."
    )


def _noise(noise: Noise | None, loss: LossAnswer) -> str:
    """How far rounding alone moves the loss, beside the margin."""
    again = "replicate bench noise DIR measures it, where DIR is the folder of this report"
    if noise is None or noise.largest_nats is None:
        return (
            f"How far rounding alone (another machine, other micro-batches) moves this loss is not measured: {again}."
        )
    if not noise.is_of_this_suite:
        return f"How far rounding alone moves this loss was measured under another config than these cells': {again}."
    return (
        f"Rounding alone moved this loss by up to {noise.largest_nats:.2g} nats, beside the margin of "
        f"{loss.margin_nats:g} nats: the same cell cut otherwise ({', '.join(noise.cuts)}; {', '.join(noise.cells)})."
    )


def _beside_loss(r: Results, loss: LossAnswer) -> list[str]:
    unsmoothed = r.quantity(f"{loss.loss}_unsmoothed").arm(loss.arm)
    return list(beside_loss.lines(r.beside_loss, loss, unsmoothed, r.analysis)) if r.beside_loss else []


def _carries(r: Results) -> Iterator[str]:
    """A sentence for each effect on the preference; none where the votes are on one pair and no plan asks."""
    f = r.preference_factorial
    if f is None:
        return
    if f.effects[0].mean is None:
        yield f"Which change carries the preference is not known: {f.note}."
        return
    decided = {decision.id: decision for decision in r.decisions}
    for e in f.effects:
        bounds = f"{percent(f.interval_level)} interval {points(e.low)} to {points(e.high)}"
        over = f.note or f"over {f.n} seeds, {f.n_prompts} prompts and {f.n_judges} judges"
        found = f"{points(e.mean)} points of the share of decisive votes ({bounds}, {over}), p {p_value(e.p)}"
        decision = decided.get(e.id)
        corrected = f", {p_value(decision.p_holm)} by Holm's method" if decision and decision.p_holm is not None else ""
        yield f"{e.name} on the preference: {found}{corrected}{f': {decision.verdict}' if decision else ''}."
        yield from decision.looks if decision else ()
    if not f.is_registered:
        yield "No plan asked for these effects on the preference (analysis.preference_factorial): they are exploratory."
