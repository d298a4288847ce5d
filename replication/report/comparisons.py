"""Numbers of cells and of arms: every cell's own, arms compared at the same seed, and the published values beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from replication.config import SuiteConfig
from replication.protocol.certificate import Certificate
from replication.protocol.diverged import why_diverged
from replication.protocol.paper import DIVERGENCE_STEPS, DIVERGENCES, METRICS, PHASE_3
from replication.report.load import NAN, CellData, Floats
from replication.runs.layout import SuiteDir
from replication.statistics.losses import sign_flip_p
from replication.statistics.seeds import (
    BUDGET_TOLERANCE,
    budget_departure,
    differences_to_first,
    last_share_mean,
    late_mean,
    summarize_paired,
)

Number = float | None
"""Of a record of results.json; NaN until it is written, None where it was missing."""
LATE_STEP_SHARE = 0.1


# ---------------------------------------------------------------- which pairs and cells are compared


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

    def late(cell: CellData) -> float:
        return late_mean(cell.validation.column("val/loss_nats"), late_validations).value

    def grad_norm(cell: CellData) -> float:
        return last_share_mean(cell.per_step.get("train/grad_norm", np.empty(0)), LATE_STEP_SHARE).value

    histogram, predictive = "val/entropy_predicted_tokens_nats", "val/entropy_predictive_nats"
    return (
        Quantity("final_val_loss", "Validation loss at the last step", "nats", _final("val/loss_nats")),
        Quantity("late_val_loss", "Validation loss, late mean", "nats", late),
        Quantity("entropy_predicted_tokens", "Entropy of the histogram of predicted tokens", "nats", _final(histogram)),
        Quantity("entropy_predictive", "Mean entropy of the predictive distribution", "nats", _final(predictive)),
        Quantity("grad_norm", f"Gradient norm, mean of the last {LATE_STEP_SHARE:.0%} of steps", "", grad_norm),
    )


def _final(tag: str) -> Callable[[CellData], float]:
    """The validation at the cell's last step; a validation of an earlier step is not the final one."""

    def value(cell: CellData) -> float:
        steps = cell.validation.steps
        return cell.validation.last(tag) if len(steps) and steps[-1] == cell.step else NAN

    return value


# ---------------------------------------------------------------- cells


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """One cell; the quantities of one that is not complete are missing."""

    arm: str
    seed: int
    state: str
    step: int
    steps_planned: object
    tokens: Number
    last_val_loss_nats: Number
    last_val_loss_unsmoothed_nats: Number
    last_val_step: int | None
    tokens_per_second: Number
    wall_seconds: Number
    config_hash: str | None
    final_weights_sha256: str | None
    final_val_loss: Number
    late_val_loss: Number
    entropy_predicted_tokens: Number
    entropy_predictive: Number
    grad_norm: Number


def cell_row(cell: CellData, compared: Sequence[Quantity]) -> CellRow:
    steps = cell.validation.steps
    return CellRow(
        arm=cell.arm,
        seed=cell.seed,
        state=cell.state,
        step=cell.step,
        steps_planned=cell.config.get("training.steps"),
        tokens=cell.tokens,
        last_val_loss_nats=cell.validation.last("val/loss_nats"),
        last_val_loss_unsmoothed_nats=cell.validation.last("val/loss_unsmoothed_nats"),
        last_val_step=int(steps[-1]) if len(steps) else None,
        tokens_per_second=cell.tokens / cell.wall_seconds if cell.wall_seconds > 0 else NAN,
        wall_seconds=cell.wall_seconds,
        config_hash=cell.manifest.config_hash if cell.manifest else None,
        final_weights_sha256=cell.manifest.final_weights_sha256 if cell.manifest else None,
        **{q.key: q.value(cell) if cell.complete else NAN for q in compared},
    )


@dataclass(frozen=True)
class FailureRow:
    arm: str
    seed: int
    error: str
    step: int


@dataclass(frozen=True)
class DivergedRow:
    """A cell that diverged by the suite's rule; complete ones stay in every comparison."""

    arm: str
    seed: int
    state: str
    why: str


def diverged_rows(suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[CellData]) -> Iterator[DivergedRow]:
    for c in cells:
        warmup, vocabulary = (c.config.get(key) for key in ("training.warmup_steps", "model.vocab_size"))
        if isinstance(warmup, int) and isinstance(vocabulary, int):
            why = why_diverged(suite_dir.cell(c.arm, c.seed), suite.diverged, warmup, vocabulary)
            if why:
                yield DivergedRow(c.arm, c.seed, c.state, why)


