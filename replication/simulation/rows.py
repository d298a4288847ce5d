"""Long simulations, one row a cell: in parallel, with progress, each row kept as it comes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from replication.runs.files import naming, parse_objects


class Keyed(Protocol):
    @property
    def key(self) -> str: ...


def compute_rows(
    cells: Sequence[Keyed],
    function: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    path: Path,
    label: str,
    console: Console,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """function(cell, *arguments) of every cell, in the cells' order.

    Args:
        cells: what differs.
        function: at the top level of its module; its row has `key`.
        arguments: what all cells share; numbers or strings.
        path: JSON lines of the finished rows; those of the same arguments are not computed again.
        label: words before the progress bar.
        console: for progress.
        processes: at once; None: one a core.
    """
    arguments = (*arguments, _method())
    done = _read(path, arguments)
    missing = [cell for cell in cells if cell.key not in done]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        n = min(processes or os.cpu_count() or 1, len(missing))
        with (
            naming(path),
            open(path, "a", encoding="utf-8") as file,
            Progress(*columns, console=console, transient=True) as progress,
            ProcessPoolExecutor(n, initializer=_ignore_interrupt) as pool,
        ):
            task = progress.add_task(label, total=len(cells), completed=len(cells) - len(missing))
            futures = [pool.submit(function, cell, *arguments[:-1]) for cell in missing]
            try:
                for future in as_completed(futures):
                    row = future.result()
                    file.write(json.dumps({"arguments": list(arguments), **row}) + "\n")
                    file.flush()
                    done[row["key"]] = row
                    progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [done[cell.key] for cell in cells]


def _method() -> str:
    """Hash of the analysis' code: rows of another method are computed again."""
    files = sorted(f for part in ("simulation", "statistics") for f in (Path(__file__).parents[1] / part).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _read(path: Path, arguments: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    rows = (row for row in parse_objects(content) if row.pop("arguments", None) == list(arguments))
    return {row["key"]: row for row in rows}


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
