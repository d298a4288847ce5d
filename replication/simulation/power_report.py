"""The answer of `replicate power`: a table, the seeds that are missing, a figure, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from replication.runs.files import write_json, write_text
from replication.simulation.figures import draw_power
from replication.simulation.power import ENOUGH, fewest_seeds
from replication.statistics.format import count, percent

BEFORE = ("seed spread", "prompts", "judges")
AFTER = ("seeds for 80 %", "GPU-hours, 2 arms", "4 arms")


NOTE = (
    f"'more': none of these numbers of seeds reaches {percent(ENOUGH)}. Where power hardly grows with seeds, prompts "
    "or judges are what limits: take more of them."
)


def write_power(
    rows: Sequence[dict[str, Any]], assumptions: Sequence[str], have: int, folder: Path, console: Console
) -> list[Path]:
    """Print the table; write power.json, power.md and power.png.

    Args:
        rows: of power.power_row.
        assumptions: where each spread comes from, in words.
        have: seeds that there are already.
        folder: made where it does not exist.
        console: for the table.

    Returns:
        The paths.
    """
    paths = [folder / f"power.{end}" for end in ("json", "md", "png")]
    fewest = fewest_seeds(rows)
    write_json(paths[0], {"assumptions": list(assumptions), "fewest_seeds": fewest, "rows": list(rows)})
    title = f"Power to find {percent(rows[0]['share'], 1)} of decisive votes, {percent(rows[0]['ties'], 1)} ties"
    lines = [_line(entry, rows, have) for entry in fewest]
    columns = [*BEFORE, *(f"{n} seeds" for n in sorted({row["seeds"] for row in rows})), *AFTER]
    write_text(paths[1], _markdown(title, assumptions, columns, lines))
    draw_power(rows, paths[2])
    table = Table(*columns, title=title, title_justify="left", padding=(0, 0))
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for words in (*assumptions, NOTE):
        console.print(words, soft_wrap=True)
    return paths


def _line(entry: dict[str, Any], rows: Sequence[dict[str, Any]], have: int) -> list[str]:
    """One combination of seed spread, prompts and judges."""
    key = (entry["seed_spread"], entry["prompts"], entry["judges"])
    group = [row for row in rows if (row["spread"]["seed"], row["prompts"], row["judges"]) == key]
    reached = [percent(row["power"]) for row in sorted(group, key=lambda row: row["seeds"])]
    fewest = entry["fewest_seeds"]
    if fewest is None:
        words, hours = "more", ["–", "–"]
    else:
        row = next(row for row in group if row["seeds"] == fewest)
        words = f"{fewest}" + (f" ({max(0, fewest - have)} more)" if have else "")
        hours = [count(row["gpu_hours_2_arms"]), count(row["gpu_hours_4_arms"])]
    return [f"{key[0]:g}", str(key[1]), str(key[2]), *reached, words, *hours]


def _markdown(title: str, assumptions: Sequence[str], columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}", *(f"| {' | '.join(line)} |" for line in lines)]
    words = [f"- {words}" for words in assumptions]
    return "\n".join([f"# {title}", "", *words, "", *table, "", NOTE, ""])
