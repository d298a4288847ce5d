"""Numbers of cells and of arms: every cell's own, arms compared at the same seed, and the published values beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from replication.config import DivergedRule, SuiteConfig
from replication.evaluation.record import Part
from replication.protocol.certificate import Certificate
from replication.protocol.diverged import why_diverged
from replication.protocol.paper import DIVERGENCE_STEPS, DIVERGENCES, METRICS, PHASE_3
from replication.report.load import NAN, CellData, Floats
from replication.runs.layout import SuiteDir, name_cells
from replication.runs.manifest import Manifest
from replication.statistics.seeds import (
    BUDGET_TOLERANCE,
    budget_departure,
    differences_to_first,
    last_share_mean,
    late_mean,
    sign_flip_p,
    summarize_paired,
)

Number = float | None
"""Of a record of results.json; NaN until it is written, None where it was missing."""
Row = dict[str, object]
"""Column -> value: a row of a table, or a part of results.json, that templates read."""
Scores = Mapping[str, Number]
"""Of one evaluation, by metric."""
LATE_STEP_SHARE = 0.1
KINDS = ("task", "file", "distributions")
"""Of evaluations, in the order of the report."""


def certified(certificate: Certificate, arms: Sequence[str], seeds: Sequence[int]) -> NDArray[np.bool_]:
    """bool [N]: at which seeds the certificate lets all these arms be compared with one another."""
    first = certificate.arms[0]
    states = [[arm == first or certificate.pair(arm, seed).state == "holds" for arm in arms] for seed in seeds]
    return np.all(np.array(states, dtype=bool).reshape(len(seeds), len(arms)), axis=1, keepdims=False)


@dataclass(frozen=True)
class Quantity:
    """One number of a complete cell that arms are compared by."""

    key: str
    name: str
    unit: str
    value: Callable[[CellData], float]


def quantities(late_validations: int) -> tuple[Quantity, ...]:
    """All that arms are compared by; the late mean is over so many validations."""

    def final(tag: str) -> Callable[[CellData], float]:
        """At the cell's last step: a validation of an earlier one is not the final one."""
        return lambda cell: cell.validation.last(tag) if cell.step in cell.validation.steps[-1:] else NAN

    def late(tag: str) -> Callable[[CellData], float]:
        return lambda cell: late_mean(cell.validation.column(tag), late_validations)

    def grad_norm(cell: CellData) -> float:
        return last_share_mean(cell.per_step.get("train/grad_norm", np.empty(0)), LATE_STEP_SHARE)

    unsmoothed, plain = "val/loss_unsmoothed_nats", "Validation loss, no smoothing"
    histogram, predictive = "val/entropy_predicted_tokens_nats", "val/entropy_predictive_nats"
    return (
        Quantity("final_val_loss", "Validation loss at the last step", "nats", final("val/loss_nats")),
        Quantity("late_val_loss", "Validation loss, late mean", "nats", late("val/loss_nats")),
        Quantity("final_val_loss_unsmoothed", f"{plain}, at the last step", "nats", final(unsmoothed)),
        Quantity("late_val_loss_unsmoothed", f"{plain}, late mean", "nats", late(unsmoothed)),
        Quantity("entropy_predicted_tokens", "Entropy of the histogram of predicted tokens", "nats", final(histogram)),
        Quantity("entropy_predictive", "Mean entropy of the predictive distribution", "nats", final(predictive)),
        Quantity("grad_norm", f"Gradient norm, mean of the last {LATE_STEP_SHARE:.0%} of steps", "", grad_norm),
    )


def diverged_rows(suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[CellData]) -> Iterator[Row]:
    """Cells that diverged by the suite's rule; complete ones stay in every comparison."""
    for c in cells:
        warmup, vocabulary = (c.config.get(key) for key in ("training.warmup_steps", "model.vocab_size"))
        if isinstance(warmup, int) and isinstance(vocabulary, int):
            why = why_diverged(suite_dir.cell(c.arm, c.seed), suite.diverged, warmup, vocabulary)
            if why:
                yield {"arm": c.arm, "seed": c.seed, "state": c.state, "why": why}


def diverged_limit(rule: DivergedRule, cells: Iterable[CellData]) -> float:
    """What a diverged cell's loss counts at where it has none, in nats: the limit of the suite's rule."""
    vocabulary = next((cell.config.get("model.vocab_size") for cell in cells if cell.config), None)
    return rule.above_nats or (math.log(vocabulary) if isinstance(vocabulary, int) else NAN)


