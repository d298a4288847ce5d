"""Figures over training: every seed a thin line, the arm's mean a thick one, one colour an arm, never colour alone.

Blocks have heat maps too, over blocks and steps, with a map for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from replication.protocol.paper import DIVERGENCE_STEPS, DIVERGENCES, PHASE_3
from replication.report.comparisons import block_of
from replication.report.curves import write_curves
from replication.report.drawing import (
    FONT_POINTS,
    WIDTH_INCHES,
    ArmStyle,
    Curve,
    Drawing,
    arm_styles,
    draw_arms,
    empty,
    legend,
    name_axes,
    new_figure,
    of_train,
    of_validation,
    save_vector,
)
from replication.report.effects import answer_figure, factorial_figure, paired_figure, vote_figures
from replication.report.load import CellData, Floats
from replication.report.results import Drawn, Results
from replication.statistics.seeds import BUDGET_TOLERANCE, mean_over_seeds, window_means

Styles = dict[str, ArmStyle]
MAX_POINTS = 120
"""Of a curve over all steps."""
COLUMNS = 400
"""Of a row of heat maps: all seeds of an arm share them."""


def draw_figures(
    cells: Sequence[CellData], results: Results, folder: Path, width_inches: float = WIDTH_INCHES
) -> list[Drawn]:
    """Draw every figure into folder, which is made where it does not exist; returns their words, in the report's order.

    Figures without anything to show say so in the picture. Their curves are saved beside them, for the page's script.
    """
    styles = arm_styles(results.suite.arms)
    drawings = [
        *([answer_figure(results, styles)] if results.loss else []),
        _validation_loss(cells, styles, results),
        _each_step(cells, styles, "train/loss_nats"),
        paired_figure(results, styles),
        *(vote_figures(results.preference, styles) if results.preference else []),
        *([factorial_figure(results.factorial)] if results.factorial else []),
        _gain(cells, styles),
        _block_lines(cells, styles),
        _heat_maps(cells, styles, "divergence"),
        _heat_maps(cells, styles, "scale"),
        _each_step(cells, styles, "train/grad_norm"),
        _entropies(cells, styles),
    ]
    write_curves(drawings, cells, styles, folder)
    for figure, drawn in drawings:
        save_vector(figure, folder / drawn.file, width_inches)
    return [drawn for _, drawn in drawings]


def _validation_loss(cells: Sequence[CellData], styles: Styles, results: Results) -> Drawing:
    """Of all arms, and below them each arm's difference to the baseline."""
    by_name, baseline = {(cell.arm, cell.seed): cell.validation for cell in cells}, results.suite.baseline
    figure, (top, bottom) = new_figure(2, 3.1)
    draw_arms(top, cells, styles, of_validation("val/loss_nats"))
    name_axes(top, "Validation loss", "nats a token")
    bottom.axhline(0, color=styles[baseline].colour, linewidth=1.2)
    for arm, style in styles.items():
        curves = []
        for seed in [pair.seed for pair in results.pairs_used if pair.arm == arm]:
            first, other = by_name[baseline, seed], by_name[arm, seed]
            steps, in_first, in_other = np.intersect1d(first.steps, other.steps, return_indices=True)
            difference = other.column("val/loss_nats")[in_other] - first.column("val/loss_nats")[in_first]
            curves.append((steps.astype(np.float64), difference))
            bottom.plot(*curves[-1], color=style.colour, linewidth=0.8, alpha=0.65, label=f"{arm}/seed-{seed}")
        bottom.plot(*mean_over_seeds(curves), color=style.colour, linewidth=2.4, linestyle=style.dashes, label=arm)
    if not results.pairs_used:
        empty(bottom)
    name_axes(bottom, f"Difference to {styles[baseline].label}, same seed", "nats a token", "optimizer step")
    legend(figure, styles)
    return figure, Drawn(
        "validation_loss.svg",
        "Validation loss",
        "Cross-entropy with the training's label smoothing on the fixed validation set. Below: each arm minus "
        f"{baseline} at the same seed and step, certified pairs only. A cross marks a cell that did not finish.",
    )


def _curves(cells: Sequence[CellData], styles: Styles, inches: float, *rows: tuple[Curve, str, str]) -> Figure:
    """A figure of (curve, title, name of y) one below the other, each `inches` high, over optimizer steps."""
    figure, column = new_figure(len(rows), inches)
    for axes, (curve, title, y) in zip(column, rows, strict=True):
        draw_arms(axes, cells, styles, curve)
        name_axes(axes, title, y, "optimizer step" if axes is column[-1] else "")
    legend(figure, styles)
    return figure


