"""Figures of the training runs: loss curves, last metrics, divergences and the scales that follow from them.

Shapes: V checkpoints, T samples, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from replication.audit.published import Curve, Divergences, Floats, Published
from replication.audit.recompute import recomputes

LATE = 10
"""The published smooth loss is the mean over the last ten checkpoints."""


def _curve(data: Published, run: str) -> Curve:
    if run not in data.curves:
        raise LookupError(f"loss curve of '{run}'")
    return data.curves[run]


def _at(steps: np.ndarray, step: int) -> int:
    found = np.flatnonzero(steps == step)
    if not len(found):
        raise LookupError(f"step {step}")
    return int(found[0])


def _divergences(data: Published) -> Divergences:
    if data.divergences is None:
        raise LookupError("divergences")
    return data.divergences


def _sampled(data: Published, blocks: Sequence[int], from_step: int = 0) -> Floats:
    """float64 [T, len(blocks)], from a step on."""
    d = _divergences(data)
    return d.values_TB[d.steps >= from_step][:, list(blocks)]


def scales(values_TB: Floats, t: float = 0.5) -> Floats:
    """1 + t (d / mean d - 1) over the blocks, before the clamp; float64 [T, B]."""
    return 1 + t * (values_TB / values_TB.mean(1, keepdims=True) - 1)


# ---------------------------------------------------------------- losses


@recomputes
def late_loss(data: Published, run: str, minus: str | None = None, last: int = LATE) -> float:
    """Mean validation loss over a run's last checkpoints, or its difference to another run's."""
    value = float(_curve(data, run).validation[-last:].mean())
    return value if minus is None else value - late_loss(data, minus, last=last)


@recomputes
def late_loss_in_errors(data: Published, run: str, minus: str, last: int = LATE) -> float:
    """The difference of the late means in its standard errors, checkpoints taken as independent."""
    return late_loss(data, run, minus, last) / late_loss_error(data, run, minus, last)


@recomputes
def late_loss_error(data: Published, run: str, minus: str, last: int = LATE) -> float:
    """Standard error of the difference of the late means, checkpoints taken as independent."""
    variances = [_curve(data, name).validation[-last:].var(ddof=1) / last for name in (run, minus)]
    return float(np.sqrt(sum(variances)))


@recomputes
def late_gap(data: Published, run: str, minus: str, last: int = LATE) -> float:
    """Distance of two runs' mean gaps (validation minus train) over the last checkpoints."""
    gaps = [(c.validation - c.train)[-last:].mean() for c in (_curve(data, run), _curve(data, minus))]
    return float(abs(gaps[0] - gaps[1]))


@recomputes
def loss_at(data: Published, run: str, step: int, which: str = "validation") -> float:
    """train or validation loss of a run at a checkpoint."""
    curve = _curve(data, run)
    return float(getattr(curve, which)[_at(curve.steps, step)])


@recomputes
def checkpoint_noise(data: Published, run: str, last: int = LATE) -> float:
    """Standard deviation of the change from checkpoint to checkpoint, over a run's last 2 x `last` checkpoints."""
    return float(np.diff(_curve(data, run).validation[-2 * last :]).std(ddof=1))


@recomputes
def gap_ratio(data: Published, run: str, to: str, which: str) -> float:
    """The lowest or highest ratio of two runs' gaps (validation minus train) over their common checkpoints."""
    ours, theirs = _curve(data, run), _curve(data, to)
    _, i, j = np.intersect1d(ours.steps, theirs.steps, return_indices=True)
    ratios = (ours.validation - ours.train)[i] / (theirs.validation - theirs.train)[j]
    return float({"min": np.min, "max": np.max}[which](ratios))


@recomputes
def widest_smooth_difference(data: Published, run: str, minus: str, from_step: int, window: int = LATE) -> float:
    """The largest distance of two smoothed validation curves at their common checkpoints from a step on.

    A point is the mean over the last `window` checkpoints up to it, as in the late mean.
    """
    smooth = []
    for name in (run, minus):
        curve = _curve(data, name)
        means = [curve.validation[max(0, i + 1 - window) : i + 1].mean() for i in range(len(curve.steps))]
        smooth.append(dict(zip(curve.steps.tolist(), means, strict=True)))
    common = [step for step in smooth[0] if step in smooth[1] and step >= from_step]
    return float(max(abs(smooth[0][step] - smooth[1][step]) for step in common))


@recomputes
def checkpoints(data: Published, run: str) -> int:
    """How many checkpoints of a run are published."""
    return len(_curve(data, run).steps)


@recomputes
def checkpoints_missing(data: Published, run: str, that: str) -> str:
    """Steps that another run's curve has and this one's lacks."""
    missing = np.setdiff1d(_curve(data, that).steps, _curve(data, run).steps)
    return ", ".join(str(step) for step in missing) or "none"


@recomputes
def final(data: Published, run: str, key: str, minus: str | None = None) -> float:
    """A run's last metric, or its difference to another run's."""
    for name in [run] if minus is None else [run, minus]:
        if key not in data.finals.get(name, {}):
            raise LookupError(f"metric {key} of '{name}'")
    value = data.finals[run][key]
    return value if minus is None else value - data.finals[minus][key]


@recomputes
def spread_of_finals(data: Published, runs: Sequence[str], key: str) -> float:
    """Highest minus lowest last metric of some runs."""
    values = [final(data, run, key) for run in runs]
    return max(values) - min(values)


