"""A suite of 128 cells of 30,000 steps with the scalars of the 1.2B run, and what a report over it costs. By hand:

python tests/support/large_suite.py DIR      build it (0.6 GB, about a minute), report on it, print seconds and memory
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from synthetic_runs import Synthetic, build_suite

from replication.config import load_suite
from replication.report.report import write_report
from replication.runs.layout import SuiteDir

LARGE = Synthetic(
    seeds=tuple(range(1, 33)),
    steps=30_000,
    log_every=50,
    validate_every=500,
    model="model/1b2.yaml",
    effects={"both": {"val/loss_nats": 0.004, "train/grad_norm": 0.76, "val/entropy_predicted_tokens_nats": 0.21}},
)
"""4 arms x 32 seeds, a line every 50 steps."""


def main(folder: Path) -> None:
    suite_dir = SuiteDir(folder)
    if not suite_dir.suite.is_file():
        build_suite(folder, LARGE)
    start = time.monotonic()
    write_report(suite_dir, load_suite(suite_dir.suite))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{time.monotonic() - start:.1f} s, peak of the largest process {peak / 2**20:.2f} GiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
