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
    """function(scenario, experiments, seed) of every scenario, in their order; `function` is at the top of its module.

    `path` keeps the finished rows as JSON lines; those of the same number, seed and code are not computed again.
    `label` stands before the progress bar; `jobs` run at once, one a core where it is None.
    """
    package = Path(__file__).parents[1]
    analysis = sorted(file for part in ("simulation", "statistics") for file in (package / part).glob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in analysis)).hexdigest()[:16]
    same = [experiments, seed, code]
    content = path.read_bytes() if path.exists() else b""
    done: dict[str, Any] = {row["key"]: row for row in parse_objects(content) if row.pop("arguments", None) == same}
    missing = [scenario for scenario in scenarios if scenario.key not in done]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            naming(path),
            open(path, "a", encoding="utf-8") as file,
            progress(console, "bar", "count", "elapsed", transient=True) as shown,
            ProcessPoolExecutor(
                min(jobs or os.cpu_count() or 1, len(missing)),
                initializer=signal.signal,
                initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to answer
            ) as pool,
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
