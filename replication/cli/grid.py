"""`replicate grid ACTION`: plan, run, submit, status, cancel, retry, diff."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from replication.cli.arguments import COUNT, Parser, table_console
from replication.config import SuiteConfig, find_cluster, find_config, load_suite
from replication.config.reading import Layer, Plain, check_layer
from replication.data.prompts import load_prompts
from replication.errors import UserError
from replication.grid import slurm, submit
from replication.grid.cells import Cell, Place, claim_folder, places, plan, write_configs
from replication.grid.jobs import JobStage, check_accelerator
from replication.grid.site import default_site
from replication.grid.status import (
    RETRIED,
    STYLE,
    CellStatus,
    Left,
    cell_status,
    last_link,
    print_status,
    read_notes,
)
from replication.protocol.preregistration import read_plan
from replication.runs.files import read_object
from replication.runs.layout import SuiteDir, name_cells
from replication.runs.manifest import Manifest, find_manifest, is_trained
from replication.runs.provenance import code_identity
from replication.runs.starts import code_facts, code_of, logged_cells, refuse_other_data, unlike

TEXTS = {
    "plan": "list the cells",
    "run": "run here what is not complete, then report",
    "submit": "submit to SLURM what is neither queued, running, complete nor failed, then completions and the report",
    "status": "show every cell, with its job where there is a scheduler",
    "retry": "submit failed, preempted, interrupted and cancelled cells again, as their folders describe them",
    "cancel": "take the suite's jobs out of the queue",
    "diff": "show in which keys two arms differ",
}


def grid(argv: list[str]) -> int:
    """The verb: parse, then act."""
    parser = Parser(prog="replicate grid", description="Plan, run, submit or show a suite: arms x seeds.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(TEXTS), parser_class=Parser)
    for name, text in TEXTS.items():
        keys = {"retry": " --cluster.* and --checkpoints.* keys may follow.", "status": "", "cancel": ""}
        description = f"{text}.{keys.get(name, ' Any key of a run may follow as a flag.')}"
        sub = actions.add_parser(name, help=text, description=description)
        sub.add_argument("suite", help="suite file, or a name in configs/suites")
        if name == "diff":
            sub.add_argument("arms", nargs=2, metavar="ARM", help="names of two arms")
            continue
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


def named_suite(args: argparse.Namespace, from_folder: bool = False) -> tuple[SuiteConfig, SuiteDir]:
    """The suite (with --seeds) and its output folder; with from_folder, a suite that the folder holds wins."""
    folder = next((f for f in (Path(args.suite), Path("out") / args.suite) if SuiteDir(f).suite.is_file()), None)
    if folder is None or _is_suite(args.suite):
        suite = load_suite(args.suite)
    elif from_folder and args.out is None:
        suite, args.out = load_suite(SuiteDir(folder).suite), folder
    else:
        raise UserError(f"{args.suite}: is an output folder, and a suite's file or name goes here, with --out {folder}")
    suite_dir = SuiteDir(args.out or Path("out") / suite.name)
    if from_folder and suite_dir.suite.is_file():
        suite = load_suite(suite_dir.suite)
    if args.seeds is None:
        return suite, suite_dir
    given = Layer({"seeds": [Plain(part.strip()) for part in args.seeds.split(",")]}, "")
    suite = replace(suite, seeds=check_layer(SuiteConfig, given)["seeds"])
    if len(set(suite.seeds)) != len(suite.seeds):
        raise UserError(f"--seeds: '{args.seeds}' names a seed twice; name each once")
    return suite, suite_dir


def _is_suite(name: str) -> bool:
    try:
        return find_config(name, "suites").is_file()
    except UserError:
        return False


def _cells(args: argparse.Namespace, flags: list[str]) -> tuple[SuiteConfig, SuiteDir, list[Cell]]:
    # here, as it brings scipy, which a look at the cells can do without
    from replication.tensorboard.writer import refuse_taken_names

    suite, suite_dir = named_suite(args)
    cluster = find_cluster(args.cluster) if args.cluster else None
    refuse_taken_names(suite)
    cells = plan(suite, suite_dir, flags, cluster)
    for prompts in {cell.config.generation.prompts for cell in cells} - {None}:
        load_prompts(str(prompts))  # before a corpus is prepared, which may take hours
    return suite, suite_dir, cells


def _statuses(
    suite: SuiteConfig, suite_dir: SuiteDir, of: Sequence[Place], queue: Sequence[slurm.Queued] | None = None
) -> list[CellStatus]:
    """The state of cells; with what is in the queue, the scheduler's word is part of it."""
    earlier = submit.submissions(suite_dir)
    if not earlier or queue is None:
        return [cell_status(place, suite.diverged) for place in of]
    jobs, elements = submit.jobs_of_cells(earlier, queue), submit.last_elements(earlier)
    left: dict[str, dict[JobStage, Left]] = {}
    for p in of:
        if p.folder in elements and p.folder not in jobs and not p.run.complete.is_file():
            left[p.folder] = _left(elements[p.folder], read_notes(p.run))
    words = slurm.history([one.job for stages in left.values() for one in stages.values()])
    for stages in left.values():
        stages.update({stage: replace(one, word=words.get(one.job)) for stage, one in stages.items()})
    return [cell_status(p, suite.diverged, jobs.get(p.folder), left.get(p.folder)) for p in of]


