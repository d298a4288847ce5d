"""A cell that waits for its test: words before Python in a site file, so that no test depends on how fast a machine is.

python tests/held_cell.py FOLDER PYTHON ... -m replication VERB ARGUMENT...

FOLDER/hold           a step: no rank begins it, or a later one, while the file holds it
FOLDER/held-RANK      the step that a rank is held at
FOLDER/told-RANK      where a held rank was told to stop
FOLDER/<arm>.py       what runs in place of that arm's cell
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def hold_steps(folder: Path) -> None:
    """Make the callback that asks at each step whether to stop wait before it asks."""
    from replication.processes.preemption import stop_requested
    from replication.training.stopping import GracefulStop

    begin: Callable[..., None] = GracefulStop.on_train_batch_start
    rank = os.environ.get("SLURM_PROCID", "0")

    def held(self: GracefulStop, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        while batch_idx % self.config.accumulation == 0 and step >= step_held_at(folder):
            (folder / f"held-{rank}").write_text(str(step))
            if stop_requested():
                (folder / f"told-{rank}").touch()
            time.sleep(0.02)
            self.checkpoints._boundary_at = time.monotonic()  # the wait is no part of a step
        begin(self, trainer, module, batch, batch_idx)

    GracefulStop.on_train_batch_start = held  # type: ignore[method-assign]


def step_held_at(folder: Path) -> float:
    try:
        return float((folder / "hold").read_text())
    except FileNotFoundError:
        return float("inf")


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    sys.argv = ["replication", *words[words.index("replication") + 1 :]]
    sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
    if sys.argv[1] == "train":
        instead = folder / f"{Path(sys.argv[sys.argv.index('--config') + 1]).parts[-3]}.py"
        if instead.exists():
            exec(instead.read_text(), {"cell": Path(sys.argv[sys.argv.index("--config") + 1]).parent})
            return
        if "generate" not in sys.argv:
            hold_steps(folder)
    runpy.run_module("replication", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
