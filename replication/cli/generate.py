"""`replicate generate SUITE`: completions of a suite's trained cells, or two arms' of them for judging elsewhere."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, SEED, takes, takes_keys, verb
from replication.config import load_run, load_suite
from replication.console import say
from replication.errors import UserError
from replication.evaluation.record import matched_temperature
from replication.generation.completions import Shard
from replication.generation.export import write_export
from replication.generation.settings import MATCHED, parse_settings, setting_flags
from replication.generation.suite import cells_to_sample, sample_as_worker, sample_cells, trained_cells
from replication.runs.layout import RunDir, SuiteDir


@verb
@takes("suite", "output folder of a suite, or the suite: its file or its name in configs/suites")
@takes("--out", "output folder, where a suite is named (default: out/<suite>)", Path)
@takes("--arm", "only this arm")
@takes("--seed", "only this seed", SEED)
@takes("--jobs", "processes side by side (default: one a GPU, one on a CPU)", COUNT)
@takes("--again", "sample anew what is there already", bool)
@takes("--setting", "ways of sampling, apart: greedy, t0.5 (temperature), matched (baseline's entropy)", metavar="A,B")
@takes("--export", "write two arms' completions at --seed, and no more", Path, metavar="FILE")
@takes("--pair", "with --export: the arms (default: the suite's two)", metavar="A,B")
@takes("--shard", SUPPRESS, Shard.parse)  # what a worker is started with
@takes_keys("")
def generate(args: Namespace) -> int:
    """Sample completions of every trained cell, as its config or --generation.* keys say; what is there already is left
    alone, and an interrupted command goes on where it stopped. With --export, write those of two arms at one seed to
    the file of the published A/B tool instead.

    Returns:
        0; 1 where cells failed or are not trained.
    """
    for key in args.keys:
        if not key.startswith(("--generation.", "--cluster.")) and key.startswith("--"):
            raise UserError(f"replicate generate: {key} does not act on generation; use --generation.* or --cluster.*")
    if args.pair and not args.export:
        raise UserError("--pair: chooses the arms of --export; for one arm's completions use --arm")
    is_folder = Path(args.suite).is_dir()
    if is_folder and args.out is not None:
        raise UserError(f"--out: {args.suite} is an output folder already; give one of them")
    try:
        default = Path(args.suite) if is_folder else Path("out", load_suite(args.suite).name)
    except UserError as error:
        raise UserError(f"{args.suite}: neither a folder nor a suite ({error})") from None
    suite_dir = SuiteDir(args.out or default)
    if args.export:
        _export(args, suite_dir)
        return 0

    def flags_of(run: RunDir) -> list[str]:
        """The keys of the command line, then those of the cell's named setting, which says what it is."""
        matched = None
        if run.setting == MATCHED:
            config = load_run([run.config], args.keys)
            baseline = suite_dir.cell(load_suite(suite_dir.suite).arms[0], config.seed)
            matched = matched_temperature(run, baseline, config.generation.temperature)
        return [*args.keys, *setting_flags(run.setting, matched)]

    settings = parse_settings(args.setting) if args.setting else [""]
    if args.shard:
        run = suite_dir.cell(args.arm, args.seed, settings[0])
        sample_as_worker(run, args.shard, suite_dir, flags_of(run))
        return 0
    console = Console()
    trained, untrained = trained_cells(suite_dir, args.arm, args.seed)
    made = n_there = 0
    failed: dict[str, str] = {}
    for setting in settings:  # one after the other, as each takes hold of the cells
        runs = [replace(run, setting=setting) for run in trained]
        todo, there = cells_to_sample(runs, flags_of, args.again, suite_dir, console)
        failed |= sample_cells(todo, suite_dir, args.jobs, args.keys, console)
        made, n_there = made + len(todo), n_there + there
    for name, why in failed.items():
        say(console, ("failed", "red"), f" {name}: {why}")
    if untrained:
        say(console, ("not trained:", "yellow"), f" {', '.join(untrained)}")
    n_cells = len(trained) * len(settings) + len(untrained)
    say(console, f"{made - len(failed)} of {n_cells} cells sampled, {n_there} there already")
    return 1 if failed or untrained else 0


def _export(args: Namespace, suite_dir: SuiteDir) -> None:
    """Write two arms' completions: those of --pair, or of the suite's primary comparison."""
    if args.seed is None:
        raise UserError("--export: needs --seed; the file holds two arms at one seed")
    if args.arm or args.jobs or args.again or args.setting or args.keys:
        raise UserError(
            "--export: writes what is there; --arm, --jobs, --again, --setting and keys do not act on it, --pair does"
        )
    if args.pair is not None:
        a, comma, b = args.pair.partition(",")
        if not comma or not a or not b or "," in b or a == b:
            raise UserError(f"--pair: '{args.pair}' must be two arms, such as baseline,both")
    elif suite_dir.suite.is_file():
        suite = load_suite(suite_dir.suite)
        resolved = suite.analysis.resolved(suite.arms)
        if resolved.treatment is None:
            raise UserError(f"--pair: the suite {suite.name} has one arm, and the file holds two")
        a, b = str(resolved.baseline), resolved.treatment
    else:
        raise UserError(f"--pair: {suite_dir.root} has no suite.yaml that names two arms; give --pair A,B")
    config = suite_dir.cell(a, args.seed).config
    prompts = load_run([config]).generation if config.is_file() else None
    count = write_export(args.export, suite_dir, args.seed, (a, b), prompts)
    say(Console(), f"wrote {args.export}: {count} questions, {a} and {b} at seed {args.seed}")