_EACH_STEP = {
    "train/loss_nats": (
        *("train_loss.svg", "Training loss", "nats a token"),
        "Unweighted cross-entropy with label smoothing, {}: never the weighted objective, so that arms compare.",
    ),
    "train/grad_norm": (
        *("gradient_norm.svg", "Gradient norm", "global 2-norm"),
        "Global norm after the layer scale and before clipping, {}.",
    ),
}


def _each_step(cells: Sequence[CellData], styles: Styles, tag: str) -> Drawing:
    """Values of every step in means over windows, the same window for every cell."""
    file, title, y, caption = _EACH_STEP[tag]
    size = max(1, -(-max((len(cell.per_step.get(tag, ())) for cell in cells), default=0) // MAX_POINTS))
    words = "every step" if size == 1 else f"means over {size} steps"

    def curve(cell: CellData) -> tuple[Floats, Floats]:
        return window_means(cell.per_step.get(tag, np.empty(0)), size)

    figure = _curves(cells, styles, 3.4, (curve, f"{title} ({words})", y))
    figure.axes[0].set_label(tag)
    figure.axes[0].set_ylim(bottom=0 if tag == "train/grad_norm" else None)
    return figure, Drawn(file, title, caption.format(words))


def _entropies(cells: Sequence[CellData], styles: Styles) -> Drawing:
    histogram, predictive = (
        of_validation("val/entropy_predicted_tokens_nats"),
        of_validation("val/entropy_predictive_nats"),
    )
    upper = (histogram, "Entropy of the histogram of predicted tokens", "nats")
    lower = (predictive, "Mean entropy of the predictive distribution", "nats")
    return _curves(cells, styles, 2.9, upper, lower), Drawn(
        "token_entropies.svg",
        "Token entropies",
        "On the validation set. The published 'token entropy' is not defined; its size fits the upper quantity.",
    )


def _gain(cells: Sequence[CellData], styles: Styles) -> Drawing:
    rows = (
        ("mean", "Mean gain after the clamp (grey: within 1 % of 1)", "mean gain"),
        ("std", "Spread of the gain over tokens", "standard dev."),
        ("share_at_min", "Tokens clamped at the lower bound", "share"),
        ("share_at_max", "Tokens clamped at the upper bound", "share"),
    )
    figure = _curves(cells, styles, 2.1, *((of_train(f"gain/{key}"), title, y) for key, title, y in rows))
    figure.axes[0].axhspan(1 - BUDGET_TOLERANCE, 1 + BUDGET_TOLERANCE, color="#cccccc", zorder=0)
    return figure, Drawn(
        "token_gain.svg",
        "Token gain",
        "Measured in every arm; in arms without the token gain it is what the gain would have been.",
    )


def _block_lines(cells: Sequence[CellData], styles: Styles) -> Drawing:
    """Divergence of the first, the fourth and the last block, every seed a line, with the published values."""
    n_blocks = max((len(cell.train.tags("divergence/")) for cell in cells), default=0)
    places = [(d, block) for d in DIVERGENCES if (block := block_of(d.place, n_blocks)) is not None]
    shown = places or [(DIVERGENCES[0], 0)]
    figure, rows = new_figure(len(shown), 2.3)
    last = max((cell.step for cell in cells), default=0)
    for axes, (published, block) in zip(rows, shown, strict=True):
        draw_arms(axes, cells, styles, of_train(f"divergence/block_{block:02d}"))
        name_axes(axes, f"Block {block}; published: block {published.block} of {PHASE_3.blocks}", "divergence")
        if last:
            at = [last * step / PHASE_3.steps for step in DIVERGENCE_STEPS]
            axes.plot(
                at, published.values, "D", color="#CC79A7", markersize=9, mec="#000000", zorder=5, label="published"
            )
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
    rows[-1].set_xlabel("optimizer step", fontsize=FONT_POINTS)
    diamond = Line2D([], [], color="#CC79A7", marker="D", mec="#000000", linestyle="", markersize=8, label="published")
    legend(figure, styles, [diamond])
    return figure, Drawn(
        "divergence_blocks.svg",
        "Divergence of three blocks",
        "First, fourth and last block, every seed a line. Diamonds: the published run with both changes (one seed, 1.2 "
        "billion parameters) at the same share of its training.",
    )


_MAPPED = {
    "divergence": (
        "||y - x|| / ||x||",
        "Layer divergence",
        "How far each block moves its input, over blocks (down) and steps (to the right): a map for every seed. White: "
        "not logged.",
    ),
    "scale": (
        "scale of the gradients",
        "Layer scale",
        "The factor on each block's gradients, a map for every seed. In arms without the layer gain it is what the "
        "factor would have been. White: not logged.",
    ),
}


def _heat_maps(cells: Sequence[CellData], styles: Styles, what: str) -> Drawing:
    """Heat maps of divergence or scale, blocks x steps: a row an arm, a map a seed."""
    unit, title, caption = _MAPPED[what]
    maps = {arm: [_block_table(c, what) for c in cells if c.arm == arm] for arm in styles}
    tables = [table for of_arm in maps.values() for table in of_arm]
    values = np.concatenate([table.ravel() for _, table in tables] or [np.empty(0)])
    values = values[np.isfinite(values) & (values > 0)]
    last = max((float(steps[-1]) for steps, _ in tables if len(steps)), default=0.0)
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    stride = max(1, -(-len(seeds) // 10))  # names as far as there is room
    figure, column = new_figure(len(styles), 1.7)
    image: Any = None
    for axes, (arm, of_arm) in zip(column, maps.items(), strict=True):
        acts = {c.config.get("layer_gain.enabled") for c in cells if c.arm == arm and c.config}
        is_told = what == "scale" and len(acts) == 1
        applied = " (applied)" if acts == {True} else " (measured, not applied)"
        name_axes(axes, f"{styles[arm].label}{applied if is_told else ''}", "block")
        axes.grid(False)
        n_blocks = max((len(table) for _, table in of_arm), default=0)
        if not n_blocks or not len(values):
            empty(axes)
            continue
        row = _side_by_side(of_arm, n_blocks, last)
        ends = np.arange(row.shape[1]), np.arange(n_blocks)
        image = axes.pcolormesh(*ends, row, shading="nearest", rasterized=True, **_colours(values, what))
        axes.set_yticks(range(0, n_blocks, max(1, -(-n_blocks // 6))))
        axes.invert_yaxis()
        middles = [(i + 0.5) * row.shape[1] / max(1, len(of_arm)) for i in range(0, len(seeds), stride)]
        axes.set_xticks(middles, [str(seed) for seed in seeds[::stride]])
        axes.tick_params(axis="x", length=0)
    column[-1].set_xlabel(f"seed; in each map, steps 1 to {last:,.0f}", fontsize=FONT_POINTS)
    if image is not None:
        bar = figure.colorbar(image, ax=column, location="right", fraction=0.05)
        ticks = np.geomspace(image.norm.vmin, image.norm.vmax, 5)
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_ticks(ticks.tolist(), labels=[f"{tick:.3g}" for tick in ticks])
        bar.set_label(unit, fontsize=FONT_POINTS)
    return figure, Drawn(f"layer_{what}.svg", title, caption)


def _block_table(cell: CellData, what: str) -> tuple[Floats, Floats]:
    """(steps [T], values [L, T]); empty where the cell has logged none."""
    tags = cell.train.tags(f"{what}/")
    table = np.array([cell.train.column(tag) for tag in tags]) if tags else np.empty((0, 0))
    return cell.train.steps.astype(np.float64) if tags else np.empty(0), table


def _side_by_side(tables: Sequence[tuple[Floats, Floats]], n_blocks: int, last: float) -> Floats:
    """[L, columns]: the maps of one arm's seeds on one scale of steps, with a blank column after each."""
    width = max(6, COLUMNS // max(1, len(tables)))
    edges = np.linspace(0, last, width)[1:]
    maps = []
    for steps, table in tables:
        piece = np.full((n_blocks, width), np.nan)
        if len(steps):
            at = np.minimum(np.searchsorted(steps, edges), len(steps) - 1)
            logged = edges <= steps[-1] + last / width
            piece[: len(table), :-1] = np.where(logged, table[:, at], np.nan)
        maps.append(piece)
    return np.concatenate(maps, axis=1)


def _colours(values: Floats, what: str) -> dict[str, Any]:
    """Colour map and norm: both quantities are ratios, so equal steps of colour are equal factors."""
    least, most = float(values.min()), float(values.max())
    if what == "divergence":
        floor = max(most * 1e-3, 1e-12)
        return {"cmap": "cividis", "norm": LogNorm(max(least, floor), max(most, 2 * floor))}
    factor = max(most, 1 / max(least, 1e-3), 1.01)
    return {"cmap": "PuOr", "norm": LogNorm(1 / factor, factor)}
