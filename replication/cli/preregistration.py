"""`replicate preregistration ACTION`: register, show, check; `replicate plan freeze` is its earlier name."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import Parser, folder
from replication.cli.grid import named_suite
from replication.config import find_cluster, load_suite
from replication.console import say
from replication.errors import UserError
from replication.grid.cells import check_arms_declare_alike, refuse_other_suite
from replication.protocol.deviations import check_plan
from replication.protocol.preregistration import Registered, markdown, read_plan, register
from replication.runs.layout import SuiteDir, name_cells

TEXTS = {
    "register": "write the analysis plan of a suite, before its first cell runs",
    "show": "print the plan of an output folder",
    "check": "say whether the plan came before the data and was followed; exit code 1 where there are deviations, "
    "for which cells or votes that are still to come do not count",
}


def preregistration(argv: list[str]) -> int:
    """The verb: parse, then act."""
    parser = Parser(
        prog="replicate preregistration", description="Register, show or check the analysis plan of a suite."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(TEXTS), parser_class=Parser)
    more = " Any key of a run may follow as a flag: give what `replicate grid run` or `submit` will be given."
    for name, text in TEXTS.items():
        is_first = name == "register"
        sub = actions.add_parser(
            name,
            help=text,
            description=f"{text}.{more if is_first else ''}",
            aliases=["freeze"] if is_first else [],
        )
        if not is_first:
            sub.add_argument("out", type=folder, help="output folder of the suite")
            continue
        sub.add_argument("suite", help="suite file, or a name in configs/suites")
        sub.add_argument("--out", type=Path, help="output folder (default: out/<suite>)")
        sub.add_argument("--seeds", help="comma-separated seeds instead of the suite's")
        sub.add_argument("--cluster", help="file that says where cells run, or its name in configs/cluster")
        sub.add_argument("--amend", metavar="REASON", help="replace the plan; the report quotes the reason")
        sub.add_argument(
            "--unless-begun",
            action="store_true",
            help="for scripts: do nothing in a folder that was begun without a plan, and name no next command",
        )
    args, flags = parser.parse_known_args(argv)
    if args.action == "show":
        act = _show
    elif args.action == "check":
        act = _check
    else:
        return _register(args, flags)
    if flags:
        raise UserError(f"{parser.prog} {args.action}: {flags[0]} does not act here; remove it")
    return act(SuiteDir(args.out))


def _register(args: argparse.Namespace, flags: list[str]) -> int:
    suite, suite_dir = named_suite(args)
    refuse_other_suite(suite, suite_dir)
    check_arms_declare_alike(suite)
    if args.unless_begun and suite_dir.suite.is_file() and not suite_dir.plan.is_file():
        print(f"{suite_dir.root}: was begun without an analysis plan, and none is registered now")
        return 0
    cluster = find_cluster(args.cluster) if args.cluster else None
    _print_registered(register(suite_dir, suite, flags, cluster, args.amend), suite_dir)
    if not args.unless_begun:
        given = [("--out", args.out), ("--seeds", args.seeds), ("--cluster", args.cluster)]
        options = [str(x) for name, value in given if value for x in (name, value)]
        say(Console(), f"next:         {shlex.join(['replicate', 'grid', 'run', args.suite, *options, *flags])}")
    return 0


def _print_registered(registered: Registered, suite_dir: SuiteDir) -> None:
    record, console = registered.record, Console()
    done = "registered" if registered.is_new else "registered already"
    say(console, f"{done} at {record.frozen_at}, sha256 {record.sha256}")
    if record.began_before:
        began = name_cells(record.began_before)
        say(console, ("after the data:", "yellow"), f" these cells had logged steps by then: {began}")
    say(console, f"plan:         {suite_dir.plan_md}")


def _show(suite_dir: SuiteDir) -> int:
    record = read_plan(suite_dir)
    if record is None:
        command = f"replicate preregistration register SUITE --out {suite_dir.root}"
        raise UserError(f"{suite_dir.plan}: no such file; `{command}` writes it")
    print(markdown(record), end="")
    return 0


def _check(suite_dir: SuiteDir) -> int:
    if not suite_dir.root.is_dir():
        raise UserError(f"{suite_dir.root}: no such folder; give the output folder of a suite")
    status = check_plan(suite_dir, load_suite(suite_dir.suite) if suite_dir.suite.is_file() else None)
    for line in (*status.sentences, *(f"- {deviation}" for deviation in status.deviations)):
        print(line)
    return 1 if set(status.deviations) - set(status.unfinished) else 0
