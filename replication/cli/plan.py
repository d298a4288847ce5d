"""`replicate plan ACTION`: freeze, show, check."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from replication.cli.arguments import Parser, folder
from replication.cli.grid import named_suite
from replication.config import find_cluster, load_suite
from replication.errors import UserError
from replication.grid.cells import check_arms_declare_alike, refuse_other_suite
from replication.protocol.preregistration import Frozen, check_plan, freeze, read_plan
from replication.protocol.preregistration_text import markdown
from replication.runs.layout import SuiteDir, name_cells

TEXTS = {
    "freeze": "write the analysis plan of a suite, before its first cell runs",
    "show": "print the plan of an output folder",
    "check": "say whether the plan came before the data and was followed; exit code 1 where it was departed from, "
    "which cells or votes that are still to come are not",
}


def plan(argv: list[str]) -> int:
    """The verb: parse, then act."""
    parser = Parser(prog="replicate plan", description="Freeze, show or check the analysis plan of a suite.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(TEXTS), parser_class=Parser)
    more = " Any key of a run may follow as a flag: give what `replicate grid run` or `submit` will be given."
    for name, text in TEXTS.items():
        sub = actions.add_parser(name, help=text, description=f"{text}.{more if name == 'freeze' else ''}")
        if name != "freeze":
            sub.add_argument("out", type=folder, help="output folder of the suite")
            continue
        sub.add_argument("suite", help="suite file, or a name in configs/suites")
        sub.add_argument("--out", type=Path, help="output folder (default: out/<suite>)")
        sub.add_argument("--seeds", help="comma-separated seeds instead of the suite's")
        sub.add_argument("--cluster", help="file that says where cells run, or its name in configs/cluster")
        sub.add_argument(
            "--amend", metavar="REASON", help="replace the plan that is frozen; the report quotes the reason"
        )
        sub.add_argument(
            "--unless-begun",
            action="store_true",
            help="for scripts: do nothing in a folder that was begun without a plan, and name no next command",
        )
    args, flags = parser.parse_known_args(argv)
    if flags and args.action != "freeze":
        raise UserError(f"replicate plan {args.action}: {flags[0]} does not act here; remove it")
    if args.action == "freeze":
        return _freeze(args, flags)
    return _show(args.out) if args.action == "show" else _check(args.out)


def _freeze(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir = named_suite(args)
    refuse_other_suite(suite, suite_dir)
    check_arms_declare_alike(suite)
    if args.unless_begun and suite_dir.suite.is_file() and not suite_dir.plan.is_file():
        print(f"{suite_dir.root}: was begun without an analysis plan, and none is frozen now")
        return 0
    cluster = find_cluster(args.cluster) if args.cluster else None
    frozen = freeze(suite_dir, suite, flags, cluster, args.amend)
    _print_frozen(frozen, suite_dir)
    if args.unless_begun:
        return 0
    given = [("--out", args.out), ("--seeds", args.seeds), ("--cluster", args.cluster)]
    options = [str(x) for name, value in given if value for x in (name, value)]
    command = shlex.join(["replicate", "grid", "run", args.suite, *options, *flags])
    Console().print(f"next:         {command}", soft_wrap=True, highlight=False)
    return 0


def _print_frozen(frozen: Frozen, suite_dir: SuiteDir) -> None:
    record, console = frozen.record, Console(soft_wrap=True, highlight=False)
    console.print(
        f"{'frozen' if frozen.is_new else 'frozen already'} at {record['frozen_at']}, sha256 {record['sha256']}"
    )
    if record["began_before"]:
        began = escape(name_cells(record["began_before"]))
        console.print(f"[yellow]after the data:[/yellow] these cells had logged steps by then: {began}")
    console.print(f"plan:         {suite_dir.plan_md}")


def _show(out: Path) -> int:
    record = read_plan(SuiteDir(out))
    if record is None:
        raise UserError(f"{SuiteDir(out).plan}: no such file; `replicate plan freeze SUITE --out {out}` writes it")
    print(markdown(record), end="")
    return 0


def _check(out: Path) -> int:
    suite_dir = SuiteDir(out)
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; give the output folder of a suite")
    status = check_plan(suite_dir, load_suite(suite_dir.suite) if suite_dir.suite.is_file() else None)
    for line in (*status.sentences, *(f"- {departure}" for departure in status.departures)):
        print(line)
    return 1 if set(status.departures) - set(status.unfinished) else 0
