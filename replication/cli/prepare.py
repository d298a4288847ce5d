"""`replicate prepare`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from replication.cli.arguments import NATURAL, Parser


def prepare(argv: list[str]) -> int:
    """Read the sources, train or load the tokenizer, write token blocks; or show a global batch."""
    from replication.config import load_run

    parser = Parser(prog="replicate prepare", description=prepare.__doc__)
    parser.add_argument(
        "--config", action="append", default=[], help="config file; repeat it (default: data/python.yaml)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the prepared corpus")
    parser.add_argument(
        "--show-batch", type=NATURAL, metavar="K", help="print the global batch of step K (from 0), decoded"
    )
    parser.add_argument("--full", action="store_true", help="with --show-batch: whole sequences")
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.config or ["data/python.yaml"], flags)
    console = Console()
    from replication.data.prepare import prepare as prepare_corpus
    from replication.data.store import show_batch

    if args.show_batch is not None:
        show_batch(config, args.out, args.show_batch, console, full=args.full)
    else:
        prepare_corpus(config.data, args.out, console)
    return 0
