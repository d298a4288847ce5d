"""The analysis plan in words: its questions with their tests, its exclusion rules, and plan.md. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from replication.config import AnalysisConfig

LOSSES = {
    "late_val_loss": "validation loss (mean of the last {k} validations)",
    "final_val_loss": "validation loss at the last step",
}
ALL_FOUR = {(False, False), (True, False), (False, True), (True, True)}


def questions(
    a: AnalysisConfig, arms: Sequence[str], n_seeds: int, gains: Mapping[str, tuple[bool, bool]]
) -> list[dict[str, Any]]:
    """The primary question first, then the secondary ones.

    Args:
        a: the resolved section.
        arms: of the suite.
        n_seeds: how many are planned.
        gains: arm -> whether (token gain, layer gain) act; four arms with all four make the 2x2.

    Returns:
        For each {"id", "role": primary or secondary, "question", "test", "beside": figures that decide nothing}.
    """
    asked = [_preference(a, n_seeds), _loss(a, n_seeds)]
    if a.primary == "loss":
        asked.reverse()
    factorial = len(arms) == 4 and {gains[arm] for arm in arms} == ALL_FOUR
    asked += _factorial(a) if factorial else _others(a, arms)
    return [{"id": q["id"], "role": "secondary" if i else "primary", **q} for i, q in enumerate(asked)]


def _sign_flip(n_seeds: int) -> str:
    return (
        f"exact sign-flip test over the seeds (with {n_seeds} seeds its smallest p is {min(1.0, 2 / 2**n_seeds):.2g})"
    )


def _preference(a: AnalysisConfig, n_seeds: int) -> dict[str, Any]:
    return {
        "id": "preference",
        "question": f"Do judges prefer the text of `{a.treatment}` to that of `{a.baseline}`? Measured by the share of "
        f"decisive votes for `{a.treatment}`; ties are counted, shown, and left out of the share.",
        "test": f"t test of a share of one half in a model with crossed random effects of seed, prompt and judge, and "
        "the interaction of seed and prompt, over the decisive votes, with "
        f"Satterthwaite's degrees of freedom; two-sided at {a.alpha:g}.",
        "beside": [
            "t test over the seeds' shares, conditional on these prompts and judges",
            _sign_flip(n_seeds),
            f"bootstrap of three levels (seeds, prompts, judges), {a.bootstrap_resamples:,} resamples, seed "
            f"{a.bootstrap_seed}",
        ],
    }


def _loss(a: AnalysisConfig, n_seeds: int) -> dict[str, Any]:
    return {
        "id": "loss_equivalence",
        "question": f"Is the {_loss_words(a)} of `{a.treatment}` equivalent to that of `{a.baseline}`, within "
        f"{a.margin_nats:g} nats on either side?",
        "test": f"Difference `{a.treatment}` - `{a.baseline}` at each seed; two one-sided t tests over the seeds, "
        f"against -{a.margin_nats:g} and +{a.margin_nats:g} nats, each at {a.alpha:g}. Equivalent where both reject: "
        f"where the {1 - 2 * a.alpha:.0%} interval of the mean lies within the margin. That no difference is found is "
        "not equivalence.",
        "beside": [f"t test of no difference over the seeds, two-sided at {a.alpha:g}", _sign_flip(n_seeds)],
    }


def _factorial(a: AnalysisConfig) -> list[dict[str, Any]]:
    words = {
        "main_effect_token_gain": ("the main effect of token gain", "arms with it minus arms without, halved"),
        "main_effect_layer_gain": ("the main effect of layer gain", "arms with it minus arms without, halved"),
        "interaction": (
            "the interaction of the two",
            "both minus token gain alone minus layer gain alone plus neither",
        ),
    }
    return [
        {
            "id": f"{name}_loss",
            "question": f"Is {what} on the {_loss_words(a)} other than zero?",
            "test": f"The contrast within each seed ({contrast}), so that the seed is the block; t test over the "
            f"seeds, two-sided at {a.alpha:g}.",
            "beside": [],
        }
        for name, (what, contrast) in words.items()
    ]


def _others(a: AnalysisConfig, arms: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"loss_difference_{arm}",
            "question": f"Does the {_loss_words(a)} of `{arm}` differ from that of `{a.baseline}`?",
            "test": f"Difference `{arm}` - `{a.baseline}` at each seed; t test over the seeds, two-sided at "
            f"{a.alpha:g}.",
            "beside": [],
        }
        for arm in arms
        if arm not in (a.baseline, a.treatment)
    ]


def _loss_words(a: AnalysisConfig) -> str:
    return LOSSES[a.loss].format(k=a.late_validations)


STRICT = (
    " A pair is refused too whose cells at any start ran other code or packages, or on a machine that rounds otherwise."
)


def exclusions(a: AnalysisConfig, diverged: Mapping[str, Any]) -> list[str]:
    """What is left out of which figure, what stays in, and when collecting ends; a sentence or two each."""
    above = diverged["above_nats"]
    limit = "what guessing uniformly costs" if above is None else f"{above:g} nats"
    return [
        "A pair (an arm and the first arm at one seed) that the pair certificate refuses enters no comparison. It is "
        "listed with the reason." + (STRICT if a.strict_pairs else ""),
        "A cell that is not complete is listed with its state, and never dropped in silence.",
        f"A cell counts as diverged where its loss is not finite, or its training loss stays above {limit} for the "
        f"last {diverged['for_steps']} steps, all after the warm-up. A diverged cell stays in every comparison that "
        "its files allow, and is listed.",
        f"A question is answered with at least {a.min_seeds} certified seeds. With fewer there is an estimate and no "
        "verdict.",
        f"Votes of these kinds of judges count: {', '.join(a.judge_kinds)}. The primary analysis leaves out no judge, "
        "and no vote but repeats (for self-consistency alone) and those on pairs that the certificate refuses.",
        f"Sensitivity, beside the primary analysis: without people whose median time to a vote is below "
        f"{a.fast_seconds:g} seconds; without judges of more than {a.tie_share:.0%} ties; without judges of fewer than "
        f"{a.votes_per_judge} votes; without those who run the experiment; without all of these; models alone; people "
        "alone.",
        f"Collecting ends with all planned seeds, and with {a.judges} judges of {a.votes_per_judge} votes each. No "
        "look at the results ends it earlier or later.",
    ]


# ---------------------------------------------------------------- plan.md


def markdown(record: Mapping[str, Any]) -> str:
    """plan.md: the record of a frozen plan for a reader."""
    plan, commit = record["plan"], record["git"]["commit"] or "not known"
    a = plan["analysis"]
    changes = " with uncommitted changes" if record["git"]["dirty"] else ""
    lines = [
        f"# Analysis plan of {plan['suite']}",
        "",
        f"Frozen at {record['frozen_at']}, sha256 `{record['sha256']}`, code {plan['code']['version']} at commit "
        f"{commit}{changes}. plan.json is what counts; this page says the same.",
        "",
        _when(record["began_before"]),
        "",
        *_history(record),
        *_asked(plan),
        "## Arms, seeds, judges",
        "",
        f"- arms: {', '.join(plan['arms'])}; `{a['treatment']}` is compared with `{a['baseline']}`",
        f"- training seeds: {', '.join(map(str, plan['seeds']))}",
        f"- judges: {a['judges']}, each with {a['votes_per_judge']} votes",
        "",
        "## Exclusion, divergence, stopping",
        "",
        *(f"- {line}" for line in plan["exclusions"]),
        "",
        *_settings(plan),
    ]
    return "\n".join(lines) + "\n"


def _when(began_before: Sequence[str]) -> str:
    if not began_before:
        return "No cell had logged a step by then."
    return f"**Cells had logged steps by then**: {', '.join(began_before)}. The plan makes no result confirmatory."


def _history(record: Mapping[str, Any]) -> list[str]:
    if not record["history"]:
        return []
    earlier = [f"- {e['file']}: frozen at {e['frozen_at']}, sha256 `{e['sha256']}`" for e in record["history"]]
    return ["## Earlier plans", "", *earlier, "", f"Amended for this reason: {record['amends']}", ""]


def _asked(plan: Mapping[str, Any]) -> list[str]:
    n, lines = len(plan["secondary"]), []
    for question in plan["questions"]:
        lines += [f"## {question['role'].capitalize()}: {question['id']}", "", question["question"], ""]
        lines += [f"- test: {question['test']}", *(f"- beside it: {line}" for line in question["beside"]), ""]
    lines += [
        f"The primary question is one test, without correction. The {n} secondary questions are corrected together by "
        f"Holm's method at {plan['analysis']['alpha']:g}. Everything else in the report is exploratory.",
        "",
    ]
    return lines


def _settings(plan: Mapping[str, Any]) -> list[str]:
    lines = ["## Settings", "", "| cell | config hash |", "|---|---|"]
    lines += [f"| {name} | `{hash}` |" for name, hash in plan["cells"].items()]
    lines += ["", "| key | value |", "|---|---|"]
    for arm, keys in plan["settings"]["arms"].items():
        lines += [f"| {arm}: {key} | {_cell(value)} |" for key, value in keys.items() if key != "arm"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in plan["settings"]["shared"].items()]
    lines += [f"| generation.{key} | {_cell(value)} |" for key, value in plan["generation"].items()]
    return lines


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "\\n")
