"""The preference, seed by seed and group by group."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from replication.report.drawing import FONT_POINTS, ArmStyle, Drawn, empty, name_panel, new_figure

MARGIN = 0.04


def preference_figure(results: dict[str, Any], styles: dict[str, ArmStyle]) -> tuple[Figure, Drawn]:
    """Share of decisive votes for the treatment: each seed, and all together; then kinds of judges and categories."""
    f = results["preference"]
    style = styles[f["treatment"]]
    seeds = (
        [(f"seed {row['seed']}", row["estimate"], None, None) for row in f["per_seed"]["rows"]] if f["per_seed"] else []
    )
    all_ = [("all, over seeds, prompts, judges", f["estimate"], f["low"], f["high"])]
    groups = [(row["name"], row["estimate"], row["low"], row["high"]) for row in (*f["kinds"], *f["categories"])]
    rows = [*seeds, *all_, *groups]
    figure, (panel,) = new_figure(1, 0.9 + 0.34 * len(rows))
    _draw(panel, rows, style)
    name_panel(panel, f"Decisive votes for {style.label}", "", "share")
    return figure, Drawn(
        "preference.png",
        "Preference",
        f"Share of decisive votes for {f['treatment']} against {f['baseline']}: a mark for each seed, and below them "
        "all votes, kinds of judges and categories of prompts, with their intervals over seeds, prompts and judges. "
        "One half is no preference.",
    )


def _draw(panel: Axes, rows: list[tuple[str, Any, Any, Any]], style: ArmStyle) -> None:
    panel.axvline(0.5, color="#000000", linewidth=1.2)
    panel.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name, *_ in rows], fontsize=FONT_POINTS - 2)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(-MARGIN, 1 + MARGIN)
    if all(estimate is None for _, estimate, *_ in rows):
        empty(panel)
    for y, (name, estimate, low, high) in enumerate(rows):
        if low is not None:
            panel.plot([max(low, 0), min(high, 1)], [y, y], color=style.colour, linewidth=2)
        if estimate is not None:
            size = 9 if name.startswith("all") else 7
            panel.plot(estimate, y, style.marker, color=style.colour, markersize=size, mec="white", mew=0.8)
