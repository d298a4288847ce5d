"""What the numbers say, in plain words, and what so few seeds cannot say. Reads results, computes nothing new."""

from __future__ import annotations

from typing import Any

from replication.report.preference_words import preference_lines
from replication.report.results import side
from replication.statistics.format import count, number, p_value, percent, signed
from replication.statistics.losses import DIFFERENT, EQUIVALENT


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """The words at the top of the report.

    Args:
        results: see results.compute_results.

    Returns:
        headline: a sentence or two, the primary question first; preference, loss, factorial: the questions of the plan,
        lists of sentences; noise: how far rounding alone moves the loss; shows: what else these seeds show; cannot:
        what they cannot show.
    """
    return {
        "headline": _headline(results),
        "preference": preference_lines(results["preference"]),
        "loss": loss_lines(results["loss"]),
        "factorial": factorial_lines(results["factorial"]),
        "noise": noise_lines(results["noise"], results["loss"]),
        "shows": _shows(results),
        "cannot": _cannot(results),
    }


def _headline(r: dict[str, Any]) -> str:
    suite = r["suite"]
    if not suite["cells_complete"]:
        return f"Nothing can be said: none of the {suite['cells_total']} cells of this suite is complete."
    if not r["pairs_used"]:
        why = "only one arm was run" if len(suite["arms"]) < 2 else "no pair with the baseline passes the certificate"
        return f"No comparison can be made: {why}."
    answers = [preference_lines(r["preference"])[0], *loss_lines(r["loss"])[:1]]
    return " ".join(answers if r["analysis"]["primary"] == "preference" else reversed(answers))


# ---------------------------------------------------------------- loss


def loss_lines(loss: dict[str, Any] | None) -> list[str]:
    """Whether the loss is equivalent; the first sentence is the verdict."""
    if loss is None:
        return []
    n, margin = loss["n"], f"{loss['margin_nats']:g} nats"
    what = f"Validation loss of {loss['arm']} beside {loss['baseline']}:"
    if not n:
        return [f"{what} not decided: no certified pair has both losses."]
    if n == 1:
        return [
            f"{what} not decided: {signed(loss['mean'], 4)} nats at one seed, which has no interval; "
            f"{_more(loss['more_seeds'])} to reach the {loss['min_seeds']} that a verdict needs."
        ]
    found = f"mean difference {_interval(loss, 'nats')}, {n} seeds"
    if not loss["enough_seeds"]:
        return [
            f"{what} not decided: {n} of the {loss['min_seeds']} seeds that a verdict needs ({found}).",
            *_need(loss),
        ]
    if loss["verdict"] == EQUIVALENT:
        return [f"{what} equivalent within {margin} ({found}).", *_tests(loss)]
    if loss["verdict"] == DIFFERENT:
        side_ = "higher" if loss["mean"] > 0 else "lower"
        return [f"{what} {side_} by more than {margin} ({found}).", *_tests(loss)]
    return [f"{what} not decided within {margin}: {_more(loss['more_seeds'])} ({found}).", *_need(loss), *_tests(loss)]


def _interval(found: dict[str, Any], unit: str = "") -> str:
    """'+0.0041 nats, 90 % interval -0.0021 to +0.0103'."""
    bounds = f"{signed(found['low'], 4)} to {signed(found['high'], 4)}"
    return (
        f"{signed(found['mean'], 4)}{' ' if unit else ''}{unit}, {percent(found['interval_level'])} interval {bounds}"
    )


def _more(k: int | None) -> str:
    if k is None:
        return "how many more seeds are needed is not known"
    if not k:
        return "not for lack of seeds"
    return f"{k} more {'seed' if k == 1 else 'seeds'}"


def _need(loss: dict[str, Any]) -> list[str]:
    """How many more seeds, and how little is known of that."""
    further, margin = loss["further"], f"{loss['margin_nats']:g} nats"
    if further is None or further["k"] is None:
        return ["How many seeds equivalence would need cannot be told from these."]
    spread = f"standard deviation over seeds {number(further['sd'], 4)} nats"
    if not further["k"]:
        return [
            f"At no true difference these {loss['n']} seeds had a power of 80 % to show equivalence ({spread}): "
            f"where they do not, the true difference may lie near {margin} itself."
        ]
    bound = f"{number(further['sd_upper'], 4)} nats"
    more = f"{further['k_upper']} more" if further["k_upper"] is not None else "more than can be counted"
    return [
        f"At no true difference, {_more(further['k'])} would give a power of 80 % to show equivalence ({spread}; "
        f"so few seeds say little of it: at its upper 80 % bound, {bound}, {more})."
    ]


def _tests(loss: dict[str, Any]) -> list[str]:
    return [
        f"Two one-sided t tests against {loss['margin_nats']:g} nats: {_p(loss['p'])}. Of no difference at all: "
        f"{_p(loss['p_no_difference'])} by t test, {_p(loss['p_sign_flip'])} by exact sign flips."
    ]


def _p(p: Any) -> str:
    """'p = 0.0123', 'p < 0.0001' or 'no p'."""
    text = p_value(p)
    return "no p" if p is None else f"p {text}" if text.startswith("<") else f"p = {text}"


