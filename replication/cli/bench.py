"""`replicate bench ACTION`: step, peers, scaling, head, data, noise."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, Parser, several, whole
from replication.config import RunConfig, load_run
from replication.errors import UserError
from replication.runs.files import write_json
from replication.runs.layout import SuiteDir
from replication.runs.starts import refuse_other_data

TEXTS = {
    "step": "the four arms and a plain torch loop: speed, memory, and where the time goes",
    "peers": "a dense model here, in a plain torch loop, in Hugging Face's Trainer, in LitGPT; and both interventions",
    "scaling": "the training on 1, 2, ... processes of this machine",
    "head": "the ways from hidden states to losses: peak memory and time",
    "data": "preparing a corpus beside its tokenizer alone, and the training loader beside what the model eats",
    "noise": "how far rounding alone moves the loss: a suite's cell again in other micro-batches and kernels",
}
STRATEGY = ["--cluster.strategy=ddp"]
"""What bench scaling adds to the layers: single is one process."""
EATS = 85_000
DEFAULT_LAYERS = ["model/tiny.yaml", "cluster/cpu.yaml"]


def bench(argv: list[str]) -> int:
    """The verb: parse, then act."""
    parser = Parser(prog="replicate bench", description="Measure speed and memory as ratios inside one run, and "
                    "the noise of rounding.")  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(TEXTS), parser_class=Parser)
    for name, text in TEXTS.items():
        keys = "" if name == "head" else " Any key of a run may follow as a flag."
        sub = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.{keys}")
        if name not in ("head", "noise"):
            default = "data/python" if name == "data" else "model/tiny, cluster/cpu"
            sub.add_argument("--config", action="append", default=[], help=f"config file (default: {default})")
        if name in ("step", "peers", "scaling"):
            sub.add_argument("--blocks", type=COUNT, default=24, help="of each contestant, that count (default 24)")
            sub.add_argument("--block-steps", type=COUNT, default=10, help="optimizer steps in a block (default 10)")
        if name == "scaling":
            sub.add_argument("--ranks", type=several(COUNT), default=[1, 2], help="numbers of processes (default 1,2)")
            sub.add_argument("--mode", choices=("weak", "strong"), default="weak", help="weak: the batch grows with "
                             "the processes (default); strong: it is cut finer")  # fmt: skip
        if name == "head":
            _add_head_arguments(sub)
        if name == "data":
            _add_data_arguments(sub)
        if name == "noise":
            _add_noise_arguments(sub)
        else:
            sub.add_argument("--out", type=Path, help="JSON file of the results, every block included")
    args, flags = parser.parse_known_args(argv)
    action: Callable[[argparse.Namespace, list[str], Console], dict[str, object]] = {
        "step": _step, "peers": _peers, "scaling": _scaling, "head": _head, "data": _data,
        "noise": _noise,
    }[args.action]  # fmt: skip
    console = Console()
    result = action(args, flags, console)
    if args.out and args.action != "noise":
        write_json(args.out, result)
        console.print(f"every block:  {args.out}", soft_wrap=True)
    return 0


def _add_head_arguments(sub: argparse.ArgumentParser) -> None:
    for name, size in (("tokens", 16384), ("vocabulary", 100_031), ("width", 1024)):
        sub.add_argument(f"--{name}", type=COUNT, default=size, help=f"default {size:,}, as in the 1.2B model")
    sub.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="where (default auto)")
    sub.add_argument("--fp32", action="store_true", help="no autocast to bf16")
    sub.add_argument("--compile", action="store_true", help="compile what cluster.compile would")
    sub.add_argument("--repeats", type=NATURAL, default=3, help="timed runs; 0 counts memory only (default 3)")


def _add_data_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prepared", type=Path, required=True, metavar="DIR", help="what `replicate prepare` wrote with "
                     "the same config: its tokenizer and its loader are timed")  # fmt: skip
    sub.add_argument("--megabytes", type=COUNT, default=16, help="text that each turn prepares (default 16)")
    sub.add_argument("--turns", type=COUNT, default=5, help="preparations that count (default 5)")
    sub.add_argument("--eats", type=COUNT, default=EATS, metavar="TOKENS", help=f"tokens that the model trains on in a "
                     f"second (default {EATS:,}: hoped for of the 1.2B model on one H100)")  # fmt: skip


def _add_noise_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("suite", help="suite file, a name in configs/suites, or a suite's output folder")
    sub.add_argument("--out", type=Path, help="the suite's output folder (default: out/<suite>); noise.json goes there")
    sub.add_argument("--cluster", help="file that says where cells run, or its name in configs/cluster")
    sub.add_argument("--arms", help="comma-separated arms (default: the suite's first)")
    sub.add_argument("--seed", type=whole(0, 2**32 - 1), help="default: the suite's first")
    sub.add_argument("--cuts", default="micro-batch,head,attention", help="kinds of cuts: micro-batch, head, "
                     "attention, checkpointing, ranks (two processes), again (default %(default)s)")  # fmt: skip


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


def _scaling(args: argparse.Namespace, flags: list[str], console: Console) -> dict[str, object]:
    from replication.bench.scaling import bench_scaling, scaling_table

    config = load_run(args.config or DEFAULT_LAYERS, [*STRATEGY, *flags])
    result = bench_scaling(config, args.ranks, args.mode, args.block_steps, args.blocks, console)
    console.print(scaling_table(result))
    return result.to_dict()


def _data(args: argparse.Namespace, flags: list[str], console: Console) -> dict[str, object]:
    from replication.bench.data import bench_loader, bench_preparation, loader_table, preparation_table
    from replication.data.store import TokenStore

    config = load_run(args.config or ["data/python.yaml"], flags)
    store = TokenStore.open(args.prepared)
    loader = bench_loader(config, store, args.eats)
    console.print(loader_table(loader))
    tokenizer = replace(config.data.tokenizer, path=str(args.prepared / "tokenizer.json"), revision=None)
    data = replace(config.data, tokenizer=tokenizer)
    preparation = bench_preparation(data, args.turns, args.megabytes * 1_000_000, console)
    console.print(preparation_table(preparation))
    return {"bench": "data", "loader": loader.to_dict(), "preparation": preparation.to_dict()}


def _head(args: argparse.Namespace, flags: list[str], console: Console) -> dict[str, object]:
    from replication.bench.head import HeadSize, bench_head, head_table

    if flags:
        raise UserError(f"replicate bench head: {flags[0]} does not act here; see `replicate bench head --help`")
    import torch

    on_gpu = torch.cuda.is_available() and args.accelerator != "cpu"
    if args.accelerator == "gpu" and not on_gpu:
        raise UserError("--accelerator: torch sees no GPU here; choose cpu")
    size = HeadSize(args.tokens, args.vocabulary, args.width, not args.fp32, args.compile)
    result = bench_head(size, torch.device("cuda" if on_gpu else "cpu"), args.repeats, console)
    console.print(head_table(result))
    return result.to_dict()


def _noise(args: argparse.Namespace, flags: list[str], console: Console) -> dict[str, object]:
    from replication.bench.noise import CUTS, bench_noise, noise_table
    from replication.cli.grid import named_suite
    from replication.config import find_cluster
    from replication.data.prepare import prepare
    from replication.data.store import TokenStore
    from replication.grid.cells import plan

    inside = SuiteDir(Path(args.suite)).suite
    if inside.is_file():
        args.out, args.suite = args.out or Path(args.suite), str(inside)
    args.seeds = str(args.seed) if args.seed is not None else None
    suite, suite_dir = named_suite(args, from_folder=True)
    arms = tuple(args.arms.split(",")) if args.arms else suite.arms[:1]
    kinds = args.cuts.split(",")
    for option, given, known in (("--arms", arms, suite.arms), ("--cuts", kinds, CUTS)):
        for name in given:
            if name not in known:
                raise UserError(f"{option}: no '{name}'; choose of {', '.join(known)}")
    chosen = replace(suite, arms=arms, seeds=suite.seeds[:1])
    cluster = find_cluster(args.cluster) if args.cluster else None
    bases = plan(chosen, suite_dir, flags, cluster, from_folder=True)
    data = bases[0].config.data
    if data.dir is None:
        prepare(data, suite_dir.data, console)
    store = TokenStore.open(data.dir or suite_dir.data)
    refuse_other_data(suite_dir.runs, str(store.dir), store.hash)
    where = str(store.dir.resolve())
    bases = [replace(b, config=replace(b.config, data=replace(b.config.data, dir=where))) for b in bases]
    result = bench_noise(suite, suite_dir, bases, kinds, console)
    console.print(noise_table(result))
    console.print(f"every run:    {suite_dir.noise}; `replicate report {suite_dir.root}` takes it in", soft_wrap=True)
    return result
