"""Figures of `replicate calibrate` and `replicate power`: what the tests do, before any of them is believed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from replication.report.drawing import DPI, FONT_POINTS, MARKERS, WIDTH_INCHES, save_png

if TYPE_CHECKING:
    from replication.simulation.calibration import Row, Truth
    from replication.simulation.power import PowerRow

COLOURS = ("#000000", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#D55E00")  # Okabe and Ito


def draw_calibration(rows: Sequence[Row], names: dict[str, str], path: Path) -> None:
    """False-positive rate and interval coverage of every test of votes, a column of marks for each truth.

    Args:
        rows: of calibration.measure, kind votes.
        names: key of a test -> its words.
        path: the PNG.
    """
    null = [row for row in rows if row["truth"]["share"] == 0.5]
    figure = Figure(figsize=(WIDTH_INCHES * 1.25, 8.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 1)
    _rates(panels[0], null, names, "rejected")
    panels[0].axhspan(0.03, 0.07, color="#dddddd", zorder=0)
    panels[0].axhline(0.05, color="#777777", linewidth=1)
    _title(panels[0], "False positives where nobody prefers either arm (grey: 3 to 7 %)", "share of experiments")
    _rates(panels[1], rows, names, "coverage")
    panels[1].axhspan(0.93, 0.97, color="#dddddd", zorder=0)
    panels[1].axhline(0.95, color="#777777", linewidth=1)
    _title(panels[1], "Coverage of the 95 % interval (grey: 93 to 97 %)", "share of experiments")
    panels[1].set_ylim(min(0.4, panels[1].get_ylim()[0]), 1.01)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=FONT_POINTS - 2, frameon=False)
    save_png(figure, path)


def _rates(panel: Axes, rows: Sequence[Row], names: dict[str, str], what: Literal["rejected", "coverage"]) -> None:
    for i, (key, words) in enumerate(names.items()):
        values = [row["tests"][key][what] for row in rows]
        there = [(x, y) for x, y in enumerate(values) if y is not None]
        if there:
            x, y = np.array(there).T
            place = x + (i - len(names) / 2) * 0.11
            panel.plot(place, y, MARKERS[i], color=COLOURS[i], markersize=6, label=words, mec="white", mew=0.5)
    ticks = [_truth(row["truth"]) for row in rows]
    panel.set_xticks(range(len(rows)), ticks, fontsize=FONT_POINTS - 5, rotation=90)
    panel.grid(axis="y", color="#dddddd", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


def _truth(truth: Truth) -> str:
    spread = truth["spread"]
    share = f"share {truth['share']:g}, " if truth["share"] != 0.5 else ""
    return f"{share}s {spread['seed']:g} p {spread['prompt']:g} j {spread['judge']:g}"


def draw_power(rows: Sequence[PowerRow], path: Path) -> None:
    """Power over seeds: a panel for each number of prompts, a line for each spread between seeds (most judges dashed).

    Args:
        rows: of power.power_row.
        path: the PNG.
    """
    prompts = sorted({row["prompts"] for row in rows})
    judges = sorted({row["judges"] for row in rows})
    spreads = sorted({row["spread"]["seed"] for row in rows})
    figure = Figure(figsize=(WIDTH_INCHES * 1.1, 2.6 * len(prompts) + 1.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(prompts), 1, squeeze=False, sharex=True)[:, 0]
    for panel, n_prompts in zip(panels, prompts, strict=True):
        for i, spread in enumerate(spreads):
            for n_judges, line in {judges[-1]: "--", judges[0]: "-"}.items():
                cells = [
                    (row["seeds"], row["power"])
                    for row in rows
                    if (row["prompts"], row["judges"], row["spread"]["seed"]) == (n_prompts, n_judges, spread)
                ]
                x, y = np.array(sorted(cells)).T
                label = f"seed spread {spread:g}, {n_judges} judges"
                panel.plot(x, y, line, marker=MARKERS[i], color=COLOURS[i], markersize=5, label=label)
        panel.axhline(0.8, color="#777777", linewidth=1)
        panel.set_ylim(0, 1.02)
        panel.set_xscale("log")
        panel.set_xticks(
            sorted({row["seeds"] for row in rows}), [str(n) for n in sorted({row["seeds"] for row in rows})]
        )
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        _title(panel, f"{n_prompts} prompts", "power")
    panels[-1].set_xlabel("training seeds", fontsize=FONT_POINTS)
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=2, fontsize=FONT_POINTS - 2.5, frameon=False
    )
    save_png(figure, path)


def _title(panel: Axes, title: str, y: str) -> None:
    panel.set_title(title, fontsize=FONT_POINTS, loc="left", fontweight="bold")
    panel.set_ylabel(y, fontsize=FONT_POINTS)