def noise_lines(noise: dict[str, Any] | None, loss: dict[str, Any] | None) -> list[str]:
    """How far rounding alone moves the loss, beside the margin: one sentence, and none in a suite of one arm."""
    if loss is None:
        return []
    again = "replicate bench noise DIR measures it, where DIR is the folder of this report"
    if noise is None or noise["largest_nats"] is None:
        return [
            f"How far rounding alone (another machine, other micro-batches) moves this loss is not measured: {again}."
        ]
    if not noise["is_of_this_suite"]:
        return [f"How far rounding alone moves this loss was measured under another config than these cells': {again}."]
    return [
        f"Rounding alone moved this loss by up to {noise['largest_nats']:.2g} nats, beside the margin of "
        f"{loss['margin_nats']:g} nats: the same cell cut otherwise ({', '.join(noise['cuts'])}; "
        f"{', '.join(noise['cells'])})."
    ]


# ---------------------------------------------------------------- factorial


def factorial_lines(factorial: dict[str, Any] | None) -> list[str]:
    """A sentence for each effect; none in a suite that is no 2x2."""
    if factorial is None:
        return []
    if not factorial["n"]:
        return ["The 2x2 cannot be read: at no seed are all four arms complete and certified."]
    level = factorial["interval_level"]
    lines = []
    for effect in factorial["effects"]:
        if effect["note"]:
            found = f"{signed(effect['mean'], 4)} nats ({effect['note']})"
        else:
            found = f"{_interval({**effect, 'interval_level': level}, 'nats')}, {_p(effect['p'])} before correction"
        lines.append(f"{effect['name']} on the loss: {found}.")
    return lines


# ---------------------------------------------------------------- what these seeds show


def _shows(r: dict[str, Any]) -> list[str]:
    suite = r["suite"]
    lines = [f"{suite['cells_complete']} of {suite['cells_total']} cells are complete."]
    if r["pairs_used"]:
        quantities = {q["key"]: q for q in r["quantities"]}
        for i, arm in enumerate(suite["arms"][1:]):
            lines += _arm_lines(arm, i, quantities, suite["baseline"])
        spread = quantities["final_val_loss"]["baseline_range"]
        if spread is not None:
            lines.append(
                f"For scale: the {suite['baseline']} seeds alone differ by up to {number(spread, 4)} nats in final "
                "validation loss."
            )
    lines += _budget_lines(r)
    if r["pairs_refused"]:
        n = len(r["pairs_refused"])
        lines.append(f"{n} {'pair is' if n == 1 else 'pairs are'} refused and not used; see the certificate.")
    return lines


def _arm_lines(arm: str, place: int, quantities: dict[str, Any], baseline: str) -> list[str]:
    loss = quantities["final_val_loss"]["pairs"][place]
    if not loss["n"]:
        return [f"{arm}: no certified pair with {baseline}."]
    values = " and ".join(signed(d, 4) for d in loss["differences"] if d is not None) if loss["n"] <= 3 else ""
    each = f"{values} nats" if values else f"{signed(loss['mean'], 4)} nats in the mean of {loss['n']} seeds"
    others = "; ".join(
        f"{words} {side(quantities[key]['pairs'][place])}"
        for key, words in (("entropy_predicted_tokens", "predicted-token entropy"), ("grad_norm", "gradient norm"))
    )
    return [f"{arm} against {baseline}: final validation loss {each} ({side(loss)}); {others}."]


def _budget_lines(r: dict[str, Any]) -> list[str]:
    """How often the claim that the total gradient budget is preserved fails, where the gain acts."""
    acting: dict[str, list[int]] = {}
    logged: dict[str, int] = {}
    for row in r["gain"]:
        if row["applied"] and row["n_measured"]:
            acting.setdefault(row["arm"], []).append(row["n_failing"])
            logged[row["arm"]] = max(row["n_measured"], logged.get(row["arm"], 0))
    if not acting:
        return []
    parts = [f"{arm} {_range(counts)} of {logged[arm]}" for arm, counts in acting.items()]
    return [
        "'The total gradient budget is preserved' (mean gain after the clamp within 1 % of 1) fails in this many "
        f"logged steps of a run where the token gain acts: {'; '.join(parts)}."
    ]


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


# ---------------------------------------------------------------- what they cannot


def _cannot(r: dict[str, Any]) -> list[str]:
    suite, lines = r["suite"], []
    n = suite["n_paired"]
    if n:
        lines.append(_significance(n, suite["smallest_sign_flip_p"]))
    lines.append("A difference that cannot be told from zero is not equality: that takes the equivalence test.")
    if r["preference"] is None:
        lines.append(
            "No judgements of preference were made: whether anyone would prefer one arm's completions is open."
        )
    n_tests = sum(len(q["pairs"]) for q in r["quantities"])
    if n and n_tests > 1:
        lines.append(
            f"{n_tests} differences are listed under 'Paired differences'. They are exploratory, and their intervals "
            "are not corrected for being many; the secondary questions are."
        )
    size = suite["parameters"]
    model = f"a model of {count(size)} parameters" if size else "another model"
    tokens = f" and {count(suite['tokens'])} tokens" if suite["tokens"] else ""
    published = (
        "; the published comparison is one seed of about 1.2 billion parameters and 3.93 billion tokens on other data: "
        "directions can be compared with it, sizes hardly"
    )
    lines.append(f"This is {model}{tokens}{published if r['published']['applies'] else ''}.")
    return lines


def _significance(n: int, smallest: float) -> str:
    if n == 1:
        return "With one seed there is no interval, and the smallest p that an exact sign-flip test can reach is 1."
    p = f"{smallest:.2g}"
    text = f"With {n} seeds the smallest p that an exact sign-flip test can reach is {p}"
    if smallest > 0.05:
        return f"{text}: even the same sign at every seed shows nothing at the usual 5 % by that test."
    return f"{text}."
