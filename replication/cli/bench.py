"""`replicate bench ACTION`: step, peers, scaling, head, data, noise; and `replicate drill`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, Parser, several, whole
from replication.config import RunConfig, find_cluster, load_run, load_suite
from replication.console import say
from replication.errors import UserError
from replication.runs.files import write_json
from replication.runs.layout import SuiteDir

if TYPE_CHECKING:
    from replication.bench.blocks import Result

EATS = 85_000
DEFAULT_LAYERS = ["model/tiny.yaml", "cluster/cpu.yaml"]


def bench(argv: list[str]) -> int:
    """The verb: parse, measure, show; --out takes the result with every block."""
    parser = Parser(prog="replicate bench", description="Measure speed and memory as ratios inside one run, and "
                    "the noise of rounding.")  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS), parser_class=Parser)
    for name, (text, add_arguments, _) in ACTIONS.items():
        keys = "" if name == "head" else " Any key of a run may follow as a flag."
        sub = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.{keys}")
        add_arguments(sub)
        if name != "noise":
            sub.add_argument("--out", type=Path, help="JSON file of the results, every block included")
    args, flags = parser.parse_known_args(argv)
    console = Console()
    result = ACTIONS[args.action][2](args, flags, console)
    console.print(*result.tables(), sep="\n")
    if args.action == "noise":
        where = SuiteDir(args.out)
        say(console, f"every run:    {where.noise}; `replicate report {where.root}` takes it in")
    elif args.out:
        write_json(args.out, result.to_dict())
        say(console, f"every block:  {args.out}")
    return 0


def _add_config(sub: argparse.ArgumentParser, default: str = "model/tiny, cluster/cpu") -> None:
    sub.add_argument("--config", action="append", default=[], help=f"config file (default: {default})")


def _add_blocks(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--blocks", type=COUNT, default=24, help="of each contestant, that count (default 24)")
    sub.add_argument("--block-steps", type=COUNT, default=10, help="optimizer steps in a block (default 10)")


def _config(args: argparse.Namespace, flags: list[str]) -> RunConfig:
    return load_run(args.config or DEFAULT_LAYERS, flags)


# ---------------------------------------------------------------- step, peers, scaling


def _step(args: argparse.Namespace, flags: list[str], console: Console) -> Result:
    from replication.bench.product import configure
    from replication.bench.step import bench_step

    config = configure(_config(args, flags), args.block_steps)
    return bench_step(config, args.block_steps, args.blocks, console)


def _peers(args: argparse.Namespace, flags: list[str], console: Console) -> Result:
    from replication.bench.peers import bench_peers

    config = _config(args, ["--model.feed_forward=dense", *flags])
    return bench_peers(config, args.block_steps, args.blocks, console)


def _add_scaling(sub: argparse.ArgumentParser) -> None:
    _add_blocks(sub)
    sub.add_argument("--ranks", type=several(COUNT), default=[1, 2], help="numbers of processes (default 1,2)")
    sub.add_argument("--mode", choices=("weak", "strong"), default="weak", help="weak: the batch grows with "
                     "the processes (default); strong: it is cut finer")  # fmt: skip


def _scaling(args: argparse.Namespace, flags: list[str], console: Console) -> Result:
    from replication.bench.scaling import bench_scaling

    config = _config(args, ["--cluster.strategy=ddp", *flags])  # single is one process
    return bench_scaling(config, args.ranks, args.mode, args.block_steps, args.blocks, console)


# ---------------------------------------------------------------- head, data


def _add_head(sub: argparse.ArgumentParser) -> None:
    for name, size in (("tokens", 16384), ("vocabulary", 100_031), ("width", 1024)):
        sub.add_argument(f"--{name}", type=COUNT, default=size, help=f"default {size:,}, as in the 1.2B model")
    sub.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="where (default auto)")
    sub.add_argument("--fp32", action="store_true", help="no autocast to bf16")
    sub.add_argument("--compile", action="store_true", help="compile what cluster.compile would")
    sub.add_argument("--repeats", type=NATURAL, default=3, help="timed runs; 0 counts memory only (default 3)")


def _head(args: argparse.Namespace, flags: list[str], console: Console) -> Result:
    if flags:
        raise UserError(f"replicate bench head: {flags[0]} does not act here; see `replicate bench head --help`")
    import torch

    from replication.bench.head import HeadSize, bench_head

    on_gpu = torch.cuda.is_available() and args.accelerator != "cpu"
    if args.accelerator == "gpu" and not on_gpu:
        raise UserError("--accelerator: torch sees no GPU here; choose cpu")
    size = HeadSize(args.tokens, args.vocabulary, args.width, not args.fp32, args.compile)
    return bench_head(size, torch.device("cuda" if on_gpu else "cpu"), args.repeats, console)


def _add_data(sub: argparse.ArgumentParser) -> None:
    _add_config(sub, "data/python")
    sub.add_argument("--prepared", type=Path, required=True, metavar="DIR", help="what `replicate prepare` wrote with "
                     "the same config: its tokenizer and its loader are timed")  # fmt: skip
    sub.add_argument("--megabytes", type=COUNT, default=16, help="text that each turn prepares (default 16)")
    sub.add_argument("--turns", type=COUNT, default=5, help="preparations that count (default 5)")
    sub.add_argument("--eats", type=COUNT, default=EATS, metavar="TOKENS", help=f"tokens that the model trains on in a "
                     f"second (default {EATS:,}: hoped for of the 1.2B model on one H100)")  # fmt: skip


def _data(args: argparse.Namespace, flags: list[str], console: Console) -> Result:
    from replication.bench.data import bench_data

    config = load_run(args.config or ["data/python.yaml"], flags)
    return bench_data(config, args.prepared, args.turns, args.megabytes * 1_000_000, args.eats, console)


# ---------------------------------------------------------------- noise


def _add_noise(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("suite", help="suite file, a name in configs/suites, or a suite's output folder")
    sub.add_argument("--out", type=Path, help="the suite's output folder (default: out/<suite>); noise.json goes there")
    sub.add_argument("--cluster", help="file that says where cells run, or its name in configs/cluster")
    sub.add_argument("--arms", help="comma-separated arms (default: the suite's first)")
    sub.add_argument("--seed", type=whole(0, 2**32 - 1), help="default: the suite's first")
    sub.add_argument("--cuts", default="micro-batch,head,attention", help="kinds of cuts: micro-batch, head, "
                     "attention, checkpointing, ranks (two processes), again (default %(default)s)")  # fmt: skip


def _noise(args: argparse.Namespace, flags: list[str], console: Console) -> Result:
    from replication.bench.noise import CUTS, bench_noise
    from replication.cli.grid import named_suite, with_seeds
    from replication.grid.cells import load_cells

    inside = SuiteDir(Path(args.suite)).suite
    if inside.is_file():
        args.out, args.suite = args.out or Path(args.suite), str(inside)
    args.seeds = str(args.seed) if args.seed is not None else None
    suite, suite_dir = named_suite(args)
    if suite_dir.suite.is_file():
        suite = with_seeds(load_suite(suite_dir.suite), args.seeds)
    args.out = suite_dir.root
    arms, kinds = tuple(args.arms.split(",")) if args.arms else suite.arms[:1], args.cuts.split(",")
    for option, given, known in (("--arms", arms, suite.arms), ("--cuts", kinds, CUTS)):
        for name in given:
            if name not in known:
                raise UserError(f"{option}: no '{name}'; choose of {', '.join(known)}")
    cluster = find_cluster(args.cluster) if args.cluster else None
    cells = load_cells(replace(suite, arms=arms, seeds=suite.seeds[:1]), suite_dir, flags, cluster, from_folder=True)
    return bench_noise(suite, suite_dir, cells, kinds, console)


ACTIONS: dict[
    str,
    tuple[
        str,
        Callable[[argparse.ArgumentParser], None],
        Callable[[argparse.Namespace, list[str], Console], Result],
    ],
] = {
    "step": ("the four arms and a plain torch loop: speed, memory, and where the time goes", _add_blocks, _step),
    "peers": (
        "a dense model here, in a plain torch loop, in Hugging Face's Trainer, in LitGPT; and both interventions",
        _add_blocks, _peers,
    ),
    "scaling": ("the training on 1, 2, ... processes of this machine", _add_scaling, _scaling),
    "head": ("the ways from hidden states to losses: peak memory and time", _add_head, _head),
    "data": (
        "preparing a corpus beside its tokenizer alone, and the training loader beside the model", _add_data, _data,
    ),
    "noise": (
        "the loss as rounding alone moves it: a suite's cell again in other micro-batches and kernels",
        _add_noise, _noise,
    ),
}  # fmt: skip
"""Name -> (help, its arguments, the measurement)."""


# ---------------------------------------------------------------- drill


def drill(argv: list[str]) -> int:
    """Kill a run at random points, resume it, and compare its end with an undisturbed run.

    Returns:
        0; 1 where the drill of a strategy does not hold.
    """
    text = "Kill a run at random points, resume it, and compare its end with an undisturbed run."
    parser = Parser(prog="replicate drill", description=f"{text} Any key of a run may follow as a flag.")
    parser.add_argument("--config", action="append", default=[], help="config file; repeat it, later files win")
    parser.add_argument("--out", required=True, type=Path, help="folder of the drill's runs and of drill.json")
    parser.add_argument("--strategies", help="comma-separated values of cluster.strategy (default: the config's)")
    parser.add_argument("--kills", type=COUNT, default=12, help="in all, shared among the strategies (default 12)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), help="of the run, and of the moments of the kills")
    parser.add_argument("--seed-of-kills", type=NATURAL, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args(argv)
    if args.seed is not None:
        flags.append(f"--seed={args.seed}")
    if args.seed_of_kills is not None:
        print("replicate drill: --seed chooses the moments too now; --seed-of-kills goes soon", file=sys.stderr)
    moments = args.seed or 0 if args.seed_of_kills is None else args.seed_of_kills
    from replication.bench.drill import drill as run_drill

    config, console = load_run(args.config, flags), Console()
    strategies = args.strategies.split(",") if args.strategies else [config.cluster.strategy]
    results = run_drill(config, strategies, args.out, args.kills, moments, console)
    say(console, f"every kill:   {args.out / 'drill.json'}")
    return 0 if all(result.holds for result in results) else 1
