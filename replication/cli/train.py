"""`replicate prepare` and `replicate train`: the corpus; one process of a run, or the launcher of all."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import NATURAL, Parser, takes, takes_keys, verb
from replication.errors import UserError


@verb
@takes("--config", "config file; repeat it (default: data/python.yaml)", default=[], action="append")
@takes("--out", "folder of the prepared corpus", Path, required=True)
@takes("--show-batch", "print the global batch of step K (from 0), decoded", NATURAL, metavar="K")
@takes("--full", "with --show-batch: whole sequences", bool)
@takes_keys("")
def prepare(args: Namespace) -> None:
    """Read the sources, train or load the tokenizer, write token blocks; or show a global batch."""
    from replication.config import load_run
    from replication.data.prepare import prepare as prepare_corpus
    from replication.data.store import show_batch

    config = load_run(args.config or ["data/python.yaml"], args.keys)
    if args.show_batch is not None:
        show_batch(config, args.out, args.show_batch, Console(), full=args.full)
    else:
        prepare_corpus(config.data, args.out, Console())


@takes("--config", "layer of keys; repeat it, later files win", default=[], action="append")
@takes("--plugins", "file with gains or scales of your own; repeat it", default=[], action="append")
@takes("--out", "output folder; the cell is OUT/runs/<arm>/seed-<n>", Path)
@takes("--stage", "train, or generate completions, or both", default="all", choices=("all", "train", "generate"))
@takes("--print_config", "print every key as it is resolved, train nothing", bool)
@takes("--dry-run", "print parameter groups and sizes, and train nothing", bool)
def train(argv: Sequence[str]) -> int:
    """Train one cell (one arm at one seed), generate its completions, mark it complete."""
    from replication.config import find_plugin, help_of_keys, load_run, plugin_layer, to_yaml

    parser = Parser(prog="replicate train", description=train.__doc__, add_help=False).declare(train)
    if not argv or {"-h", "--help"} & {*argv}:
        words = [word.removeprefix("--") for word in argv if word not in ("-h", "--help")]
        if len(words) == 1:
            print(help_of_keys(words[0].partition("=")[0]))
            return 0
        print(f"{parser.format_help()}\nkeys of a run, and sections of them; flags win over files:\n{help_of_keys()}")
        print("\n`replicate train --help SECTION`, or KEY, shows keys with their defaults")
        return 0
    args, keys = parser.parse_known_args(argv)
    plugins = [find_plugin(name) for name in args.plugins]
    config = load_run([*args.config, *([plugin_layer(plugins)] if plugins else [])], keys)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.dry_run:
        from replication.training.optimizers import dry_run

        dry_run(config, Console())
        return 0
    if args.out is None:
        raise UserError("replicate train: --out is missing; name the output folder, such as --out out/my_suite")
    from replication.grid.cell import run_cell
    from replication.objectives.plugins import keep_plugins
    from replication.processes.launcher import adopt_place, run_ranks
    from replication.processes.preemption import listen
    from replication.runs.layout import SuiteDir

    keep_plugins(plugins, SuiteDir(args.out).plugins)
    n, cluster = config.world_size, config.cluster
    if args.stage != "generate" and not adopt_place(config) and n > 1:
        if cluster.nodes > 1:
            raise UserError(
                f"cluster.nodes: {cluster.nodes} nodes need a launcher: in a SLURM job `srun --nodes={cluster.nodes} "
                f"--ntasks-per-node={cluster.devices} replicate train ...` (`replicate grid submit` writes it), "
                f"elsewhere on every node `torchrun --nnodes={cluster.nodes} --nproc-per-node={cluster.devices} "
                "--rdzv-backend=c10d --rdzv-id=RUN --rdzv-endpoint=FIRST_NODE:PORT -m replication train ...`"
            )
        return run_ranks([sys.executable, "-P", "-m", "replication", "train", *argv], n, cluster.stop_signal)
    listen(cluster.stop_signal)
    if "SLURM_STEP_ID" in os.environ:  # what a scheduler that takes its nodes back sends before it kills
        listen("TERM")
    run_cell(config, SuiteDir(args.out), Console(), args.stage)
    return 0
