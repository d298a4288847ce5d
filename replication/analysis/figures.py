"""Figures of the report: every seed a thin line, the arm's mean a thick one, one colour an arm, never colour alone.

Object interface of matplotlib on the Agg canvas: no global state, no display. Sized so that text stays legible when a
phone shows the whole width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from replication.analysis.load import Cell, Series
from replication.analysis.stats import BUDGET_TOLERANCE, mean_over_seeds, window_means

Floats = NDArray[np.float64]
Curve = Callable[[Cell], tuple[Floats, Floats]]
"""Cell -> (steps [T], values [T])."""

WIDTH_INCHES, DPI, FONT_POINTS = 6.2, 140, 12.5
NAMED_COLOURS = {"baseline": "#000000", "token_gain": "#0072B2", "layer_gain": "#009E73", "both": "#D55E00"}
OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#666666")  # the rest of Okabe and Ito's palette
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vP*X"
MAX_POINTS, MAX_COLUMNS = 120, 400


@dataclass(frozen=True)
class Drawn:
    """One figure on disk and the words that go with it."""

    file: str
    """Name inside DIR/figures."""
    title: str
    caption: str


@dataclass(frozen=True)
class ArmStyle:
    """How one arm looks in every figure."""

    name: str
    colour: str
    dashes: Any
    marker: str

    @property
    def label(self) -> str:
        return self.name.replace("$", r"\$")  # a dollar sign would start mathematics


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """The same arm looks the same in every suite that has the four named ones; others take what is left."""
    spare = itertools.cycle(OTHER_COLOURS)
    return {
        arm: ArmStyle(arm, NAMED_COLOURS.get(arm) or next(spare), DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, arm in enumerate(arms)
    }


def draw_figures(cells: Sequence[Cell], results: dict[str, Any], folder: Path) -> list[Drawn]:
    """Draw every figure into folder.

    Args:
        cells: all cells of the suite, in whatever state.
        results: the numbers of the report; `suite`, `quantities` and `pairs_used` are read.
        folder: DIR/figures; made where it does not exist.

    Returns:
        What was drawn, in the order of the report. Figures without anything to show say so in the picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    styles = arm_styles(results["suite"]["arms"])
    drawings = [
        _validation_loss(cells, styles, results),
        _train_loss(cells, styles),
        _paired(results, styles),
        _gain(cells, styles),
        _blocks(cells, styles, "divergence"),
        _blocks(cells, styles, "scale"),
        _gradient_norm(cells, styles),
        _entropies(cells, styles),
    ]
    for figure, drawn in drawings:
        FigureCanvasAgg(figure).print_png(str(folder / drawn.file), metadata={"Software": None})
    return [drawn for _, drawn in drawings]


# ---------------------------------------------------------------- what all figures share


def _figure(n_panels: int, panel_inches: float, shared_steps: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_INCHES, n_panels * panel_inches + 0.7), dpi=DPI, layout="constrained")
    axes = figure.subplots(n_panels, 1, squeeze=False, sharex=shared_steps)[:, 0].tolist()
    for panel in axes:
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=FONT_POINTS - 1)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _name(panel: Axes, title: str, y: str = "", x: str = "") -> None:
    panel.set_title(title, fontsize=FONT_POINTS, loc="left", fontweight="bold")
    panel.set_ylabel(y, fontsize=FONT_POINTS)
    panel.set_xlabel(x, fontsize=FONT_POINTS)


def _legend(figure: Figure, styles: dict[str, ArmStyle]) -> None:
    lines = [Line2D([], [], color=s.colour, linestyle=s.dashes, linewidth=2.6, label=s.label) for s in styles.values()]
    lines.append(Line2D([], [], color="#555555", linewidth=0.8, label="thin: one seed"))
    figure.legend(
        handles=lines,
        loc="outside upper center",
        ncols=3,
        fontsize=FONT_POINTS,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.2,
    )


def _empty(panel: Axes) -> None:
    panel.text(0.5, 0.5, "nothing logged yet", transform=panel.transAxes, ha="center", color="#555555", fontsize=12)


def _draw_arms(panel: Axes, cells: Sequence[Cell], styles: dict[str, ArmStyle], curve: Curve) -> None:
    """Thin lines for every cell, a cross where one ended early, a thick mean over the complete cells."""
    drawn = False
    for style in styles.values():
        own = [(cell, *curve(cell)) for cell in cells if cell.arm == style.name]
        for cell, steps, values in own:
            there = np.flatnonzero(np.isfinite(values))
            if not len(there):
                continue
            drawn = True
            panel.plot(steps, values, color=style.colour, linewidth=0.8, alpha=0.65)
            if not cell.complete:
                panel.plot(steps[there[-1]], values[there[-1]], "x", color=style.colour, markersize=8, mew=2)
        steps, mean = mean_over_seeds([(steps, values) for cell, steps, values in own if cell.complete])
        panel.plot(steps, mean, color=style.colour, linewidth=2.4, linestyle=style.dashes)
    if not drawn:
        _empty(panel)


