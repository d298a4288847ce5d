"""`replicate bench ACTION`: step, peers, scaling, head."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from replication.arguments import Parser
from replication.config import RunConfig, load_run
from replication.errors import UserError
from replication.rundir import write_json

TEXTS = {
    "step": "the four arms and a plain torch loop: speed, memory, and where the time goes",
    "peers": "a dense model here, in a plain torch loop, in Hugging Face's Trainer, in LitGPT; and both interventions",
}
DEFAULT_LAYERS = ["model/tiny.yaml", "cluster/cpu.yaml"]


def bench(argv: list[str]) -> int:
    """The verb: parse, then act."""
    parser = Parser(prog="replicate bench", description="Measure speed and memory, as ratios inside one run.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(TEXTS), parser_class=Parser)
    for name, text in TEXTS.items():
        keys = "" if name == "head" else " Any key of a run may follow as a flag."
        sub = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.{keys}")
        if name != "head":
            sub.add_argument("--config", action="append", default=[], help="config file (default: model/tiny, "
                             "cluster/cpu)")  # fmt: skip
            sub.add_argument("--blocks", type=int, default=24, help="blocks of each contestant that count (default 24)")
            sub.add_argument("--block-steps", type=int, default=10, help="optimizer steps in a block (default 10)")
        sub.add_argument("--out", type=Path, help="JSON file of the results, every block included")
    args, flags = parser.parse_known_args(argv)
    for name in ("blocks", "block_steps"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} must be at least 1")
    action: Callable[[argparse.Namespace, list[str], Console], dict[str, object]] = {
        "step": _step, "peers": _peers,
    }[args.action]  # fmt: skip
    console = Console()
    result = action(args, flags, console)
    if args.out:
        write_json(args.out, result)
        console.print(f"every block:  {args.out}", soft_wrap=True)
    return 0


def _config(args: argparse.Namespace, flags: list[str]) -> RunConfig:
    return load_run(args.config or DEFAULT_LAYERS, flags)


def _step(args: argparse.Namespace, flags: list[str], console: Console) -> dict[str, object]:
    from replication.bench.product import configure
    from replication.bench.step import bench_step, step_tables

    config = configure(_config(args, flags), args.block_steps)
    result = bench_step(config, args.block_steps, args.blocks, console)
    console.print(*step_tables(result), sep="\n")
    return result.to_dict()


def _peers(args: argparse.Namespace, flags: list[str], console: Console) -> dict[str, object]:
    from replication.bench.peers import bench_peers, peers_tables

    config = _config(args, ["--model.feed_forward=dense", *flags])
    result = bench_peers(config, args.block_steps, args.blocks, console)
    console.print(*peers_tables(result), sep="\n")
    return result.to_dict()