def cell_row(cell: CellData, compared: Sequence[Quantity]) -> Row:
    """One cell; the quantities of one that is not complete are missing."""
    validation, manifest = cell.validation, cell.manifest or Manifest()
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "state": cell.state,
        "step": cell.step,
        "steps_planned": cell.config.get("training.steps"),
        "tokens": cell.tokens,
        "last_val_loss_nats": validation.last("val/loss_nats"),
        "last_val_loss_unsmoothed_nats": validation.last("val/loss_unsmoothed_nats"),
        "last_val_step": int(validation.steps[-1]) if len(validation.steps) else None,
        "tokens_per_second": cell.tokens / cell.wall_seconds if cell.wall_seconds > 0 else NAN,
        "wall_seconds": cell.wall_seconds,
        "config_hash": manifest.config_hash,
        "final_weights_sha256": manifest.final_weights_sha256,
        **{q.key: q.value(cell) if cell.complete else NAN for q in compared},
    }


def late_window(cells: Sequence[CellData], k: int) -> Row:
    """Part of training that the late-checkpoint mean is over, of the first complete cell with validations."""
    for cell in cells:
        if cell.complete and len(cell.validation.steps):
            late = cell.validation.steps[-k:].tolist()
            share = (cell.step - late[0]) / cell.step if cell.step else NAN
            return Row(k=len(late), k_asked=k, first_step=late[0], last_step=late[-1], share_of_training=share)
    return Row(k=0, k_asked=k, first_step=None, last_step=None, share_of_training=None)


def gain_row(cell: CellData) -> Row:
    """Whether the token gain preserves the total gradient budget in one cell (objectives/README.md, Token gain).

    What is measured is the gain of the formula; in a control it is not applied, as another weight stands in its place.
    """
    mean = cell.train.column("gain/mean")
    budget = budget_departure(mean)
    failing = cell.train.steps[np.abs(np.where(np.isfinite(mean), mean, 1.0) - 1) > BUDGET_TOLERANCE]
    last = ("mean", "mean_before_clamp", "std", "share_at_min", "share_at_max")
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "applied": cell.config.get("token_gain.enabled") and cell.config.get("token_gain.control", "none") == "none",
        "n_measured": budget.n_measured,
        "n_failing": budget.n_failing,
        "share_failing": budget.share,
        "last_failing_step": int(failing[-1]) if len(failing) else None,
        "largest_mean": float(np.nanmax(mean)) if budget.n_measured else NAN,
        **{f"last_{name}": cell.train.last(f"gain/{name}") for name in last},
    }


@dataclass(frozen=True)
class ComparedArm:
    """One arm beside the baseline in one quantity, over certified pairs; numbers as in statistics.seeds.Paired."""

    arm: str
    differences: list[Number]
    """Arm minus baseline, one a seed."""
    n: int
    mean: Number
    sd: Number
    low: Number
    high: Number
    n_positive: int
    n_negative: int
    note: str
    p_sign_flip: Number

    @property
    def side(self) -> str:
        """On which side of the baseline the arm lies."""
        n, up, down = self.n, self.n_positive, self.n_negative
        if not n:
            return "not measured in any certified pair"
        if n in (up, down):
            return f"{'higher' if up else 'lower'} at {'the one seed' if n == 1 else f'{n} of {n} seeds'}"
        return f"higher at {up}, lower at {down} of {n} seeds"


@dataclass(frozen=True)
class QuantityRow:
    """One quantity: values of complete cells, and differences of the pairs that the certificate lets pass."""

    key: str
    name: str
    unit: str
    values: dict[str, list[Number]]
    """Arm -> one a seed."""
    means: dict[str, Number]
    baseline_range: Number
    pairs: list[ComparedArm]

    def arm(self, name: str) -> ComparedArm:
        return next(pair for pair in self.pairs if pair.arm == name)


Values = Mapping[str, Sequence[Number]]
"""Arm -> one value a seed, NaN where a cell has none."""


def paired(values: Values, certificate: Certificate, arm: str, baseline: str, seeds: Sequence[int]) -> Floats:
    """float64 [N]: arm minus baseline at each seed; NaN where a value or the certificate is missing."""
    (differences,) = differences_to_first([np.asarray(values[of], dtype=np.float64) for of in (baseline, arm)])
    return np.where(certified(certificate, (arm, baseline), seeds), differences, NAN)


def compare(q: Quantity, suite: SuiteConfig, cells: Sequence[CellData], certificate: Certificate) -> QuantityRow:
    measured = {(cell.arm, cell.seed): q.value(cell) for cell in cells if cell.complete}
    values: dict[str, list[Number]]
    values = {arm: [measured.get((arm, seed), NAN) for seed in suite.seeds] for arm in suite.arms}
    pooled = [seed for seed in suite.seeds if seed not in certificate.not_pooled]
    there = [[v for seed in pooled if np.isfinite(v := measured.get((arm, seed), NAN))] for arm in suite.arms]
    pairs = []
    for arm in suite.arms[1:]:
        used = paired(values, certificate, arm, suite.arms[0], suite.seeds)
        numbers = vars(summarize_paired(used))
        pairs.append(ComparedArm(arm=arm, differences=used.tolist(), **numbers, p_sign_flip=float(sign_flip_p(used))))
    return QuantityRow(
        key=q.key,
        name=q.name,
        unit=q.unit,
        values=values,
        means={arm: float(np.mean(of)) if of else NAN for arm, of in zip(suite.arms, there, strict=True)},
        baseline_range=float(np.ptp(there[0])) if len(there[0]) > 1 else NAN,
        pairs=pairs,
    )


