"""What the numbers say, in plain words, and what so few seeds cannot say. Reads results, computes nothing new."""

from __future__ import annotations

from replication.console import plural
from replication.protocol.paper import PHASE_3
from replication.report.comparisons import Number, QuantityRow
from replication.report.description import Noise
from replication.report.preference import BASELINE_PREFERRED, PREFERRED, Estimate, Preference
from replication.report.questions import Effect, FactorialAnswer, LossAnswer
from replication.report.results import Results, Sentences
from replication.statistics.format import count, number, p_value, percent, signed
from replication.statistics.losses import DIFFERENT, EQUIVALENT


def sentences(r: Results) -> Sentences:
    return Sentences(
        headline=_headline(r),
        preference=preference_lines(r.preference),
        loss=loss_lines(r.loss),
        factorial=factorial_lines(r.factorial),
        noise=noise_lines(r.noise, r.loss),
        shows=_shows(r),
        cannot=_cannot(r),
    )


def _headline(r: Results) -> str:
    if not r.suite.cells_complete:
        return f"Nothing can be said: none of the {r.suite.cells_total} cells of this suite is complete."
    if not r.pairs_used:
        why = "only one arm was run" if len(r.suite.arms) < 2 else "no pair with the baseline passes the certificate"
        return f"No comparison can be made: {why}."
    answers = [preference_lines(r.preference)[0], *loss_lines(r.loss)[:1]]
    return " ".join(answers if r.analysis.primary == "preference" else reversed(answers))


def _p(p: Number) -> str:
    """'p = 0.0123', 'p < 0.0001' or 'no p'."""
    text = p_value(p)
    return "no p" if p is None else f"p {text}" if text.startswith("<") else f"p = {text}"


# ---------------------------------------------------------------- preference


def preference_lines(f: Preference | None) -> list[str]:
    """The first sentence is the decision."""
    if f is None:
        return ["Preference: no votes yet."]
    return [_decision(f), *_seeds_needed(f), *_other_tests(f), *_judges(f), *f.left_out]


def _decision(f: Preference) -> str:
    found = f"{percent(f.estimate, 1)} of {count(f.n_decisive)} decisive votes for {f.treatment}{_bounds(f.primary)}"
    if f.decision == PREFERRED:
        return f"Preference: {f.treatment} is preferred to {f.baseline} ({found}, p {p_value(f.p)})."
    if f.decision == BASELINE_PREFERRED:
        return f"Preference: {f.baseline} is preferred to {f.treatment} ({found}, p {p_value(f.p)})."
    return f"Preference: not decided: {f.why}{f' ({found})' if f.n_decisive else ''}."


def _bounds(e: Estimate) -> str:
    if e.low is None:
        return ""
    scope = f", {e.note}" if e.note else " over seeds, prompts and judges"
    return f", {percent(e.level)} interval {percent(e.low, 1)} to {percent(e.high, 1)}{scope}"


def _seeds_needed(f: Preference) -> list[str]:
    more = f.more_seeds
    if more is None:
        return []
    power, size = percent(more.power), percent(more.effect, 1)
    found = f"a power of {power} to find a preference of the published size ({size})"
    if more.k is None:
        return [f"No number of further seeds would give {found} with these {more.limit}: more {more.limit} would."]
    if not more.k:
        return [f"These seeds, prompts and judges had {found}: a smaller one may be there."]
    return [f"{_more_seeds(more.k)} would give {found}, with as many prompts and judges."]


def _other_tests(f: Preference) -> list[str]:
    """Each with its scope."""
    if not (f.per_seed and f.sign_flip and f.naive):
        return []
    shares = [row.estimate for row in f.per_seed.rows if row.estimate is not None]
    above, at = sum(share > 0.5 for share in shares), shares.count(0.5)
    even = f", {at} at it" if at else ""
    lines = [
        f"{above} of {len(shares)} seeds lie above one half{even}; t over seeds p {p_value(f.per_seed.p)}, "
        f"{f.per_seed.scope}; exact sign flips p {p_value(f.sign_flip.p)} (with so many seeds the smallest there "
        f"is is {p_value(f.sign_flip.smallest)}).",
        f"{count(f.n_ties)} of {count(f.n_votes)} votes are ties; wins and half the ties are "
        f"{percent(f.win_half.estimate, 1)}{_bounds(f.win_half)}.",
    ]
    if f.naive.p is not None:
        lines.append(
            f"Counted as the published p counts, each vote as independent, p would be {p_value(f.naive.p)}: not to be "
            "believed, because votes on one seed, prompt or by one judge are alike."
        )
    return lines


