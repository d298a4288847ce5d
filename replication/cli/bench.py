"""`replicate bench ACTION`: step, peers, scaling, head, graphs, rates, data, noise; and `replicate drill`."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, SEED, actions, several, takes, takes_keys, together, verb
from replication.cli.grid import CLUSTER, named_suite, with_seeds
from replication.config import RunConfig, find_cluster, find_plugin, load_run, load_suite, plugin_layer
from replication.console import say
from replication.errors import UserError
from replication.runs.files import write_json
from replication.runs.layout import SuiteDir

if TYPE_CHECKING:
    from replication.bench.blocks import Result

EATS = 85_000
BLOCKS = together(
    takes("--config", "config file (default: model/tiny, cluster/cpu)", default=[], action="append"),
    takes("--blocks", "of each contestant, that count (default 24)", COUNT, 24),
    takes("--block-steps", "optimizer steps in a block (default 10)", COUNT, 10),
)
OUT = takes("--out", "JSON file of the results, every block included", Path)


def _config(args: Namespace, *keys: str, default: Sequence[str] = ("model/tiny.yaml", "cluster/cpu.yaml")) -> RunConfig:
    """The run that is measured, with keys that the flags may still change."""
    config = load_run(args.config or default, [*keys, *args.keys])
    if config.model.class_path is not None:
        raise UserError("model.class_path: bench times our own model; leave it out")
    return config


def _tell(result: Result, out: Path | None) -> None:
    Console().print(*result.tables(), sep="\n")
    if out:
        write_json(out, result.to_dict())
        say(Console(), f"every block:  {out}")


@BLOCKS
@OUT
@takes_keys()
def step(args: Namespace) -> None:
    """The four arms and a plain torch loop: speed, memory, and where the time goes."""
    from replication.bench.product import configure
    from replication.bench.step import bench_step

    config = configure(_config(args), args.block_steps)
    _tell(bench_step(config, args.block_steps, args.blocks, Console(), args.out), args.out)


@BLOCKS
@OUT
@takes_keys()
def peers(args: Namespace) -> None:
    """A dense model here, in a plain torch loop, in Hugging Face's Trainer, in LitGPT; and both interventions."""
    from replication.bench.peers import bench_peers

    config = _config(args, "--model.feed_forward=dense")
    _tell(bench_peers(config, args.block_steps, args.blocks, Console()), args.out)


@BLOCKS
@takes("--ranks", "numbers of processes (default 1,2)", several(COUNT), [1, 2])
@takes(
    "--mode",
    "weak: the batch grows with the processes (default); strong: it is cut finer",
    default="weak",
    choices=("weak", "strong"),
)
@OUT
@takes_keys()
def scaling(args: Namespace) -> None:
    """The training on 1, 2, ... processes of this machine."""
    from replication.bench.scaling import bench_scaling

    config = _config(args, "--cluster.strategy=ddp")  # single is one process
    _tell(bench_scaling(config, args.ranks, args.mode, args.block_steps, args.blocks, Console()), args.out)


@takes("--tokens", "default 16,384, as in the 1.2B model", COUNT, 16384)
@takes("--vocabulary", "default 100,031, as in the 1.2B model", COUNT, 100_031)
@takes("--width", "default 1,024, as in the 1.2B model", COUNT, 1024)
@takes("--accelerator", "where (default auto)", default="auto", choices=("auto", "cpu", "gpu"))
@takes("--fp32", "no autocast to bf16", bool)
@takes("--compile", "compile what cluster.compile would", bool)
@takes("--repeats", "timed runs; 0 counts memory only (default 3)", NATURAL, 3)
@OUT
def head(args: Namespace) -> None:
    """The ways from hidden states to losses: peak memory and time."""
    import torch

    from replication.bench.head import HeadSize, bench_head

    on_gpu = torch.cuda.is_available() and args.accelerator != "cpu"
    if args.accelerator == "gpu" and not on_gpu:
        raise UserError("--accelerator: torch sees no GPU here; choose cpu")
    size = HeadSize(args.tokens, args.vocabulary, args.width, not args.fp32, args.compile)
    _tell(bench_head(size, torch.device("cuda" if on_gpu else "cpu"), args.repeats, Console()), args.out)


@takes("--config", "config file (default: the 1.2B model on one GPU, both interventions)", default=[], action="append")
@OUT
@takes_keys()
def graphs(args: Namespace) -> None:
    """Kernels, bytes and casts of a compiled block and head, counted without a GPU; and the step that is predicted."""
    from replication.bench.graphs import PUBLISHED, count_graphs

    _tell(count_graphs(_config(args, default=PUBLISHED)), args.out)


@takes("--config", "config file (default: the 1.2B model on one GPU, both interventions)", default=[], action="append")
@takes("--repeats", "timed calls of each (default 10)", COUNT, 10)
@OUT
@takes_keys()
def rates(args: Namespace) -> None:
    """What the time model assumes, measured here: products, experts, attention, memory, launches; and a prediction."""
    import torch

    from replication.bench.graphs import PUBLISHED
    from replication.bench.rates import bench_rates
    from replication.training.environment import uses_gpu

    config = _config(args, default=PUBLISHED)
    device = torch.device("cuda" if uses_gpu(config) else "cpu")
    _tell(bench_rates(config, device, args.repeats, args.out, Console()), args.out)


