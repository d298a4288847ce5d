"""`replicate grid ACTION`: plan, run, submit, status, retry, cancel, withdraw, extend, diff; and `replicate doctor`."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import SUPPRESS, Namespace
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, actions, table_console, takes, takes_keys, together, verb
from replication.config import (
    SuiteConfig,
    config_root,
    differences,
    find_cluster,
    find_config,
    load_cell,
    load_suite,
    scientific,
)
from replication.config.reading import Layer, Plain, check_layer
from replication.console import own_command, say, table
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.cells import Grid, claim_folder, load_grid, make_ready, places, tell_before
from replication.grid.slurm import load_site
from replication.grid.status import print_status, statuses
from replication.grid.submissions import jobs_of_cells, note, queue_of, submissions
from replication.runs.layout import RunDir, SuiteDir, name_cells
from replication.runs.withdrawn import withdraw as withdraw_from

SUITE = takes("suite", "suite file, or a name in configs/suites")
SEEDS = takes("--seeds", "comma-separated seeds instead of the suite's")
CLUSTER = takes("--cluster", "file that says where cells run, or its name in configs/cluster")
OF_SUITE = together(SUITE, takes("--out", "output folder (default: out/<suite>)", Path), SEEDS, CLUSTER)
OF_FOLDER = together(
    takes("suite", "output folder of the suite", metavar="OUT"),
    takes("--out", SUPPRESS, Path),  # of SUITE --out OUT, where the folder alone stands now
    SEEDS,
)
OF_JOBS = together(
    takes("--site", "site file (default: launch/site.env, where it exists)", Path),
    takes("--dry-run", "print every script and command, submit nothing", bool),
)


def named_suite(name: str, out: Path | None, seeds: str | None) -> tuple[SuiteConfig, SuiteDir]:
    """The suite of a name, with --seeds, and its output folder by --out."""
    inside = next((f for f in (Path(name), Path("out", name)) if SuiteDir(f).suite.is_file()), None)
    if inside is not None and not _is_suite(name):
        raise UserError(f"{name}: is an output folder, and a suite's file or name goes here, with --out {inside}")
    suite = load_suite(name)
    return with_seeds(suite, seeds), SuiteDir(out or Path("out", suite.name))


def _suite_of_folder(args: Namespace) -> tuple[SuiteConfig, SuiteDir]:
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


def _is_suite(name: str) -> bool:
    try:
        return find_config(name, "suites").is_file()
    except UserError:
        return False


def with_seeds(suite: SuiteConfig, seeds: str | None) -> SuiteConfig:
    """The suite with the seeds of --seeds in place of its own."""
    if seeds is None:
        return suite
    given = Layer({"seeds": [Plain(part.strip()) for part in seeds.split(",")]}, "")
    suite = replace(suite, seeds=check_layer(SuiteConfig, given)["seeds"])
    if len(set(suite.seeds)) != len(suite.seeds):
        raise UserError(f"--seeds: '{seeds}' names a seed twice; name each once")
    return suite


def _load(args: Namespace) -> Grid:
    cluster = find_cluster(args.cluster) if args.cluster else None
    return load_grid(*named_suite(args.suite, args.out, args.seeds), args.keys, cluster)


@OF_SUITE
@takes_keys()
def plan(args: Namespace) -> None:
    """list the cells."""
    grid = _load(args)
    rows = []
    for cell in grid.cells:
        t = cell.config.training
        rows.append((cell.name, cell.hash, t.steps, f"{t.steps * t.batch_tokens:,}", cell.run.root))
    columns = ("cell", "config hash", "steps", "tokens", "folder")
    table_console().print(table(f"{grid.suite.name}: {len(grid.cells)} cells", columns, rows))


@OF_SUITE
@takes("--jobs", "cells side by side (default 1)", COUNT, 1)
@takes_keys()
def run(args: Namespace) -> None:
    """run here what is not complete, then report."""
    from replication.grid.local import report_is_current, run_cells

    grid, console = _load(args), Console()
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
    say(console, f"curves:       {shlex.join([own_command(), 'tensorboard', str(grid.dir.root)])}")
    for what, ended, remedy in (
        ("failed", outcome.failed, "see the table; run again to retry"),
        ("were told to stop", outcome.stopped, "see the table; run again to retry"),
        ("are run by another process", outcome.elsewhere, "run again when it has ended"),
    ):
        if ended:
            names = name_cells([c.name for c in ended])
            raise UserError(f"{len(ended)} of {len(grid.cells)} cells {what} ({names}); {remedy}")


@OF_SUITE
@OF_JOBS
@takes_keys()
def submit(args: Namespace) -> None:
    """submit to SLURM what is neither queued, running, complete nor failed, then completions and the report."""
    from replication.grid.submit import submit_cells

    submit_cells(_load(args), load_site(args.site), Console(), args.dry_run)


@OF_FOLDER
def status(args: Namespace) -> None:
    """show every cell, with its job where there is a scheduler."""
    suite, suite_dir = _suite_of_folder(args)
    console = table_console()
    queue = queue_of(suite_dir, console) if suite_dir.launch.is_dir() else None
    earlier = [] if queue is None else submissions(suite_dir)
    rows = statuses(suite.diverged, places(suite, suite_dir), earlier, queue or [])
    print_status(rows, f"{suite.name} in {suite_dir.root}", console)


@OF_FOLDER
@CLUSTER
@OF_JOBS
@takes_keys("--cluster.* and --checkpoints.* keys may follow.")
def retry(args: Namespace) -> None:
    """submit failed, preempted, interrupted and cancelled cells again, as their folders describe them."""
    from replication.grid.submit import submit_cells

    suite, suite_dir = _suite_of_folder(args)
    for key in args.keys:
        if key.startswith("--") and not key.startswith(("--cluster.", "--checkpoints.")):
            raise UserError(
                f"replicate grid retry: {key} does not act here; the cells are what their folders say, only "
                "--cluster.* and --checkpoints.* may change"
            )
    cluster = find_cluster(args.cluster) if args.cluster else None
    grid = load_grid(suite, suite_dir, args.keys, cluster, again=True)
    submit_cells(grid, load_site(args.site), Console(), args.dry_run, again=True)


@OF_FOLDER
def cancel(args: Namespace) -> None:
    """take the suite's jobs out of the queue."""
    suite, suite_dir = _suite_of_folder(args)
    console = Console()
    queue = queue_of(suite_dir, console, needed=True) or []
    chosen = {p.folder for p in places(suite, suite_dir)}
    found = jobs_of_cells(submissions(suite_dir), queue)
    jobs = {cell: stages for cell, stages in found.items() if cell in chosen}
    if args.seeds:
        queue = [q for stages in jobs.values() for q in stages.values()]  # else all of it, the report included
    if not queue:
        say(console, "nothing of this suite is in the queue")
        return
    others = sorted({q.user for q in queue} - {"", slurm.user_name()})
    if others and os.geteuid():
        raise UserError(
            f"{suite_dir.root}: jobs of {', '.join(others)} are among them, which you cannot cancel; ask there for "
            "`replicate grid cancel`"
        )
    # first the notes: a job that is told to end reads there that it is not to go on later
    note([RunDir(suite_dir.root / cell) for cell in jobs], "cancelled")
    slurm.cancel([q.id for q in queue])
    say(console, f"cancelled {len(queue)} job(s) or elements; `replicate grid retry` goes on")