def _judges(f: Preference) -> list[str]:
    a, lines = f.agreement, []
    both = a.people_and_models
    if both.n_prompts:
        r = f", correlation {number(both.pearson, 2)}" if both.pearson is not None else ""
        lines.append(
            f"People and models have the same majority on {both.same_majority} of {both.n_prompts} prompts{r}."
        )
    if a.krippendorff_alpha is not None:
        lines.append(f"Agreement between judges: Krippendorff's alpha {number(a.krippendorff_alpha, 2)}.")
    if a.repeats:
        lines.append(f"Judges repeated their own choice in {a.repeats_same} of {a.repeats} pairs shown again.")
    return lines


# ---------------------------------------------------------------- loss


def loss_lines(loss: LossAnswer | None) -> list[str]:
    """Whether the loss is equivalent; the first sentence is the answer."""
    if loss is None:
        return []
    n, margin = loss.n, f"{loss.margin_nats:g} nats"
    what = f"Validation loss of {loss.arm} beside {loss.baseline}:"
    if not n:
        return [f"{what} not decided: no certified pair has both losses."]
    if n == 1:
        return [
            f"{what} not decided: {signed(loss.mean, 4)} nats at one seed, which has no interval; "
            f"{_more_seeds(loss.more_seeds)} to reach the {loss.min_seeds} that a verdict needs."
        ]
    found = f"mean difference {_interval(loss, loss.interval_level)}, {n} seeds"
    if not loss.enough_seeds:
        return [
            f"{what} not decided: {n} of the {loss.min_seeds} seeds that a verdict needs ({found}).",
            *_seeds_for_equivalence(loss),
        ]
    if loss.verdict == EQUIVALENT:
        return [f"{what} equivalent within {margin} ({found}).", _tests(loss)]
    if loss.verdict == DIFFERENT:
        side = "higher" if (loss.mean or 0) > 0 else "lower"
        return [f"{what} {side} by more than {margin} ({found}).", _tests(loss)]
    more = _more_seeds(loss.more_seeds)
    return [f"{what} not decided within {margin}: {more} ({found}).", *_seeds_for_equivalence(loss), _tests(loss)]


def _interval(found: LossAnswer | Effect, level: float) -> str:
    """'+0.0041 nats, 90 % interval -0.0021 to +0.0103'."""
    bounds = f"{signed(found.low, 4)} to {signed(found.high, 4)}"
    return f"{signed(found.mean, 4)} nats, {percent(level)} interval {bounds}"


def _more_seeds(k: int | None) -> str:
    if k is None:
        return "how many more seeds are needed is not known"
    if not k:
        return "not for lack of seeds"
    return f"{k} more {'seed' if k == 1 else 'seeds'}"


def _seeds_for_equivalence(loss: LossAnswer) -> list[str]:
    """How many more seeds, and how little is known of that."""
    further, margin = loss.further, f"{loss.margin_nats:g} nats"
    if further is None or further.k is None:
        return ["How many seeds equivalence would need cannot be told from these."]
    spread = f"standard deviation over seeds {number(further.sd, 4)} nats"
    if not further.k:
        return [
            f"At no true difference these {loss.n} seeds had a power of 80 % to show equivalence ({spread}): "
            f"where they do not, the true difference may lie near {margin} itself."
        ]
    bound = f"{number(further.sd_upper, 4)} nats"
    more = f"{further.k_upper} more" if further.k_upper is not None else "more than can be counted"
    return [
        f"At no true difference, {_more_seeds(further.k)} would give a power of 80 % to show equivalence ({spread}; "
        f"so few seeds say little of it: at its upper 80 % bound, {bound}, {more})."
    ]


def _tests(loss: LossAnswer) -> str:
    return (
        f"Two one-sided t tests against {loss.margin_nats:g} nats: {_p(loss.p)}. Of no difference at all: "
        f"{_p(loss.p_no_difference)} by t test, {_p(loss.p_sign_flip)} by exact sign flips."
    )


def noise_lines(noise: Noise | None, loss: LossAnswer | None) -> list[str]:
    """How far rounding alone moves the loss, beside the margin: one sentence, and none in a suite of one arm."""
    if loss is None:
        return []
    again = "replicate bench noise DIR measures it, where DIR is the folder of this report"
    if noise is None or noise.largest_nats is None:
        return [
            f"How far rounding alone (another machine, other micro-batches) moves this loss is not measured: {again}."
        ]
    if not noise.is_of_this_suite:
        return [f"How far rounding alone moves this loss was measured under another config than these cells': {again}."]
    return [
        f"Rounding alone moved this loss by up to {noise.largest_nats:.2g} nats, beside the margin of "
        f"{loss.margin_nats:g} nats: the same cell cut otherwise ({', '.join(noise.cuts)}; {', '.join(noise.cells)})."
    ]