@takes("--config", "config file (default: data/python)", default=[], action="append")
@takes(
    "--prepared",
    "what `replicate prepare` wrote with the same config: its tokenizer and its loader are timed",
    Path,
    required=True,
    metavar="DIR",
)
@takes("--megabytes", "text that each turn prepares (default 16)", COUNT, 16)
@takes("--turns", "preparations that count (default 5)", COUNT, 5)
@takes(
    "--eats",
    f"tokens that the model trains on in a second (default {EATS:,}: hoped for of the 1.2B model on one H100)",
    COUNT,
    EATS,
    metavar="TOKENS",
)
@OUT
@takes_keys()
def data(args: Namespace) -> None:
    """Preparing a corpus beside its tokenizer alone, and the training loader beside the model."""
    from replication.bench.data import bench_data

    config, n_bytes = load_run(args.config or ["data/python.yaml"], args.keys), args.megabytes * 1_000_000
    _tell(bench_data(config, args.prepared, args.turns, n_bytes, args.eats, Console()), args.out)


@takes("suite", "suite file, a name in configs/suites, or a suite's output folder")
@takes("--out", "the suite's output folder (default: out/<suite>); noise.json goes there", Path)
@CLUSTER
@takes("--arms", "comma-separated arms (default: the suite's first)")
@takes("--seed", "default: the suite's first", SEED)
@takes(
    "--cuts",
    "kinds of cuts: micro-batch, head, attention, checkpointing, ranks (two processes), again (default %(default)s)",
    default="micro-batch,head,attention",
)
@takes_keys()
def noise(args: Namespace) -> None:
    """The loss as rounding alone moves it: a suite's cell again in other micro-batches and kernels."""
    from replication.bench.noise import CUTS, bench_noise
    from replication.grid.cells import load_cells

    name, out, seeds = args.suite, args.out, None if args.seed is None else str(args.seed)
    inside = SuiteDir(Path(name)).suite
    if inside.is_file():
        name, out = str(inside), out or Path(name)
    suite, suite_dir = named_suite(name, out, seeds)
    if suite_dir.suite.is_file():
        suite = with_seeds(load_suite(suite_dir.suite), seeds)
    arms, kinds = tuple(args.arms.split(",")) if args.arms else suite.arms[:1], args.cuts.split(",")
    for option, given, known in (("--arms", arms, suite.arms), ("--cuts", kinds, CUTS)):
        for one in given:
            if one not in known:
                raise UserError(f"{option}: no '{one}'; choose of {', '.join(known)}")
    cluster = find_cluster(args.cluster) if args.cluster else None
    chosen = replace(suite, arms=arms, seeds=suite.seeds[:1])
    cells = load_cells(chosen, suite_dir, args.keys, cluster, again=True)
    _tell(bench_noise(suite, suite_dir, cells, kinds, Console()), None)
    say(Console(), f"every run:    {suite_dir.noise}; `replicate report {suite_dir.root}` takes it in")


bench = actions(
    "bench",
    "Measure speed and memory as ratios inside one run, and the noise of rounding.",
    *(step, peers, scaling, head, graphs, rates, data, noise),
    no_keys="see `replicate bench head --help`",
)


@verb
@takes("--config", "config file; repeat it, later files win", default=[], action="append")
@takes("--out", "folder of the drill's runs and of drill.json", Path, required=True)
@takes("--plugins", "file with gains or scales of your own; repeat it", default=[], action="append")
@takes("--strategies", "comma-separated values of cluster.strategy (default: the config's)")
@takes("--kills", "in all, shared among the strategies (default 12)", COUNT, 12)
@takes("--seed", "of the run, and of the moments of the kills", SEED)
@takes("--seed-of-kills", SUPPRESS, NATURAL)
@takes_keys()
def drill(args: Namespace) -> int:
    """Kill a run at random points, resume it, and compare its end with an undisturbed run.

    Returns:
        0; 1 where the drill of a strategy does not hold.
    """
    from replication.bench.drill import drill as run_drill
    from replication.objectives.plugins import keep_plugins

    if args.seed_of_kills is not None:
        print("replicate drill: --seed chooses the moments too now; --seed-of-kills goes soon", file=sys.stderr)
    moments = args.seed or 0 if args.seed_of_kills is None else args.seed_of_kills
    plugins = [find_plugin(name) for name in args.plugins]
    layers = [*args.config, *([plugin_layer(plugins)] if plugins else [])]
    config = load_run(layers, args.keys + ([] if args.seed is None else [f"--seed={args.seed}"]))
    keep_plugins(plugins, args.out / "plugins")
    strategies = args.strategies.split(",") if args.strategies else [config.cluster.strategy]
    results = run_drill(config, strategies, args.out, args.kills, moments, Console())
    say(Console(), f"every kill:   {args.out / 'drill.json'}")
    return 0 if all(result.holds for result in results) else 1