def _left(
    stages: Mapping[JobStage, tuple[str, submit.Submission]], notes: list[dict[str, Any]]
) -> dict[JobStage, Left]:
    """A cell's latest jobs, by stage, before the scheduler was asked what became of them."""
    ids = {stage: id for stage, (id, _) in stages.items()}
    return {
        stage: Left(
            id, last_link(id, notes, set(ids.values()) - {id}), None, s.folder / f"output-{id.split('_')[1]}.txt"
        )
        for stage, (id, s) in stages.items()
    }


def _queue(suite_dir: SuiteDir, console: Console, needed: bool = False) -> list[slurm.Queued] | None:
    """What is in the queue of an output folder; says whose it is, and where it would look for the folder in vain.

    None, with a line, where the scheduler does not answer and is not needed.
    """
    if not needed and not slurm.is_here():
        return None
    try:
        queue = slurm.queue()
    except UserError as error:
        if needed:
            raise
        console.print(f"[yellow]{escape(str(error))}[/yellow]; what follows is from the run folders", soft_wrap=True)
        return None
    earlier = submit.submissions(suite_dir)
    queue = [job for job, _ in submit.own_jobs(earlier, queue)] + submit.hidden_jobs(suite_dir, earlier)
    for user, n in Counter(job.user for job in queue).items():
        if user not in ("", slurm.user_name()):
            console.print(f"{n} job(s) or elements of this suite in the queue are {escape(user)}'s", soft_wrap=True)
    for out in submit.moved_from(submit.still_queued(earlier, queue)):
        console.print(
            f"[yellow]jobs in the queue look for this folder at {escape(out)}, where it is no more[/yellow]; move it "
            "back, or `replicate grid cancel` and then `retry`", soft_wrap=True,
        )  # fmt: skip
    return queue


# ---------------------------------------------------------------- looking


def _plan(args: argparse.Namespace, flags: list[str]) -> int:
    suite, _, cells = _cells(args, flags)
    table = Table("cell", "config hash", "steps", "tokens", "folder", title=f"{suite.name}: {len(cells)} cells")
    for cell in cells:
        t = cell.config.training
        table.add_row(cell.name, cell.hash, str(t.steps), f"{t.steps * t.batch_tokens:,}", str(cell.run.root))
    table_console().print(table)
    return 0


