"""`replicate audit DIR`: a paper's printed figures against its published data files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from replication.cli.arguments import Parser
from replication.config import find_config
from replication.runs.files import write_json, write_text

if TYPE_CHECKING:
    from replication.audit.audit import Audit, Row


def audit(argv: list[str]) -> int:
    """Recompute a paper's printed figures from its published data files, and say which differ."""
    parser = Parser(prog="replicate audit", description=audit.__doc__)
    parser.add_argument("dir", type=Path, help="folder of the author's data files")
    parser.add_argument(
        "--claims", default="precision_weighted_training", help="claims file, or its name in configs/claims"
    )
    parser.add_argument("--out", type=Path, help="folder for audit.md and audit.json")
    parser.add_argument("--all", action="store_true", help="show every row, also those that are the same")
    args = parser.parse_args(argv)
    from replication.audit.audit import audit as run_audit
    from replication.audit.audit import markdown

    found = run_audit(args.dir, find_config(args.claims, "claims"))
    console = Console()
    _print(found, console, everything=args.all)
    if args.out is not None:
        write_json(args.out / "audit.json", found.to_dict())
        write_text(args.out / "audit.md", markdown(found))
        console.print(f"every figure: {args.out / 'audit.md'}", soft_wrap=True)
    return 0


def _print(found: Audit, console: Console, *, everything: bool) -> None:
    from replication.audit.audit import CANNOT, DIFFERS, SAME

    if everything:
        console.print(_figures("The same", found.of(SAME)))
    console.print(_figures("Figures that differ", found.of(DIFFERS, is_sentence=False)))
    console.print(_figures("Sentences that differ, as read", found.of(DIFFERS, is_sentence=True)))
    console.print(_figures("Not recomputable from what was published", found.of(CANNOT)))
    for row in found.stated:
        if row.verdict == DIFFERS:
            console.print(f"the file states {row.stated} for {escape(row.what)}; its rows add up to {row.recomputed}")
    console.print(_clusters(found))
    if found.late_loss is not None:
        loss = found.late_loss
        console.print(
            f"late validation loss, {loss.run} minus {loss.minus}: {loss.difference:+.3f} nats, standard error "
            f"{loss.standard_error:.3f}; not distinguishable is not equivalent"
        )
    console.print("cannot be answered from these files:")
    for line in found.cannot_answer:
        console.print(f"  - {escape(line)}", soft_wrap=True)
    counts = {verdict: len(found.of(verdict)) for verdict in (SAME, DIFFERS, CANNOT)}
    entries = len({row.entry for row in found.of(DIFFERS)})
    console.print(
        f"{len(found.rows)} figures and sentences: {counts[SAME]} same, {counts[DIFFERS]} differ "
        f"(in {entries} entries of the claims file), {counts[CANNOT]} not recomputable"
    )


def _figures(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{title} ({len(rows)})", title_justify="left", expand=True)
    for column, ratio in (("figure", 4), ("where", 3), ("printed", 2), ("recomputed", 2), ("note", 5)):
        table.add_column(column, ratio=ratio)
    for row in rows:
        table.add_row(*(escape(text) for text in (row.what, row.where, row.printed, row.recomputed, row.note)))
    return table


def _clusters(found: Audit) -> Table:
    from replication.statistics.format import p_value, percent

    table = Table(title="The same votes with other units", title_justify="left")
    for column in ("unit", "clusters", "share for gain", "95 % interval", "gain : baseline : even", "sign test p"):
        table.add_column(column)
    for c in found.clusters:
        bounds = f"{percent(c.low, 1)} to {percent(c.high, 1)}"
        leans = f"{c.for_gain} : {c.for_baseline} : {c.even}"
        p = p_value(c.sign_p)
        table.add_row(c.unit, str(c.n_clusters), percent(c.share, 1), bounds, leans, p)
    return table
