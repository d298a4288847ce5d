"""The questions of the analysis plan that losses answer: equivalence, the 2x2, and the secondary questions together.

A question that cannot be answered says why; nothing is made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from replication.config import AnalysisConfig, SuiteConfig, flatten, load_cell, to_dict
from replication.errors import UserError
from replication.protocol.certificate import Certificate
from replication.report.comparisons import Number, Values, certified, paired
from replication.report.load import NAN, CellData
from replication.report.preference import Preference
from replication.report.sweeps import Sweeps
from replication.statistics.seeds import (
    NOT_DECIDED,
    FurtherSeeds,
    equivalence,
    factorial_contrasts,
    further_seeds,
    holm,
    mean_test,
    sign_flip_p,
    smallest_sign_flip_p,
    summarize_paired,
)

TWO_BY_TWO = {"neither": (False, False), "token": (True, False), "layer": (False, True), "both": (True, True)}
"""Place in the 2x2 -> whether (token gain, layer gain) act."""
ENABLED, CONTROLS = (tuple(f"{gain}.{key}" for gain in ("token_gain", "layer_gain")) for key in ("enabled", "control"))
EFFECTS = (
    ("main_effect_token_gain_loss", "Token gain, main effect", "what it adds, in the mean of layer gain off and on"),
    ("main_effect_layer_gain_loss", "Layer gain, main effect", "what it adds, in the mean of token gain off and on"),
    ("interaction_loss", "Interaction", "what token gain adds with layer gain, less what it adds without"),
)
"""(id of the plan's question, name, in words), in the order of statistics.seeds.factorial_contrasts."""


@dataclass(frozen=True, kw_only=True)
class LossAnswer:
    """Whether the treatment's loss is equivalent to the baseline's."""

    id: str = "loss_equivalence"
    arm: str
    baseline: str
    loss: str
    margin_nats: float
    alpha: float
    interval_level: float
    differences: list[Number]
    n: int
    min_seeds: int
    enough_seeds: bool
    verdict: str
    """equivalent, different beyond the margin, or not decided."""
    mean: Number
    sd: Number
    low: Number
    high: Number
    p_lower: Number
    p_upper: Number
    p: Number
    p_no_difference: Number
    p_sign_flip: Number
    smallest_sign_flip_p: Number
    further: FurtherSeeds | None
    more_seeds: int | None
    """Seeds that a verdict still lacks: up to the fewest that the plan asks for, and to the power; None: unknown."""
    name: str
    """Of the loss."""


def loss_answer(
    values: Values, name: str, certificate: Certificate, seeds: Sequence[int], a: AnalysisConfig
) -> LossAnswer | None:
    """The answer, in nats; None in a suite of one arm. `a` is the resolved section `analysis`."""
    if a.treatment is None or a.baseline is None:
        return None
    differences = paired(values, certificate, a.treatment, a.baseline, seeds)
    tested = equivalence(differences, a.margin_nats, a.alpha)
    n, lacking = int(tested.n), max(0, a.min_seeds - int(tested.n))
    further = further_seeds(n, float(tested.sd), a.margin_nats, alpha=a.alpha) if n >= 2 else None
    k = further.k if further else 0
    return LossAnswer(
        arm=a.treatment,
        baseline=a.baseline,
        loss=a.loss,
        margin_nats=a.margin_nats,
        alpha=a.alpha,
        interval_level=1 - 2 * a.alpha,
        differences=differences.tolist(),
        n=n,
        min_seeds=a.min_seeds,
        enough_seeds=not lacking,
        verdict=NOT_DECIDED if lacking else str(tested.verdict),
        **{key: getattr(tested, key).item() for key in ("mean", "sd", "low", "high", "p_lower", "p_upper", "p")},
        p_no_difference=float(mean_test(differences).p),
        p_sign_flip=float(sign_flip_p(differences)),
        smallest_sign_flip_p=smallest_sign_flip_p(n),
        further=further,
        more_seeds=None if k is None else max(lacking, k),
        name=name,
    )


def places(cells: Sequence[CellData], suite: SuiteConfig) -> dict[str, str] | None:
    """Place in the 2x2 -> arm; None where arms but controls are none. An arm without cells is read from its file."""
    of_arm = {cell.arm: cell.config for cell in reversed(cells) if cell.config}
    for arm in suite.arms:
        if arm not in of_arm:
            with suppress(UserError, OSError):
                of_arm[arm] = flatten(to_dict(load_cell(suite, arm, suite.seeds[0])))
    plain = [arm for arm in suite.arms if not {of_arm.get(arm, {}).get(key) for key in CONTROLS} - {"none", None}]
    arm_of = {tuple(of_arm[arm].get(key) for key in ENABLED): arm for arm in plain if arm in of_arm}
    if len(plain) != len(TWO_BY_TWO) or arm_of.keys() != set(TWO_BY_TWO.values()):
        return None
    return {place: arm_of[gains] for place, gains in TWO_BY_TWO.items()}


@dataclass(frozen=True)
class Effect:
    """A main effect or the interaction, over seeds; numbers as in statistics.seeds.Paired."""

    id: str
    name: str
    words: str
    contrasts: list[Number]
    """One a seed."""
    n: int
    mean: Number
    sd: Number
    low: Number
    high: Number
    n_positive: int
    n_negative: int
    note: str
    p: Number
    p_sign_flip: Number


@dataclass(frozen=True)
class FactorialAnswer:
    """Main effects and interaction on the loss, blocked by seed."""

    places: dict[str, str]
    loss: str
    n: int
    interval_level: float
    effects: list[Effect]
    within_seed: dict[str, list[Number]]
    """Arm -> its loss less the seed's mean."""


def factorial_answer(
    values: Values, certificate: Certificate, seeds: Sequence[int], of_place: dict[str, str] | None, a: AnalysisConfig
) -> FactorialAnswer | None:
    """The answer; None where the arms are no 2x2."""
    if of_place is None:
        return None
    order = [of_place[place] for place in TWO_BY_TWO]
    table = np.array([values[arm] for arm in order], dtype=np.float64)
    used = np.where(certified(certificate, order, seeds), table, NAN)
    whole = np.isfinite(used).all(0)
    effects = []
    for name, contrast in zip(EFFECTS, factorial_contrasts(used), strict=True):
        numbers = vars(summarize_paired(contrast, 1 - a.alpha))
        p, p_sign_flip = float(mean_test(contrast).p), float(sign_flip_p(contrast))
        effects.append(Effect(*name, contrasts=contrast.tolist(), **numbers, p=p, p_sign_flip=p_sign_flip))
    within = np.where(whole, used - used.mean(0, keepdims=True), NAN)
    by_arm = {arm: row.tolist() for arm, row in zip(order, within, strict=True)}
    return FactorialAnswer(of_place, a.loss, int(whole.sum()), 1 - a.alpha, effects, by_arm)


@dataclass(frozen=True)
class SecondaryAnswer:
    id: str
    name: str
    n: int | None
    mean: Number
    low: Number
    high: Number
    level: float
    p: Number
    p_holm: Number = NAN
    verdict: str = ""


def secondary_answers(
    values: Values,
    certificate: Certificate,
    seeds: Sequence[int],
    a: AnalysisConfig,
    loss: LossAnswer | None,
    factorial: FactorialAnswer | None,
    preference: Preference | None = None,
    sweeps: Sweeps | None = None,
) -> list[SecondaryAnswer]:
    """The plan's secondary questions with Holm's p over all of them; one that has no p yet counts as p = 1."""
    if loss is None:
        return []
    if a.primary == "preference":
        name = f"Loss of {loss.arm} equivalent to that of {loss.baseline} within {a.margin_nats:g} nats"
        rows = [SecondaryAnswer(loss.id, name, loss.n, loss.mean, loss.low, loss.high, loss.interval_level, loss.p)]
    elif preference is None:
        rows = [SecondaryAnswer("preference", "Preference", None, None, None, None, 1 - a.alpha, None)]
    else:
        f = preference
        rows = [SecondaryAnswer("preference", "Preference", f.n, f.estimate, f.low, f.high, f.level, f.p)]
    if factorial is not None:
        rows += [
            SecondaryAnswer(e.id, f"{e.name} on the loss", e.n, e.mean, e.low, e.high, factorial.interval_level, e.p)
            for e in factorial.effects
        ]
    answered = {a.baseline, a.treatment, *(factorial.places.values() if factorial else ())}
    answered |= {arm for arms in (a.sweeps or {}).values() for arm in arms}
    for arm in (arm for arm in certificate.arms if arm not in answered):
        differences = paired(values, certificate, arm, loss.baseline, seeds)
        s, p = summarize_paired(differences, 1 - a.alpha), float(mean_test(differences).p)
        name = f"Loss of {arm} less that of {loss.baseline}"
        rows.append(SecondaryAnswer(f"loss_difference_{arm}", name, s.n, s.mean, s.low, s.high, 1 - a.alpha, p))
    for best in sweeps.answers if sweeps else ():
        name = f"Loss of {best.name} less that of {best.baseline}, each at its best rate"
        rows.append(SecondaryAnswer(best.id, name, best.n, best.mean, best.low, best.high, best.level, best.p))
    p_Q = np.array([row.p for row in rows], dtype=np.float64)
    adjusted = np.where(np.isnan(p_Q), NAN, holm(np.where(np.isnan(p_Q), 1.0, p_Q)))
    return [
        replace(row, p_holm=float(corrected), verdict=_secondary_verdict(row, corrected, a))
        for row, corrected in zip(rows, adjusted, strict=True)
    ]


def _secondary_verdict(row: SecondaryAnswer, corrected: float, a: AnalysisConfig) -> str:
    if np.isnan(corrected):
        return "no p: not enough to test"
    if row.n is None or row.n < a.min_seeds:
        return f"not decided: fewer than {a.min_seeds} seeds"
    if row.id == "loss_equivalence":
        return "equivalent" if corrected < a.alpha else "not shown to be equivalent"
    null = "one half" if row.id == "preference" else "zero"
    return f"other than {null}" if corrected < a.alpha else f"not told from {null}"