def factorial_lines(factorial: FactorialAnswer | None) -> list[str]:
    """A sentence for each effect; none in a suite that is no 2x2."""
    if factorial is None:
        return []
    if not factorial.n:
        return ["The 2x2 cannot be read: at no seed are all four arms complete and certified."]
    lines = []
    for effect in factorial.effects:
        found = f"{_interval(effect, factorial.interval_level)}, {_p(effect.p)} before correction"
        if effect.note:
            found = f"{signed(effect.mean, 4)} nats ({effect.note})"
        lines.append(f"{effect.name} on the loss: {found}.")
    return lines


# ---------------------------------------------------------------- what these seeds show


def _shows(r: Results) -> list[str]:
    suite, final = r.suite, r.quantity("final_val_loss")
    lines = [f"{suite.cells_complete} of {suite.cells_total} cells are complete."]
    if r.pairs_used:
        others = {"predicted-token entropy": r.quantity("entropy_predicted_tokens"),
                  "gradient norm": r.quantity("grad_norm")}  # fmt: skip
        lines += [_arm_line(arm, suite.baseline, final, others) for arm in suite.arms[1:]]
        if final.baseline_range is not None:
            lines.append(
                f"For scale: the {suite.baseline} seeds alone differ by up to {number(final.baseline_range, 4)} nats "
                "in final validation loss."
            )
    lines += _budget_lines(r)
    if r.pairs_refused:
        verb = "is" if len(r.pairs_refused) == 1 else "are"
        lines.append(f"{plural(len(r.pairs_refused), 'pair')} {verb} refused and not used; see the certificate.")
    return lines


def _arm_line(arm: str, baseline: str, final: QuantityRow, others: dict[str, QuantityRow]) -> str:
    loss = final.arm(arm)
    if not loss.n:
        return f"{arm}: no certified pair with {baseline}."
    values = " and ".join(signed(d, 4) for d in loss.differences if d is not None) if loss.n <= 3 else ""
    each = f"{values} nats" if values else f"{signed(loss.mean, 4)} nats in the mean of {loss.n} seeds"
    sides = "; ".join(f"{name} {row.arm(arm).side}" for name, row in others.items())
    return f"{arm} against {baseline}: final validation loss {each} ({loss.side}); {sides}."


def _budget_lines(r: Results) -> list[str]:
    """How often the claim that the total gradient budget is preserved fails, where the gain acts."""
    parts = []
    for arm in r.suite.arms:
        rows = [row for row in r.gain if row.arm == arm and row.applied and row.n_measured]
        if rows:
            low, high = min(row.n_failing for row in rows), max(row.n_failing for row in rows)
            failing = f"{low}" if low == high else f"{low} to {high}"
            parts.append(f"{arm} {failing} of {max(row.n_measured for row in rows)}")
    if not parts:
        return []
    return [
        "'The total gradient budget is preserved' (mean gain after the clamp within 1 % of 1) fails in this many "
        f"logged steps of a run where the token gain acts: {'; '.join(parts)}."
    ]


# ---------------------------------------------------------------- what they cannot


def _cannot(r: Results) -> list[str]:
    suite, lines = r.suite, []
    if suite.n_paired:
        lines.append(_significance(suite.n_paired, suite.smallest_sign_flip_p or 1.0))
    lines.append("A difference that cannot be told from zero is not equality: that takes the equivalence test.")
    if r.preference is None:
        lines.append(
            "No judgements of preference were made: whether anyone would prefer one arm's completions is open."
        )
    n_tests = sum(len(q.pairs) for q in r.quantities)
    if suite.n_paired and n_tests > 1:
        lines.append(
            f"{n_tests} differences are listed under 'Paired differences'. They are exploratory, and their intervals "
            "are not corrected for being many; the secondary questions are."
        )
    model = f"a model of {count(suite.parameters)} parameters" if suite.parameters else "another model"
    tokens = f" and {count(suite.tokens)} tokens" if suite.tokens else ""
    published = (
        f"; the published comparison is one seed of about {PHASE_3.parameters / 1e9:g} billion parameters and "
        f"{PHASE_3.tokens / 1e9:.2f} billion tokens on other data: directions can be compared with it, sizes hardly"
    )
    lines.append(f"This is {model}{tokens}{published if r.published.applies else ''}.")
    return lines


def _significance(n: int, smallest: float) -> str:
    if n == 1:
        return "With one seed there is no interval, and the smallest p that an exact sign-flip test can reach is 1."
    text = f"With {n} seeds the smallest p that an exact sign-flip test can reach is {smallest:.2g}"
    if smallest > 0.05:
        return f"{text}: even the same sign at every seed shows nothing at the usual 5 % by that test."
    return f"{text}."
