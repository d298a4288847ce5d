"""Figures of what was found over seeds: paired differences, the 2x2, and the preference by seeds and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from replication.report.comparisons import ComparedArm, Number
from replication.report.drawing import FONT_POINTS, ArmStyle, Drawing, empty, name_axes, new_figure
from replication.report.preference import Preference
from replication.report.questions import TWO_BY_TWO, Effect, FactorialAnswer
from replication.report.results import Drawn, Results
from replication.statistics.format import percent


def paired_figure(results: Results, styles: dict[str, ArmStyle]) -> Drawing:
    quantities, baseline = results.quantities, results.suite.baseline
    n_arms = max(1, len(styles) - 1)
    figure, rows = new_figure(len(quantities), 0.75 + 0.36 * n_arms, shared_steps=False)
    for axes, quantity in zip(rows, quantities, strict=True):
        marks = []
        for pair in quantity.pairs:
            style = styles[pair.arm]
            marks.append(_Marks(style.label, pair.differences, pair, (style.colour,) * 3, style.marker))
        _draw_differences(axes, marks, 1.9)  # with two seeds the interval is too wide to set the scale
        if quantity.key == results.analysis.loss:
            margin = results.analysis.margin_nats
            axes.axvspan(-margin, margin, color="#dddddd", zorder=0)
        name_axes(axes, f"{quantity.name}, {quantity.unit}" if quantity.unit else quantity.name)
    name_axes(rows[-1], rows[-1].get_title("left"), "", f"difference to {styles[baseline].label}")
    return figure, Drawn(
        "paired_differences.svg",
        "Paired differences",
        f"Each arm minus {baseline} at the same seed: a mark for each seed, a bar at the mean, and the 95 % t interval "
        "of the mean from two seeds on (an arrow: it goes on outside the picture). Grey: the margin of equivalence. "
        "Certified pairs only.",
    )


@dataclass(frozen=True)
class _Marks:
    """One row: a mark for each seed, a bar at the mean, and the interval."""

    label: str
    seeds: Sequence[Number]
    numbers: ComparedArm | Effect
    colours: tuple[str, str, str]
    """Of marks, bar and interval."""
    marker: str


def _draw_differences(axes: Axes, rows: Sequence[_Marks], room: float) -> None:
    """The rows around zero; `room` is how far the axis reaches beyond the farthest mark, as a factor."""
    axes.axvline(0, color="#000000", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=FONT_POINTS - 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    marks = [abs(value) for row in rows for value in row.seeds if value is not None]
    if not marks:
        empty(axes)
        return
    reach = max(max(marks) * room, 1e-9)
    axes.set_xlim(-reach, reach)
    for y, row in enumerate(rows):
        of_marks, of_bar, of_interval = row.colours
        low, high = row.numbers.low, row.numbers.high
        if low is not None and high is not None:
            axes.plot([max(low, -reach), min(high, reach)], [y, y], color=of_interval, linewidth=1.6, alpha=0.7)
            for is_beyond, edge, marker in ((low < -reach, -reach, "<"), (high > reach, reach, ">")):
                if is_beyond:
                    axes.plot(edge, y, marker, color=of_interval, markersize=9, clip_on=False)
        if row.numbers.mean is not None:
            axes.plot([row.numbers.mean] * 2, [y - 0.26, y + 0.26], color=of_bar, linewidth=3)
        there = [value for value in row.seeds if value is not None]
        axes.plot(there, [y] * len(there), row.marker, color=of_marks, markersize=7, mec="white", mew=0.8)


def factorial_figure(factorial: FactorialAnswer) -> Drawing:
    """Above, every seed's four losses as two lines; below, its three contrasts."""
    figure, (top, bottom) = new_figure(2, 3.0, shared_steps=False)
    within = [factorial.within_seed[factorial.places[place]] for place in TWO_BY_TWO]
    table = np.array(within, dtype=np.float64)
    name_axes(top, "Loss less the seed's mean", "nats a token", "layer gain")
    top.set_xticks([0, 1], ["off", "on"], fontsize=FONT_POINTS)
    top.set_xlim(-0.2, 1.2)
    if factorial.n:
        off, on = ([0, 2], "token gain off", "#0072B2", "-", "o"), ([1, 3], "on", "#D55E00", "--", "s")
        for rows, label, colour, dashes, marker in (off, on):
            top.plot([0, 1], table[rows], color=colour, linewidth=0.8, alpha=0.6, marker=marker, markersize=3)
            mean = np.nanmean(table[rows], axis=1)
            top.plot([0, 1], mean, dashes, color=colour, linewidth=2.6, marker=marker, markersize=7, label=label)
        top.legend(fontsize=FONT_POINTS - 1, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.0))
        top.margins(y=0.3)
    else:
        empty(top)
    colours = ("#666666", "#000000", "#333333")
    marks = [_Marks(e.name.replace(", ", "\n"), e.contrasts, e, colours, "o") for e in factorial.effects]
    _draw_differences(bottom, marks, 1.6)
    name_axes(bottom, "Effects on the loss", "", "nats a token")
    return figure, Drawn(
        "factorial.svg",
        "The 2x2",
        "Above: each seed's loss in the four arms less the seed's own mean, thin; thick, the mean over seeds. Parallel "
        "lines mean no interaction. Below: main effects and interaction, a mark for each seed, a bar at the mean, and "
        f"the {percent(factorial.interval_level)} t interval (an arrow: it goes on outside the picture). Seeds with "
        "all four arms certified only.",
    )


def preference_figure(f: Preference, styles: dict[str, ArmStyle]) -> Drawing:
    """Share of decisive votes for the treatment: each seed, and all together; then kinds of judges and categories."""
    style, margin = styles[f.treatment], 0.04
    rows: list[tuple[str, object, object, object]] = []
    rows += [(f"seed {row['seed']}", row["estimate"], None, None) for row in (f.per_seed.rows if f.per_seed else [])]
    rows += [("all, over seeds, prompts, judges", f.estimate, f.low, f.high)]
    rows += [(str(row["name"]), row["estimate"], row["low"], row["high"]) for row in (*f.kinds, *f.categories)]
    table = np.array([numbers for _, *numbers in rows], dtype=np.float64)  # NaN where one is missing
    figure, (axes,) = new_figure(1, 0.9 + 0.34 * len(rows))
    axes.axvline(0.5, color="#000000", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name, *_ in rows], fontsize=FONT_POINTS - 2)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-margin, 1 + margin)
    if np.isnan(table[:, 0]).all():
        empty(axes)
    for y, ((name, *_), (estimate, low, high)) in enumerate(zip(rows, table, strict=True)):
        if np.isfinite(low) and np.isfinite(high):
            axes.plot([max(low, 0), min(high, 1)], [y, y], color=style.colour, linewidth=2)
        if np.isfinite(estimate):
            size = 9 if name.startswith("all") else 7
            axes.plot(estimate, y, style.marker, color=style.colour, markersize=size, mec="white", mew=0.8)
    name_axes(axes, f"Decisive votes for {style.label}", "", "share")
    return figure, Drawn(
        "preference.svg",
        "Preference",
        f"Share of decisive votes for {f.treatment} against {f.baseline}: a mark for each seed, and below them "
        "all votes, kinds of judges and categories of prompts, with their intervals over seeds, prompts and judges. "
        "One half is no preference.",
    )