@dataclass(frozen=True)
class LateWindow:
    """Part of training that the late-checkpoint mean is over, of the first complete cell with validations."""

    k: int
    k_asked: int
    first_step: int | None = None
    last_step: int | None = None
    share_of_training: Number = None


def late_window(cells: Sequence[CellData], k: int) -> LateWindow:
    for cell in cells:
        if cell.complete and len(cell.validation.steps):
            late = cell.validation.steps[-k:]
            first = int(late[0])
            return LateWindow(len(late), k, first, int(late[-1]), (cell.step - first) / cell.step if cell.step else NAN)
    return LateWindow(0, k)


@dataclass(frozen=True, kw_only=True)
class GainRow:
    """Whether the token gain preserves the total gradient budget in one cell (objectives/README.md, Token gain)."""

    arm: str
    seed: int
    applied: object
    n_measured: int
    n_failing: int
    share_failing: Number
    last_failing_step: int | None
    largest_mean: Number
    last_mean: Number
    last_mean_before_clamp: Number
    last_std: Number
    last_share_at_min: Number
    last_share_at_max: Number


def gain_row(cell: CellData) -> GainRow:
    mean = cell.train.column("gain/mean")
    budget = budget_departure(mean)
    failing = cell.train.steps[np.abs(np.where(np.isfinite(mean), mean, 1.0) - 1) > BUDGET_TOLERANCE]
    last = ("mean", "mean_before_clamp", "std", "share_at_min", "share_at_max")
    return GainRow(
        arm=cell.arm,
        seed=cell.seed,
        applied=cell.config.get("token_gain.enabled"),
        n_measured=budget.n_measured,
        n_failing=budget.n_failing,
        share_failing=budget.share,
        last_failing_step=int(failing[-1]) if len(failing) else None,
        largest_mean=float(np.nanmax(mean)) if budget.n_measured else NAN,
        **{f"last_{name}": cell.train.last(f"gain/{name}") for name in last},
    )


# ---------------------------------------------------------------- arms


@dataclass(frozen=True)
class ArmDifferences:
    arm: str
    differences: list[Number]
    """Arm minus baseline, one a seed."""


@dataclass(frozen=True)
class PairedNumbers:
    """See statistics.seeds.Paired."""

    n: int
    mean: Number
    sd: Number
    low: Number
    high: Number
    n_positive: int
    n_negative: int
    note: str


@dataclass(frozen=True)
class ComparedArm(PairedNumbers, ArmDifferences):
    """One arm beside the baseline in one quantity, over certified pairs."""

    p_sign_flip: Number

    @property
    def side(self) -> str:
        """On which side of the baseline the arm lies."""
        n, up, down = self.n, self.n_positive, self.n_negative
        if not n:
            return "not measured in any certified pair"
        seeds = "the one seed" if n == 1 else f"{n} of {n} seeds"
        if n in (up, down):
            return f"{'higher' if up else 'lower'} at {seeds}"
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


def compare(q: Quantity, suite: SuiteConfig, cells: Sequence[CellData], certificate: Certificate) -> QuantityRow:
    by_name = {(cell.arm, cell.seed): cell for cell in cells}
    values = np.array([
        [q.value(by_name[arm, seed]) if by_name[arm, seed].complete else NAN for seed in suite.seeds]
        for arm in suite.arms
    ])  # fmt: skip
    pairs = []
    for arm, row in zip(suite.arms[1:], differences_to_first(values), strict=True):
        used = np.where([certificate.pair(arm, seed).state == "holds" for seed in suite.seeds], row, NAN)
        numbers = vars(summarize_paired(used))
        pairs.append(ComparedArm(arm=arm, differences=used.tolist(), **numbers, p_sign_flip=float(sign_flip_p(used))))
    pooled = values[:, [seed not in certificate.not_pooled for seed in suite.seeds]]
    there = [row[np.isfinite(row)] for row in pooled]
    return QuantityRow(
        key=q.key,
        name=q.name,
        unit=q.unit,
        values={arm: row.tolist() for arm, row in zip(suite.arms, values, strict=True)},
        means={arm: float(row.mean()) if len(row) else NAN for arm, row in zip(suite.arms, there, strict=True)},
        baseline_range=float(np.ptp(there[0])) if len(there[0]) > 1 else NAN,
        pairs=pairs,
    )


