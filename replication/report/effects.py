"""Figures of what was found over seeds: the answer, paired differences, the 2x2, and how the votes went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from replication.protocol.paper import VOTES
from replication.report.comparisons import Number
from replication.report.drawing import FONT_POINTS, ArmStyle, Drawing, empty, name_axes, new_figure
from replication.report.preference import Preference
from replication.report.questions import TWO_BY_TWO, FactorialAnswer
from replication.report.results import Drawn, Results
from replication.statistics.format import arm_name, percent

GREY = "#dddddd"


@dataclass(frozen=True)
class _Marks:
    """One row: a mark for each seed, a bar at the mean, and the interval."""

    label: str
    seeds: Sequence[Number]
    mean: Number
    low: Number
    high: Number
    colours: Sequence[str]
    """Of marks, bar and interval."""
    marker: str = "o"


def _draw_rows(axes: Axes, rows: Sequence[_Marks], centre: float = 0.0, room: float = 1.6, least: float = 1e-9) -> None:
    """The rows around `centre`; the axis reaches `room` times as far as the farthest mark or `least`."""
    axes.axvline(centre, color="#000000", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [row.label.replace("$", r"\$") for row in rows], fontsize=FONT_POINTS - 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    marks = [abs(x - centre) for row in rows for x in (*row.seeds, row.mean) if x is not None]
    left, right = centre - max([least, *marks]) * room, centre + max([least, *marks]) * room
    axes.set_xlim(left, right)
    if not marks:
        empty(axes)
    for y, row in enumerate(rows):
        of_marks, of_bar, of_interval = row.colours
        if row.low is not None and row.high is not None:
            axes.plot([max(row.low, left), min(row.high, right)], [y, y], color=of_interval, linewidth=2, alpha=0.7)
            for is_beyond, edge, marker in ((row.low < left, left, "<"), (row.high > right, right, ">")):
                if is_beyond:
                    axes.plot(edge, y, marker, color=of_interval, markersize=9, clip_on=False)
        if row.mean is not None:
            axes.plot([row.mean] * 2, [y - 0.26, y + 0.26], color=of_bar, linewidth=3)
        there = [value for value in row.seeds if value is not None]
        apart = np.linspace(-0.2, 0.2, len(there)) if len(there) > 3 else np.zeros(len(there))
        axes.plot(there, y + apart, row.marker, color=of_marks, markersize=7, mec="white", mew=0.8)


def answer_figure(r: Results, styles: dict[str, ArmStyle]) -> Drawing:
    """The two questions: preference beside one half and the published share, loss beside its margin."""
    assert r.loss is not None
    loss, f, style = r.loss, r.preference, styles[r.loss.arm]
    figure, (top, bottom) = new_figure(2, 1.5, shared_steps=False)
    colours = [style.colour] * 3
    seeds: list[Any] = [row["estimate"] for row in f.per_seed.rows] if f and f.per_seed else []
    voted = _Marks("all", [], *((f.estimate, f.low, f.high) if f else (None,) * 3), colours)
    rows = [_Marks("each seed", seeds, None, None, None, colours, style.marker), voted]
    ticks = {0: "0 %", 0.25: "25 %", 0.5: "50 %", VOTES.share: f"{percent(VOTES.share, 1)}\npublished", 0.75: "75 %"}
    top.set_xticks([*ticks, 1], [*ticks.values(), "100 %"])
    _draw_rows(top, rows, 0.5, 1.15, 0.27)
    top.axvline(VOTES.share, color="#000000", linewidth=1.2, linestyle=":")
    name_axes(top, f"Decisive votes for {style.label}")
    rows = [_Marks("each seed", loss.differences, None, None, None, colours, style.marker)]
    _draw_rows(bottom, [*rows, _Marks("all", [], loss.mean, loss.low, loss.high, colours)], 0, 1.15, loss.margin_nats)
    bottom.axvspan(-loss.margin_nats, loss.margin_nats, color=GREY, zorder=0)
    name_axes(bottom, f"Loss minus that of {styles[loss.baseline].label}, nats (right: worse)")
    return figure, Drawn(
        "answer.svg",
        "The answer",
        f"Share of decisive votes for {arm_name(loss.arm)}, beside one half and the published share; and its loss less "
        f"that of {arm_name(loss.baseline)}, within the margin of ±{loss.margin_nats:g} nats (grey) or not. A mark for "
        f"each seed; below, a bar at the estimate with its interval (an arrow: it goes on outside).",
    )


def paired_figure(results: Results, styles: dict[str, ArmStyle]) -> Drawing:
    quantities, baseline = results.quantities, results.suite.baseline
    figure, rows = new_figure(len(quantities), 0.75 + 0.36 * max(1, len(styles) - 1), shared_steps=False)
    for axes, quantity in zip(rows, quantities, strict=True):
        marks = []
        for pair in quantity.pairs:
            style, numbers = styles[pair.arm], (pair.mean, pair.low, pair.high)
            marks.append(_Marks(style.label, pair.differences, *numbers, (style.colour,) * 3, style.marker))
        _draw_rows(axes, marks, room=1.9)  # with two seeds the interval is too wide to set the scale
        if quantity.key == results.analysis.loss:
            margin = results.analysis.margin_nats
            axes.axvspan(-margin, margin, color=GREY, zorder=0)
        axes.locator_params(axis="x", nbins=6)
        x = f"difference to {styles[baseline].label}" if axes is rows[-1] else ""
        name_axes(axes, f"{quantity.name}, {quantity.unit}" if quantity.unit else quantity.name, "", x, FONT_POINTS - 2)
    return figure, Drawn(
        "paired_differences.svg",
        "Paired differences",
        f"Each arm minus {arm_name(baseline)} at the same seed: a mark for each seed, a bar at the mean, and the "
        "95 % t interval of the mean from two seeds on (an arrow: it goes on outside the picture). Grey: the margin of "
        "equivalence. Certified pairs only.",
    )


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
    effects = factorial.effects
    _draw_rows(
        bottom, [_Marks(e.name.replace(", ", "\n"), e.contrasts, e.mean, e.low, e.high, colours) for e in effects]
    )
    name_axes(bottom, "Effects on the loss", "", "nats a token")
    return figure, Drawn(
        "factorial.svg",
        "The 2x2",
        "Above: each seed's loss in the four arms less the seed's own mean, thin; thick, the mean over seeds. Parallel "
        "lines mean no interaction. Below: main effects and interaction, a mark for each seed, a bar at the mean, and "
        f"the {percent(factorial.interval_level)} t interval (an arrow: it goes on outside the picture). Seeds with "
        "all four arms certified only.",
    )


def vote_figures(f: Preference, styles: dict[str, ArmStyle]) -> list[Drawing]:
    """How the votes of each seed went, the share by groups, and that of each prompt and judge."""
    return [_outcomes_figure(f, styles), _groups_figure(f, styles), _dots_figure(f, styles)]


def _outcomes_figure(f: Preference, styles: dict[str, ArmStyle]) -> Drawing:
    rows, ours, theirs = f.outcomes.get("seed", []), styles[f.treatment], styles[f.baseline]
    table = np.array([[o.wins, o.ties, o.both_bad, o.losses] for o in rows], dtype=np.float64).reshape(len(rows), 4)
    widths = table / np.maximum(table.sum(1, keepdims=True), 1)
    starts = widths.cumsum(1) - widths
    figure, (axes,) = new_figure(1, 1.2 + 0.3 * len(rows))
    kinds = ((ours.label, ours.colour, "white"), ("tie", GREY, "black"), ("both bad", "#999999", "black"))
    for k, (label, colour, ink) in enumerate((*kinds, (theirs.label, theirs.colour, "white"))):
        bars = axes.barh(
            range(len(rows)), widths[:, k], left=starts[:, k], color=colour, label=label, edgecolor="white"
        )
        counts = [f"{n:.0f}" if width > 0.06 else "" for n, width in zip(table[:, k], widths[:, k], strict=True)]
        axes.bar_label(bars, counts, label_type="center", color=ink, fontsize=FONT_POINTS - 3)
    axes.set_yticks(range(len(rows)), [f"seed {o.name}" for o in rows], fontsize=FONT_POINTS - 2)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6))
    if not rows:
        empty(axes)
    figure.legend(loc="outside upper center", ncols=2, fontsize=FONT_POINTS, frameon=False)
    name_axes(axes, "", "", "share of the seed's votes")
    return figure, Drawn(
        "votes.svg",
        "Votes of each seed",
        f"For {arm_name(f.treatment)}, tie, both bad, and for {arm_name(f.baseline)}, as shares of each seed's votes, "
        "with their numbers.",
    )


def _groups_figure(f: Preference, styles: dict[str, ArmStyle]) -> Drawing:
    style, groups = styles[f.treatment], (*f.kinds, *f.categories)
    colours, seeds = (style.colour,) * 3, f.per_seed.rows if f.per_seed else []
    every: list[Any] = [("all votes", [row["estimate"] for row in seeds], f.estimate, f.low, f.high)]
    every += [(row["name"], [], row["estimate"], row["low"], row["high"]) for row in groups]
    marks = [_Marks(str(name), each, mean, low, high, colours, style.marker) for name, each, mean, low, high in every]
    figure, (axes,) = new_figure(1, 0.9 + 0.32 * len(every))
    _draw_rows(axes, marks, 0.5, 1.04, 0.5)
    name_axes(axes, f"Decisive votes for {style.label}", "", "share")
    return figure, Drawn(
        "preference.svg",
        "Preference",
        f"Share of decisive votes for {arm_name(f.treatment)} against {arm_name(f.baseline)}: all votes "
        "with a mark for each seed, kinds of judges, and categories of prompts, with their intervals over seeds, "
        "prompts and judges. One half is no preference.",
    )


def _dots_figure(f: Preference, styles: dict[str, ArmStyle]) -> Drawing:
    figure, rows = new_figure(2, 2.2, shared_steps=False)
    for axes, of in zip(rows, ("prompt", "judge"), strict=True):
        counts = [(o.wins / n, n) for o in f.outcomes.get(f"{of}_id", []) if (n := o.wins + o.losses)]
        shares, decisive = np.array(sorted(counts), dtype=np.float64).reshape(-1, 2).T
        axes.axhline(0.5, color="#000000", linewidth=1.2)
        axes.scatter(np.arange(len(shares)), shares, 12 + 4 * decisive, color=styles[f.treatment].colour, alpha=0.7)
        axes.set_ylim(-0.08, 1.08)
        axes.set_xticks([])
        name_axes(axes, f"Each {of}, in order", "share")
        if not counts:
            empty(axes)
    return figure, Drawn(
        "prompts_and_judges.svg",
        "Each prompt and each judge",
        f"Share of decisive votes for {arm_name(f.treatment)}: a dot for each prompt and for each judge that has any, "
        "the larger, the more.",
    )
