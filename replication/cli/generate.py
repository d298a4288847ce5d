"""`replicate generate SUITE`: completions of a suite's trained cells, in this process or dealt out to several."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from replication.cli.arguments import COUNT, Parser, whole
from replication.config import load_run, load_suite
from replication.errors import UserError
from replication.generation.export import write_export
from replication.generation.parts import Samples, Share
from replication.generation.workers import Display, run_workers
from replication.grid.cell import data_folder, mark_cell_complete
from replication.processes.preemption import listen
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import is_trained

if TYPE_CHECKING:
    from replication.data.store import TokenStore

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
    suite_dir = _folder(args.suite, args.out)
    if args.export:
        return _export(args, flags, suite_dir)
    if args.share:
        return _share(args, flags, suite_dir)
    console = Console()
    trained, untrained = _cells(suite_dir, args.arm, args.seed)
    todo, n_there = _todo(trained, flags, args.again, suite_dir, console)
    failed = _sample(todo, suite_dir, args.jobs, flags, console) if todo else {}
    for name, why in failed.items():
        console.print(f"[red]failed[/red] {name}: {escape(why)}", soft_wrap=True, highlight=False)
    if untrained:
        console.print(f"[yellow]not trained:[/yellow] {', '.join(untrained)}", soft_wrap=True, highlight=False)
    made = len(todo) - len(failed)
    console.print(f"{made} of {len(trained) + len(untrained)} cells sampled, {n_there} there already", highlight=False)
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
    parser.add_argument("--share", type=Share.parse, help=argparse.SUPPRESS)  # what a worker is started with
    args, flags = parser.parse_known_args(argv)
    for flag in flags:
        if not flag.startswith(("--generation.", "--cluster.")) and flag.startswith("--"):
            raise UserError(f"replicate generate: {flag} does not act on generation; use --generation.* or --cluster.*")
    if args.pair and not args.export:
        raise UserError("--pair: chooses the arms of --export; for one arm's completions use --arm")
    return args, flags


# ---------------------------------------------------------------- which cells


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


def _cells(suite_dir: SuiteDir, arm: str | None, seed: int | None) -> tuple[list[RunDir], list[str]]:
    """The folders of trained cells, and the names of those that are not, in the suite's order, seed by seed.

    Raises:
        UserError: nothing is trained.
    """
    begun = [(seed, arm) for arm, seed, run in suite_dir.cells() if run.config.is_file()]
    places = [(arm, f"seed-{seed}") for seed, arm in sorted(begun)]
    if suite_dir.suite.is_file():
        suite = load_suite(suite_dir.suite)
        places = [(a, f"seed-{s}") for s in suite.seeds for a in suite.arms] + places
    wanted = [(a, s) for a, s in dict.fromkeys(places) if arm in (None, a) and (seed is None or s == f"seed-{seed}")]
    runs = {f"{a}/{s}": RunDir(suite_dir.runs / a / s) for a, s in wanted}
    trained = [run for run in runs.values() if run.config.is_file() and is_trained(run)]
    if not trained:
        which = f"{arm or '*'}/seed-{'*' if seed is None else seed}"
        raise UserError(f"{suite_dir.runs}: no trained cell matches {which}; train first, with `replicate grid run`")
    return trained, [name for name, run in runs.items() if run not in trained]


def _todo(
    trained: Sequence[RunDir], flags: Sequence[str], again: bool, suite_dir: SuiteDir, console: Console
) -> tuple[list[Samples], int]:
    """Cells to sample, and how many need nothing."""
    todo, n_there = [], 0
    for run in trained:
        config = load_run([run.config], flags)
        if suite_dir.cell(config.arm, config.seed) != run:  # its completions would go into that one's folder
            console.print(f"[yellow]{run.root}: holds {config.arm}/seed-{config.seed}, a copy; passed over[/yellow]")
            continue
        samples = Samples.of(config, run)
        if again or not samples.are_there():
            data_folder(samples.config, suite_dir)
            todo.append(samples)
            continue
        n_there += 1
        console.print(f"{samples.name}: {len(samples.rows)} completions, there already", highlight=False)
        if not run.complete.is_file():
            with suppress(UserError), run.lock():  # a process that runs it will do so itself
                _settle(samples)
    return todo, n_there


def _settle(samples: Samples) -> None:
    """Mark a trained cell complete, if these are the completions that its own config asks for."""
    own = load_run([samples.run.config])
    if own.generation.prompts and Samples.of(own, samples.run).record == samples.record:
        if not samples.run.complete.is_file():
            mark_cell_complete(own, samples.run)
        samples.run.failed.unlink(missing_ok=True)


# ---------------------------------------------------------------- sampling


def _sample(
    todo: Sequence[Samples], suite_dir: SuiteDir, jobs: int | None, flags: Sequence[str], console: Console
) -> dict[str, str]:
    """Sample cells; why those that failed did, by name."""
    slots = _slots(todo[0], jobs)
    listen(todo[0].config.cluster.stop_signal)
    display = Display(console, sum(len(s.rows) for s in todo), sum(len(s.parts()) for s in todo))

    def finish(samples: Samples) -> None:
        count = samples.finish()
        _settle(samples)
        console.print(f"{samples.name}: {count} completions of {len(samples.prompts)} prompts", highlight=False)

    def command(samples: Samples, share: Share) -> list[str]:
        of_cell = ["--arm", samples.config.arm, f"--seed={samples.config.seed}", f"--share={share.i}/{share.n}"]
        return [sys.executable, "-P", "-m", "replication", "generate", str(suite_dir.root), *of_cell, *flags]

    with display.shown():
        if len(slots) > 1:
            return run_workers(todo, slots, command, display, finish)
        failed = {}
        for samples in todo:
            try:
                with samples.run.lock():
                    samples.begin()
                    _sample_here(samples, Share(), suite_dir, display)
                    finish(samples)
            except UserError as error:
                if len(todo) == 1:
                    raise
                failed[samples.name] = str(error)
        return failed


def _sample_here(samples: Samples, share: Share, suite_dir: SuiteDir, display: Display | None = None) -> None:
    from replication.generation.generate import sample_share

    on_step = display.steps_of(samples.config.generation.max_new_tokens) if display else None
    sample_share(samples, share, _store(samples, suite_dir), on_step)


def _store(samples: Samples, suite_dir: SuiteDir) -> TokenStore:
    from replication.data.store import TokenStore

    return TokenStore.open(data_folder(samples.config, suite_dir))


def _slots(samples: Samples, jobs: int | None) -> list[dict[str, str]]:
    """Environment of each process: a GPU of its own, or a share of the cores.

    Raises:
        UserError: more jobs than GPUs.
    """
    cluster = samples.config.cluster
    devices = [] if cluster.accelerator == "cpu" else _gpus()
    if devices:
        if jobs is not None and jobs > len(devices):
            raise UserError(
                f"--jobs: {jobs} processes on {len(devices)} GPU(s); at most one each, and generation.rows_at_once "
                "fills a GPU better"
            )
        return [{"CUDA_VISIBLE_DEVICES": device} for device in devices[:jobs]]
    jobs = jobs or 1
    threads = cluster.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // jobs)
    return [{"OMP_NUM_THREADS": str(threads)}] * jobs


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    named = [d.strip() for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    count = torch.cuda.device_count()
    return named[:count] or [str(i) for i in range(count)]


def _share(args: argparse.Namespace, flags: Sequence[str], suite_dir: SuiteDir) -> int:
    """What a worker does: one share of one cell, which the process that started it holds the lock of."""
    run = suite_dir.cell(args.arm, args.seed)
    samples = Samples.of(load_run([run.config], flags), run)
    listen(samples.config.cluster.stop_signal)
    _sample_here(samples, args.share, suite_dir)
    return 0


# ---------------------------------------------------------------- export


def _export(args: argparse.Namespace, flags: Sequence[str], suite_dir: SuiteDir) -> int:
    if args.seed is None:
        raise UserError("--export: needs --seed; the file holds two arms at one seed")
    if args.arm or args.jobs or args.again or flags:
        raise UserError("--export: writes what is there; --arm, --jobs, --again and keys do not act on it, --pair does")
    arms = _pair(args.pair, suite_dir)
    config = suite_dir.cell(arms[0], args.seed).config
    prompts = load_run([config]).generation.prompts if config.is_file() else None
    count = write_export(args.export, suite_dir, args.seed, arms, prompts)
    Console().print(f"wrote {args.export}: {count} questions, {arms[0]} and {arms[1]} at seed {args.seed}",
                    soft_wrap=True, highlight=False)  # fmt: skip
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
