"""What all figures of the report share: size, palette, legend, and the look of an arm.

Object interface of matplotlib on the Agg canvas: no global state, no display. Sized so that text stays legible when a
phone shows the whole width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from replication.report.load import Cell, Series
from replication.runs.files import write_bytes
from replication.statistics.seeds import mean_over_seeds, window_means

Floats = NDArray[np.float64]
Curve = Callable[[Cell], tuple[Floats, Floats]]
"""Cell -> (steps [T], values [T])."""

WIDTH_INCHES, DPI, FONT_POINTS = 6.2, 140, 12.5
NAMED_COLOURS = {"baseline": "#000000", "token_gain": "#0072B2", "layer_gain": "#009E73", "both": "#D55E00"}
OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#666666")  # the rest of Okabe and Ito's palette
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vP*X"
MAX_POINTS = 120


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


def new_figure(n_panels: int, panel_inches: float, shared_steps: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_INCHES, n_panels * panel_inches + 0.7), dpi=DPI, layout="constrained")
    axes = figure.subplots(n_panels, 1, squeeze=False, sharex=shared_steps)[:, 0].tolist()
    for panel in axes:
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=FONT_POINTS - 1)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def name_panel(panel: Axes, title: str, y: str = "", x: str = "") -> None:
    panel.set_title(title, fontsize=FONT_POINTS, loc="left", fontweight="bold")
    panel.set_ylabel(y, fontsize=FONT_POINTS)
    panel.set_xlabel(x, fontsize=FONT_POINTS)


def legend(figure: Figure, styles: dict[str, ArmStyle], more: Sequence[Line2D] = ()) -> None:
    lines = [Line2D([], [], color=s.colour, linestyle=s.dashes, linewidth=2.6, label=s.label) for s in styles.values()]
    lines.append(Line2D([], [], color="#555555", linewidth=0.8, label="thin: one seed"))
    figure.legend(
        handles=[*lines, *more],
        loc="outside upper center",
        ncols=3,
        fontsize=FONT_POINTS,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.2,
    )


def empty(panel: Axes) -> None:
    panel.text(0.5, 0.5, "nothing logged yet", transform=panel.transAxes, ha="center", color="#555555", fontsize=12)


def draw_interval(panel: Axes, y: float, low: float, high: float, reach: float, colour: str) -> None:
    panel.plot([max(low, -reach), min(high, reach)], [y, y], color=colour, linewidth=1.6, alpha=0.7)
    for beyond, edge, marker in ((low < -reach, -reach, "<"), (high > reach, reach, ">")):
        if beyond:
            panel.plot(edge, y, marker, color=colour, markersize=9, clip_on=False)


# ---------------------------------------------------------------- curves of arms


def draw_arms(panel: Axes, cells: Sequence[Cell], styles: dict[str, ArmStyle], curve: Curve) -> None:
    """Thin lines for every cell, a cross where one ended early, a thick mean over complete cells that may be pooled."""
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
        steps, mean = mean_over_seeds([(steps, values) for cell, steps, values in own if cell.complete and cell.pooled])
        panel.plot(steps, mean, color=style.colour, linewidth=2.4, linestyle=style.dashes)
    if not drawn:
        empty(panel)


def column(series: Callable[[Cell], Series], tag: str) -> Curve:
    def curve(cell: Cell) -> tuple[Floats, Floats]:
        there = series(cell)
        return there.steps.astype(np.float64), there.column(tag)

    return curve


def of_train(tag: str) -> Curve:
    return column(lambda cell: cell.train, tag)


def of_validation(tag: str) -> Curve:
    return column(lambda cell: cell.validation, tag)


def windowed(cells: Sequence[Cell], tag: str) -> tuple[Curve, str]:
    """Per-step values in means over windows, the same window for every cell; and the window in words."""
    longest = max((len(cell.per_step.get(tag, ())) for cell in cells), default=0)
    size = max(1, -(-longest // MAX_POINTS))

    def curve(cell: Cell) -> tuple[Floats, Floats]:
        return window_means(cell.per_step.get(tag, np.empty(0)), size)

    return curve, "every step" if size == 1 else f"means over {size} steps"


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure whole; its folder is made where it does not exist."""
    picture = BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    write_bytes(path, picture.getvalue())
