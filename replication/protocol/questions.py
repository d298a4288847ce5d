"""The questions of a plan with their tests, and its exclusion rules, in words. Every text here is hashed with the plan.

A changed word makes the same plan another one; so words are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from replication.config import AnalysisConfig, DivergedRule
from replication.config.study import Study
from replication.errors import UserError

LOSSES = {
    "late_val_loss": "validation loss (mean of the last {k} validations)",
    "final_val_loss": "validation loss at the last step",
}
CROSSED = (
    "with crossed random effects of seed, prompt and cluster of judges, and the interaction of seed and prompt; "
    "two-sided at {:g}. A person is a cluster, and so are all models of one vendor; judges whose votes are the same "
    "beyond chance (at 1 %, all pairs of judges together, and in 80 % of what both judged; "
    "replication/statistics/alike.py) are one. The variance v of the mean is by Henderson's first method, and never "
    "below v_f, what the clusters of one factor f alone make of it: SS_f sum(n_k^2) / (N^2 - sum(n_k^2)) / N, of the "
    "sum of squares SS_f between its d_f + 1 levels of n_k of N votes. Degrees of freedom are Satterthwaite's with a "
    "correction for few levels, v^2 / sum_f(v_f^2 (1 + 2 / d_f) / d_f), and at least the smallest d_f, at most twice "
    "that and N - 1. With models of fewer than four vendors the result is, as to models, conditional on these vendors."
)
"""What both tests of votes have in common, redone from these words by tests/statistics/test_crossed.py."""
ALL_FOUR = {(False, False), (True, False), (False, True), (True, True)}


@dataclass(frozen=True)
class Question:
    """One question that the votes or the losses answer."""

    id: str
    role: str  # primary or secondary
    question: str
    test: str
    beside: tuple[str, ...]  # supplementary figures, which decide nothing


def questions(
    a: AnalysisConfig, arms: Sequence[str], n_seeds: int, gains: Mapping[str, tuple[bool, bool]]
) -> tuple[Question, ...]:
    """The primary question first, then the secondary ones, of a resolved section.

    Gains say of each arm but controls whether (token gain, layer gain) act; four arms with all four make the 2x2.
    """
    loss = LOSSES[a.loss].format(k=a.late_validations)
    smallest = min(1.0, 2 / 2**n_seeds)
    sign_flip = f"exact sign-flip test over the seeds (with {n_seeds} seeds its smallest p is {smallest:.2g})"
    preference = Question(
        "preference",
        "secondary",
        f"Do judges prefer the text of `{a.treatment}` to that of `{a.baseline}`? Measured by the share of "
        f"decisive votes for `{a.treatment}`; ties are counted, shown, and left out of the share.",
        f"t test of a share of one half in a model with crossed random effects of seed, prompt and judge, and "
        "the interaction of seed and prompt, over the decisive votes, with "
        f"Satterthwaite's degrees of freedom; two-sided at {a.alpha:g}.",
        (
            "t test over the seeds' shares, conditional on these prompts and judges",
            sign_flip,
            f"bootstrap of three levels (seeds, prompts, clusters of judges), {a.bootstrap_resamples:,} resamples, "
            f"seed {a.bootstrap_seed}",
        ),
    )
    equivalence = Question(
        "loss_equivalence",
        "secondary",
        f"Is the {loss} of `{a.treatment}` equivalent to that of `{a.baseline}`, within "
        f"{a.margin_nats:g} nats on either side?",
        f"Difference `{a.treatment}` - `{a.baseline}` at each seed; two one-sided t tests over the seeds, "
        f"against -{a.margin_nats:g} and +{a.margin_nats:g} nats, each at {a.alpha:g}. Equivalent where both reject: "
        f"where the {1 - 2 * a.alpha:.0%} interval of the mean lies within the margin. That no difference is found is "
        "not equivalence.",
        (f"t test of no difference over the seeds, two-sided at {a.alpha:g}", sign_flip),
    )
    first, second = (equivalence, preference) if a.primary == "loss" else (preference, equivalence)
    crossed = gains if len(gains) == 4 and set(gains.values()) == ALL_FOUR else {}
    swept = {arm for of_sweep in (a.sweeps or {}).values() for arm in of_sweep}
    others = _differences(a, [arm for arm in arms if arm not in {*crossed, *swept}], loss)
    factorial = _factorial(a, loss) if crossed else []
    if a.preference_factorial and not crossed:
        raise UserError(
            "analysis.preference_factorial: the suite's arms are no 2x2 of token gain and layer gain; leave it out, or "
            "take the arms baseline, token_gain, layer_gain and both"
        )
    return (replace(first, role="primary"), second, *factorial, *others, *_best_rates(a, loss))


def _factorial(a: AnalysisConfig, loss: str) -> list[Question]:
    halved = "arms with it minus arms without, halved"
    both_less_each = "both minus token gain alone minus layer gain alone plus neither"
    words = (
        ("main_effect_token_gain", "the main effect of token gain", halved),
        ("main_effect_layer_gain", "the main effect of layer gain", halved),
        ("interaction", "the interaction of the two", both_less_each),
    )
    of_loss = [
        Question(
            f"{name}_loss",
            "secondary",
            f"Is {what} on the {loss} other than zero?",
            f"The contrast within each seed ({contrast}), so that the seed is the block; t test over the "
            f"seeds, two-sided at {a.alpha:g}.",
            (),
        )
        for name, what, contrast in words
    ]
    of_preference = [
        Question(
            f"preference_{name.removeprefix('main_effect_')}",
            "secondary",
            f"Is {what} on the preference other than zero, in the share of decisive votes?",
            "Decisive votes between any two of the four arms at one seed, as a linear function of how the two differ "
            "in token gain, layer gain and their product (arms as +-1/2 in each gain), by least squares; t test of a "
            f"coefficient b, as the mean of b + N w e over N votes with weights w and residuals e, "
            f"{CROSSED.format(a.alpha)}",
            (),
        )
        for name, what, _ in words
        if a.preference_factorial
    ]
    return of_loss + of_preference


def _differences(a: AnalysisConfig, arms: Sequence[str], loss: str) -> list[Question]:
    return [
        Question(
            f"loss_difference_{arm}",
            "secondary",
            f"Does the {loss} of `{arm}` differ from that of `{a.baseline}`?",
            f"Difference `{arm}` - `{a.baseline}` at each seed; t test over the seeds, two-sided at {a.alpha:g}.",
            (),
        )
        for arm in arms
        if arm not in (a.baseline, a.treatment)
    ]


def _best_rates(a: AnalysisConfig, loss: str) -> list[Question]:
    (first, of_first), *others = (a.sweeps or {"": ()}).items()
    return [
        Question(
            f"best_rate_{name}",
            "secondary",
            f"Does the {loss} of {name} at its best learning rate differ from that of {first} at its own?",
            f"Rates of {first}: those of {_listed(of_first)}; of {name}: those of {_listed(arms)}. Two t tests over "
            "the seeds: of the differences at each seed at the rates whose mean loss over the other seeds is lowest, "
            "and at the rates whose mean over all seeds is lowest; p is the larger one, and 1 where the means differ "
            f"in sign; two-sided at {a.alpha:g}. A cell that diverged and did not finish counts at the rule's limit.",
            ("whether a best rate is the lowest or the highest that was tried",),
        )
        for name, arms in others
    ]


def _listed(arms: Sequence[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms)


STRICT = (
    " A pair is refused too whose cells at any start ran other code or packages, or on a machine that rounds otherwise."
)


def exclusions(a: AnalysisConfig, diverged: DivergedRule, study: Study | None = None) -> tuple[str, ...]:
    """Rules, a sentence or two each: who is left out of which figure, who stays in, and when collecting ends."""
    above = diverged.above_nats
    rules = "; ".join(study.exclude.rules.values()) if study else ""
    by_rule = f" but those who by the study's rules break one when the panel is locked, whatever the arms ({rules})"
    limit = "what guessing uniformly costs" if above is None else f"{above:g} nats"
    return (
        "A pair (an arm and the first arm at one seed) that the pair certificate refuses enters no comparison. It is "
        "listed with the reason." + (STRICT if a.strict_pairs else ""),
        "A cell that is not complete is listed with its state, and never dropped in silence.",
        f"A cell counts as diverged where its loss is not finite, or its training loss stays above {limit} for the "
        f"last {diverged.for_steps} steps, all after the warm-up. A diverged cell stays in every comparison that "
        "its files allow, and is listed.",
        f"A question is answered with at least {a.min_seeds} certified seeds. With fewer there is an estimate and no "
        "verdict.",
        f"Votes of these kinds of judges count: {', '.join(a.judge_kinds)}. The primary analysis leaves out no judge"
        f"{by_rule if rules else ''}, and no vote but repeats (for self-consistency alone) and those on pairs that "
        "the certificate refuses.",
        f"Sensitivity, beside the primary analysis: without people whose median time to a vote is below "
        f"{a.fast_seconds:g} seconds; without judges of more than {a.tie_share:.0%} ties; without judges of fewer than "
        f"{a.votes_per_judge} votes; without those who run the experiment; without all of these; models alone; people "
        "alone.",
        _ending(a),
    )


BOUNDARIES = {"haybittle_peto": "Haybittle and Peto", "obrien_fleming": "O'Brien and Fleming, by alpha spending"}


def _ending(a: AnalysisConfig) -> str:
    panel = f"with {a.judges} judges of {a.votes_per_judge} votes each."
    if not a.looks:
        return f"Collecting ends with all planned seeds, and {panel} No look at the results ends it earlier or later."
    from replication.statistics.looks import look_levels  # scipy, which a cell's start does not wait for

    levels = (look_levels(a.looks, a.alpha, a.look_boundaries, sides) for sides in (2, 1))
    two, one = (", ".join(f"{level:.4g}" for level in of) for of in levels)
    return (
        f"The results are looked at with {', '.join(map(str, a.looks))} seeds. A question is decided for good at the "
        f"first look at which its p is below the level there: {two} for a two-sided test, {one} for each of two "
        f"one-sided ones (boundaries of {BOUNDARIES[a.look_boundaries]}). Of secondary questions each step of Holm's "
        f"correction has the levels that keep its part of {a.alpha:g} over all looks. Collecting ends with the last "
        f"look, and {panel} An earlier look takes as large a part of these votes as of the seeds."
    )
