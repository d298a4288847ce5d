"""The questions of the analysis plan that losses answer: equivalence, the 2x2, and the secondary questions together.

Reads values and the certificate, gives plain numbers. A question that cannot be answered says why; nothing is made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replication.config import AnalysisConfig, SuiteConfig, load_cell
from replication.errors import UserError
from replication.protocol.certificate import Certificate
from replication.report.load import Cell
from replication.statistics.losses import (
    NOT_DECIDED,
    equivalence,
    factorial_contrasts,
    further_seeds,
    holm,
    mean_test,
    sign_flip_p,
)
from replication.statistics.seeds import smallest_sign_flip_p, summarize_paired

Floats = NDArray[np.float64]
Values = Mapping[str, Sequence[float]]
"""Arm -> one value a seed, NaN where a cell has none."""

TWO_BY_TWO = {"neither": (False, False), "token": (True, False), "layer": (False, True), "both": (True, True)}
"""Place in the 2x2 -> whether (token gain, layer gain) act."""
EFFECTS = (
    ("main_effect_token_gain_loss", "Token gain, main effect", "what it adds, in the mean of layer gain off and on"),
    ("main_effect_layer_gain_loss", "Layer gain, main effect", "what it adds, in the mean of token gain off and on"),
    ("interaction_loss", "Interaction", "what token gain adds with layer gain, less what it adds without"),
)
"""(id of the plan's question, name, in words), in the order of losses.factorial_contrasts."""


def certified(certificate: Certificate, arms: Sequence[str], seeds: Sequence[int]) -> NDArray[np.bool_]:
    """bool [N]: at which seeds the certificate lets all these arms be compared with one another."""
    first = certificate.arms[0]
    states = [[arm == first or certificate.pair(arm, seed).state == "holds" for arm in arms] for seed in seeds]
    return np.all(np.array(states, dtype=bool).reshape(len(seeds), len(arms)), axis=1, keepdims=False)


def paired(values: Values, certificate: Certificate, arm: str, baseline: str, seeds: Sequence[int]) -> Floats:
    """float64 [N]: arm minus baseline at each seed; NaN where a value or the certificate is missing."""
    differences = np.asarray(values[arm], dtype=np.float64) - np.asarray(values[baseline], dtype=np.float64)
    return np.where(certified(certificate, (arm, baseline), seeds), differences, np.nan)


# ---------------------------------------------------------------- is the loss equivalent?


def loss_answer(
    values: Values, certificate: Certificate, seeds: Sequence[int], a: AnalysisConfig
) -> dict[str, Any] | None:
    """The equivalence of the treatment's loss to the baseline's.

    Args:
        values: of the loss that the plan names, in nats.
        certificate: of the suite.
        seeds: of the suite.
        a: the resolved section `analysis`.

    Returns:
        Differences, mean, interval, p of both tests and of no difference, the sign flips, the verdict, and how many
        more seeds an undecided one needs. None in a suite of one arm.
    """
    if a.treatment is None or a.baseline is None:
        return None
    differences = paired(values, certificate, a.treatment, a.baseline, seeds)
    tested = equivalence(differences, a.margin_nats, a.alpha)
    n, enough = int(tested.n), int(tested.n) >= a.min_seeds
    further = further_seeds(n, float(tested.sd), a.margin_nats, alpha=a.alpha) if n >= 2 else None
    return {
        "id": "loss_equivalence",
        "arm": a.treatment,
        "baseline": a.baseline,
        "loss": a.loss,
        "margin_nats": a.margin_nats,
        "alpha": a.alpha,
        "interval_level": 1 - 2 * a.alpha,
        "differences": differences.tolist(),
        "n": n,
        "min_seeds": a.min_seeds,
        "enough_seeds": enough,
        "verdict": str(tested.verdict) if enough else NOT_DECIDED,
        **{k: float(getattr(tested, k)) for k in ("mean", "sd", "low", "high", "p_lower", "p_upper", "p")},
        "p_no_difference": float(mean_test(differences).p),
        "p_sign_flip": float(sign_flip_p(differences)),
        "smallest_sign_flip_p": smallest_sign_flip_p(n),
        "further": asdict(further) if further else None,
        "more_seeds": _more_seeds(n, a, further.k if further else None),
    }


def _more_seeds(n: int, a: AnalysisConfig, k: int | None) -> int | None:
    """Seeds that a verdict still lacks: up to the fewest that the plan asks for, and to the power; None: unknown."""
    lacking = max(0, a.min_seeds - n)
    return lacking if n < 2 else None if k is None else max(lacking, k)


# ---------------------------------------------------------------- which change moved it?


def places(cells: Sequence[Cell], suite: SuiteConfig) -> dict[str, str] | None:
    """Place in the 2x2 -> arm; None where the arms are no 2x2. An arm without any cell yet is read from its file."""
    acting: dict[str, tuple[Any, Any]] = {}
    for cell in cells:
        if cell.config:
            acting.setdefault(cell.arm, (cell.config.get("token_gain.enabled"), cell.config.get("layer_gain.enabled")))
    for arm in suite.arms:
        if arm not in acting and len(suite.arms) == len(TWO_BY_TWO):
            acting[arm] = _declared_gains(suite, arm)
    arms = suite.arms
    found = {place: [arm for arm in arms if acting.get(arm) == gains] for place, gains in TWO_BY_TWO.items()}
    if len(arms) != 4 or any(len(of) != 1 for of in found.values()):
        return None
    return {place: of[0] for place, of in found.items()}


def _declared_gains(suite: SuiteConfig, arm: str) -> tuple[Any, Any]:
    try:
        config = load_cell(suite, arm, suite.seeds[0])
    except (UserError, OSError):
        return None, None
    return config.token_gain.enabled, config.layer_gain.enabled


def factorial_answer(
    values: Values, certificate: Certificate, seeds: Sequence[int], of_place: dict[str, str] | None, a: AnalysisConfig
) -> dict[str, Any] | None:
    """Main effects and interaction on the loss, blocked by seed; None where the arms are no 2x2."""
    if of_place is None:
        return None
    order = [of_place[place] for place in TWO_BY_TWO]
    table = np.array([values[arm] for arm in order], dtype=np.float64)
    used = np.where(certified(certificate, order, seeds), table, np.nan)
    contrasts = factorial_contrasts(used)
    tests = mean_test(contrasts, 1 - a.alpha)
    whole = np.isfinite(used).all(0)
    effects = []
    for i, (id, name, words) in enumerate(EFFECTS):
        summary = summarize_paired(contrasts[i], 1 - a.alpha)
        effects.append({
            "id": id,
            "name": name,
            "words": words,
            "contrasts": contrasts[i].tolist(),
            **asdict(summary),
            "p": float(tests.p[i]),
            "p_sign_flip": float(sign_flip_p(contrasts[i])),
        })  # fmt: skip
    within = np.where(whole, used - used.mean(0, keepdims=True), np.nan)
    return {
        "places": of_place,
        "loss": a.loss,
        "n": int(whole.sum()),
        "interval_level": 1 - a.alpha,
        "effects": effects,
        "within_seed": {arm: row.tolist() for arm, row in zip(order, within, strict=True)},
    }


# ---------------------------------------------------------------- the secondary questions together


def secondary_answers(
    values: Values,
    certificate: Certificate,
    seeds: Sequence[int],
    a: AnalysisConfig,
    loss: dict[str, Any] | None,
    factorial: dict[str, Any] | None,
    preference: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The plan's secondary questions with Holm's p over all of them; one that has no p yet counts as p = 1.

    Args:
        values: see loss_answer.
        certificate: see loss_answer.
        seeds: see loss_answer.
        a: see loss_answer.
        loss: of loss_answer.
        factorial: of factorial_answer.
        preference: of the votes, with keys p, estimate, low, high; None: no votes yet.
    """
    if loss is None:
        return []
    rows = [_secondary_loss(loss, a)] if a.primary == "preference" else [_secondary_preference(preference, a)]
    if factorial is not None:
        level = factorial["interval_level"]
        rows += [_secondary_row(e["id"], f"{e['name']} on the loss", e, e["p"], level) for e in factorial["effects"]]
    else:
        for arm in certificate.arms:
            if arm not in (a.baseline, a.treatment):
                differences = paired(values, certificate, arm, loss["baseline"], seeds)
                summary = asdict(summarize_paired(differences, 1 - a.alpha))
                p = float(mean_test(differences).p)
                name = f"Loss of {arm} less that of {loss['baseline']}"
                rows.append(_secondary_row(f"loss_difference_{arm}", name, summary, p, 1 - a.alpha))
    p_Q = np.array([row["p"] for row in rows], dtype=np.float64)
    adjusted = np.where(np.isnan(p_Q), np.nan, holm(np.where(np.isnan(p_Q), 1.0, p_Q)))
    for row, corrected in zip(rows, adjusted, strict=True):
        enough = row["n"] is not None and row["n"] >= a.min_seeds
        row |= {"p_holm": float(corrected), "verdict": _secondary_verdict(row, corrected, enough, a)}
    return rows


def _secondary_loss(loss: dict[str, Any], a: AnalysisConfig) -> dict[str, Any]:
    name = f"Loss of {loss['arm']} equivalent to that of {loss['baseline']} within {a.margin_nats:g} nats"
    return _secondary_row("loss_equivalence", name, loss, loss["p"], loss["interval_level"])


def _secondary_preference(preference: dict[str, Any] | None, a: AnalysisConfig) -> dict[str, Any]:
    found = preference or {}
    numbers = {"n": found.get("n"), "mean": found.get("estimate"), "low": found.get("low"), "high": found.get("high")}
    p = found.get("p")
    return _secondary_row(
        "preference", "Preference", numbers, float("nan") if p is None else p, found.get("level", 1 - a.alpha)
    )


def _secondary_row(id: str, name: str, found: Mapping[str, Any], p: float, level: float) -> dict[str, Any]:
    return {"id": id, "name": name, **{k: found[k] for k in ("n", "mean", "low", "high")}, "level": level, "p": p}


def _secondary_verdict(row: dict[str, Any], corrected: float, enough: bool, a: AnalysisConfig) -> str:
    if np.isnan(corrected):
        return "no p: not enough to test"
    if not enough:
        return f"not decided: fewer than {a.min_seeds} seeds"
    if row["id"] == "loss_equivalence":
        return "equivalent" if corrected < a.alpha else "not shown to be equivalent"
    null = "one half" if row["id"] == "preference" else "zero"
    return f"other than {null}" if corrected < a.alpha else f"not told from {null}"
