"""`replicate grid ACTION`: plan, run, submit, status, retry, cancel, diff."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, Parser, table_console
from replication.config import SuiteConfig, differences, find_cluster, find_config, load_cell, load_suite, scientific
from replication.config.reading import Layer, Plain, check_layer
from replication.console import say, table
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.cells import claim_folder, places
from replication.grid.ready import Grid, load_grid, make_ready, tell_before
from replication.grid.site import default_site
from replication.grid.status import print_status, statuses
from replication.grid.submissions import jobs_of_cells, note_cancelled, queue_of, submissions
from replication.runs.layout import SuiteDir, name_cells

TEXTS = {
    "plan": "list the cells",
    "run": "run here what is not complete, then report",
    "submit": "submit to SLURM what is neither queued, running, complete nor failed, then completions and the report",
    "status": "show every cell, with its job where there is a scheduler",
    "retry": "submit failed, preempted, interrupted and cancelled cells again, as their folders describe them",
    "cancel": "take the suite's jobs out of the queue",
    "diff": "show in which keys two arms differ",
}
OF_A_FOLDER = ("status", "retry", "cancel")


def grid(argv: list[str]) -> int:
    """The verb: parse, then act."""
    parser = Parser(prog="replicate grid", description="Plan, run, submit or show a suite: arms x seeds.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(TEXTS), parser_class=Parser)
    for name, text in TEXTS.items():
        keys = {"retry": " --cluster.* and --checkpoints.* keys may follow.", "status": "", "cancel": ""}
        description = f"{text}.{keys.get(name, ' Any key of a run may follow as a flag.')}"
        sub = actions.add_parser(name, help=text, description=description)
        if name in OF_A_FOLDER:
            sub.add_argument("suite", metavar="OUT", help="output folder of the suite")
            sub.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # earlier: SUITE --out OUT
        else:
            sub.add_argument("suite", help="suite file, or a name in configs/suites")
        if name == "diff":
            sub.add_argument("arms", nargs=2, metavar="ARM", help="names of two arms")
            continue
        if name not in OF_A_FOLDER:
            sub.add_argument("--out", type=Path, help="output folder (default: out/<suite>)")
        sub.add_argument("--seeds", help="comma-separated seeds instead of the suite's")
        if name in ("plan", "run", "submit", "retry"):
            sub.add_argument("--cluster", help="file that says where cells run, or its name in configs/cluster")
        if name == "run":
            sub.add_argument("--jobs", type=COUNT, default=1, help="cells side by side (default 1)")
        if name in ("submit", "retry"):
            sub.add_argument("--site", type=Path, help="site file (default: launch/site.env, where it exists)")
            sub.add_argument("--dry-run", action="store_true", help="print every script and command, submit nothing")
    args, flags = parser.parse_known_args(argv)
    if flags and args.action in ("status", "cancel"):
        raise UserError(
            f"replicate grid {args.action}: {flags[0]} does not act here; the cells are what their folders say"
        )
    action: Callable[[argparse.Namespace, list[str]], int] = {
        "plan": _plan, "run": _run, "submit": _submit, "status": _status, "retry": _retry, "cancel": _cancel,
        "diff": _diff,
    }[args.action]  # fmt: skip
    return action(args, flags)


# ---------------------------------------------------------------- what is meant


def named_suite(args: argparse.Namespace) -> tuple[SuiteConfig, SuiteDir]:
    """The suite that args.suite names, with --seeds, and its output folder by --out."""
    inside = next((f for f in (Path(args.suite), Path("out", args.suite)) if SuiteDir(f).suite.is_file()), None)
    if inside is not None and not _is_suite(args.suite):
        raise UserError(f"{args.suite}: is an output folder, and a suite's file or name goes here, with --out {inside}")
    suite = load_suite(args.suite)
    return with_seeds(suite, args.seeds), SuiteDir(args.out or Path("out", suite.name))


def suite_of_folder(args: argparse.Namespace) -> tuple[SuiteConfig, SuiteDir]:
    """The suite that an output folder holds, with --seeds; a suite and --out in its place are read with a hint."""
    out, name = args.out, args.suite
    if out is None and not SuiteDir(Path(name)).root.is_dir():
        out = Path("out", load_suite(name).name if _is_suite(name) else name)
    if out is not None:
        hint = f"the output folder alone stands here now: `replicate grid {args.action} {out}`"
        print(f"{hint}; the old form goes soon", file=sys.stderr)
    suite_dir = SuiteDir(out or Path(name))
    if not suite_dir.root.is_dir():
        raise UserError(f"{suite_dir.root}: no such folder; give the --out of `replicate grid run` or `submit`")
    if not suite_dir.suite.is_file():
        raise UserError(f"{suite_dir.suite}: no such file; run or submit the suite first")
    return with_seeds(load_suite(suite_dir.suite), args.seeds), suite_dir


def with_seeds(suite: SuiteConfig, seeds: str | None) -> SuiteConfig:
    """The suite with the seeds of --seeds in place of its own."""
    if seeds is None:
        return suite
    given = Layer({"seeds": [Plain(part.strip()) for part in seeds.split(",")]}, "")
    suite = replace(suite, seeds=check_layer(SuiteConfig, given)["seeds"])
    if len(set(suite.seeds)) != len(suite.seeds):
        raise UserError(f"--seeds: '{seeds}' names a seed twice; name each once")
    return suite


def _is_suite(name: str) -> bool:
    try:
        return find_config(name, "suites").is_file()
    except UserError:
        return False


def _load(args: argparse.Namespace, flags: list[str]) -> Grid:
    return load_grid(*named_suite(args), flags, find_cluster(args.cluster) if args.cluster else None)


# ---------------------------------------------------------------- looking


def _plan(args: argparse.Namespace, flags: list[str]) -> int:
    grid = _load(args, flags)
    rows = []
    for cell in grid.cells:
        t = cell.config.training
        rows.append((cell.name, cell.hash, t.steps, f"{t.steps * t.batch_tokens:,}", cell.run.root))
    columns = ("cell", "config hash", "steps", "tokens", "folder")
    table_console().print(table(f"{grid.suite.name}: {len(grid.cells)} cells", columns, rows))
    return 0


def _status(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir = suite_of_folder(args)
    console = table_console()
    queue = queue_of(suite_dir, console) if suite_dir.launch.is_dir() else None
    earlier = [] if queue is None else submissions(suite_dir)
    rows = statuses(suite.diverged, places(suite, suite_dir), earlier, queue or [])
    print_status(rows, f"{suite.name} in {suite_dir.root}", console)
    return 0


def _diff(args: argparse.Namespace, flags: list[str]) -> int:
    suite = load_suite(args.suite)
    a, b = (scientific(load_cell(suite, arm, suite.seeds[0], flags)) for arm in args.arms)
    rows = ((key, left, right) for key, (left, right) in differences(a, b).items())
    table_console().print(table(f"{suite.name}: keys that may change a weight or a number", ("key", *args.arms), rows))
    return 0


# ---------------------------------------------------------------- running here


def _run(args: argparse.Namespace, flags: list[str]) -> int:
    from replication.grid.local import report_is_current, run_cells

    grid, console = _load(args, flags), Console()
    begun = claim_folder(grid.suite, grid.dir, grid.cells)
    tell_before(grid, begun, console)
    make_ready(grid, grid.incomplete, begun, console)
    outcome = run_cells(grid.cells, grid.dir, args.jobs, console)
    print_status(statuses(grid.suite.diverged, grid.cells), grid.suite.name, console)
    if outcome.complete or outcome.failed or not report_is_current(grid.dir):
        from replication.report.report import write_report

        say(console, f"wrote {write_report(grid.dir, load_suite(grid.dir.suite))}")
    elif not outcome.elsewhere:
        say(console, "every cell was complete and the report is up to date: nothing to do")
    say(console, f"report:       {grid.dir.report_html}")
    say(console, f"curves:       {shlex.join([_here('replicate'), 'tensorboard', str(grid.dir.root)])}")
    for what, ended, remedy in (
        ("failed", outcome.failed, "see the table; run again to retry"),
        ("were told to stop", outcome.stopped, "see the table; run again to retry"),
        ("are run by another process", outcome.elsewhere, "run again when it has ended"),
    ):
        if ended:
            names = name_cells([c.name for c in ended])
            raise UserError(f"{len(ended)} of {len(grid.cells)} cells {what} ({names}); {remedy}")
    return 0


def _here(command: str) -> str:
    """A command of this Python's own environment, by its path where it is not on PATH."""
    own = Path(sys.executable).with_name(command)
    return command if shutil.which(command) or not own.exists() else str(own)


