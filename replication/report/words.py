"""What the numbers say, in plain words, and what so few seeds cannot say. Reads results, computes nothing new."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from replication.console import plural
from replication.protocol.paper import PHASE_3
from replication.report import beside_loss, completions, sweeps
from replication.report.comparisons import Number, Row
from replication.report.decisions import not_rejected
from replication.report.description import Noise
from replication.report.preference import BASELINE_PREFERRED, PREFERRED, Estimate, Preference
from replication.report.questions import Effect, LossAnswer
from replication.report.results import Results
from replication.statistics.format import count, number, p_value, percent, points, signed
from replication.statistics.seeds import DIFFERENT, EQUIVALENT, NOT_DECIDED


def sentences(r: Results) -> Row:
    """The words at the top of the report: a headline, the primary question first, and lists of sentences."""
    preference, loss = preference_lines(r.preference), list(_loss(r))
    preference += completions.lines(r.robustness, r.analysis) if r.robustness else []
    if not r.suite.cells_complete:
        headline = f"Nothing can be said: none of the {r.suite.cells_total} cells of this suite is complete."
    elif not r.pairs_used:
        why = "only one arm was run" if len(r.suite.arms) < 2 else "no pair with the baseline passes the certificate"
        headline = f"No comparison can be made: {why}."
    else:
        answers = [preference[0], *loss[:1]]
        headline = " ".join(answers if r.analysis.primary == "preference" else reversed(answers))
    return Row(
        headline=headline,
        preference=preference + _looks(r, "preference"),
        loss=loss + _looks(r, "loss_equivalence"),
        factorial=list(_factorial(r)),
        carries=list(_carries(r)),
        rates=list(sweeps.lines(r.sweeps)),
        noise=[_noise(r.noise, r.loss), *_beside_loss(r, r.loss)] if r.loss else [],
        shows=list(_shows(r)),
        cannot=list(_cannot(r)),
    )


def _looks(r: Results, name: str) -> list[str]:
    return r.decision(name).looks if r.decisions else []


def preference_lines(f: Preference | None) -> list[str]:
    """The first sentence is the decision."""
    return [*_preference(f), *f.left_out] if f else ["Preference: no votes yet."]


def _preference(f: Preference) -> Iterator[str]:
    found = f"{percent(f.estimate, 1)} of {count(f.n_decisive)} decisive votes for {f.treatment}{_bounds(f.primary)}"
    if f.decision in (PREFERRED, BASELINE_PREFERRED):
        won, lost = (f.treatment, f.baseline) if f.decision == PREFERRED else (f.baseline, f.treatment)
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
    if f.per_seed and f.sign_flip and f.naive:  # each with its scope
        shares = np.array([row["estimate"] for row in f.per_seed.rows if row["estimate"] is not None], dtype=np.float64)
        above, at = (shares > 0.5).sum(), (shares == 0.5).sum()
        even = f", {at} at it" if at else ""
        yield (
            f"{above} of {len(shares)} seeds lie above one half{even}; t over seeds p {p_value(f.per_seed.p)}, "
            f"{f.per_seed.scope}; exact sign flips p {p_value(f.sign_flip['p'])}, conditional likewise and no test of "
            f"preference (with so many seeds the smallest there is is {p_value(f.sign_flip['smallest'])})."
        )
        yield (
            f"{count(f.n_ties)} of {count(f.n_votes)} votes are ties; wins and half the ties are "
            f"{percent(f.win_half.estimate, 1)}{_bounds(f.win_half)}."
        )
        if f.naive["p"] is not None:
            yield (
                f"Counted as the published p counts, each vote as independent, p would be {p_value(f.naive['p'])}: not "
                "to be believed, because votes on one seed, prompt or by one judge are alike."
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
        r = f", correlation {number(both['pearson'], 2)}" if both["pearson"] is not None else ""
        yield f"People and models have the same majority on {same}{r}."
    if f.agreement.krippendorff_alpha is not None:
        yield f"Agreement between judges: Krippendorff's alpha {number(f.agreement.krippendorff_alpha, 2)}."
    if n := f.agreement.repeats:
        yield f"Judges repeated their own choice in {f.agreement.repeats_same} of {n} pairs shown again."


def _bounds(e: Estimate) -> str:
    if e.low is None:
        return ""
    scope = f", {e.note}" if e.note else " over seeds, prompts and judges"
    return f", {percent(e.level)} interval {percent(e.low, 1)} to {percent(e.high, 1)}{scope}"


def _loss(r: Results) -> Iterator[str]:
    """Whether the loss is equivalent; the first sentence is the decision."""
    loss = r.loss
    if loss is None:
        return
    n, margin, decision = loss.n, f"{loss.margin_nats:g} nats", r.decision(loss.id)
    what = f"Validation loss of {loss.arm} beside {loss.baseline}:"
    found = f"mean difference {_interval(loss, loss.interval_level)}, {n} seeds"
    if not n:
        yield f"{what} not decided: no certified pair has both losses."
    elif n == 1:
        one = f"{signed(loss.mean, 4)} nats at one seed, which has no interval"
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
    if loss.enough_seeds:
        yield (
            f"Two one-sided t tests against {margin}: {_p(loss.p)}. Of no difference at all: "
            f"{_p(loss.p_no_difference)} by t test, {_p(loss.p_sign_flip)} by exact sign flips."
        )


def _p(p: Number) -> str:
    """'p = 0.0123', 'p < 0.0001' or 'no p'."""
    text = p_value(p)
    return "no p" if p is None else f"p {text}" if text.startswith("<") else f"p = {text}"


def _interval(found: LossAnswer | Effect, level: float) -> str:
    """'+0.0041 nats, 90 % interval -0.0021 to +0.0103'."""
    bounds = f"{signed(found.low, 4)} to {signed(found.high, 4)}"
    return f"{signed(found.mean, 4)} nats, {percent(level)} interval {bounds}"


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
        f"equivalence (standard deviation over seeds {number(study.sd, 4)} nats; so few seeds say little of it: at its "
        f"upper 80 % bound, {number(study.sd_upper, 4)} nats, {upper})."
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


def _factorial(r: Results) -> Iterator[str]:
    """A sentence for each effect; none in a suite that is no 2x2."""
    factorial = r.factorial
    if factorial is not None and not factorial.n:
        yield "The 2x2 cannot be read: at no seed are all four arms complete and certified."
    elif factorial is not None:
        for effect in factorial.effects:
            decision = r.decision(effect.id)
            corrected = f", {p_value(decision.p_holm)} by Holm's method" if decision.p_holm is not None else ""
            found = f"{_interval(effect, factorial.interval_level)}, {_p(effect.p)}{corrected}: {decision.verdict}"
            alone = f"{signed(effect.mean, 4)} nats ({effect.note})"
            yield f"{effect.name} on the loss: {alone if effect.note else found}."
            yield from decision.looks


def _shows(r: Results) -> Iterator[str]:
    suite, final = r.suite, r.quantity("final_val_loss")
    yield f"{suite.cells_complete} of {suite.cells_total} cells are complete."
    if r.pairs_used:
        entropy, norm = r.quantity("entropy_predicted_tokens"), r.quantity("grad_norm")
        for arm in suite.arms[1:]:
            loss = final.arm(arm)
            if not loss.n:
                yield f"{arm}: no certified pair with {suite.baseline}."
                continue
            each = " and ".join(signed(d, 4) for d in loss.differences if d is not None) + " nats"
            mean = f"{signed(loss.mean, 4)} nats in the mean of {loss.n} seeds"
            yield (
                f"{arm} against {suite.baseline}: final validation loss {each if loss.n <= 3 else mean} ({loss.side}); "
                f"predicted-token entropy {entropy.arm(arm).side}; gradient norm {norm.arm(arm).side}."
            )
        if final.baseline_range is not None:
            yield (
                f"For scale: the {suite.baseline} seeds alone differ by up to {number(final.baseline_range, 4)} nats "
                "in final validation loss."
            )
    failing = []
    for arm in suite.arms:
        rows = [row for row in r.gain if row["arm"] == arm and row["applied"] and row["n_measured"]]
        if rows:
            n_failing, n_measured = np.array([[row["n_failing"], row["n_measured"]] for row in rows], dtype=np.int64).T
            low, high = n_failing.min(), n_failing.max()
            failing.append(f"{arm} {low if low == high else f'{low} to {high}'} of {n_measured.max()}")
    if failing:
        yield (
            "'The total gradient budget is preserved' (mean gain after the clamp within 1 % of 1) fails in this many "
            f"logged steps of a run where the token gain acts: {'; '.join(failing)}."
        )
    if r.pairs_refused:
        refused = plural(len(r.pairs_refused), "pair is", "pairs are")
        yield f"{refused} refused and not used; see the certificate."


def _cannot(r: Results) -> Iterator[str]:
    suite, n = r.suite, r.suite.n_paired
    if n == 1:
        yield "With one seed there is no interval, and the smallest p that an exact sign-flip test can reach is 1."
    elif n:
        smallest = suite.smallest_sign_flip_p or 1.0
        nothing = ": even the same sign at every seed shows nothing at the usual 5 % by that test"
        yield (
            f"With {n} seeds the smallest p that an exact sign-flip test can reach is {smallest:.2g}"
            f"{nothing if smallest > 0.05 else ''}."
        )
    yield "A difference that cannot be told from zero is not equality: that takes the equivalence test."
    if r.preference is None:
        yield "No judgements of preference were made: whether anyone would prefer one arm's completions is open."
    n_tests = sum(len(q.pairs) for q in r.quantities)
    if n and n_tests > 1:
        yield (
            f"{n_tests} differences are listed under 'Paired differences'. They are exploratory, and their intervals "
            "are not corrected for being many; the secondary questions are."
        )
    model = f"a model of {count(suite.parameters)} parameters" if suite.parameters else "another model"
    tokens = f" and {count(suite.tokens)} tokens" if suite.tokens else ""
    published = (
        f"; the published comparison is one seed of about {PHASE_3.parameters / 1e9:g} billion parameters and "
        f"{PHASE_3.tokens / 1e9:.2f} billion tokens on other data: directions can be compared with it, sizes hardly"
    )
    yield f"This is {model}{tokens}{published if r.published['applies'] else ''}."
