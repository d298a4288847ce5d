"""The report's tables as files for a paper: LaTeX with booktabs, rounded as in the report, and CSV with every digit."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from replication.report.comparisons import Row
from replication.report.results import Results
from replication.report.study import difference_rows
from replication.runs.files import write_text
from replication.statistics.format import arm_name, count, duration, number, p_value, percent, plain, signed

Column = tuple[str, str, Callable[[object], str]]
"""(key of the rows and head in CSV, head in LaTeX, how LaTeX writes a value)."""
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--"}
LATEX |= {"±": r"$\pm$", "…": r"\dots{}", "<": r"\textless{}", ">": r"\textgreater{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}
INTERVAL: tuple[Column, ...] = (("low", "low", signed), ("high", "high", signed))


@dataclass(frozen=True)
class PaperTable:
    """One table: rows of values by the columns' keys."""

    name: str
    """Of its files."""
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]


def write_tables(results: Results, folder: Path, kinds: Collection[str]) -> None:
    """Write each table that has rows as NAME.tex and NAME.csv, of those of `kinds`."""
    for table in _tables(results):
        if "csv" in kinds and table.rows:
            write_text(folder / f"{table.name}.csv", _csv(table))
        if "tex" in kinds and table.rows:
            write_text(folder / f"{table.name}.tex", _latex(table))


def _tables(r: Results) -> Iterator[PaperTable]:
    counted: list[Column] = [("n", "seeds", plain), ("mean", "mean", signed), ("sd", "sd", number)]
    arm_seed: list[Column] = [("arm", "arm", arm_name), ("seed", "seed", plain)]
    quantity: list[Column] = [("quantity", "quantity", plain), ("unit", "unit", plain)]
    base = arm_name(r.suite.baseline)
    yield PaperTable(
        "differences",
        f"Paired differences to {base} over seeds, with 95 % t intervals and exact sign-flip p values.",
        [*quantity, ("arm", "arm", arm_name), *counted, *INTERVAL, ("p_sign_flip", "p", p_value)],
        difference_rows(r),
    )
    yield PaperTable(
        "seeds",
        f"The same differences to {base}, seed by seed.",
        [*quantity, *arm_seed, ("difference", "difference", signed)],
        [
            Row(quantity=q.key, unit=q.unit, arm=pair.arm, seed=seed, difference=difference)
            for q in (*r.quantities, *r.completions, *r.evaluations)
            for pair in q.pairs
            for seed, difference in zip(r.suite.seeds, pair.differences, strict=True)
        ],
    )
    if r.factorial:
        yield PaperTable(
            "factorial",
            f"Main effects and interaction of the 2x2 on the loss, nats, with {percent(r.factorial.interval_level)} "
            "intervals.",
            [
                ("name", "effect", plain),
                *counted,
                *INTERVAL,
                ("p", "p", p_value),
                ("p_sign_flip", "sign flips", p_value),
            ],
            [asdict(effect) for effect in r.factorial.effects],
        )
    yield PaperTable(
        "secondary",
        "Secondary questions, with Holm's correction over all of them.",
        [
            *(("name", "question", plain), ("n", "seeds", plain), ("mean", "estimate", signed), *INTERVAL),
            *(("p", "p", p_value), ("p_holm", "Holm's p", p_value), ("verdict", "verdict", plain)),
        ],
        [asdict(question) for question in r.secondary],
    )
    if r.preference:
        tallies: list[Column] = [("n_votes", "votes", count), ("n_decisive", "decisive", count)]
        yield PaperTable(
            "votes",
            f"Decisive votes for {arm_name(r.preference.treatment)} against {base}, by which judges are kept.",
            [
                *(("name", "judges", plain), *tallies, ("estimate", "share", number)),
                *(("low", "low", number), ("high", "high", number), ("p", "p", p_value)),
            ],
            r.preference.filters,
        )
    yield PaperTable(
        "cells",
        "Every cell.",
        [
            *(*arm_seed, ("state", "state", plain), ("step", "step", count), ("tokens", "tokens", count)),
            *(("last_val_loss_nats", "last loss", number), ("late_val_loss", "late mean", number)),
            *(("tokens_per_second", "tokens/s", count), ("wall_seconds", "wall time", duration)),
        ],
        r.cells,
    )
    yield PaperTable(
        "token_gain",
        "Logged steps at which the mean gain after the clamp departs from 1 by more than 1 %.",
        [
            *(*arm_seed, ("applied", "acts", plain), ("n_failing", "failing", plain), ("n_measured", "of", plain)),
            *(("last_failing_step", "last failing", plain), ("largest_mean", "largest mean", number)),
            *(("last_share_at_min", "at lower clamp", percent), ("last_share_at_max", "at upper clamp", percent)),
        ],
        r.gain,
    )
    yield PaperTable(
        "certificate",
        "Pairs that the certificate refuses or has no cell for.",
        [*arm_seed, ("reference", "with", plain), ("state", "state", plain), ("reasons", "reasons", plain)],
        [asdict(pair) | {"reasons": "; ".join(pair.reasons)} for pair in r.pairs_refused],
    )


def _csv(table: PaperTable) -> str:
    """Values with every digit; what is missing is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([key for key, *_ in table.columns])
    writer.writerows([["" if (v := row.get(key)) is None else v for key, *_ in table.columns] for row in table.rows])
    return text.getvalue()


def _latex(table: PaperTable) -> str:
    """A tabular to be \\input into a table environment; its caption stands in a comment above it."""
    is_number = [all(isinstance(row.get(key), int | float | None) for row in table.rows) for key, *_ in table.columns]
    lines = [[_escaped(shown(row.get(key))) for key, _, shown in table.columns] for row in table.rows]
    heads = [_escaped(head) for _, head, _ in table.columns]
    rows = [r"\toprule", f"{' & '.join(heads)} \\\\", r"\midrule", *(f"{' & '.join(line)} \\\\" for line in lines)]
    columns = "".join("r" if numeric else "l" for numeric in is_number)
    begin = [f"% {table.caption}", r"% needs \usepackage{booktabs}", f"\\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*begin, *rows, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    return re.sub(r"[^\w\s]|_", lambda found: LATEX.get(found.group(), found.group()), " ".join(text.split()))