def _status(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir = named_suite(args, from_folder=True)
    console = table_console()
    if not suite_dir.root.is_dir():
        raise UserError(f"{suite_dir.root}: no such folder; give the --out of `replicate grid run` or `submit`")
    queue = _queue(suite_dir, console) if suite_dir.launch.is_dir() else None
    rows = _statuses(suite, suite_dir, places(suite, suite_dir), queue)
    print_status(rows, f"{suite.name} in {suite_dir.root}", console)
    return 0


def _diff(args: argparse.Namespace, flags: list[str]) -> int:
    from replication.config import differences, load_cell, scientific

    suite = load_suite(args.suite)
    a, b = (scientific(load_cell(suite, arm, suite.seeds[0], flags)) for arm in args.arms)
    table = Table("key", *args.arms)
    for key, (left, right) in differences(a, b).items():
        table.add_row(key, str(left), str(right))
    table_console().print(table)
    return 0


# ---------------------------------------------------------------- running here


def _run(args: argparse.Namespace, flags: list[str]) -> int:
    from replication.grid.local import run_cells

    suite, suite_dir, cells = _cells(args, flags)
    console = Console()
    claim_folder(suite, suite_dir, cells)
    waiting = [c for c in cells if not c.run.complete.is_file()]
    _say_plan(suite_dir, waiting, console)
    _say_votes(suite, cells, console)
    _make_ready(waiting, suite_dir, console)
    outcome = run_cells(cells, suite_dir, args.jobs, console)
    print_status(_statuses(suite, suite_dir, cells), suite.name, console)
    if outcome.complete or outcome.failed or not _report_is_current(suite_dir):
        from replication.report.report import write_report

        console.print(f"wrote {write_report(suite_dir, load_suite(suite_dir.suite))}", soft_wrap=True)
    elif not outcome.elsewhere:
        console.print("every cell was complete and the report is up to date: nothing to do")
    console.print(f"report:       {suite_dir.report_html}", soft_wrap=True)
    command = shlex.join([_here("replicate"), "tensorboard", str(suite_dir.root)])
    console.print(f"curves:       {command}", soft_wrap=True)
    for what, ended, remedy in (
        ("failed", outcome.failed, "see the table; run again to retry"),
        ("were told to stop", outcome.stopped, "see the table; run again to retry"),
        ("are run by another process", outcome.elsewhere, "run again when it has ended"),
    ):
        if ended:
            names = name_cells([c.name for c in ended])
            raise UserError(f"{len(ended)} of {len(cells)} cells {what} ({names}); {remedy}")
    return 0


def _make_ready(cells: Sequence[Cell], suite_dir: SuiteDir, console: Console) -> None:
    """Prepare the corpus where it is the folder's own, check what can be checked before training, write the configs."""
    from replication.data.store import TokenStore
    from replication.grid.cell import check_before_training, data_folder

    if not cells:
        return
    write_configs(cells)
    if cells[0].config.data.dir is None:
        from replication.data.prepare import prepare as prepare_corpus

        prepare_corpus(cells[0].config.data, suite_dir.data, console)
    store = TokenStore.open(data_folder(cells[0].config, suite_dir))
    refuse_other_data(suite_dir.runs, store.dir, store.hash)
    for cell in cells:
        check_before_training(cell.config, store)


def _say_plan(suite_dir: SuiteDir, cells: Sequence[Cell], console: Console) -> None:
    """A line each: whether the folder's cells ran other code than this; whether an analysis plan is registered, and
    whether it has the cells that are about to run."""
    if not cells:
        return
    ran = {name: code_of(find_manifest(run) or Manifest()) for name, run in logged_cells(suite_dir.runs).items()}
    changed = unlike({**ran, "now": [code_facts(code_identity())]})
    if changed:
        line = f"[yellow]cells of this folder ran other code:[/yellow] {escape(changed)}; the report will say so"
        console.print(line, soft_wrap=True, highlight=False)
    record = read_plan(suite_dir)
    if record is None:
        line = (
            "no analysis plan is registered; `replicate preregistration register` before the first cell makes the "
            "result confirmatory"
        )
        console.print(line, soft_wrap=True)
        return
    console.print(f"analysis plan {record.sha256[:16]}, registered at {record.frozen_at}", soft_wrap=True)
    others = [c.name for c in cells if record.plan.cells.get(c.name) != c.hash]
    if others:
        line = f"these cells are not the plan's, and the report will say so: {escape(name_cells(others))}"
        console.print(f"[yellow]{line}[/yellow]; see `replicate preregistration show`", soft_wrap=True)


def _say_votes(suite: SuiteConfig, cells: Sequence[Cell], console: Console) -> None:
    """A line where a judge is to vote on more pairs than there will be: `judge prepare` would refuse it afterwards."""
    g, votes = cells[0].config.generation, suite.analysis.votes_per_judge
    if len(suite.arms) < 2 or g.prompts is None:
        return
    n_pairs = len(load_prompts(g.prompts)) * len(suite.seeds) * g.samples_per_prompt**2
    if votes > n_pairs:
        line = f"analysis.votes_per_judge: {votes}, but there will be {n_pairs} pairs of completions to judge"
        console.print(f"[yellow]{line}[/yellow]; lower it, or give `replicate judge prepare` --votes", soft_wrap=True)


def _report_is_current(suite_dir: SuiteDir) -> bool:
    """Whether the report is there, and made from what is there now: cells, suite, plan, votes, noise."""
    if not all(p.is_file() for p in (suite_dir.report_html, suite_dir.report_md)):
        return False
    try:
        made_from = read_object(suite_dir.results).get("made_from")
    except UserError:
        return False
    suite = load_suite(suite_dir.suite)  # its seeds may be more than those of this call
    every = [place.run for place in places(suite, suite_dir)]
    return bool(made_from == suite_dir.inputs_sha256(every))


def _here(command: str) -> str:
    """A command of this Python's own environment, by its path where it is not on PATH."""
    beside = Path(sys.executable).with_name(command)
    return command if shutil.which(command) or not beside.exists() else str(beside)


# ---------------------------------------------------------------- running on a cluster


def _submit(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir, cells = _cells(args, flags)
    return _send(args, suite, suite_dir, cells, ("pending", "trained"), behind=True)


def _retry(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir = named_suite(args, from_folder=True)
    if not suite_dir.suite.is_file():
        raise UserError(f"{suite_dir.suite}: no such file; submit the suite first")
    for flag in flags:
        if flag.startswith("--") and not flag.startswith(("--cluster.", "--checkpoints.")):
            raise UserError(
                f"replicate grid retry: {flag} does not act here; the cells are what their folders say, only "
                "--cluster.* and --checkpoints.* may change"
            )
    cluster = find_cluster(args.cluster) if args.cluster else None
    cells = plan(suite, suite_dir, flags, cluster, from_folder=True)
    return _send(args, suite, suite_dir, cells, (*RETRIED, "trained"), behind=False)


def _send(
    args: argparse.Namespace,
    suite: SuiteConfig,
    suite_dir: SuiteDir,
    cells: list[Cell],
    taken: Sequence[str],
    behind: bool,
) -> int:
    """Submit the cells in the states that are to be taken, and what follows them.

    Args:
        args: of the command line: site, dry_run.
        suite: the suite.
        suite_dir: its output folder.
        cells: all of them.
        taken: states; a cell that has a job in the queue is left alone whatever its state.
        behind: whether they wait for training that is in the queue.
    """
    submitter = submit.Submitter(suite_dir, default_site(args.site), Console(), args.dry_run)
    if not args.dry_run:
        slurm.queue()  # before anything is written: raises where there is no scheduler
    with nullcontext() if args.dry_run else submit.one_at_a_time(suite_dir):
        if not args.dry_run:
            claim_folder(suite, suite_dir, cells)
            _say_plan(suite_dir, [c for c in cells if not c.run.complete.is_file()], submitter.console)
            _say_votes(suite, cells, submitter.console)
        steps = _steps(suite, suite_dir, cells, taken, behind, submitter)
        submitter.submit(steps)
    if not steps:
        submitter.console.print("nothing to submit")
    return 0


def _steps(
    suite: SuiteConfig,
    suite_dir: SuiteDir,
    cells: list[Cell],
    taken: Sequence[str],
    behind: bool,
    submitter: submit.Submitter,
) -> list[submit.Step]:
    """What is to be submitted; unless this is a dry run, its cells are ready to run when this returns."""
    console, dry = submitter.console, submitter.dry
    earlier, queue = submit.submissions(suite_dir), _queue(suite_dir, console, needed=not dry) or []
    if not dry:
        earlier = submit.adopt_unanswered(earlier, queue)
    rows = {row.name: row for row in _statuses(suite, suite_dir, cells, queue)}
    jobs = submit.jobs_of_cells(earlier, queue)
    wanted = [c for c in cells if rows[c.name].state in taken and c.folder not in jobs]
    for state in STYLE:
        names = [c.name for c in cells if c not in wanted and rows[c.name].state == state]
        hint = "; `replicate grid retry` submits it again" if state in RETRIED else ""
        if names:
            console.print(f"{escape(name_cells(names))}: {state}, left as it is{hint}", soft_wrap=True)
    check_accelerator([c.config for c in wanted])
    submit.check_lead_time(wanted)
    if not dry:
        _make_ready(wanted, suite_dir, console)
        for cell in wanted:  # what it failed of before says nothing of what is submitted now
            cell.run.failed.unlink(missing_ok=True)
    prefix, number = submit.suite_prefix(suite.name, suite_dir), submit.next_number(suite_dir)
    waiting = submit.still_queued(earlier, queue)
    trained = [c for c in wanted if is_trained(c.run)]
    unfollowed = submit.find_unfollowed(waiting, cells)
    return submit.plan_steps(prefix, number, cells[0], wanted, trained, waiting, unfollowed, behind)


def _cancel(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir = named_suite(args, from_folder=True)
    queue = _queue(suite_dir, Console(), needed=True) or []
    chosen = {p.folder for p in places(suite, suite_dir)}
    jobs = submit.jobs_of_cells(submit.submissions(suite_dir), queue)
    jobs = {cell: stages for cell, stages in jobs.items() if cell in chosen}
    if args.seeds:
        queue = [q for stages in jobs.values() for q in stages.values()]  # else all of it, the report included
    if not queue:
        Console().print("nothing of this suite is in the queue")
        return 0
    others = sorted({q.user for q in queue} - {"", slurm.user_name()})
    if others and os.geteuid():
        raise UserError(
            f"{suite_dir.root}: jobs of {', '.join(others)} are among them, which you cannot cancel; ask there for "
            "`replicate grid cancel`"
        )
    # first the notes: a job that is told to end reads there that it is not to go on later
    submit.note_cancelled(suite_dir, list(jobs))
    slurm.cancel([q.id for q in queue])
    Console().print(f"cancelled {len(queue)} job(s) or elements; `replicate grid retry` goes on")
    return 0