@OF_FOLDER
@takes("--seed", "of the suite", NATURAL, required=True)
@takes("--why", "the reason, which the report quotes", required=True)
def withdraw(args: Namespace) -> None:
    """leave a seed out of every statistic, for good; its cells are kept and listed."""
    suite, suite_dir = _suite_of_folder(args)
    if args.seed not in suite.seeds:
        raise UserError(f"--seed: {args.seed} is no seed of the suite, which has {', '.join(map(str, suite.seeds))}")
    withdraw_from(suite_dir, "seed", str(args.seed), args.why)
    say(Console(), f"seed {args.seed} is withdrawn; `replicate report {suite_dir.root}` leaves it out, and says why")


@OF_FOLDER
@takes("--steps", "that every cell is to have", COUNT, required=True)
@takes("--why", "the reason, which plan and report quote", required=True)
def extend(args: Namespace) -> None:
    """let every cell go on to more steps; plan, certificate and report say so."""
    from replication.grid.extend import extend as extend_cells

    if args.seeds:
        raise UserError("--seeds: every cell of a suite has as many steps, and is extended; leave it out")
    suite, suite_dir = _suite_of_folder(args)
    n, flags = extend_cells(suite, suite_dir, args.steps, args.why, console := Console())
    out = str(suite_dir.root)
    say(console, f"{n} begun cells are of {args.steps:,} steps now, and go on from their last checkpoints:")
    run = ["replicate", "grid", "run", str(suite_dir.suite), "--out", out, *flags]
    say(console, f"here:         {shlex.join(run)}")
    say(console, f"on SLURM:     {shlex.join(['replicate', 'grid', 'retry', out])}")


@SUITE
@takes("arms", "names of two arms", nargs=2, metavar="ARM")
@takes_keys()
def diff(args: Namespace) -> None:
    """show in which keys two arms differ."""
    suite = load_suite(args.suite)
    a, b = (scientific(load_cell(suite, arm, suite.seeds[0], args.keys)) for arm in args.arms)
    rows = ((key, left, right) for key, (left, right) in differences(a, b).items())
    table_console().print(table(f"{suite.name}: keys that may change a weight or a number", ("key", *args.arms), rows))


grid = actions(
    "grid",
    "Plan, run, submit or show a suite: arms x seeds.",
    *(plan, run, submit, status, retry, cancel, withdraw, extend, diff),
    no_keys="the cells are what their folders say",
)


@verb
@takes("--cluster", "cluster file, or its name in configs/cluster: ask SLURM, start nothing")
@takes("--suite", "suite file or name: what it needs, here or on the cluster (ablation_2x2 there)")
@takes("--site", "with --cluster: site file (default: launch/site.env, if there)", Path)
@takes("--out", "with --cluster: folder of the results (default: out)", Path)
def doctor(args: Namespace) -> int:
    """Say what this machine has and what each config would need; or whether a cluster could run a suite."""
    from replication.grid.cluster import examine_cluster
    from replication.grid.doctor import doctor as examine

    if args.cluster:
        suite = load_suite(args.suite or "ablation_2x2")
        config = load_cell(suite, suite.arms[0], suite.seeds[0], cluster=find_cluster(args.cluster))
        return examine_cluster(suite, config, load_site(args.site), args.out or Path("out"), Console())
    for name in ("site", "out"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: says what a cluster is asked about; name that with --cluster")
    return examine(Console(), config_root(), find_config(args.suite, "suites") if args.suite else None)
