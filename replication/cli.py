"""The door: `replicate VERB`. Each verb parses its own arguments and imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from replication import __version__
from replication.errors import UserError, is_lost_peer

if TYPE_CHECKING:
    from replication.config import RunConfig, SuiteConfig
    from replication.grid.plan import Cell
    from replication.rundir import SuiteDir

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviations: --seed is not --seeds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 2 with one line for a user's mistake, 130 after Ctrl-C, 1 otherwise."""
    args = list(sys.argv[1:] if argv is None else argv)
    launched = "RANK" in os.environ  # by a launcher, which speaks for all ranks; strategies set it later as well
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal ends a run as Ctrl-C does, its cells included
        signal.signal(getattr(signal, name), _interrupt)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        return _verb(args)
    except UserError as error:
        if debug:
            traceback.print_exc()
        errors.print(f"[red]error:[/red] {_escape(str(error))}")
        return 2
    except KeyboardInterrupt:
        if launched:
            return INTERRUPTED
        errors.print("interrupted; the same command goes on where this one stopped")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `replicate ... | head` is no error
        return 0
    except RuntimeError as error:
        if debug or not is_lost_peer(error):
            raise
        errors.print(f"rank {os.environ.get('RANK', '0')}: stopped, because another rank of the run did")
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        if debug:
            traceback.print_exc()
        errors.print(f"[red]error:[/red] {_escape(str(error.filename))}: {error.strerror}; choose another path")
        return 2


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _verb(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        print(f"replicate {__version__}")
        return 0
    if args[0] not in VERBS:
        raise UserError(f"replicate: no verb '{args[0]}'; the verbs are {', '.join(VERBS)}")
    return VERBS[args[0]](args[1:])


def _overview() -> str:
    lines = [
        "usage: replicate VERB [options]      (replicate VERB --help says more; --debug shows tracebacks)",
        "",
    ]
    lines += [f"  {name:<9} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------- verbs


def prepare(argv: list[str]) -> int:
    """Read the sources, train or load the tokenizer, write token blocks; or show a global batch."""
    from replication.config import load_run

    parser = Parser(prog="replicate prepare", description=prepare.__doc__)
    parser.add_argument(
        "--config", action="append", default=[], help="config file; repeat it (default: data/python.yaml)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the prepared corpus")
    parser.add_argument(
        "--show-batch", type=int, metavar="K", help="print the global batch of step K (from 0), decoded"
    )
    parser.add_argument("--full", action="store_true", help="with --show-batch: whole sequences")
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.config or ["data/python.yaml"], flags)
    console = Console()
    from replication.data.prepare import prepare as prepare_corpus
    from replication.data.show import show_batch

    if args.show_batch is not None:
        show_batch(config, args.out, args.show_batch, console, full=args.full)
    else:
        prepare_corpus(config.data, args.out, console)
    return 0


def train(argv: list[str]) -> int:
    """Train one cell (one arm at one seed), generate its completions, mark it complete."""
    from replication.config import load_run, run_parser, to_yaml

    if not argv or any(a in ("-h", "--help") for a in argv):
        keys = run_parser()
        keys.add_argument("--out", type=Path, help="output folder; the cell is OUT/runs/<arm>/seed-<n>")
        keys.print_help()
        return 0
    parser = Parser(prog="replicate train", add_help=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--print_config", action="store_true")
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.config, flags)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.out is None:
        raise UserError("replicate train: --out is missing; name the output folder, such as --out out/my_suite")
    if config.world_size > 1 and "RANK" not in os.environ:
        return _start_ranks(config, argv)
    from replication.cell import run_cell
    from replication.rundir import SuiteDir

    run_cell(config, SuiteDir(args.out), Console())
    return 0


def _start_ranks(config: RunConfig, argv: list[str]) -> int:
    """Start this verb once for each process of the run, and wait.

    Raises:
        UserError: the run spans nodes, where each node must start its own launcher.
    """
    from replication.launcher import run_ranks

    if config.cluster.nodes > 1:
        raise UserError(
            f"cluster.nodes: {config.cluster.nodes} nodes need one launcher each: on every node run "
            f"torchrun --nnodes={config.cluster.nodes} --nproc-per-node={config.cluster.devices} "
            "--rdzv-backend=c10d --rdzv-id=RUN --rdzv-endpoint=FIRST_NODE:PORT -m replication train ..."
        )
    return run_ranks([sys.executable, "-m", "replication", "train", *argv], config.world_size)


def grid(argv: list[str]) -> int:
    """Plan, run or show a suite: arms x seeds."""
    parser = Parser(prog="replicate grid", description=grid.__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="plan|run|status|diff", parser_class=Parser)
    for name, text in (("plan", "list the cells"), ("run", "run what is not complete, then report"),
                       ("status", "show every cell"), ("diff", "show in which keys two arms differ")):  # fmt: skip
        sub = actions.add_parser(name, help=text, description=f"{text}. Any key of a run may follow as a flag.")
        sub.add_argument("suite", help="suite file, or a name in configs/suites")
        if name == "diff":
            sub.add_argument("arms", nargs=2, metavar="ARM", help="names of two arms")
        else:
            sub.add_argument("--out", type=Path, help="output folder (default: out/<suite>)")
            sub.add_argument("--seeds", help="comma-separated seeds instead of the suite's")
        if name == "run":
            sub.add_argument("--jobs", type=int, default=1, help="cells side by side (default 1)")
    args, flags = parser.parse_known_args(argv)
    action: Callable[[argparse.Namespace, list[str]], int] = {
        "plan": _grid_plan, "run": _grid_run, "status": _grid_status, "diff": _grid_diff
    }[args.action]  # fmt: skip
    return action(args, flags)


def generate(argv: list[str]) -> int:
    """Sample completions of trained cells again, for example with other prompts."""
    parser = Parser(prog="replicate generate", description=generate.__doc__)
    parser.add_argument("out", type=Path, help="output folder of a suite")
    parser.add_argument("--arm", help="only this arm")
    parser.add_argument("--seed", type=int, help="only this seed")
    args, flags = parser.parse_known_args(argv)
    from replication.cell import data_folder
    from replication.config import load_run
    from replication.rundir import RunDir, SuiteDir

    suite_dir = SuiteDir(args.out)
    pattern = f"{args.arm or '*'}/seed-{'*' if args.seed is None else args.seed}/config.yaml"
    found = sorted(suite_dir.runs.glob(pattern))
    if not found:
        raise UserError(f"{suite_dir.runs}: no cell matches {pattern}; train first")
    for flag in flags:
        if not flag.startswith(("--generation.", "--cluster.")) and flag.startswith("--"):
            raise UserError(f"replicate generate: {flag} does not act on generation; use --generation.* or --cluster.*")
    from replication.data.store import TokenStore
    from replication.preference.generate import generate as generate_cell

    for path in found:
        config = load_run([path], flags)
        run = RunDir(path.parent)
        if config.generation.prompts is None:
            raise UserError(f"{path}: key generation.prompts is empty; name a prompt file")
        with run.lock():
            generate_cell(config, run, TokenStore.open(data_folder(config, suite_dir)), Console())
    return 0


def report(argv: list[str]) -> int:
    """Write report.html, report.md, results.json and figures from the run folders."""
    parser = Parser(prog="replicate report", description=report.__doc__)
    parser.add_argument("out", type=Path, help="output folder of a suite")
    args = parser.parse_args(argv)
    from replication.config import load_suite
    from replication.rundir import SuiteDir

    suite_dir = SuiteDir(args.out)
    if not suite_dir.suite.is_file():
        raise UserError(f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`")
    _write_report(suite_dir, load_suite(suite_dir.suite))
    return 0


def drill(argv: list[str]) -> int:
    """Kill a run at random points, resume it, and compare its end with an undisturbed run."""
    from replication.config import load_run

    parser = Parser(prog="replicate drill", description=f"{drill.__doc__} Any key of a run may follow as a flag.")
    parser.add_argument("--config", action="append", default=[], help="config file; repeat it, later files win")
    parser.add_argument("--out", required=True, type=Path, help="folder of the drill's runs and of drill.json")
    parser.add_argument("--strategies", help="comma-separated values of cluster.strategy (default: the config's)")
    parser.add_argument("--kills", type=int, default=12, help="in all, shared among the strategies (default 12)")
    parser.add_argument("--seed-of-kills", type=int, default=0, help="chooses the moments (default 0)")
    args, flags = parser.parse_known_args(argv)
    if args.kills < 1:
        raise UserError(f"--kills: {args.kills} must be at least 1")
    config = load_run(args.config, flags)
    strategies = args.strategies.split(",") if args.strategies else [config.cluster.strategy]
    known = ("single", "ddp", "zero1", "zero2", "zero3")
    for strategy in strategies:
        if strategy not in known:
            raise UserError(f"--strategies: no strategy '{strategy}'; the strategies are {', '.join(known)}")
    from dataclasses import replace

    from replication.drill import drill as run_drill

    console = Console()
    if config.data.dir is None:
        from replication.data.prepare import prepare as prepare_corpus

        prepare_corpus(config.data, args.out / "data", console)
        config = replace(config, data=replace(config.data, dir=str((args.out / "data").resolve())))
    results = run_drill(config, strategies, args.out, args.kills, args.seed_of_kills, console)
    console.print(f"every kill:   {args.out / 'drill.json'}", soft_wrap=True)
    return 0 if all(result.holds for result in results) else 1


def bench(argv: list[str]) -> int:
    """Measure speed as ratios in one run: a step of the product beside a plain torch loop."""
    parser = Parser(prog="replicate bench", description=bench.__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="step", parser_class=Parser)
    text = "a step beside the same step in a plain torch loop"
    sub = actions.add_parser("step", help=text, description=f"Time {text}. Any key of a run may follow as a flag.")
    sub.add_argument("--config", action="append", default=[], help="config file (default: model/tiny, cluster/cpu)")
    sub.add_argument("--blocks", type=int, default=24, help="paired blocks (default 24)")
    sub.add_argument("--block-steps", type=int, default=10, help="optimizer steps in a block (default 10)")
    sub.add_argument("--out", type=Path, help="JSON file of every block's seconds")
    args, flags = parser.parse_known_args(argv)
    for name in ("blocks", "block_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} must be at least 1")
    from replication.bench.step import bench_step, configure, step_table
    from replication.config import load_run
    from replication.rundir import write_json

    config = configure(load_run(args.config or ["model/tiny.yaml", "cluster/cpu.yaml"], flags), args.blocks,
                       args.block_steps)  # fmt: skip
    console = Console()
    result = bench_step(config, args.block_steps, console)
    console.print(step_table(result, config))
    if args.out:
        write_json(args.out, result.to_dict())
        console.print(f"every block:  {args.out}", soft_wrap=True)
    return 0


def doctor(argv: list[str]) -> int:
    """Say what this machine has, and what each config would need."""
    parser = Parser(prog="replicate doctor", description=doctor.__doc__)
    parser.parse_args(argv)
    from replication.config import config_root
    from replication.doctor import doctor as examine

    return examine(Console(), config_root())


VERBS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare,
    "train": train,
    "grid": grid,
    "generate": generate,
    "report": report,
    "drill": drill,
    "bench": bench,
    "doctor": doctor,
}


# ---------------------------------------------------------------- grid's actions


def _suite_cells(
    args: argparse.Namespace, flags: list[str], from_folder: bool = False
) -> tuple[SuiteConfig, SuiteDir, list[Cell]]:
    """The suite (with --seeds), its output folder and its cells.

    With from_folder, a suite that the folder holds wins over the file: its seeds, and each cell's own config.
    """
    from dataclasses import replace

    from replication.config import load_suite
    from replication.grid.plan import plan
    from replication.rundir import SuiteDir

    suite = load_suite(args.suite)
    if args.seeds:
        try:
            suite = replace(suite, seeds=tuple(int(s) for s in args.seeds.split(",")))
        except ValueError:
            raise UserError(f"--seeds: '{args.seeds}' is not a list of whole numbers such as 1,2,3") from None
        if len(set(suite.seeds)) != len(suite.seeds):
            raise UserError(f"--seeds: '{args.seeds}' names a seed twice; name each once")
    suite_dir = SuiteDir(args.out or Path("out") / suite.name)
    if from_folder and suite_dir.suite.is_file():
        stored = load_suite(suite_dir.suite)
        suite = stored if not args.seeds else replace(stored, seeds=suite.seeds)
    return suite, suite_dir, plan(suite, suite_dir, flags, from_folder)


def _grid_plan(args: argparse.Namespace, flags: list[str]) -> int:
    from rich.table import Table

    suite, _, cells = _suite_cells(args, flags)
    table = Table("cell", "config hash", "steps", "tokens", "folder", title=f"{suite.name}: {len(cells)} cells")
    for cell in cells:
        t = cell.config.training
        table.add_row(cell.name, cell.hash, str(t.steps), f"{t.steps * t.batch_tokens:,}", str(cell.run.root))
    Console().print(table)
    return 0


def _grid_run(args: argparse.Namespace, flags: list[str]) -> int:
    from replication.cell import check_before_training, data_folder
    from replication.grid.local import run_cells
    from replication.grid.plan import claim_folder
    from replication.grid.status import cell_status, status_table

    if args.jobs < 1:
        raise UserError(f"--jobs: {args.jobs} must be at least 1")
    suite, suite_dir, cells = _suite_cells(args, flags)
    console = Console()
    claim_folder(suite, suite_dir, cells)
    waiting = [c for c in cells if not c.run.complete.is_file()]
    if waiting and waiting[0].config.data.dir is None:
        from replication.data.prepare import prepare as prepare_corpus

        prepare_corpus(waiting[0].config.data, suite_dir.data, console)
    if waiting:
        from replication.data.store import TokenStore

        store = TokenStore.open(data_folder(waiting[0].config, suite_dir))
        for cell in waiting:
            check_before_training(cell.config, store)
    outcome = run_cells(cells, suite_dir, args.jobs, console)
    console.print(status_table([cell_status(c) for c in cells], suite.name))
    if outcome.complete or outcome.failed or not _report_is_current(suite_dir, cells):
        from replication.config import load_suite

        _write_report(suite_dir, load_suite(suite_dir.suite))
    else:
        console.print("every cell was complete and the report is up to date: nothing to do")
    console.print(f"report:       {suite_dir.report_html}", soft_wrap=True)
    command = shlex.join([_here("tensorboard"), "--logdir", str(suite_dir.tensorboard)])
    console.print(f"curves:       {command}", soft_wrap=True)
    if outcome.failed:
        names = ", ".join(c.name for c in outcome.failed)
        raise UserError(
            f"{len(outcome.failed)} of {len(cells)} cells failed ({names}); see the table; run again to retry"
        )
    return 0


def _grid_status(args: argparse.Namespace, flags: list[str]) -> int:
    from replication.grid.status import cell_status, status_table

    suite, suite_dir, cells = _suite_cells(args, flags, from_folder=True)
    Console().print(status_table([cell_status(c) for c in cells], f"{suite.name} in {suite_dir.root}"))
    return 0


def _grid_diff(args: argparse.Namespace, flags: list[str]) -> int:
    from rich.table import Table

    from replication.config import differences, load_cell, load_suite, scientific

    suite = load_suite(args.suite)
    a, b = (scientific(load_cell(suite, arm, suite.seeds[0], flags)) for arm in args.arms)
    table = Table("key", *args.arms)
    for key, (left, right) in differences(a, b).items():
        table.add_row(key, str(left), str(right))
    Console().print(table)
    return 0


def _write_report(suite_dir: SuiteDir, suite: SuiteConfig) -> None:
    from replication.analysis.report import write_report

    path = write_report(suite_dir, suite)
    Console().print(f"wrote {path}", soft_wrap=True)


def _report_is_current(suite_dir: SuiteDir, cells: Sequence[Cell]) -> bool:
    outputs = (suite_dir.results, suite_dir.report_html, suite_dir.report_md)
    if not all(p.is_file() for p in outputs):
        return False
    oldest = min(p.stat().st_mtime for p in outputs)
    return all(c.run.complete.stat().st_mtime <= oldest for c in cells if c.run.complete.is_file())


def _here(command: str) -> str:
    """A command of this Python's own environment, by its path where it is not on PATH."""
    import shutil

    beside = Path(sys.executable).with_name(command)
    return command if shutil.which(command) or not beside.exists() else str(beside)