@recomputes
def ratio_of_finals(data: Published, run: str, to: str, key: str) -> float:
    """A run's last metric as a multiple of another's."""
    return final(data, run, key) / final(data, to, key)


# ---------------------------------------------------------------- divergences


@recomputes
def divergence(data: Published, block: int, step: int) -> float:
    """Of one block at one sampled step."""
    d = _divergences(data)
    return float(d.values_TB[_at(d.steps, step), block])


@recomputes
def divergence_mean(data: Published, step: int, without: Sequence[int] = ()) -> float:
    """Mean over the blocks at a step, some left out."""
    d = _divergences(data)
    kept = [block for block in range(d.values_TB.shape[1]) if block not in without]
    return float(d.values_TB[_at(d.steps, step), kept].mean())


@recomputes
def divergence_ratio(data: Published, block: int, to: Sequence[int], step: int) -> float:
    """One block's divergence as a multiple of the mean over others."""
    d = _divergences(data)
    row = d.values_TB[_at(d.steps, step)]
    return float(row[block] / row[list(to)].mean())


@recomputes
def divergence_table(data: Published, column: int | str, step: int, blocks: Sequence[int] = ()) -> float:
    """A cell of a table of divergences: a block, or `ratio` (block 0 to the mean of some)."""
    return divergence_ratio(data, 0, blocks, step) if column == "ratio" else divergence(data, int(column), step)


@recomputes
def ratio_keeps_falling(data: Published, block: int, to: Sequence[int], steps: Sequence[int], digits: int = 1) -> bool:
    """Whether the ratio, rounded as printed, never rises from a listed step to the next."""
    ratios = [round(divergence_ratio(data, block, to, step), digits) for step in steps]
    return all(later <= earlier for earlier, later in pairwise(ratios))


@recomputes
def least_ratio_to_others(data: Published, block: int) -> float:
    """The lowest multiple of the mean over all other blocks, over the samples."""
    values_TB = _divergences(data).values_TB
    others = np.delete(values_TB, block, axis=1).mean(1)
    return float((values_TB[:, block] / others).min())


@recomputes
def divergence_growth(data: Published, block: int, start: int, end: int) -> float:
    """Relative growth from one step to another: 1 is a doubling."""
    return divergence(data, block, end) / divergence(data, block, start) - 1


@recomputes
def window_growth(data: Published, block: int, last: int) -> float:
    """Relative growth of a block's mean over the last samples against as many before them."""
    values_T = _sampled(data, [block])[:, 0]
    return float(values_T[-last:].mean() / values_T[-2 * last : -last].mean() - 1)


@recomputes
def largest_growth(data: Published, blocks: Sequence[int], start: int, end: int) -> float:
    """The largest relative growth of some blocks."""
    return max(divergence_growth(data, block, start, end) for block in blocks)


@recomputes
def divergence_extreme(data: Published, blocks: Sequence[int], which: str, from_step: int = 0) -> float:
    """The lowest or highest divergence of some blocks, from a step on."""
    return float({"min": np.min, "max": np.max}[which](_sampled(data, blocks, from_step)))


@recomputes
def divergence_extreme_at(data: Published, blocks: Sequence[int], which: str, step: int) -> float:
    """The lowest or highest divergence of some blocks at one step."""
    return {"min": min, "max": max}[which](divergence(data, block, step) for block in blocks)


@recomputes
def samples_within(data: Published, block: int, low: float, high: float) -> float:
    """Share of the samples in which a block's divergence lies in a range."""
    values = _sampled(data, [block])
    return float(((values >= low) & (values <= high)).mean())


@recomputes
def samples(data: Published) -> int:
    """How many steps are sampled."""
    return len(_divergences(data).steps)


@recomputes
def blocks(data: Published) -> int:
    """How many blocks are sampled."""
    return _divergences(data).values_TB.shape[1]


@recomputes
def sample_spacing(data: Published) -> int:
    """Steps between samples, the widest."""
    return int(np.diff(_divergences(data).steps).max())


# ---------------------------------------------------------------- scales


@recomputes
def samples_at_upper_clamp(data: Published, block: int, m_max: float = 3.0, t: float = 0.5) -> float:
    """Share of the samples in which a block's scale reaches the upper clamp."""
    return float((scales(_divergences(data).values_TB, t)[:, block] >= m_max).mean())


@recomputes
def last_step_at_upper_clamp(data: Published, block: int, m_max: float = 3.0, t: float = 0.5) -> int:
    """The last sampled step at which a block's scale reaches the upper clamp; 0 where it never does."""
    d = _divergences(data)
    at = d.steps[scales(d.values_TB, t)[:, block] >= m_max]
    return int(at.max()) if len(at) else 0


@recomputes
def highest_scale(data: Published, blocks: Sequence[int], from_step: int = 0, t: float = 0.5) -> float:
    """The highest scale of some blocks before the clamp, from a step on."""
    d = _divergences(data)
    return float(scales(d.values_TB, t)[d.steps >= from_step][:, list(blocks)].max())


@recomputes
def scale_sd(data: Published, step: int, t: float = 0.5, m_min: float = 0.1, m_max: float = 3.0) -> float:
    """Standard deviation of the clamped scales over the blocks at a step (n - 1)."""
    d = _divergences(data)
    return float(np.clip(scales(d.values_TB, t)[_at(d.steps, step)], m_min, m_max).std(ddof=1))
