"""The questions of the analysis plan that losses answer: equivalence and the 2x2. decisions.py decides them.

A question that cannot be answered says why; nothing is made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from replication.config import AnalysisConfig, SuiteConfig, flatten, load_cell, to_dict
from replication.errors import UserError
from replication.protocol.certificate import Certificate
from replication.report.comparisons import Number, Values, certified, paired
from replication.report.load import NAN, CellData
from replication.statistics.seeds import (
    NOT_DECIDED,
    SeedsForPower,
    equivalence,
    factorial_contrasts,
    mean_test,
    seeds_for_power,
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
    verdict: str = NOT_DECIDED
    """equivalent, different beyond the margin, or not decided: the outcome of the decision."""
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
    further: SeedsForPower | None
    """Of a new study; None where the mean lies outside the margin, and no number of seeds is what is lacking."""
    more_seeds: int
    """Seeds that are lacking to the fewest that the plan asks for."""
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
    is_within = n >= 2 and abs(float(tested.mean)) < a.margin_nats
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
        **{key: getattr(tested, key).item() for key in ("mean", "sd", "low", "high", "p_lower", "p_upper", "p")},
        p_no_difference=float(mean_test(differences).p),
        p_sign_flip=float(sign_flip_p(differences)),
        smallest_sign_flip_p=smallest_sign_flip_p(n),
        further=seeds_for_power(n, float(tested.sd), a.margin_nats, a.alpha) if is_within else None,
        more_seeds=lacking,
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
