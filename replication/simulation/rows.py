"""Long simulations, one row a scenario: in parallel, with progress, each row kept as it comes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console

from replication.console import progress
from replication.runs.files import naming, parse_objects


class Keyed(Protocol):
    @property
    def key(self) -> str: ...


S = TypeVar("S", bound=Keyed)
R = TypeVar("R", bound=Mapping[str, Any])
"""A row: a TypedDict of plain JSON with `key`."""


def compute_rows(
    scenarios: Sequence[S],
    function: Callable[[S, int, int], R],
    experiments: int,
    seed: int,
    path: Path,
    label: str,
    console: Console,
    jobs: int | None = None,
) -> list[R]:
    """function(scenario, experiments, seed) of every scenario, in their order.

    Args:
        scenarios: what differs.
        function: at the top level of its module.
        experiments, seed: what all scenarios share.
        path: JSON lines of the finished rows; those of the same number, seed and code are not computed again.
        label: words before the progress bar.
        console: for progress.
        jobs: processes at once; None: one a core.
    """
    same = [experiments, seed, _method()]
    done = _read(path, same)
    missing = [scenario for scenario in scenarios if scenario.key not in done]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            naming(path),
            open(path, "a", encoding="utf-8") as file,
            progress(console, "bar", "count", "elapsed", transient=True) as shown,
            ProcessPoolExecutor(min(jobs or os.cpu_count() or 1, len(missing)), initializer=_ignore_interrupt) as pool,
        ):
            task = shown.add_task(label, total=len(scenarios), completed=len(scenarios) - len(missing))
            futures = {pool.submit(function, scenario, experiments, seed): scenario.key for scenario in missing}
            try:
                for future in as_completed(futures):
                    row = done[futures[future]] = future.result()
                    file.write(json.dumps({"arguments": same, **row}) + "\n")
                    file.flush()
                    shown.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [done[scenario.key] for scenario in scenarios]


def _method() -> str:
    """Hash of the analysis' code: rows of another method are computed again."""
    files = sorted(f for part in ("simulation", "statistics") for f in (Path(__file__).parents[1] / part).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _read(path: Path, same: Sequence[Any]) -> dict[str, Any]:
    content = path.read_bytes() if path.exists() else b""
    return {row["key"]: row for row in parse_objects(content) if row.pop("arguments", None) == same}


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
