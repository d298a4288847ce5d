"""`replicate quickstart`: the whole path on one machine."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import takes, takes_keys, verb
from replication.console import own_command, say
from replication.errors import install
from replication.runs.layout import SuiteDir

SUITE = "ablation_2x2"


@verb
@takes("--out", "folder of the results (default: out/quickstart)", Path, Path("out", "quickstart"))
@takes("--no-serve", "do not open the judging page, print the command that does", bool)
@takes_keys()
def quickstart(args: Namespace) -> None:
    """Run four arms of a tiny model at two seeds here, then write the report and open the judging page.

    A second call continues where the first one stopped, and repeats nothing.
    """
    from replication.cli.grid import grid
    from replication.cli.judge import judge
    from replication.cli.preregistration import preregistration

    out, folder = str(args.out), SuiteDir(args.out)
    if not folder.plan.exists() and not folder.suite.exists():  # a plan comes before the first cell, or not at all
        preregistration(["register", SUITE, "--out", out, *args.keys])
    grid(["run", SUITE, "--out", out, "--jobs", str(min(len(os.sched_getaffinity(0)), 8)), *args.keys])
    if find_spec("fastapi") is None:
        say(Console(), f"judging:      needs more packages: {install('judge')}, then the same command again")
        return
    if not (folder.judging / "judging.sqlite").exists():
        judge(["prepare", out])
    if sys.stdin.isatty() and sys.stdout.isatty() and not args.no_serve:
        judge(["serve", out])
    else:
        command = shlex.join([own_command(), "judge", "serve", out])
        say(Console(), f"judging:      {command}   (opens the page on this machine, prints the link for judges)")
