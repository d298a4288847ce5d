"""Figures of the report: every seed a thin line, the arm's mean a thick one, one colour an arm, never colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from replication.report.block_figures import draw_block_lines, draw_blocks
from replication.report.drawing import (
    FONT_POINTS,
    ArmStyle,
    Drawn,
    Floats,
    arm_styles,
    draw_arms,
    draw_interval,
    empty,
    legend,
    name_panel,
    new_figure,
    of_train,
    of_validation,
    save_png,
    windowed,
)
from replication.report.load import Cell, Series
from replication.report.preference_figures import preference_figure
from replication.statistics.seeds import BUDGET_TOLERANCE, mean_over_seeds


def draw_figures(cells: Sequence[Cell], results: dict[str, Any], folder: Path) -> list[Drawn]:
    """Draw every figure into folder.

    Args:
        cells: all cells of the suite, in whatever state.
        results: the numbers of the report; `suite`, `quantities`, `pairs_used`, `factorial` and `divergence` are read.
        folder: DIR/figures; made where it does not exist.

    Returns:
        What was drawn, in the order of the report. Figures without anything to show say so in the picture.
    """
    styles = arm_styles(results["suite"]["arms"])
    drawings = [
        _validation_loss(cells, styles, results),
        _train_loss(cells, styles),
        _paired(results, styles),
        *([preference_figure(results, styles)] if results["preference"] else []),
        *([_factorial(results["factorial"])] if results["factorial"] else []),
        _gain(cells, styles),
        draw_block_lines(cells, styles, results["divergence"]),
        draw_blocks(cells, styles, "divergence"),
        draw_blocks(cells, styles, "scale"),
        _gradient_norm(cells, styles),
        _entropies(cells, styles),
    ]
    return [save_figure(figure, drawn, folder) for figure, drawn in drawings]


def save_figure(figure: Figure, drawn: Drawn, folder: Path) -> Drawn:
    """Write one figure into folder, which is made where it does not exist; returns what was drawn."""
    save_png(figure, folder / drawn.file)
    return drawn


# ---------------------------------------------------------------- curves


def _validation_loss(
    cells: Sequence[Cell], styles: dict[str, ArmStyle], results: dict[str, Any]
) -> tuple[Figure, Drawn]:
    figure, (top, bottom) = new_figure(2, 3.1)
    draw_arms(top, cells, styles, of_validation("val/loss_nats"))
    name_panel(top, "Validation loss", "nats a token")
    baseline = results["suite"]["baseline"]
    _draw_paired_curves(bottom, cells, styles, results)
    name_panel(bottom, f"Difference to {styles[baseline].label}, same seed", "nats a token", "optimizer step")
    legend(figure, styles)
    return figure, Drawn(
        "validation_loss.png",
        "Validation loss",
        "Cross-entropy with the training's label smoothing on the fixed validation set. Below: each arm minus "
        f"{baseline} at the same seed and step, certified pairs only. A cross marks a cell that did not finish.",
    )


def _draw_paired_curves(
    panel: Axes, cells: Sequence[Cell], styles: dict[str, ArmStyle], results: dict[str, Any]
) -> None:
    by_name = {(cell.arm, cell.seed): cell for cell in cells}
    baseline = results["suite"]["baseline"]
    panel.axhline(0, color=styles[baseline].colour, linewidth=1.2)
    drawn = False
    for arm, style in styles.items():
        curves = []
        for pair in results["pairs_used"]:
            if pair["arm"] == arm:
                first, other = by_name[baseline, pair["seed"]], by_name[arm, pair["seed"]]
                steps, a, b = _common(first.validation, other.validation, "val/loss_nats")
                curves.append((steps, b - a))
                panel.plot(steps, b - a, color=style.colour, linewidth=0.8, alpha=0.65)
        steps, mean = mean_over_seeds(curves)
        panel.plot(steps, mean, color=style.colour, linewidth=2.4, linestyle=style.dashes)
        drawn |= bool(curves)
    if not drawn:
        empty(panel)


def _common(a: Series, b: Series, tag: str) -> tuple[Floats, Floats, Floats]:
    """(common steps [C], values of a [C], values of b [C])."""
    steps, in_a, in_b = np.intersect1d(a.steps, b.steps, return_indices=True)
    return steps.astype(np.float64), a.column(tag)[in_a], b.column(tag)[in_b]


def _train_loss(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, (panel,) = new_figure(1, 3.4)
    curve, words = windowed(cells, "train/loss_nats")
    draw_arms(panel, cells, styles, curve)
    name_panel(panel, f"Training loss ({words})", "nats a token", "optimizer step")
    legend(figure, styles)
    return figure, Drawn(
        "train_loss.png",
        "Training loss",
        f"Unweighted cross-entropy with label smoothing, {words}: never the weighted objective, so that arms compare.",
    )


def _gradient_norm(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, (panel,) = new_figure(1, 3.4)
    curve, words = windowed(cells, "train/grad_norm")
    draw_arms(panel, cells, styles, curve)
    name_panel(panel, f"Gradient norm ({words})", "global 2-norm", "optimizer step")
    panel.set_ylim(bottom=0)
    legend(figure, styles)
    return figure, Drawn(
        "gradient_norm.png",
        "Gradient norm",
        f"Global norm after the layer scale and before clipping, {words}.",
    )


def _entropies(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, panels = new_figure(2, 2.9)
    draw_arms(panels[0], cells, styles, of_validation("val/entropy_predicted_tokens_nats"))
    name_panel(panels[0], "Entropy of the histogram of predicted tokens", "nats")
    draw_arms(panels[1], cells, styles, of_validation("val/entropy_predictive_nats"))
    name_panel(panels[1], "Mean entropy of the predictive distribution", "nats", "optimizer step")
    legend(figure, styles)
    return figure, Drawn(
        "token_entropies.png",
        "Token entropies",
        "On the validation set. The published 'token entropy' is not defined; its size fits the upper quantity.",
    )


def _gain(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, panels = new_figure(4, 2.1)
    panels[0].axhspan(1 - BUDGET_TOLERANCE, 1 + BUDGET_TOLERANCE, color="#cccccc", zorder=0)
    named = (
        ("gain/mean", "Mean gain after the clamp (grey: within 1 % of 1)", "mean gain"),
        ("gain/std", "Spread of the gain over tokens", "standard dev."),
        ("gain/share_at_min", "Tokens clamped at the lower bound", "share"),
        ("gain/share_at_max", "Tokens clamped at the upper bound", "share"),
    )
    for panel, (tag, title, y) in zip(panels, named, strict=True):
        draw_arms(panel, cells, styles, of_train(tag))
        name_panel(panel, title, y, "optimizer step" if tag == "gain/share_at_max" else "")
    legend(figure, styles)
    return figure, Drawn(
        "token_gain.png",
        "Token gain",
        "Measured in every arm; in arms without the token gain it is what the gain would have been.",
    )


# ---------------------------------------------------------------- paired differences


def _paired(results: dict[str, Any], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    quantities = results["quantities"]
    baseline = results["suite"]["baseline"]
    n_arms = max(1, len(styles) - 1)
    figure, panels = new_figure(len(quantities), 0.75 + 0.36 * n_arms, shared_steps=False)
    for panel, quantity in zip(panels, quantities, strict=True):
        _draw_differences(panel, quantity, styles)
        if quantity["key"] == results["analysis"]["loss"]:
            margin = results["analysis"]["margin_nats"]
            panel.axvspan(-margin, margin, color="#dddddd", zorder=0)
        unit = f", {quantity['unit']}" if quantity["unit"] else ""
        name_panel(panel, f"{quantity['name']}{unit}")
    name_panel(panels[-1], panels[-1].get_title("left"), "", f"difference to {styles[baseline].label}")
    return figure, Drawn(
        "paired_differences.png",
        "Paired differences",
        f"Each arm minus {baseline} at the same seed: a mark for each seed, a bar at the mean, and the 95 % t interval "
        "of the mean from two seeds on (an arrow: it goes on outside the picture). Grey: the margin of equivalence. "
        "Certified pairs only.",
    )


def _draw_differences(panel: Axes, quantity: dict[str, Any], styles: dict[str, ArmStyle]) -> None:
    rows = quantity["pairs"]
    dots = np.array([d for row in rows for d in row["differences"] if d is not None], dtype=np.float64)
    panel.axvline(0, color="#000000", linewidth=1.2)
    panel.set_yticks(range(len(rows)), [styles[row["arm"]].label for row in rows], fontsize=FONT_POINTS - 1)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    if not len(dots):
        empty(panel)
        return
    reach = max(float(np.abs(dots).max()) * 1.9, 1e-9)  # with two seeds the interval is too wide to set the scale
    panel.set_xlim(-reach, reach)
    for y, row in enumerate(rows):
        style = styles[row["arm"]]
        if row["low"] is not None:
            draw_interval(panel, y, row["low"], row["high"], reach, style.colour)
        if row["mean"] is not None:
            panel.plot([row["mean"]] * 2, [y - 0.26, y + 0.26], color=style.colour, linewidth=3)
        there = [d for d in row["differences"] if d is not None]
        panel.plot(there, [y] * len(there), style.marker, color=style.colour, markersize=7, mec="white", mew=0.8)


# ---------------------------------------------------------------- the 2x2

FOUR = ("neither", "token", "layer", "both")
OFF, ON = "#0072B2", "#D55E00"


def _factorial(factorial: dict[str, Any]) -> tuple[Figure, Drawn]:
    """Above, every seed's four losses as two lines; below, its three contrasts."""
    figure, (top, bottom) = new_figure(2, 3.0, shared_steps=False)
    _draw_interaction(top, factorial)
    _draw_effects(bottom, factorial["effects"])
    level = f"{factorial['interval_level']:.0%}".replace("%", " %")
    return figure, Drawn(
        "factorial.png",
        "The 2x2",
        "Above: each seed's loss in the four arms less the seed's own mean, thin; thick, the mean over seeds. Parallel "
        "lines mean no interaction. Below: main effects and interaction, a mark for each seed, a bar at the mean, and "
        f"the {level} t interval (an arrow: it goes on outside the picture). Seeds with all four arms certified only.",
    )


