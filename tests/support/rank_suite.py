"""What every rank of a local reference runs: the trainings of a suite's cells, in one start of the processes.

python tests/rank_suite.py RANKS SUITE_OUT OUT      the cells of SUITE_OUT, each on RANKS local ranks, into OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from replication.config import load_run
from replication.data.store import TokenStore
from replication.processes.launcher import run_ranks
from replication.runs.layout import SuiteDir
from replication.training.environment import import_torchmetrics


def main(ranks: int, suite_out: Path, out: Path) -> int:
    if "RANK" not in os.environ:
        return run_ranks([sys.executable, __file__, str(ranks), str(suite_out), str(out)], ranks)
    import_torchmetrics()
    from replication.training.train import train  # Lightning: in the ranks alone

    for path in sorted(suite_out.glob("runs/*/*/config.yaml")):
        config = load_run([path], ["--cluster.nodes=1", f"--cluster.devices={ranks}"])
        store = TokenStore.open(SuiteDir(out).data_folder(config.data.dir))
        train(config, SuiteDir(out).cell(config.arm, config.seed), store, Console(stderr=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