# ---------------------------------------------------------------- beside the published run


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A published number beside the same quantity here: comparable in direction only."""

    published_name: str
    here_name: str
    unit: str
    published_baseline: float
    published_both: float
    published_difference: float
    digits: int
    here_baseline: Number
    here_both: Number
    here_difference: Number
    published_direction: str
    here_direction: str


@dataclass(frozen=True)
class Published:
    applies: bool
    """Whether the suite has the two arms that were published."""
    rows: list[PublishedRow]


def beside_published(compared: Mapping[str, QuantityRow], arms: Sequence[str]) -> Published:
    applies = arms[0] == "baseline" and "both" in arms
    rows = []
    for metric in METRICS:
        q = compared[metric.quantity]
        pair = q.arm("both") if applies else None
        rows.append(
            PublishedRow(
                published_name=metric.name,
                here_name=q.name,
                unit=q.unit,
                published_baseline=metric.baseline,
                published_both=metric.both,
                published_difference=round(metric.both - metric.baseline, 6),
                digits=metric.digits,
                here_baseline=q.means["baseline"] if applies else None,
                here_both=q.means["both"] if applies else None,
                here_difference=pair.mean if pair else None,
                published_direction=metric.direction,
                here_direction=pair.side if pair else "no such pair in this suite",
            )
        )
    return Published(applies, rows)


@dataclass(frozen=True)
class PublishedDivergence:
    """Divergence of one block of the published run at three of its steps; growth is the last over the first."""

    place: str
    block: int
    steps: list[int]
    values: list[float]
    growth: float


@dataclass(frozen=True)
class SeedDivergence:
    seed: int
    block: int
    steps: list[int]
    values: list[Number]
    growth: Number


@dataclass(frozen=True)
class ArmDivergence:
    """The same block of one arm, at the logged steps nearest to the published shares of training."""

    arm: str
    place: str
    block: int
    steps: list[int]
    mean: list[Number]
    growth: Number
    seeds: list[SeedDivergence]


@dataclass(frozen=True)
class Divergence:
    blocks: int
    """Of the published model."""
    training_steps: int
    """Of the published run."""
    published: list[PublishedDivergence]
    here: list[ArmDivergence]


def block_of(place: str, n_blocks: int) -> int | None:
    """The block of a model of n_blocks that stands for a published one; None where it is too shallow to have one."""
    block = {"first": 0, "fourth": 3, "last": n_blocks - 1}[place]
    return block if place != "fourth" or n_blocks > 4 else None


def divergences(cells: Sequence[CellData], arms: Sequence[str]) -> Divergence:
    """Published and measured divergences; of the cells, complete ones that may be pooled are read."""
    assert PHASE_3.blocks is not None
    published = [
        PublishedDivergence(d.place, d.block, list(DIVERGENCE_STEPS), list(d.values), d.values[-1] / d.values[0])
        for d in DIVERGENCES
    ]
    here = [row for arm in arms for d in DIVERGENCES if (row := _arm_divergence(cells, arm, d.place))]
    return Divergence(PHASE_3.blocks, PHASE_3.steps, published, here)


def _arm_divergence(cells: Sequence[CellData], arm: str, place: str) -> ArmDivergence | None:
    rows = []
    for cell in cells:
        n_blocks = len(cell.train.tags("divergence/"))
        block = block_of(place, n_blocks) if n_blocks else None
        if cell.arm == arm and cell.complete and cell.pooled and block is not None:
            steps, values = _at_shares(cell, f"divergence/block_{block:02d}")
            rows.append(SeedDivergence(cell.seed, block, steps, [*values], float(values[-1] / values[0])))
    if not rows:
        return None
    table = np.array([row.values for row in rows], dtype=np.float64)  # [N, 3]
    growth = float(np.mean([row.growth for row in rows]))
    return ArmDivergence(arm, place, rows[0].block, rows[0].steps, table.mean(0).tolist(), growth, rows)


def _at_shares(cell: CellData, tag: str) -> tuple[list[int], Floats]:
    steps, values = cell.train.steps, cell.train.column(tag)
    nearest = [int(np.abs(steps - cell.step * at / PHASE_3.steps).argmin()) for at in DIVERGENCE_STEPS]
    return [int(steps[i]) for i in nearest], values[nearest]
