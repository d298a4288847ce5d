"""`replicate generate SUITE`: completions of a suite's trained cells, or two arms' of them for judging elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, Parser, whole
from replication.config import load_run, load_suite
from replication.console import say
from replication.errors import UserError
from replication.generation.export import write_export
from replication.generation.samples import Shard
from replication.generation.suite import cells_to_sample, sample_as_worker, sample_cells, trained_cells
from replication.runs.layout import SuiteDir

DESCRIPTION = (
    "Sample completions of every trained cell, as its config or --generation.* keys say; what is there already is left "
    "alone, and an interrupted command goes on where it stopped. With --export, write those of two arms at one seed to "
    "the file of the published A/B tool instead."
)


def generate(argv: list[str]) -> int:
    """The verb.

    Returns:
        0; 1 where cells failed or are not trained.
    """
    args, flags = _parse(argv)
    suite_dir, console = _folder(args.suite, args.out), Console()
    if args.export:
        return _export(args, flags, suite_dir, console)
    if args.shard:
        sample_as_worker(suite_dir.cell(args.arm, args.seed), args.shard, suite_dir, flags)
        return 0
    trained, untrained = trained_cells(suite_dir, args.arm, args.seed)
    todo, n_there = cells_to_sample(trained, flags, args.again, suite_dir, console)
    failed = sample_cells(todo, suite_dir, args.jobs, flags, console)
    for name, why in failed.items():
        say(console, ("failed", "red"), f" {name}: {why}")
    if untrained:
        say(console, ("not trained:", "yellow"), f" {', '.join(untrained)}")
    made, n_cells = len(todo) - len(failed), len(trained) + len(untrained)
    say(console, f"{made} of {n_cells} cells sampled, {n_there} there already")
    return 1 if failed or untrained else 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog="replicate generate", description=DESCRIPTION)
    parser.add_argument("suite", help="output folder of a suite, or the suite: its file or its name in configs/suites")
    parser.add_argument("--out", type=Path, help="output folder, where a suite is named (default: out/<suite>)")
    parser.add_argument("--arm", help="only this arm")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), help="only this seed")
    parser.add_argument("--jobs", type=COUNT, help="processes side by side (default: one a GPU, one on a CPU)")
    parser.add_argument("--again", action="store_true", help="sample anew what is there already")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write two arms' completions at --seed, and no more"
    )
    parser.add_argument("--pair", metavar="A,B", help="with --export: the arms (default: the suite's two)")
    parser.add_argument("--shard", type=Shard.parse, help=argparse.SUPPRESS)  # what a worker is started with
    args, flags = parser.parse_known_args(argv)
    for flag in flags:
        if not flag.startswith(("--generation.", "--cluster.")) and flag.startswith("--"):
            raise UserError(f"replicate generate: {flag} does not act on generation; use --generation.* or --cluster.*")
    if args.pair and not args.export:
        raise UserError("--pair: chooses the arms of --export; for one arm's completions use --arm")
    return args, flags


def _folder(named: str, out: Path | None) -> SuiteDir:
    """The output folder that is meant."""
    if Path(named).is_dir():
        if out is not None:
            raise UserError(f"--out: {named} is an output folder already; give one of them")
        return SuiteDir(Path(named))
    try:
        suite = load_suite(named)
    except UserError as error:
        raise UserError(f"{named}: neither a folder nor a suite ({error})") from None
    return SuiteDir(out or Path("out") / suite.name)


# ---------------------------------------------------------------- export


def _export(args: argparse.Namespace, flags: list[str], suite_dir: SuiteDir, console: Console) -> int:
    if args.seed is None:
        raise UserError("--export: needs --seed; the file holds two arms at one seed")
    if args.arm or args.jobs or args.again or flags:
        raise UserError("--export: writes what is there; --arm, --jobs, --again and keys do not act on it, --pair does")
    arms = _pair(args.pair, suite_dir)
    config = suite_dir.cell(arms[0], args.seed).config
    prompts = load_run([config]).generation.prompts if config.is_file() else None
    count = write_export(args.export, suite_dir, args.seed, arms, prompts)
    say(console, f"wrote {args.export}: {count} questions, {arms[0]} and {arms[1]} at seed {args.seed}")
    return 0


def _pair(named: str | None, suite_dir: SuiteDir) -> tuple[str, str]:
    if named is None:
        if not suite_dir.suite.is_file():
            raise UserError(f"--pair: {suite_dir.root} has no suite.yaml that names two arms; give --pair A,B")
        suite = load_suite(suite_dir.suite)
        resolved = suite.analysis.resolved(suite.arms)
        if resolved.treatment is None:
            raise UserError(f"--pair: the suite {suite.name} has one arm, and the file holds two")
        return str(resolved.baseline), resolved.treatment
    a, comma, b = named.partition(",")
    if not comma or not a or not b or "," in b or a == b:
        raise UserError(f"--pair: '{named}' must be two arms, such as baseline,both")
    return a, b
