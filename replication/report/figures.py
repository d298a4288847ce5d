"""Figures of the report: every seed a thin line, the arm's mean a thick one, one colour an arm, never colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from replication.report.blocks import draw_block_lines, draw_blocks
from replication.report.drawing import (
    ArmStyle,
    Curve,
    arm_styles,
    draw_arms,
    empty,
    legend,
    name_axes,
    new_figure,
    of_train,
    of_validation,
    save_png,
    windowed,
)
from replication.report.effects import factorial_figure, paired_figure, preference_figure
from replication.report.load import CellData, Floats, Series
from replication.report.results import Drawn, Results
from replication.statistics.seeds import BUDGET_TOLERANCE, mean_over_seeds

Drawing = tuple[Figure, Drawn]


def draw_figures(cells: Sequence[CellData], results: Results, folder: Path) -> list[Drawn]:
    """Draw every figure into folder, which is made where it does not exist.

    Returns:
        Their words, in the order of the report. Figures without anything to show say so in the picture.
    """
    styles = arm_styles(results.suite.arms)
    drawings = [
        _validation_loss(cells, styles, results),
        _train_loss(cells, styles),
        paired_figure(results, styles),
        *([preference_figure(results.preference, styles)] if results.preference else []),
        *([factorial_figure(results.factorial)] if results.factorial else []),
        _gain(cells, styles),
        draw_block_lines(cells, styles, results.divergence),
        draw_blocks(cells, styles, "divergence"),
        draw_blocks(cells, styles, "scale"),
        _gradient_norm(cells, styles),
        _entropies(cells, styles),
    ]
    return [save_figure(figure, drawn, folder) for figure, drawn in drawings]


def save_figure(figure: Figure, drawn: Drawn, folder: Path) -> Drawn:
    save_png(figure, folder / drawn.file)
    return drawn


def _curves(
    cells: Sequence[CellData], styles: dict[str, ArmStyle], inches: float, *rows: tuple[Curve, str, str]
) -> tuple[Figure, list[Axes]]:
    """A figure of (curve, title, name of y) one below the other, each `inches` high, over optimizer steps."""
    figure, column = new_figure(len(rows), inches)
    for axes, (curve, title, y) in zip(column, rows, strict=True):
        draw_arms(axes, cells, styles, curve)
        name_axes(axes, title, y, "optimizer step" if axes is column[-1] else "")
    legend(figure, styles)
    return figure, column


def _validation_loss(cells: Sequence[CellData], styles: dict[str, ArmStyle], results: Results) -> Drawing:
    figure, (top, bottom) = new_figure(2, 3.1)
    draw_arms(top, cells, styles, of_validation("val/loss_nats"))
    name_axes(top, "Validation loss", "nats a token")
    baseline = results.suite.baseline
    _draw_paired_curves(bottom, cells, styles, results)
    name_axes(bottom, f"Difference to {styles[baseline].label}, same seed", "nats a token", "optimizer step")
    legend(figure, styles)
    return figure, Drawn(
        "validation_loss.png",
        "Validation loss",
        "Cross-entropy with the training's label smoothing on the fixed validation set. Below: each arm minus "
        f"{baseline} at the same seed and step, certified pairs only. A cross marks a cell that did not finish.",
    )


def _draw_paired_curves(axes: Axes, cells: Sequence[CellData], styles: dict[str, ArmStyle], results: Results) -> None:
    by_name = {(cell.arm, cell.seed): cell for cell in cells}
    baseline = results.suite.baseline
    axes.axhline(0, color=styles[baseline].colour, linewidth=1.2)
    for arm, style in styles.items():
        curves = []
        for pair in results.pairs_used:
            if pair.arm == arm:
                first, other = by_name[baseline, pair.seed], by_name[arm, pair.seed]
                steps, a, b = _common(first.validation, other.validation, "val/loss_nats")
                curves.append((steps, b - a))
                axes.plot(steps, b - a, color=style.colour, linewidth=0.8, alpha=0.65)
        steps, mean = mean_over_seeds(curves)
        axes.plot(steps, mean, color=style.colour, linewidth=2.4, linestyle=style.dashes)
    if not results.pairs_used:
        empty(axes)


def _common(a: Series, b: Series, tag: str) -> tuple[Floats, Floats, Floats]:
    """(common steps [C], values of a [C], values of b [C])."""
    steps, in_a, in_b = np.intersect1d(a.steps, b.steps, return_indices=True)
    return steps.astype(np.float64), a.column(tag)[in_a], b.column(tag)[in_b]


def _train_loss(cells: Sequence[CellData], styles: dict[str, ArmStyle]) -> Drawing:
    curve, words = windowed(cells, "train/loss_nats")
    figure, _ = _curves(cells, styles, 3.4, (curve, f"Training loss ({words})", "nats a token"))
    caption = (
        f"Unweighted cross-entropy with label smoothing, {words}: never the weighted objective, so that arms compare."
    )
    return figure, Drawn("train_loss.png", "Training loss", caption)


def _gradient_norm(cells: Sequence[CellData], styles: dict[str, ArmStyle]) -> Drawing:
    curve, words = windowed(cells, "train/grad_norm")
    figure, (axes,) = _curves(cells, styles, 3.4, (curve, f"Gradient norm ({words})", "global 2-norm"))
    axes.set_ylim(bottom=0)
    caption = f"Global norm after the layer scale and before clipping, {words}."
    return figure, Drawn("gradient_norm.png", "Gradient norm", caption)


def _entropies(cells: Sequence[CellData], styles: dict[str, ArmStyle]) -> Drawing:
    histogram, predictive = "val/entropy_predicted_tokens_nats", "val/entropy_predictive_nats"
    figure, _ = _curves(
        cells, styles, 2.9,
        (of_validation(histogram), "Entropy of the histogram of predicted tokens", "nats"),
        (of_validation(predictive), "Mean entropy of the predictive distribution", "nats"),
    )  # fmt: skip
    return figure, Drawn(
        "token_entropies.png",
        "Token entropies",
        "On the validation set. The published 'token entropy' is not defined; its size fits the upper quantity.",
    )


def _gain(cells: Sequence[CellData], styles: dict[str, ArmStyle]) -> Drawing:
    figure, (top, *_) = _curves(
        cells, styles, 2.1,
        (of_train("gain/mean"), "Mean gain after the clamp (grey: within 1 % of 1)", "mean gain"),
        (of_train("gain/std"), "Spread of the gain over tokens", "standard dev."),
        (of_train("gain/share_at_min"), "Tokens clamped at the lower bound", "share"),
        (of_train("gain/share_at_max"), "Tokens clamped at the upper bound", "share"),
    )  # fmt: skip
    top.axhspan(1 - BUDGET_TOLERANCE, 1 + BUDGET_TOLERANCE, color="#cccccc", zorder=0)
    return figure, Drawn(
        "token_gain.png",
        "Token gain",
        "Measured in every arm; in arms without the token gain it is what the gain would have been.",
    )