# ---------------------------------------------------------------- running on a cluster


def _submit(args: argparse.Namespace, flags: list[str]) -> int:
    from replication.grid.submit import submit_cells

    submit_cells(_load(args, flags), default_site(args.site), Console(), args.dry_run)
    return 0


def _retry(args: argparse.Namespace, flags: list[str]) -> int:
    from replication.grid.submit import submit_cells

    suite, suite_dir = suite_of_folder(args)
    for flag in flags:
        if flag.startswith("--") and not flag.startswith(("--cluster.", "--checkpoints.")):
            raise UserError(
                f"replicate grid retry: {flag} does not act here; the cells are what their folders say, only "
                "--cluster.* and --checkpoints.* may change"
            )
    grid = load_grid(suite, suite_dir, flags, find_cluster(args.cluster) if args.cluster else None, from_folder=True)
    submit_cells(grid, default_site(args.site), Console(), args.dry_run, again=True)
    return 0


def _cancel(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir = suite_of_folder(args)
    console = Console()
    queue = queue_of(suite_dir, console, needed=True) or []
    chosen = {p.folder for p in places(suite, suite_dir)}
    jobs = jobs_of_cells(submissions(suite_dir), queue)
    jobs = {cell: stages for cell, stages in jobs.items() if cell in chosen}
    if args.seeds:
        queue = [q for stages in jobs.values() for q in stages.values()]  # else all of it, the report included
    if not queue:
        say(console, "nothing of this suite is in the queue")
        return 0
    others = sorted({q.user for q in queue} - {"", slurm.user_name()})
    if others and os.geteuid():
        raise UserError(
            f"{suite_dir.root}: jobs of {', '.join(others)} are among them, which you cannot cancel; ask there for "
            "`replicate grid cancel`"
        )
    # first the notes: a job that is told to end reads there that it is not to go on later
    note_cancelled(suite_dir, list(jobs))
    slurm.cancel([q.id for q in queue])
    say(console, f"cancelled {len(queue)} job(s) or elements; `replicate grid retry` goes on")
    return 0