def _column(series: Callable[[Cell], Series], tag: str) -> Curve:
    def curve(cell: Cell) -> tuple[Floats, Floats]:
        there = series(cell)
        return there.steps.astype(np.float64), there.column(tag)

    return curve


def _train(tag: str) -> Curve:
    return _column(lambda cell: cell.train, tag)


def _validation(tag: str) -> Curve:
    return _column(lambda cell: cell.validation, tag)


def _windowed(cells: Sequence[Cell], tag: str) -> tuple[Curve, str]:
    """Per-step values in means over windows, the same window for every cell; and the window in words."""
    longest = max((len(cell.per_step.get(tag, ())) for cell in cells), default=0)
    size = max(1, -(-longest // MAX_POINTS))

    def curve(cell: Cell) -> tuple[Floats, Floats]:
        return window_means(cell.per_step.get(tag, np.empty(0)), size)

    return curve, "every step" if size == 1 else f"means over {size} steps"


# ---------------------------------------------------------------- curves


def _validation_loss(
    cells: Sequence[Cell], styles: dict[str, ArmStyle], results: dict[str, Any]
) -> tuple[Figure, Drawn]:
    figure, (top, bottom) = _figure(2, 3.1)
    _draw_arms(top, cells, styles, _validation("val/loss_nats"))
    _name(top, "Validation loss", "nats a token")
    baseline = results["suite"]["baseline"]
    _draw_paired_curves(bottom, cells, styles, results)
    _name(bottom, f"Difference to {styles[baseline].label}, same seed", "nats a token", "optimizer step")
    _legend(figure, styles)
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
        _empty(panel)


def _common(a: Series, b: Series, tag: str) -> tuple[Floats, Floats, Floats]:
    """(common steps [C], values of a [C], values of b [C])."""
    steps, in_a, in_b = np.intersect1d(a.steps, b.steps, return_indices=True)
    return steps.astype(np.float64), a.column(tag)[in_a], b.column(tag)[in_b]


def _train_loss(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, (panel,) = _figure(1, 3.4)
    curve, words = _windowed(cells, "train/loss_nats")
    _draw_arms(panel, cells, styles, curve)
    _name(panel, f"Training loss ({words})", "nats a token", "optimizer step")
    _legend(figure, styles)
    return figure, Drawn(
        "train_loss.png",
        "Training loss",
        f"Unweighted cross-entropy with label smoothing, {words}: never the weighted objective, so that arms compare.",
    )


def _gradient_norm(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, (panel,) = _figure(1, 3.4)
    curve, words = _windowed(cells, "train/grad_norm")
    _draw_arms(panel, cells, styles, curve)
    _name(panel, f"Gradient norm ({words})", "global 2-norm", "optimizer step")
    panel.set_ylim(bottom=0)
    _legend(figure, styles)
    return figure, Drawn(
        "gradient_norm.png",
        "Gradient norm",
        f"Global norm after the layer scale and before clipping, {words}.",
    )


def _entropies(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, panels = _figure(2, 2.9)
    _draw_arms(panels[0], cells, styles, _validation("val/entropy_predicted_tokens_nats"))
    _name(panels[0], "Entropy of the histogram of predicted tokens", "nats")
    _draw_arms(panels[1], cells, styles, _validation("val/entropy_predictive_nats"))
    _name(panels[1], "Mean entropy of the predictive distribution", "nats", "optimizer step")
    _legend(figure, styles)
    return figure, Drawn(
        "token_entropies.png",
        "Token entropies",
        "On the validation set. The published 'token entropy' is not defined; its size fits the upper quantity.",
    )


def _gain(cells: Sequence[Cell], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    figure, panels = _figure(4, 2.1)
    panels[0].axhspan(1 - BUDGET_TOLERANCE, 1 + BUDGET_TOLERANCE, color="#cccccc", zorder=0)
    named = (
        ("gain/mean", "Mean gain after the clamp (grey: within 1 % of 1)", "mean gain"),
        ("gain/std", "Spread of the gain over tokens", "standard dev."),
        ("gain/share_at_min", "Tokens clamped at the lower bound", "share"),
        ("gain/share_at_max", "Tokens clamped at the upper bound", "share"),
    )
    for panel, (tag, title, y) in zip(panels, named, strict=True):
        _draw_arms(panel, cells, styles, _train(tag))
        _name(panel, title, y, "optimizer step" if tag == "gain/share_at_max" else "")
    _legend(figure, styles)
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
    figure, panels = _figure(len(quantities), 0.75 + 0.36 * n_arms, shared_steps=False)
    for panel, quantity in zip(panels, quantities, strict=True):
        _draw_differences(panel, quantity, styles)
        unit = f", {quantity['unit']}" if quantity["unit"] else ""
        _name(panel, f"{quantity['name']}{unit}")
    _name(panels[-1], panels[-1].get_title("left"), "", f"difference to {styles[baseline].label}")
    return figure, Drawn(
        "paired_differences.png",
        "Paired differences",
        f"Each arm minus {baseline} at the same seed: a mark for each seed, a bar at the mean, and the 95 % t interval "
        "of the mean from two seeds on (an arrow: it goes on outside the picture). Certified pairs only.",
    )


def _draw_differences(panel: Axes, quantity: dict[str, Any], styles: dict[str, ArmStyle]) -> None:
    rows = quantity["pairs"]
    dots = np.array([d for row in rows for d in row["differences"] if d is not None], dtype=np.float64)
    panel.axvline(0, color="#000000", linewidth=1.2)
    panel.set_yticks(range(len(rows)), [styles[row["arm"]].label for row in rows], fontsize=FONT_POINTS - 1)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    if not len(dots):
        _empty(panel)
        return
    reach = max(float(np.abs(dots).max()) * 1.9, 1e-9)  # with two seeds the interval is too wide to set the scale
    panel.set_xlim(-reach, reach)
    for y, row in enumerate(rows):
        style = styles[row["arm"]]
        if row["low"] is not None:
            _draw_interval(panel, y, row["low"], row["high"], reach, style.colour)
        if row["mean"] is not None:
            panel.plot([row["mean"]] * 2, [y - 0.26, y + 0.26], color=style.colour, linewidth=3)
        there = [d for d in row["differences"] if d is not None]
        panel.plot(there, [y] * len(there), style.marker, color=style.colour, markersize=7, mec="white", mew=0.8)


def _draw_interval(panel: Axes, y: float, low: float, high: float, reach: float, colour: str) -> None:
    panel.plot([max(low, -reach), min(high, reach)], [y, y], color=colour, linewidth=1.6, alpha=0.7)
    for beyond, edge, marker in ((low < -reach, -reach, "<"), (high > reach, reach, ">")):
        if beyond:
            panel.plot(edge, y, marker, color=colour, markersize=9, clip_on=False)


# ---------------------------------------------------------------- blocks over steps


def _blocks(cells: Sequence[Cell], styles: dict[str, ArmStyle], what: str) -> tuple[Figure, Drawn]:
    """Heat maps, blocks x steps, one an arm, mean over the arm's complete seeds."""
    tables = {arm: _block_table([c for c in cells if c.arm == arm and c.complete], what) for arm in styles}
    figure, panels = _figure(len(styles), 1.7)
    values = np.concatenate([table.ravel() for _, table in tables.values()])
    values = values[np.isfinite(values)]
    image = None
    for panel, (arm, (steps, table)) in zip(panels, tables.items(), strict=True):
        _name(panel, f"{styles[arm].label}{_applied(cells, arm, what)}", "block")
        panel.grid(False)
        if not table.size or not len(values):
            _empty(panel)
            continue
        image = panel.pcolormesh(steps, np.arange(len(table)), table, shading="nearest", **_colours(values, what))
        panel.set_yticks(_ticks(len(table)))
        panel.invert_yaxis()
    panels[-1].set_xlabel("optimizer step", fontsize=FONT_POINTS)
    if image is not None:
        _bar(figure, image, panels, _BLOCK_WORDS[what][0])
    return figure, Drawn(f"layer_{what}.png", *_BLOCK_WORDS[what][1:])


_BLOCK_WORDS = {
    "divergence": (
        "||y - x|| / ||x||",
        "Layer divergence",
        "How far each block moves its input, over blocks and steps; mean over the arm's complete seeds.",
    ),
    "scale": (
        "scale of the gradients",
        "Layer scale",
        "The factor on each block's gradients; mean over the arm's complete seeds. In arms without the layer gain it "
        "is what the factor would have been.",
    ),
}


def _block_table(cells: Sequence[Cell], what: str) -> tuple[Floats, Floats]:
    """(steps [T], mean over cells [L, T]); empty where no cell has logged it."""
    tags = sorted({tag for cell in cells for tag in cell.train.tags(f"{what}/")})
    rows = [mean_over_seeds([_train(tag)(cell) for cell in cells]) for tag in tags]
    if not rows:
        return np.empty(0), np.empty((0, 0))
    steps, table = rows[0][0], np.array([values for _, values in rows])
    stride = max(1, -(-len(steps) // MAX_COLUMNS))
    return steps[::stride], table[:, ::stride]


def _applied(cells: Sequence[Cell], arm: str, what: str) -> str:
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


def _bar(figure: Figure, image: Any, panels: Sequence[Axes], label: str) -> None:
    """A colour bar with five ticks in plain numbers."""
    bar = figure.colorbar(image, ax=panels, location="right", fraction=0.05)
    ticks = np.geomspace(image.norm.vmin, image.norm.vmax, 5)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.3g}" for tick in ticks])
    bar.set_label(label, fontsize=FONT_POINTS)


def _ticks(n_blocks: int) -> list[int]:
    return list(range(0, n_blocks, max(1, -(-n_blocks // 6))))