def evaluations(
    suite: SuiteConfig, cells: Sequence[CellData], certificate: Certificate
) -> tuple[list[QuantityRow], list[str]]:
    """Scores of evaluation.json, compared as every quantity is; and a warning for each that some cells were asked
    otherwise than the first cell that has it, of those in the means: theirs count as missing."""
    first: dict[tuple[str, str], Part] = {}
    for part in (part for cell in sorted(cells, key=lambda c: not c.pooled) for part in cell.evaluation):
        first.setdefault(part.key, part)
    rows, warned = [], []
    for key, of_first in sorted(first.items(), key=lambda item: KINDS.index(item[0][0])):
        found = {(c.arm, c.seed): part for c in cells for part in c.evaluation if part.key == key}
        alike = {place: part.scores for place, part in found.items() if part.asked == of_first.asked}
        if unlike := [f"{arm}/seed-{seed}" for arm, seed in found if (arm, seed) not in alike]:
            warned.append(
                f"evaluation on {key[1]}: {name_cells(unlike)} had another version of it, or of its settings, and "
                "count as missing; `replicate eval` with the same words scores them anew"
            )
        for metric in of_first.scores:

            def value(cell: CellData, alike: Mapping[tuple[str, int], Scores] = alike, metric: str = metric) -> float:
                score = alike.get((cell.arm, cell.seed), {}).get(metric)
                return NAN if score is None else score

            quantity = Quantity("/".join((*key, metric)), f"{key[1]}: {metric}", "", value)
            rows.append(compare(quantity, suite, cells, certificate))
    return rows, warned


def beside_published(compared: Mapping[str, QuantityRow], arms: Sequence[str]) -> Row:
    """Published numbers beside the same quantities here: comparable in direction only.

    They apply where the suite has the two arms that were published.
    """
    applies, rows = arms[0] == "baseline" and "both" in arms, []
    for metric in METRICS:
        q = compared[metric.quantity]
        pair = q.arm("both") if applies else None
        row = {f"published_{key}": getattr(metric, key) for key in ("name", "baseline", "both", "direction")}
        row |= {f"here_{arm}": q.means[arm] if applies else None for arm in ("baseline", "both")}
        row |= {"here_name": q.name, "unit": q.unit, "digits": metric.digits}
        row["published_difference"] = round(metric.both - metric.baseline, 6)
        row["here_difference"] = pair.mean if pair else None
        row["here_direction"] = pair.side if pair else "no such pair in this suite"
        rows.append(row)
    return {"applies": applies, "rows": rows}


def block_of(place: str, n_blocks: int) -> int | None:
    """The block of a model that stands for a published one; None where it is too shallow to have one."""
    if not n_blocks or (place == "fourth" and n_blocks <= 4):
        return None
    return {"first": 0, "fourth": 3, "last": n_blocks - 1}[place]


def divergences(cells: Sequence[CellData], arms: Sequence[str]) -> Row:
    """Divergences of three blocks, published and here; of the cells, complete ones that may be pooled are read.

    Growth is the value at the last of the steps over that at the first.
    """
    published, here = [], []
    for d in DIVERGENCES:
        at = {"place": d.place, "block": d.block, "steps": DIVERGENCE_STEPS, "values": d.values}
        published.append(at | {"growth": d.values[-1] / d.values[0]})
    for arm in arms:
        own = [cell for cell in cells if cell.arm == arm and cell.complete and cell.pooled]
        for d in DIVERGENCES:
            rows = [row for row in (_seed_divergence(cell, d.place) for cell in own) if row]
            if rows:
                means = {
                    "mean": np.array([row["values"] for row in rows], dtype=np.float64).mean(0).tolist(),
                    "growth": float(np.array([row["growth"] for row in rows], dtype=np.float64).mean()),
                }
                of_block = {key: rows[0][key] for key in ("block", "steps")}
                here.append({"arm": arm, "place": d.place} | of_block | means | {"seeds": rows})
    return {"blocks": PHASE_3.blocks, "training_steps": PHASE_3.steps, "published": published, "here": here}


def _seed_divergence(cell: CellData, place: str) -> Row | None:
    """One block of one cell, at the logged steps nearest to the published shares of training."""
    block = block_of(place, len(cell.train.tags("divergence/")))
    if block is None:
        return None
    nearest = [int(np.abs(cell.train.steps - cell.step * at / PHASE_3.steps).argmin()) for at in DIVERGENCE_STEPS]
    steps, values = cell.train.steps[nearest].tolist(), cell.train.column(f"divergence/block_{block:02d}")[nearest]
    growth = float(values[-1] / values[0])
    return Row(seed=cell.seed, block=block, steps=steps, values=values.tolist(), growth=growth)
