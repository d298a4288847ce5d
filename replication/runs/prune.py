"""Finished cells without the states that only further training needs: optimizer, schedule, random generators.

The weights of every checkpoint stay, under a COMPLETE that vouches for them alone, so that completions can be sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from replication.console import timestamp
from replication.errors import UserError
from replication.runs.files import file_sha256, narrowed_marker, remove_tree, sync, write_json
from replication.runs.layout import WEIGHTS, RunDir, SuiteDir


@dataclass(frozen=True)
class Prunable:
    """What of a finished cell can go."""

    name: str
    run: RunDir
    n_bytes: int


def prunable(suite_dir: SuiteDir) -> list[Prunable]:
    """Complete cells that hold more than weights, in the order of their names."""
    found = []
    for arm, seed, run in suite_dir.cells():
        if run.complete.is_file() and (n_bytes := sum(map(size, _parts(run)))):
            found.append(Prunable(f"{arm}/seed-{seed}", run, n_bytes))
    return found


def prune(cell: Prunable) -> tuple[int, list[str]]:
    """Remove it; the bytes that were freed, and a line about each checkpoint that was left as it is.

    Weights are read and compared with their checksum before the rest of their checkpoint goes. Raises UserError where a
    process holds the cell.
    """
    freed, notes = 0, []
    with cell.run.lock():
        for folder in cell.run.checkpoint_folders():
            try:
                marker = narrowed_marker(folder, [WEIGHTS], pruned_at=timestamp())
                if file_sha256(folder / WEIGHTS) != marker["files"][WEIGHTS]["sha256"]:
                    raise UserError(f"{folder}: has {WEIGHTS} with another checksum; it is left as it is")
            except (UserError, OSError) as error:
                notes.append(str(error))
                continue
            if inside := list(_inside(folder)):
                write_json(folder / "COMPLETE", marker)  # first: from here on nothing else is needed
            freed += sum(map(_removed, inside))
            sync(folder)
        freed += sum(map(_removed, cell.run.checkpoints.glob("universal-*")))
    return freed, notes


def size(path: Path) -> int:
    """Bytes of a file, or of those in a folder."""
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


def _parts(run: RunDir) -> Iterator[Path]:
    for folder in run.checkpoint_folders():
        yield from _inside(folder)
    yield from run.checkpoints.glob("universal-*")


def _inside(folder: Path) -> Iterator[Path]:
    """All in a checkpoint but weights and marker; nothing where there are no weights."""
    if (folder / WEIGHTS).is_file():
        yield from (path for path in folder.iterdir() if path.name not in (WEIGHTS, "COMPLETE"))


def _removed(path: Path) -> int:
    n_bytes = size(path)
    if path.is_dir():
        remove_tree(path)
    else:
        path.unlink()
    return n_bytes
