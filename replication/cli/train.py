"""`replicate train`: one process of a run, or the launcher of all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from replication.cli.arguments import Parser
from replication.errors import UserError

if TYPE_CHECKING:
    from replication.config import RunConfig

STAGES = ("all", "train", "generate")


def train(argv: list[str]) -> int:
    """Train one cell (one arm at one seed), generate its completions, mark it complete."""
    from replication.config import help_of_keys, load_run, to_yaml

    parser = Parser(prog="replicate train", description=train.__doc__, add_help=False)
    parser.add_argument("--config", action="append", default=[], help="layer of keys; repeat it, later files win")
    parser.add_argument("--out", type=Path, help="output folder; the cell is OUT/runs/<arm>/seed-<n>")
    parser.add_argument("--stage", choices=STAGES, default="all", help="train, or generate completions, or both")
    parser.add_argument("--print_config", action="store_true", help="print every key as it is resolved, train nothing")
    parser.add_argument("--dry-run", action="store_true", help="print parameter groups and sizes, and train nothing")
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(f"{parser.format_help()}\nkeys of a run, with their defaults; flags win over files:\n{help_of_keys()}")
        return 0
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.config, flags)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.dry_run:
        from replication.training.dry_run import dry_run

        dry_run(config, Console())
        return 0
    if args.out is None:
        raise UserError("replicate train: --out is missing; name the output folder, such as --out out/my_suite")
    from replication.grid.cell import run_cell
    from replication.processes.launcher import adopt_place
    from replication.processes.preemption import listen
    from replication.runs.layout import SuiteDir

    if args.stage != "generate" and not adopt_place(config) and config.world_size > 1:
        return _start_ranks(config, argv)
    listen(config.cluster.stop_signal)
    if "SLURM_STEP_ID" in os.environ:  # what a scheduler that takes its nodes back sends before it kills
        listen("TERM")
    run_cell(config, SuiteDir(args.out), Console(), args.stage)
    return 0


def _start_ranks(config: RunConfig, argv: list[str]) -> int:
    """Start this verb once for each process of the run, and wait.

    Raises:
        UserError: the run spans nodes, where each node must start its own launcher.
    """
    from replication.processes.launcher import run_ranks

    if config.cluster.nodes > 1:
        raise UserError(
            f"cluster.nodes: {config.cluster.nodes} nodes need a launcher: in a SLURM job `srun --nodes="
            f"{config.cluster.nodes} --ntasks-per-node={config.cluster.devices} replicate train ...` (`replicate grid "
            f"submit` writes it), elsewhere on every node `torchrun --nnodes={config.cluster.nodes} --nproc-per-node="
            f"{config.cluster.devices} --rdzv-backend=c10d --rdzv-id=RUN --rdzv-endpoint=FIRST_NODE:PORT "
            "-m replication train ...`"
        )
    command = [sys.executable, "-P", "-m", "replication", "train", *argv]
    return run_ranks(command, config.world_size, config.cluster.stop_signal)
