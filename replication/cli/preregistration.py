"""`replicate preregistration ACTION`: register, show, anchor, check; `replicate plan freeze` is its earlier name."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import actions, folder, takes, takes_keys
from replication.cli.grid import OF_SUITE, named_suite
from replication.config import find_cluster, load_suite
from replication.config.study import load_study
from replication.console import say
from replication.errors import UserError
from replication.grid.cells import load_cells, refuse_other_suite
from replication.protocol import preregistration as plans
from replication.protocol.deviations import check_plan, other_commits
from replication.runs.files import write_bytes
from replication.runs.layout import SuiteDir, name_cells


@OF_SUITE
@takes("--amend", "replace the plan; the report quotes the reason", metavar="REASON")
@takes(
    "--unless-begun",
    "for scripts: do nothing in a folder that was begun without a plan, and name no next command",
    bool,
)
@takes("--study", "what judges will be told and asked (default: configs/studies/default.yaml)", metavar="FILE")
@takes_keys("Any key of a run may follow as a flag: give what `replicate grid run` or `submit` will be given.")
def register(args: Namespace) -> None:
    """write the analysis plan of a suite, before its first cell runs."""
    suite, suite_dir = named_suite(args.suite, args.out, args.seeds)
    refuse_other_suite(suite, suite_dir)
    if args.unless_begun and suite_dir.suite.is_file() and not suite_dir.plan.is_file():
        print(f"{suite_dir.root}: was begun without an analysis plan, and none is registered now")
        return
    cluster, console = find_cluster(args.cluster) if args.cluster else None, Console()
    load_cells(suite, suite_dir, args.keys, cluster)  # also what no config says: whether arms fit their plugins
    study = load_study(args.study) if args.study else None
    registered = plans.register(suite_dir, suite, args.keys, cluster, args.amend, study)
    record = registered.record
    done = "registered" if registered.is_new else "registered already"
    say(console, f"{done} at {record.frozen_at}, sha256 {record.sha256}")
    if record.began_before:
        began = name_cells(record.began_before)
        say(console, ("after the data:", "yellow"), f" these cells had logged steps by then, or been removed: {began}")
    say(console, f"plan:         {suite_dir.plan_md}")
    if not args.unless_begun:
        given = [("--out", args.out), ("--seeds", args.seeds), ("--cluster", args.cluster)]
        options = [str(x) for name, value in given if value for x in (name, value)]
        say(console, f"next:         {shlex.join(['replicate', 'grid', 'run', args.suite, *options, *args.keys])}")


FOLDER = takes("out", "output folder of the suite", folder)


@FOLDER
def show(args: Namespace) -> None:
    """print the plan of an output folder."""
    suite_dir = SuiteDir(args.out)
    record = plans.read_plan(suite_dir)
    if record is None:
        command = f"replicate preregistration register SUITE --out {suite_dir.root}"
        raise UserError(f"{suite_dir.plan}: no such file; `{command}` writes it")
    print(plans.markdown(record), end="")


@FOLDER
@takes("--ca", "certificates of the authority whose answer is there now (PEM): check it with them, and keep them", Path)
def anchor(args: Namespace) -> None:
    """write what a clock outside needs to vouch for the plan, or check its answer with --ca."""
    from replication.protocol.anchor import stem, verify, write_requests

    suite_dir, console = SuiteDir(args.out), Console()
    if plans.read_plan(suite_dir) is None:
        raise UserError(f"{suite_dir.plan}: no such file; register the plan first")
    answer = stem(suite_dir).with_suffix(".tsr")
    if args.ca is None:
        for path in write_requests(suite_dir):
            say(console, f"wrote {path}")
        request = f"curl -H 'Content-Type: application/timestamp-query' --data-binary @{answer.with_suffix('.tsq')}"
        say(console, f"next:         {request} -o {answer} URL   (of a time-stamping authority)")
        say(console, f"then:         replicate plan anchor {suite_dir.root} --ca FILE")
        return
    write_bytes(suite_dir.anchor / "ca.pem", args.ca.read_bytes())
    found = verify(suite_dir)
    if found is None:
        raise UserError(f"{answer}: no such file; put the authority's answer there")
    say(console, f"anchored at {found.at:%Y-%m-%d %H:%M:%S} UTC by {found.authority}")


@FOLDER
@takes("--key", "folder of the panel's sealed key, to be compared (default: OUT/sealed)", folder, metavar="FOLDER")
def check(args: Namespace) -> int:
    """say whether the plan came before the data and was followed; exit code 1 where there are deviations, for which
    cells or votes that are still to come do not count, nor cells of other commits, which are noted."""
    suite_dir = SuiteDir(args.out, args.key)
    if not suite_dir.root.is_dir():
        raise UserError(f"{suite_dir.root}: no such folder; give the output folder of a suite")
    status = check_plan(suite_dir, load_suite(suite_dir.suite) if suite_dir.suite.is_file() else None)
    for line in (*status.sentences, *(f"- {deviation}" for deviation in status.deviations)):
        print(line)
    for withheld in status.withheld:
        print(f"no verdict on {'anything' if withheld.on == 'all' else f'the {withheld.on}'}: {withheld.why}")
    for line in other_commits(suite_dir):
        print(f"note: {line}")
    return 1 if set(status.deviations) - set(status.unfinished) else 0


preregistration = plan = actions(
    "preregistration",
    "Register, show, anchor or check the analysis plan of a suite.",
    *(register, show, anchor, check),
    no_keys="remove it",
    register="freeze",
)
