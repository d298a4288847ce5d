"""`replicate report`."""

from __future__ import annotations

from rich.console import Console

from replication.cli.arguments import Parser, folder
from replication.console import say
from replication.errors import UserError


def report(argv: list[str]) -> int:
    """Write report.html, report.md, results.json and figures from the run folders."""
    parser = Parser(prog="replicate report", description=report.__doc__)
    parser.add_argument("out", type=folder, help="output folder of a suite; or one with votes.csv alone")
    args = parser.parse_args(argv)
    from replication.config import load_suite
    from replication.runs.layout import SuiteDir

    suite_dir = SuiteDir(args.out)
    if not suite_dir.suite.is_file():
        if not suite_dir.votes.is_file():
            raise UserError(f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`")
        from replication.report.report import write_votes_report

        say(Console(), f"no suite.yaml: a report of the votes alone; wrote {write_votes_report(suite_dir)}")
        return 0
    from replication.report.report import write_report

    say(Console(), f"wrote {write_report(suite_dir, load_suite(suite_dir.suite))}")
    return 0
