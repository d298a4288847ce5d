"""The curves of the figures as data, for the page's script (templates/curves.js): hovered, zoomed, switched on and off.

Lines are told by their labels: thin ones have the name of their cell, thick ones that of their arm. An axes that is
labelled shows means over windows of that tag; its cells get the values of every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from replication.report.drawing import ArmStyle, Drawing
from replication.report.load import CellData, Floats
from replication.report.page import CURVES
from replication.runs.files import write_text
from replication.runs.records import to_json
from replication.statistics.format import arm_name

MOST_VALUES = 300_000
"""Of cells, in all panels: about 2 MB of the page."""
FEWEST_STEPS, MOST_STEPS = 100, 800
"""Of a panel; two fall on a pixel of its width."""
Line = tuple[Floats, Floats]  # steps [T], values [T]
Table = tuple[list[float], dict[str, list[float | None]]]  # steps; line -> its value to six digits, or none, at each


@dataclass(frozen=True)
class Panel:
    figure: str
    title: str
    unit: str
    band: tuple[float, float] | None
    tables: list[Table]
    """Of cells, of arms, and of marks alone."""


def write_curves(drawn: Sequence[Drawing], cells: Sequence[CellData], styles: dict[str, ArmStyle], to: Path) -> None:
    """Write the arms, and a panel for every axes that has a line of a cell."""
    by_name, panels = {cell.name: cell for cell in cells}, list[Panel]()
    pairs = [(words.file, axes) for figure, words in drawn for axes in figure.axes]
    shown = [pair for pair in pairs if any(line.get_label() in by_name for line in pair[1].lines)]
    most = min(max(MOST_VALUES // max(1, len(shown) * len(cells)), FEWEST_STEPS), MOST_STEPS)
    for file, axes in shown:
        tag, groups = str(axes.get_label()), [dict[str, Line](), dict[str, Line]()]
        for line in axes.lines:
            name, values = str(line.get_label()), (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
            if name in by_name:
                raw = by_name[name].per_step.get(tag)
                groups[0][name] = values if raw is None else (np.arange(1.0, len(raw) + 1), raw)
            elif name in styles:
                groups[1][name] = values
            elif not name.startswith("_"):  # matplotlib's own names
                groups.append({name: values})
        bands = [(p.get_y(), p.get_y() + p.get_height()) for p in axes.patches if isinstance(p, Rectangle)]
        title = axes.get_title("left").replace(r"\$", "$") + ("; thin: each step" if tag else "")
        tables = [_thinned(lines, most) for lines in groups]
        panels.append(Panel(Path(file).stem, title, axes.get_ylabel(), next(iter(bands), None), tables))
    arms = [
        {"name": s.name, "words": arm_name(s.name), "colour": s.colour, "dashes": s.dashes} for s in styles.values()
    ]
    curves = to_json({"arms": arms, "panels": panels})
    write_text(to / CURVES, json.dumps(curves, separators=(",", ":")))


def _thinned(lines: Mapping[str, Line], most: int) -> Table:
    """The lines at about `most` steps, the same for all, so that values are read side by side.

    Of every run of neighbouring steps two are kept: that of the lowest and that of the highest value of any line.
    """
    steps = np.unique(np.concatenate([line[0] for line in lines.values()] or [np.empty(0)]))
    values_NT = np.full((len(lines), len(steps)), np.nan)
    for row, (at, values) in zip(values_NT, lines.values(), strict=True):
        row[np.searchsorted(steps, at)] = values
    if len(steps) > most:
        low, high = (np.where(np.isnan(values_NT), end, values_NT) for end in (np.inf, -np.inf))
        parts = np.array_split(np.arange(len(steps)), most // 2)
        extremes = [(i[low[:, i].min(0).argmin()], i[high[:, i].max(0).argmax()]) for i in parts]
        kept = np.unique([0, *np.ravel(extremes), len(steps) - 1])
        steps, values_NT = steps[kept], values_NT[:, kept]
    rounded = [[float(f"{v:.6g}") if np.isfinite(v) else None for v in row.tolist()] for row in values_NT]
    return steps.tolist(), dict(zip(lines, rounded, strict=True))
