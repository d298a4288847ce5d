"""Shared by all figures: size, palette, legend, the look of an arm, and curves of all cells of it.

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
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from replication.report.load import CellData, Floats
from replication.report.results import Drawn
from replication.runs.files import write_bytes
from replication.statistics.format import arm_name
from replication.statistics.seeds import mean_over_seeds

Curve = Callable[[CellData], tuple[Floats, Floats]]
"""Cell -> (steps [T], values [T])."""
Drawing = tuple[Figure, Drawn]

WIDTH_INCHES, DPI, FONT_POINTS = 6.2, 140, 12.5
NAMED_COLOURS = {"baseline": "#000000", "token_gain": "#0072B2", "layer_gain": "#009E73", "both": "#D55E00"}
OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#666666")  # the rest of Okabe and Ito's palette
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class ArmStyle:
    """How one arm looks in every figure."""

    name: str
    colour: str
    dashes: Any
    marker: str

    @property
    def label(self) -> str:
        return arm_name(self.name).replace("$", r"\$")  # a dollar sign would start mathematics


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """The same arm looks the same in every suite that has the four named ones; others take what is left."""
    spare = itertools.cycle(OTHER_COLOURS)
    return {
        arm: ArmStyle(arm, NAMED_COLOURS.get(arm) or next(spare), DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, arm in enumerate(arms)
    }


def new_figure(n_rows: int, row_inches: float, shared_steps: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with its axes one below the other."""
    figure = Figure(figsize=(WIDTH_INCHES, n_rows * row_inches + 0.7), dpi=DPI, layout="constrained")
    column: list[Axes] = figure.subplots(n_rows, 1, squeeze=False, sharex=shared_steps)[:, 0].tolist()
    for axes in column:
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=FONT_POINTS - 1)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, column


def name_axes(axes: Axes, title: str, y: str = "", x: str = "", points: float = FONT_POINTS) -> None:
    axes.set_title(title, fontsize=points, loc="left", fontweight="bold")
    axes.set_ylabel(y, fontsize=FONT_POINTS)
    axes.set_xlabel(x, fontsize=FONT_POINTS)


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


def empty(axes: Axes) -> None:
    axes.text(0.04, 0.5, "nothing yet", transform=axes.transAxes, color="#555555", fontsize=12)


def draw_arms(axes: Axes, cells: Sequence[CellData], styles: dict[str, ArmStyle], curve: Curve) -> None:
    """Thin lines for every cell, a cross where one ended early, a thick mean over complete cells that may be pooled."""
    drawn = False
    for style in styles.values():
        own = [(cell, *curve(cell)) for cell in cells if cell.arm == style.name]
        for cell, steps, values in own:
            there = np.flatnonzero(np.isfinite(values))
            if len(there):
                drawn = True
                axes.plot(steps, values, color=style.colour, linewidth=0.8, alpha=0.65, label=cell.name)
                if not cell.complete:
                    end, ended = there[-1:], f"{cell.name} ended"
                    axes.plot(steps[end], values[end], "x", color=style.colour, markersize=8, mew=2, label=ended)
        steps, mean = mean_over_seeds([(steps, values) for cell, steps, values in own if cell.complete and cell.pooled])
        axes.plot(steps, mean, color=style.colour, linewidth=2.4, linestyle=style.dashes, label=style.name)
    if not drawn:
        empty(axes)


def of_train(tag: str) -> Curve:
    return lambda cell: (cell.train.steps.astype(np.float64), cell.train.column(tag))


def of_validation(tag: str) -> Curve:
    return lambda cell: (cell.validation.steps.astype(np.float64), cell.validation.column(tag))


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure whole; its folder is made where it does not exist."""
    picture = BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    write_bytes(path, picture.getvalue())


SMALLEST_POINTS = 7.0
"""Of text in a figure that a paper prints."""


def save_vector(figure: Figure, path: Path, width_inches: float = WIDTH_INCHES) -> None:
    """Save a figure at a width, in its proportions, as path.svg and path.pdf; call last: it changes the figure.

    Lines and marks shrink with the figure, letters to no less than SMALLEST_POINTS. Fonts are embedded as TrueType, as
    publishers ask, and the files are the same bytes for the same numbers.
    """
    width, height = figure.get_size_inches()
    scale = width_inches / width
    shrink = min(1.0, scale)

    def points(size: float | str) -> float:
        return max(float(size) * shrink, SMALLEST_POINTS)

    every = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [next((label.get_fontsize() for label in axis.get_ticklabels()), FONT_POINTS) for axis in every]
    for text in figure.findobj(Text):
        text.set_fontsize(points(text.get_fontsize()))
    for axis, size in zip(every, ticks, strict=True):  # those to come, too
        axis.set_tick_params(labelsize=points(size), pad=3.5 * shrink)
    for line in figure.findobj(Line2D):
        line.set_linewidth(line.get_linewidth() * shrink)
        line.set_markersize(line.get_markersize() * shrink)
    figure.set_size_inches(width_inches, height * scale)
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": path.stem}):
        for kind in ("svg", "pdf"):
            drawn = BytesIO()
            undated = {"CreationDate": None} if kind == "pdf" else {"Date": None}
            figure.savefig(drawn, format=kind, metadata=undated)
            write_bytes(path.with_suffix(f".{kind}"), drawn.getvalue())
