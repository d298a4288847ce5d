"""Figures of blocks: heat maps over blocks and steps with a map for every seed, and three blocks as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from replication.report.comparisons import Divergence, block_of
from replication.report.drawing import (
    FONT_POINTS,
    ArmStyle,
    draw_arms,
    empty,
    legend,
    name_axes,
    new_figure,
    of_train,
)
from replication.report.load import CellData, Floats
from replication.report.results import Drawn

COLUMNS = 400
"""Of a row of heat maps: all seeds of an arm share them."""


def draw_blocks(cells: Sequence[CellData], styles: dict[str, ArmStyle], what: str) -> tuple[Figure, Drawn]:
    """Heat maps, blocks x steps: a row an arm, a map a seed.

    Args:
        cells: of the suite.
        styles: of its arms.
        what: divergence or scale.
    """
    maps = {arm: [_block_table(c, what) for c in cells if c.arm == arm] for arm in styles}
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    figure, column = new_figure(len(styles), 1.7)
    values = np.concatenate([table.ravel() for tables in maps.values() for _, table in tables] or [np.empty(0)])
    values = values[np.isfinite(values) & (values > 0)]
    last = max((float(steps[-1]) for tables in maps.values() for steps, _ in tables if len(steps)), default=0.0)
    image = None
    for axes, (arm, tables) in zip(column, maps.items(), strict=True):
        name_axes(axes, f"{styles[arm].label}{_applied(cells, arm, what)}", "block")
        axes.grid(False)
        n_blocks = max((len(table) for _, table in tables), default=0)
        if not n_blocks or not len(values):
            empty(axes)
            continue
        row = _side_by_side(tables, n_blocks, last)
        image = axes.pcolormesh(
            np.arange(row.shape[1]), np.arange(n_blocks), row, shading="nearest", **_colours(values, what)
        )
        axes.set_yticks(_ticks(n_blocks))
        axes.invert_yaxis()
        _name_seeds(axes, seeds, row.shape[1] / max(1, len(tables)))
    column[-1].set_xlabel(f"seed; in each map, steps 1 to {last:,.0f}", fontsize=FONT_POINTS)
    if image is not None:
        _bar(figure, image, column, _BLOCK_WORDS[what][0])
    return figure, Drawn(f"layer_{what}.png", *_BLOCK_WORDS[what][1:])


_BLOCK_WORDS = {
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


def _block_table(cell: CellData, what: str) -> tuple[Floats, Floats]:
    """(steps [T], values [L, T]); empty where the cell has logged none."""
    tags = cell.train.tags(f"{what}/")
    table = np.array([cell.train.column(tag) for tag in tags]) if tags else np.empty((0, 0))
    return cell.train.steps.astype(np.float64) if tags else np.empty(0), table


def _side_by_side(tables: Sequence[tuple[Floats, Floats]], n_blocks: int, last: float) -> Floats:
    """float64 [L, columns]: the maps of one arm's seeds on one scale of steps, with a blank column after each."""
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


def _name_seeds(axes: Axes, seeds: Sequence[int], width: float) -> None:
    """A tick in the middle of each seed's map, with names as far as there is room."""
    stride = max(1, -(-len(seeds) // 10))
    axes.set_xticks([(i + 0.5) * width for i in range(0, len(seeds), stride)], [str(s) for s in seeds[::stride]])
    axes.tick_params(axis="x", length=0)


# ---------------------------------------------------------------- three blocks as lines


def draw_block_lines(
    cells: Sequence[CellData], styles: dict[str, ArmStyle], divergence: Divergence
) -> tuple[Figure, Drawn]:
    """Divergence of the first, the fourth and the last block, every seed a line, with the published values."""
    n_blocks = max((len(cell.train.tags("divergence/")) for cell in cells), default=0)
    places = {row.place: block_of(row.place, n_blocks) if n_blocks else None for row in divergence.published}
    shown = {place: block for place, block in places.items() if block is not None} or {"first": 0}
    figure, rows = new_figure(len(shown), 2.3)
    last = max((cell.step for cell in cells), default=0)
    for axes, (place, block) in zip(rows, shown.items(), strict=True):
        draw_arms(axes, cells, styles, of_train(f"divergence/block_{block:02d}"))
        published = next(row for row in divergence.published if row.place == place)
        name_axes(axes, f"Block {block}; published: block {published.block} of {divergence.blocks}", "divergence")
        at = [last * step / divergence.training_steps for step in published.steps]
        if last:
            axes.plot(at, published.values, "D", color="#CC79A7", markersize=9, mec="#000000", mew=1, zorder=5)
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
    rows[-1].set_xlabel("optimizer step", fontsize=FONT_POINTS)
    diamond = Line2D([], [], color="#CC79A7", marker="D", mec="#000000", linestyle="", markersize=8, label="published")
    legend(figure, styles, [diamond])
    return figure, Drawn(
        "divergence_blocks.png",
        "Divergence of three blocks",
        "First, fourth and last block, every seed a line. Diamonds: the published run with both changes (one seed, 1.2 "
        "billion parameters) at the same share of its training.",
    )


def _applied(cells: Sequence[CellData], arm: str, what: str) -> str:
    if what != "scale":
        return ""
    enabled = {c.config.get("layer_gain.enabled") for c in cells if c.arm == arm and c.config}
    if len(enabled) != 1:
        return ""
    return " (applied)" if enabled == {True} else " (measured, not applied)"


def _colours(values: Floats, what: str) -> dict[str, Any]:
    """Colour map and norm: both quantities are ratios, so equal steps of colour are equal factors."""
    if what == "divergence":
        floor = max(float(values.max()) * 1e-3, 1e-12)
        return {
            "cmap": "cividis",
            "norm": LogNorm(max(float(values.min()), floor), max(float(values.max()), 2 * floor)),
        }
    factor = max(float(values.max()), 1 / max(float(values.min()), 1e-3), 1.01)
    return {"cmap": "PuOr", "norm": LogNorm(1 / factor, factor)}


def _bar(figure: Figure, image: Any, column: Sequence[Axes], label: str) -> None:
    """A colour bar with five ticks in plain numbers."""
    bar = figure.colorbar(image, ax=column, location="right", fraction=0.05)
    ticks = np.geomspace(image.norm.vmin, image.norm.vmax, 5)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.3g}" for tick in ticks])
    bar.set_label(label, fontsize=FONT_POINTS)


def _ticks(n_blocks: int) -> list[int]:
    return list(range(0, n_blocks, max(1, -(-n_blocks // 6))))
