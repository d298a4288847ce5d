"""What the numbers say, in plain words, and what so few seeds cannot say. Reads results, computes nothing new."""

from __future__ import annotations

from typing import Any

from replication.analysis.format import count, number, signed
from replication.analysis.results import side


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """The words at the top of the report.

    Args:
        results: see results.compute_results.

    Returns:
        headline: one sentence; shows: what these seeds show; cannot: what they cannot show. Lists of sentences.
    """
    return {"headline": _headline(results), "shows": _shows(results), "cannot": _cannot(results)}


def _headline(r: dict[str, Any]) -> str:
    suite = r["suite"]
    if not suite["cells_complete"]:
        return f"Nothing can be said: none of the {suite['cells_total']} cells of this suite is complete."
    if not r["pairs_used"]:
        why = "only one arm was run" if len(suite["arms"]) < 2 else "no pair with the baseline passes the certificate"
        return f"No comparison can be made: {why}."
    n = suite["n_paired"]
    if n == 1:
        return "One seed per arm: the differences below are one observation each, and show nothing about the method."
    if suite["smallest_sign_flip_p"] > 0.05:
        return f"{n} seeds are too few to decide anything about the method; below is what these {n} runs per arm did."
    return f"{n} seeds per arm: estimates with their intervals; no question or margin was fixed in advance."


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
    acting: dict[str, list[str]] = {}
    for row in r["gain"]:
        if row["applied"] and row["n_measured"]:
            acting.setdefault(row["arm"], []).append(f"{row['n_failing']} of {row['n_measured']}")
    if not acting:
        return []
    parts = [f"{arm} {', '.join(sorted(set(counts)))}" for arm, counts in acting.items()]
    return [
        "'The total gradient budget is preserved' (mean gain after the clamp within 1 % of 1) fails in this many "
        f"logged steps of a run where the token gain acts: {'; '.join(parts)}."
    ]


# ---------------------------------------------------------------- what they cannot


def _cannot(r: dict[str, Any]) -> list[str]:
    suite, lines = r["suite"], []
    n = suite["n_paired"]
    if n:
        lines.append(_significance(n, suite["smallest_sign_flip_p"]))
    lines += [
        "A difference that cannot be told from zero is not equality: equivalence needs a margin stated in advance and "
        "enough seeds, and none is stated here.",
        "No judgements of preference were made: whether anyone would prefer one arm's completions is open.",
    ]
    n_tests = sum(len(q["pairs"]) for q in r["quantities"])
    if n and n_tests > 1:
        lines.append(f"{n_tests} differences are listed below and their intervals are not corrected for being many.")
    size = suite["parameters"]
    model = f"a model of {count(size)} parameters" if size else "another model"
    tokens = f" and {count(suite['tokens'])} tokens" if suite["tokens"] else ""
    lines.append(
        f"This is {model}{tokens} on other data than the published run of about 1.2 billion parameters and 3.93 "
        "billion tokens: sizes cannot be compared with it, directions at most."
    )
    return lines


def _significance(n: int, smallest: float) -> str:
    if n == 1:
        return "With one seed there is no interval, and the smallest p that an exact sign-flip test can reach is 1."
    p = number(smallest, 4).rstrip("0")
    text = f"With {n} seeds the smallest p that an exact sign-flip test can reach is {p}"
    if smallest > 0.05:
        return f"{text}: even the same sign at every seed shows nothing at the usual 5 %."
    return f"{text}."
