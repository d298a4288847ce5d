"""`replicate audit DIR`: a paper's printed figures against its published data files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from replication.cli.arguments import Parser
from replication.config import find_config
from replication.console import say, table
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
        say(console, f"every figure: {args.out / 'audit.md'}")
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
            say(console, f"the file states {row.stated} for {row.what}; its rows add up to {row.recomputed}")
    console.print(_clusters(found))
    if found.late_loss is not None:
        loss = found.late_loss
        say(
            console,
            f"late validation loss, {loss.run} minus {loss.minus}: {loss.difference:+.3f} nats, standard error "
            f"{loss.standard_error:.3f}; not distinguishable is not equivalent",
        )
    for line in ("cannot be answered from these files:", *(f"  - {line}" for line in found.cannot_answer)):
        say(console, line)
    entries = len({row.entry for row in found.of(DIFFERS)})
    say(
        console,
        f"{len(found.rows)} figures and sentences: {len(found.of(SAME))} same, {len(found.of(DIFFERS))} differ "
        f"(in {entries} entries of the claims file), {len(found.of(CANNOT))} not recomputable",
    )


def _figures(title: str, rows: Sequence[Row]) -> Table:
    heads = (("figure", 4), ("where", 3), ("printed", 2), ("recomputed", 2), ("note", 5))
    columns = [Column(head, ratio=ratio) for head, ratio in heads]
    cells = ((row.what, row.where, row.printed, row.recomputed, row.note) for row in rows)
    return table(f"{title} ({len(rows)})", columns, cells, expand=True)


def _clusters(found: Audit) -> Table:
    from replication.statistics.format import p_value, percent

    columns = ("unit", ">clusters", ">share for gain", "95 % interval", "gain : baseline : even", ">sign test p")
    cells = (
        (
            c.unit,
            c.n_clusters,
            percent(c.share, 1),
            f"{percent(c.low, 1)} to {percent(c.high, 1)}",
            f"{c.for_gain} : {c.for_baseline} : {c.even}",
            p_value(c.sign_p),
        )
        for c in found.clusters
    )
    return table("The same votes with other units", columns, cells)
