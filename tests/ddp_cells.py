"""What every rank of tests/test_distributed.py runs: all cells of the parity table in one start of the processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from memory_store import MemoryStore
from training_setup import fit, small_config


def main(root: Path) -> None:
    for line in (root / "cells.jsonl").read_text().splitlines():
        cell = json.loads(line)
        fit(small_config(cell["arm"], *cell["flags"]), root / cell["name"], MemoryStore(blocks=(6, 5)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
