"""What a calibration found: the bounds that it must keep, a table, a figure, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from replication.runs.files import write_json, write_text
from replication.simulation.calibration import LOSS_TESTS, VOTE_TESTS
from replication.simulation.figures import draw_calibration
from replication.statistics.format import percent

FALSE_POSITIVES = (0.03, 0.07)
COVERAGE = (0.93, 0.97)
CROSSED = ("crossed", "crossed_half")
"""The primary decision in both measures of preference."""
CLOSE = 0.03
"""How far a measured power may lie from the stated one; of the equivalence, below it."""


def findings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bounds that the primary decision and the equivalence must keep, each with what was measured.

    Returns:
        [{what, measured, bounds, holds}].
    """
    votes = [row for row in rows if row["kind"] == "votes"]
    losses = [row for row in rows if row["kind"] == "losses"]
    primary = [row for row in votes if row["truth"]["primary"]]
    null = [row for row in votes if row["truth"]["share"] == 0.5]
    lines = []
    for row in primary:
        tests, share = [row["tests"][name] for name in CROSSED], row["truth"]["share"]
        if share == 0.5:
            rejected = [test["rejected"] for test in tests]
            lines.append(_line("false positives in the primary cell", rejected, *FALSE_POSITIVES))
        covered = [test["coverage"] for test in tests]
        lines.append(_line(f"coverage in the primary cell at share {share:g}", covered, *COVERAGE))
    found_less_stated = [
        row["tests"]["crossed"]["found"] - row["truth"]["predicted"] for row in primary if row["truth"]["share"] != 0.5
    ]
    lines.append(_line("planted preference found, less the stated power", found_less_stated, -CLOSE, CLOSE))
    worst = [row["tests"][name]["rejected"] for row in null for name in CROSSED]
    lines.append(_line("false positives anywhere on the grid, at most", [max(worst)], 0.0, FALSE_POSITIVES[1]))
    at_margin = [row["tests"]["equivalence"]["rejected"] for row in losses if row["truth"]["shift_over_margin"] == 1.0]
    lines.append(_line("equivalence declared at a shift of the margin", at_margin, *FALSE_POSITIVES))
    below = [
        row["tests"]["equivalence"]["rejected"] - row["truth"]["predicted"]
        for row in losses
        if row["truth"]["shift_over_margin"] == 0.0
    ]
    lines.append(_line("equivalence at no shift, less the predicted power", below, -CLOSE, CLOSE))
    return lines


def _line(what: str, measured: Sequence[float], low: float, high: float) -> dict[str, Any]:
    holds = all(low <= value <= high for value in measured)
    return {"what": what, "measured": [min(measured), max(measured)], "bounds": [low, high], "holds": holds}


def write_calibration(
    rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], folder: Path, console: Console
) -> list[Path]:
    """Print the table; write calibration.json, calibration.md and calibration.png.

    Returns:
        The paths.
    """
    paths = [folder / f"calibration.{end}" for end in ("json", "md", "png")]
    write_json(paths[0], {"findings": list(found), "rows": list(rows)})
    write_text(paths[1], markdown(rows, found))
    draw_calibration([row for row in rows if row["kind"] == "votes"], VOTE_TESTS, paths[2])
    for title, kind, names, what in (
        ("Votes: share of experiments with p < 5 %", "votes", VOTE_TESTS, "rejected"),
        ("Votes: coverage of the 95 % interval", "votes", VOTE_TESTS, "coverage"),
        ("Losses: share of experiments with p < 5 % (equivalence: declared)", "losses", LOSS_TESTS, "rejected"),
    ):
        table = Table("truth", *names, title=title, title_justify="left")
        for row in (row for row in rows if row["kind"] == kind):
            table.add_row(_truth(row), *(percent(row["tests"][name][what], 1) for name in names))
        console.print(table)
    for line in found:
        low, high = line["measured"]
        measured = percent(low, 1) if low == high else f"{percent(low, 1)} to {percent(high, 1)}"
        mark = "[green]holds[/green]" if line["holds"] else "[red]fails[/red]"
        console.print(f"{mark}  {line['what']}: {measured} ({_bounds(line['bounds'])})", soft_wrap=True)
    return paths


def _bounds(bounds: Sequence[float]) -> str:
    return f"allowed: {percent(bounds[0])} to {percent(bounds[1])}"


def _truth(row: dict[str, Any]) -> str:
    truth = row["truth"]
    if row["kind"] == "losses":
        return f"{truth['seeds']} seeds, sd {truth['sd_over_margin']:g}, shift {truth['shift_over_margin']:g} margins"
    s = truth["spread"]
    star = " *" if truth["primary"] else ""
    return f"{truth['share']:g}: seed {s['seed']:g}, prompt {s['prompt']:g}, judge {s['judge']:g}{star}"


def markdown(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
    """The same tables as Markdown, with what each test is."""
    n = rows[0]["experiments"]
    lines = [f"# Calibration: {n:,} experiments of each truth", ""]
    lines += [f"- {'holds' if f['holds'] else '**fails**'}: {f['what']}, {percent(f['measured'][0], 1)} to "
              f"{percent(f['measured'][1], 1)} ({_bounds(f['bounds'])})" for f in found]  # fmt: skip
    for title, kind, names in (("Votes", "votes", VOTE_TESTS), ("Losses", "losses", LOSS_TESTS)):
        lines += ["", f"## {title}", ""]
        lines += [f"- `{key}`: {words}" for key, words in names.items()]
        for what, words in (
            ("rejected", "Share of experiments with p < 5 %"),
            ("coverage", "Coverage of the 95 % interval"),
        ):
            lines += ["", f"{words}:", "", f"| truth | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
            for row in (row for row in rows if row["kind"] == kind):
                values = " | ".join(percent(row["tests"][name][what], 1) for name in names)
                lines.append(f"| {_truth(row)} | {values} |")
    return "\n".join([*lines, "", "\\* The primary cell. Spreads are standard deviations of the chance of a vote.", ""])
