"""`replicate report` and `replicate audit`: a suite's own figures, and a paper's printed ones."""

from __future__ import annotations

import argparse
import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from replication.cli.arguments import folder, takes, verb
from replication.config import find_config, load_suite
from replication.console import say, table
from replication.errors import UserError
from replication.runs.files import write_json, write_text
from replication.runs.layout import SuiteDir

if TYPE_CHECKING:
    from replication.audit.audit import Row


def _forms(text: str) -> tuple[str, ...]:
    """Type of an argument that lists forms of a table."""
    found = tuple(dict.fromkeys(text.split(",")))
    if odd := [form for form in found if form not in ("tex", "csv")]:
        raise argparse.ArgumentTypeError(f"'{odd[0]}' is no form of them; name tex, csv")
    return found


def _inches(text: str) -> float:
    """Type of an argument that is the width of a figure."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(in|cm|mm|pt)", text.strip())
    inches = float(found[1]) * {"in": 1, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}[found[2]] if found else 0.0
    if not 2 <= inches <= 20:
        raise argparse.ArgumentTypeError(f"'{text}' must be a width of 2 to 20 inches, such as 3.3in, 8.5cm or 240pt")
    return inches


@verb
@takes("out", "output folder of a suite; or one with votes.csv alone", folder)
@takes("--width", "of the figures, for a paper, such as 3.3in, 84mm or 240pt (default 6.2in)", _inches)
@takes("--tables", "also as files in OUT/tables, for a paper: tex, csv or both", _forms, ())
@takes("--key", "folder of the panel's sealed key, to be compared (default: OUT/sealed)", folder, metavar="FOLDER")
def report(args: Namespace) -> None:
    """Write report.html, report.md, results.json and figures from the run folders."""
    suite_dir = SuiteDir(args.out, args.key)
    if not suite_dir.suite.is_file() and not suite_dir.votes.is_file():
        raise UserError(f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`")
    from replication.report.drawing import WIDTH_INCHES
    from replication.report.report import write_report, write_votes_report

    console = Console()
    if suite_dir.suite.is_file():
        width = args.width or WIDTH_INCHES
        say(console, f"wrote {write_report(suite_dir, load_suite(suite_dir.suite), width, args.tables)}")
        if args.tables:
            say(console, f"for a paper: {suite_dir.tables}{os.sep}*.{{{','.join(args.tables)}}}")
    elif args.width or args.tables:
        raise UserError(f"{suite_dir.suite}: no such file; --width and --tables are of a suite's report")
    else:
        say(console, f"no suite.yaml: a report of the votes alone; wrote {write_votes_report(suite_dir)}")


@verb
@takes("dir", "folder of the author's data files", Path)
@takes("--claims", "claims file, or its name in configs/claims", default="precision_weighted_training")
@takes("--out", "folder for audit.md and audit.json", Path)
@takes("--all", "show every row, also those that are the same", bool)
def audit(args: Namespace) -> None:
    """Recompute a paper's printed figures from its published data files, and say which differ."""
    from replication.audit.audit import CANNOT, DIFFERS, SAME, markdown
    from replication.audit.audit import audit as run_audit
    from replication.statistics.format import p_value, percent

    found, console = run_audit(args.dir, find_config(args.claims, "claims")), Console()
    if args.all:
        console.print(_figures("The same", found.of(SAME)))
    console.print(_figures("Figures that differ", found.of(DIFFERS, is_sentence=False)))
    console.print(_figures("Sentences that differ, as read", found.of(DIFFERS, is_sentence=True)))
    console.print(_figures("Not recomputable from what was published", found.of(CANNOT)))
    for row in found.stated:
        if row.verdict == DIFFERS:
            say(console, f"the file states {row.stated} for {row.what}; its rows add up to {row.recomputed}")
    units = ("unit", ">clusters", ">share for gain", "95 % interval", "gain : baseline : even", ">p: sign, t, Wilcoxon")
    cells = (
        (
            c.unit,
            c.n_clusters,
            percent(c.share, 1),
            f"{percent(c.low, 1)} to {percent(c.high, 1)}",
            f"{c.for_gain} : {c.for_baseline} : {c.even}",
            ", ".join(map(p_value, (c.sign_p, c.t_p, c.wilcoxon_p))),
        )
        for c in found.clusters
    )
    console.print(table("The same votes with other units", units, cells))
    if found.late_loss is not None:
        loss = found.late_loss
        say(
            console,
            f"late validation loss, {loss.run} minus {loss.minus}: {loss.difference:+.3f} nats, standard error "
            f"{loss.standard_error:.3f}, and with their autocorrelation {loss.standard_error_correlated:.3f}; not "
            "distinguishable is not equivalent",
        )
    for line in ("cannot be answered from these files:", *(f"  - {line}" for line in found.cannot_answer)):
        say(console, line)
    (what, n), claims = found.largest_table, found.claims
    cells_by = Counter(row.verdict for row in found.rows)
    for counted, words in (
        (claims, f"{claims.total()} claims, a table counted once"),
        (cells_by, f"{len(found.rows)} cells and sentences ({n} same in {what})"),
    ):
        say(console, f"{words}: {', '.join(f'{counted[verdict]} {verdict}' for verdict in (SAME, DIFFERS, CANNOT))}")
    if args.out is not None:
        write_json(args.out / "audit.json", found.to_dict())
        write_text(args.out / "audit.md", markdown(found))
        say(console, f"every figure: {args.out / 'audit.md'}")


def _figures(title: str, rows: Sequence[Row]) -> Table:
    heads = (("figure", 4), ("where", 3), ("printed", 2), ("recomputed", 2), ("note", 5))
    cells = ((row.what, row.where, row.printed, row.recomputed, row.note) for row in rows)
    return table(f"{title} ({len(rows)})", [Column(head, ratio=ratio) for head, ratio in heads], cells, expand=True)