def _draw_interaction(panel: Axes, factorial: dict[str, Any]) -> None:
    within = [factorial["within_seed"][factorial["places"][place]] for place in FOUR]
    table = np.array([[np.nan if v is None else v for v in row] for row in within], dtype=np.float64)
    name_panel(panel, "Loss less the seed's mean", "nats a token", "layer gain")
    panel.set_xticks([0, 1], ["off", "on"], fontsize=FONT_POINTS)
    panel.set_xlim(-0.2, 1.2)
    if not factorial["n"]:
        empty(panel)
        return
    for rows, label, colour, dashes, marker in (
        ([0, 2], "token gain off", OFF, "-", "o"),
        ([1, 3], "on", ON, "--", "s"),
    ):
        panel.plot([0, 1], table[rows], color=colour, linewidth=0.8, alpha=0.6, marker=marker, markersize=3)
        mean = np.nanmean(table[rows], axis=1)
        panel.plot(
            [0, 1], mean, color=colour, linewidth=2.6, linestyle=dashes, marker=marker, markersize=7, label=label
        )
    panel.legend(fontsize=FONT_POINTS - 1, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.0))
    panel.margins(y=0.3)


def _draw_effects(panel: Axes, effects: Sequence[dict[str, Any]]) -> None:
    name_panel(panel, "Effects on the loss", "", "nats a token")
    panel.axvline(0, color="#000000", linewidth=1.2)
    panel.set_yticks(range(len(effects)), [e["name"].replace(", ", "\n") for e in effects], fontsize=FONT_POINTS - 1)
    panel.set_ylim(len(effects) - 0.4, -0.6)
    dots = [d for effect in effects for d in effect["contrasts"] if d is not None]
    if not dots:
        empty(panel)
        return
    reach = max(float(np.abs(dots).max()) * 1.6, 1e-9)
    panel.set_xlim(-reach, reach)
    for y, effect in enumerate(effects):
        if effect["low"] is not None:
            draw_interval(panel, y, effect["low"], effect["high"], reach, "#333333")
        if effect["mean"] is not None:
            panel.plot([effect["mean"]] * 2, [y - 0.26, y + 0.26], color="#000000", linewidth=3)
        there = [d for d in effect["contrasts"] if d is not None]
        panel.plot(there, [y] * len(there), "o", color="#666666", markersize=7, mec="white", mew=0.8)
