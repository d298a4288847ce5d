"""Figures of the training runs: loss curves, last metrics, divergences and the scales that follow from them.

Shapes: V checkpoints, T samples, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from replication.audit.published import Curve, Floats, Published
from replication.protocol.paper import LATE_CHECKPOINTS

EXTREME = {"min": np.min, "max": np.max}


class TrainingFigures:
    """The functions of a claims file that read curves, last metrics and divergences.

    With `minus` a figure is the difference to another run's; `which` is min or max; a late mean is over the `last`
    checkpoints, and a gap is the validation loss minus the training loss.
    """

    data: Published

    def _curve(self, run: str) -> Curve:
        if run not in self.data.losses:
            raise LookupError(f"loss curve of '{run}'")
        return self.data.losses[run]

    def _row_B(self, step: int) -> Floats:
        return self.data.divergences_TB[_at(self.data.sampled_steps, step)]

    def _sampled_TB(self, blocks: Sequence[int], from_step: int = 0) -> Floats:
        return self.data.divergences_TB[self.data.sampled_steps >= from_step][:, list(blocks)]

    def _scales_TB(self, t: float) -> Floats:
        """1 + t (d / mean d - 1) over the blocks, before the clamp."""
        values_TB = self.data.divergences_TB
        return 1 + t * (values_TB / values_TB.mean(1, keepdims=True) - 1)

    def late_loss(self, run: str, minus: str | None = None, last: int = LATE_CHECKPOINTS) -> float:
        """Late mean of the validation loss."""
        value = float(self._curve(run).validation[-last:].mean())
        return value if minus is None else value - self.late_loss(minus, last=last)

    def late_loss_in_errors(self, run: str, minus: str, last: int = LATE_CHECKPOINTS) -> float:
        return self.late_loss(run, minus, last) / self.late_loss_error(run, minus, last)

    def late_loss_error(self, run: str, minus: str, last: int = LATE_CHECKPOINTS) -> float:
        """Standard error of the difference of the late means, checkpoints taken as independent."""
        variances = [self._curve(name).validation[-last:].var(ddof=1) / last for name in (run, minus)]
        return float(np.sqrt(sum(variances)))

    def smoothed_error(self, run: str, minus: str, from_step: int = 0, window: int = LATE_CHECKPOINTS) -> float:
        """Standard error of the difference of two smoothed validation curves, each point a mean over `window`.

        From the common checkpoints since a step, paired, as a stationary series whose neighbours are correlated by
        their lag-1 autocorrelation r and others by its powers: var / w * (1 + 2 sum over k < w of (1 - k / w) r^k).
        """
        variance, r = self._checkpoint_series(run, minus, from_step)
        lags = np.arange(1, window)
        return float(np.sqrt(variance / window * (1 + 2 * ((1 - lags / window) * r**lags).sum())))

    def checkpoint_autocorrelation(self, run: str, minus: str, from_step: int = 0) -> float:
        """Lag-1 autocorrelation of the difference of two runs' validation losses at their common checkpoints."""
        return self._checkpoint_series(run, minus, from_step)[1]

    def _checkpoint_series(self, run: str, minus: str, from_step: int) -> tuple[float, float]:
        ours, theirs = self._curve(run), self._curve(minus)
        steps, i, j = np.intersect1d(ours.steps, theirs.steps, return_indices=True)
        differences = (ours.validation[i] - theirs.validation[j])[steps >= from_step]
        centred = differences - differences.mean()
        return float(differences.var(ddof=1)), float((centred[1:] * centred[:-1]).sum() / (centred**2).sum())

    def late_gap(self, run: str, minus: str, last: int = LATE_CHECKPOINTS) -> float:
        """Distance of two runs' late mean gaps."""
        ours, theirs = (self._curve(name).gap[-last:].mean() for name in (run, minus))
        return float(abs(ours - theirs))

    def loss_at(self, run: str, step: int, which: str = "validation") -> float:
        """Loss (`which`: train, validation) at a checkpoint."""
        curve = self._curve(run)
        return float(getattr(curve, which)[_at(curve.steps, step)])

    def checkpoint_noise(self, run: str, last: int = LATE_CHECKPOINTS) -> float:
        """Standard deviation of the change from checkpoint to checkpoint, over a run's last 2 x `last` checkpoints."""
        return float(np.diff(self._curve(run).validation[-2 * last :]).std(ddof=1))

    def gap_ratio(self, run: str, to: str, which: str) -> float:
        """The extreme ratio of two runs' gaps over their common checkpoints."""
        ours, theirs = self._curve(run), self._curve(to)
        _, i, j = np.intersect1d(ours.steps, theirs.steps, return_indices=True)
        return float(EXTREME[which](ours.gap[i] / theirs.gap[j]))

    def widest_smooth_difference(self, run: str, minus: str, from_step: int, window: int = LATE_CHECKPOINTS) -> float:
        """The largest distance of two smoothed validation curves at their common checkpoints from a step on.

        A point is the mean over the last `window` checkpoints up to it, as in the late mean.
        """
        ours, theirs = (self._curve(name) for name in (run, minus))

        def smooth(values_V: Floats) -> Floats:
            return np.array([values_V[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values_V))])

        steps, i, j = np.intersect1d(ours.steps, theirs.steps, return_indices=True)
        apart = np.abs(smooth(ours.validation)[i] - smooth(theirs.validation)[j])
        return float(apart[steps >= from_step].max())

    def checkpoints(self, run: str) -> int:
        return len(self._curve(run).steps)

    def checkpoints_missing(self, run: str, that: str) -> str:
        """Steps that another run's curve has and this one's lacks."""
        missing = np.setdiff1d(self._curve(that).steps, self._curve(run).steps)
        return ", ".join(str(step) for step in missing) or "none"

    def final(self, run: str, key: str, minus: str | None = None) -> float:
        value = self.data.finals.get(run, {}).get(key)
        if value is None:
            raise LookupError(f"metric {key} of '{run}'")
        return value if minus is None else value - self.final(minus, key)

    def spread_of_finals(self, runs: Sequence[str], key: str) -> float:
        values = [self.final(run, key) for run in runs]
        return max(values) - min(values)

    def ratio_of_finals(self, run: str, to: str, key: str) -> float:
        return self.final(run, key) / self.final(to, key)

    def divergence(self, block: int, step: int) -> float:
        return float(self._row_B(step)[block])

    def divergence_mean(self, step: int, without: Sequence[int] = ()) -> float:
        return float(np.delete(self._row_B(step), list(without)).mean())

    def divergence_ratio(self, block: int, to: Sequence[int], step: int) -> float:
        """One block's divergence as a multiple of the mean over others."""
        row_B = self._row_B(step)
        return float(row_B[block] / row_B[list(to)].mean())

    def divergence_table(self, column: int | str, step: int, blocks: Sequence[int] = ()) -> float:
        """A cell of a table of divergences: a block, or `ratio` (block 0 to the mean of some)."""
        return self.divergence_ratio(0, blocks, step) if column == "ratio" else self.divergence(int(column), step)

    def ratio_keeps_falling(self, block: int, to: Sequence[int], steps: Sequence[int], digits: int = 1) -> bool:
        """Whether the ratio, rounded as printed, never rises from a listed step to the next."""
        ratios = [round(self.divergence_ratio(block, to, step), digits) for step in steps]
        return all(later <= earlier for earlier, later in pairwise(ratios))

    def least_ratio_to_others(self, block: int) -> float:
        """The lowest multiple of the mean over all other blocks, over the samples."""
        values_TB = self.data.divergences_TB
        return float((values_TB[:, block] / np.delete(values_TB, block, axis=1).mean(1)).min())

    def divergence_growth(self, block: int, start: int, end: int) -> float:
        """Relative growth from one step to another: 1 is a doubling."""
        return self.divergence(block, end) / self.divergence(block, start) - 1

    def window_growth(self, block: int, last: int) -> float:
        """Relative growth of a block's mean over the last samples against as many before them."""
        values_T = self._sampled_TB([block])[:, 0]
        return float(values_T[-last:].mean() / values_T[-2 * last : -last].mean() - 1)

    def largest_growth(self, blocks: Sequence[int], start: int, end: int) -> float:
        return max(self.divergence_growth(block, start, end) for block in blocks)

    def divergence_extreme(self, blocks: Sequence[int], which: str, from_step: int = 0) -> float:
        return float(EXTREME[which](self._sampled_TB(blocks, from_step)))

    def divergence_extreme_at(self, blocks: Sequence[int], which: str, step: int) -> float:
        return float(EXTREME[which](self._row_B(step)[list(blocks)]))

    def samples_within(self, block: int, low: float, high: float) -> float:
        """Share of the samples in which a block's divergence lies in a range."""
        values = self._sampled_TB([block])
        return float(((values >= low) & (values <= high)).mean())

    def samples(self) -> int:
        return len(self.data.sampled_steps)

    def blocks(self) -> int:
        return self.data.divergences_TB.shape[1]

    def sample_spacing(self) -> int:
        """Steps between samples, the widest."""
        return int(np.diff(self.data.sampled_steps).max())

    def samples_at_upper_clamp(self, block: int, m_max: float = 3.0, t: float = 0.5) -> float:
        """Share of the samples in which a block's scale reaches the upper clamp."""
        return float((self._scales_TB(t)[:, block] >= m_max).mean())

    def last_step_at_upper_clamp(self, block: int, m_max: float = 3.0, t: float = 0.5) -> int:
        """The last sampled step at which a block's scale reaches the upper clamp; 0 where it never does."""
        return int(self.data.sampled_steps[self._scales_TB(t)[:, block] >= m_max].max(initial=0))

    def highest_scale(self, blocks: Sequence[int], from_step: int = 0, t: float = 0.5) -> float:
        """The highest scale of some blocks before the clamp, from a step on."""
        return float(self._scales_TB(t)[self.data.sampled_steps >= from_step][:, list(blocks)].max())

    def scale_sd(self, step: int, t: float = 0.5, m_min: float = 0.1, m_max: float = 3.0) -> float:
        """Standard deviation of the clamped scales over the blocks at a step (n - 1)."""
        scales_B = self._scales_TB(t)[_at(self.data.sampled_steps, step)]
        return float(np.clip(scales_B, m_min, m_max).std(ddof=1))


def _at(steps: np.ndarray, step: int) -> int:
    found = np.flatnonzero(steps == step)
    if not len(found):
        raise LookupError(f"step {step}")
    return int(found[0])
