"""`replicate doctor`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from replication.cli.arguments import Parser
from replication.errors import UserError


def doctor(argv: list[str]) -> int:
    """Say what this machine has and what each config would need; or whether a cluster could run a suite."""
    parser = Parser(prog="replicate doctor", description=doctor.__doc__)
    parser.add_argument("--cluster", help="cluster file, or its name in configs/cluster: ask SLURM, start nothing")
    parser.add_argument("--suite", help="with --cluster: suite file or name (default: ablation_2x2)")
    parser.add_argument("--site", type=Path, help="with --cluster: site file (default: launch/site.env, if there)")
    parser.add_argument("--out", type=Path, help="with --cluster: folder of the results (default: out)")
    args = parser.parse_args(argv)
    if args.cluster:
        from replication.config import find_cluster, load_cell, load_suite
        from replication.grid.cluster import examine_cluster
        from replication.grid.site import default_site

        suite = load_suite(args.suite or "ablation_2x2")
        config = load_cell(suite, suite.arms[0], suite.seeds[0], cluster=find_cluster(args.cluster))
        return examine_cluster(suite, config, default_site(args.site), args.out or Path("out"), Console())
    for name in ("suite", "site", "out"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: says what a cluster is asked about; name that with --cluster")
    from replication.config import config_root
    from replication.grid.doctor import doctor as examine

    return examine(Console(), config_root())
