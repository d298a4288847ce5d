"""`replicate archive` and `replicate prune`: an output folder after its run, in one file, or rid of what is done."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import folder, table_console, takes, verb
from replication.console import plural, say, table
from replication.errors import UserError
from replication.runs.layout import SuiteDir

SHOWN = 10
"""Keys that differ, of an archive that is not equal."""


@verb
@takes("out", "output folder of a suite", folder, nargs="?")
@takes("-o", "write this file: .tar.zst, .tar.xz, .tar.gz or .tar", Path, dest="target", metavar="FILE")
@takes("--weights", "of each cell: those of its last step, or none (default)", choices=("last", "none"), default="none")
@takes("--check", "unpack this file, compute its report again, and compare every number", Path, metavar="FILE")
def archive(args: Namespace) -> int:
    """Put an output folder into one file; or prove that a file's report follows from the runs in it.

    Exits with 1 where a number differs.
    """
    if (args.check is None) == (args.out is None) or (args.out is None) != (args.target is None):
        raise UserError("replicate archive: give OUT -o FILE to make an archive, or --check FILE to prove one")
    from replication.report.archive import check, pack

    console = Console()
    if args.check is not None:
        found = check(args.check, console)
        for line in found[:SHOWN]:
            say(console, ("differs:", "red"), f" {line}")
        more = f"; {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        said = f"{plural(len(found), 'value')} not equal{more}" if found else "equal: every number of results.json"
        say(console, f"{args.check}: {said}")
        return 1 if found else 0
    suite_dir = SuiteDir(args.out)
    if not suite_dir.suite.is_file():
        raise UserError(f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`")
    n = pack(suite_dir, args.target, args.weights, console)
    corpus = "" if suite_dir.data.is_dir() else "; the corpus lies elsewhere and is not in it"
    say(console, f"wrote {args.target}: {plural(n, 'file')}, {args.target.stat().st_size / 2**20:,.1f} MiB{corpus}")
    return 0


@verb
@takes("out", "output folder of a suite", folder)
@takes("--yes", "do not ask", bool)
def prune(args: Namespace) -> int:
    """Remove from finished cells what only further training needs: optimizer states. Their weights stay."""
    from replication.runs.prune import prunable
    from replication.runs.prune import prune as prune_cell

    console, suite_dir = Console(), SuiteDir(args.out)
    if not suite_dir.runs.is_dir():
        raise UserError(f"{suite_dir.runs}: no such folder; give the output folder of `replicate grid run`")
    found = prunable(suite_dir)
    if not found:
        say(console, "no finished cell holds more than its weights: nothing to remove")
        return 0
    rows = [(cell.name, f"{cell.n_bytes / 2**20:,.1f}") for cell in found]
    rows.append(("all", f"{sum(cell.n_bytes for cell in found) / 2**20:,.1f}"))
    table_console().print(table("Finished cells", ("cell", ">MiB of optimizer states"), rows))
    say(console, "these cells can be sampled from and judged as before, and never be trained further")
    if not args.yes and not sys.stdin.isatty():
        raise UserError("replicate prune: no terminal to ask on; --yes says that it is meant")
    if not args.yes and input("Remove them? [y/N] ").strip().lower() not in ("y", "yes"):
        say(console, "nothing was removed")
        return 0
    freed, left = 0, []
    for cell in found:
        try:
            n_bytes, notes = prune_cell(cell)
        except UserError as error:  # a process holds it
            n_bytes, notes = 0, [str(error)]
        freed += n_bytes
        left += notes
    for line in left:
        say(console, line, style="yellow")
    say(console, f"freed {freed / 2**20:,.1f} MiB of {plural(len(found), 'cell')}")
    return 1 if left else 0
