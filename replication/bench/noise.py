"""How far rounding alone moves the loss: one cell trained again and again, cut otherwise each time.

Arm, seed, data and objective are the suite's; strategy, micro-batch or kernels are not. In exact arithmetic all would
end alike, so what they differ in is no effect of an arm: the floor that stands beside the margin in the report. Each
run is one of `grid run`, in DIR/noise/<cut>; a second call goes on where the first stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from replication.config import (
    RunConfig,
    SuiteConfig,
    load_run,
    machine_cut,
    refuse_differences,
    scientific,
    scientific_hash,
)
from replication.errors import UserError
from replication.grid.cells import Cell, write_configs
from replication.grid.local import run_cells
from replication.report.load import load_cell_files
from replication.report.results import quantities
from replication.runs.files import remove_tree, write_json
from replication.runs.layout import SuiteDir
from replication.runs.manifest import Manifest, find_manifest
from replication.runs.provenance import code_hash, code_identity
from replication.runs.records import to_json
from replication.runs.starts import code_of, unlike

AS_IT_IS = "as it is"
CUTS = ("micro-batch", "head", "attention", "checkpointing", "ranks", "again")


def cuts(config: RunConfig, kinds: Sequence[str]) -> Iterator[tuple[str, RunConfig | None, str]]:
    """Yield (name, config, "") of each cut of the kinds, or (name, None, why it is left out)."""
    c, n = config.cluster, config.micro_batch_sequences
    head, attention = "logits" if c.head != "logits" else "chunked", "auto" if c.attention == "math" else "math"
    of_kind: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "micro-batch": [(f"micro-batch {m}", {"micro_batch_sequences": m}) for m in (n // 2, 2 * n, n // 4) if m],
        "head": [(f"head {head}", {"head": head})],
        "attention": [(f"attention {attention}", {"attention": attention})],
        "checkpointing": [("checkpointing otherwise", {"activation_checkpointing": not c.activation_checkpointing})],
        "ranks": [("2 processes", {"strategy": "ddp", "devices": 2})],
        "again": [("again", {})],
    }
    for kind in kinds:
        for name, keys in of_kind[kind]:
            try:
                cut = replace(config, cluster=replace(c, **keys)).check()
            except UserError as error:
                yield name, None, str(error)
                continue
            if scientific_hash(cut) != scientific_hash(config):
                yield name, None, "here it is part of the objective, and no matter of rounding"
            else:
                yield name, cut, ""


def bench_noise(
    suite: SuiteConfig, suite_dir: SuiteDir, bases: Sequence[Cell], kinds: Sequence[str], console: Console
) -> dict[str, Any]:
    """Train each cell as it is and in every cut; DIR/noise.json is written after each run.

    Args:
        suite: names the validations of the late mean.
        suite_dir: DIR.
        bases: cells of the suite, with their configs; data.dir is prepared.
        kinds: of CUTS.
        console: for progress and what is left out.

    Returns:
        What noise.json holds: a row for each run, with its losses and their differences to the cell as it is.

    Raises:
        UserError: a run failed, or DIR/noise has runs of another config, cut or code.
    """
    rows: list[dict[str, Any]] = []
    result = {"bench": "noise", "suite": suite.name, **to_json(code_identity()), "rows": rows}
    for base in bases:
        config = replace(base.config, generation=replace(base.config.generation, prompts=None))
        first: dict[str, float] = {}
        for name, cut, why in [(AS_IT_IS, config, ""), *cuts(config, kinds)]:
            if cut is None:
                console.print(f"{name}: left out ({why})", soft_wrap=True, markup=False)
                continue
            losses = _losses(name, cut, suite, suite_dir, console)
            first = first or losses
            rows.append({
                "cell": base.name,
                "cut": name,
                "config_hash": scientific_hash(cut),
                "precision": cut.training.precision,
                "steps": cut.training.steps,
                "machine": machine_cut(cut),
                **losses,
                "differences": {key: value - first[key] for key, value in losses.items()},
            })  # fmt: skip
            write_json(suite_dir.noise, result)
    return result


def _losses(
    name: str, config: RunConfig, suite: SuiteConfig, suite_dir: SuiteDir, console: Console
) -> dict[str, float]:
    """Train one cut, unless it is there; its losses by the names that `analysis.loss` may have."""
    folder = SuiteDir(suite_dir.root / "noise" / re.sub(r"\W+", "-", name))
    cell = Cell(config.arm, config.seed, folder.cell(config.arm, config.seed), config)
    if cell.run.config.is_file():
        there = load_run([cell.run.config])
        refuse_differences(
            f"{cell.run.root}: was run otherwise",
            scientific(there) | machine_cut(there),
            scientific(config) | machine_cut(config),
            f"remove {folder.root.parent}, and measure anew",
        )
    write_configs([cell])
    console.print(f"{cell.name}, {name}:", markup=False)
    outcome = run_cells([cell], folder, 1, console)
    if not (outcome.complete or outcome.skipped):
        raise UserError(f"{cell.run.root}: the run did not end (log: {cell.run.log}); the same command goes on")
    ran = code_of(find_manifest(cell.run) or Manifest())
    changed = unlike({"this run": ran, "now": [{"code_hash": code_hash()}]})
    if changed:
        raise UserError(f"{cell.run.root}: ran other code ({changed}); remove {folder.root.parent}, and measure anew")
    remove_tree(cell.run.checkpoints)  # the losses are in the journal
    read = load_cell_files(cell.run, cell.arm, cell.seed)
    return {q.key: q.value(read) for q in quantities(suite.analysis.late_validations)[:2]}


def noise_table(result: dict[str, Any]) -> Table:
    """A row for each run; differences in nats, to the cell as it is."""
    table = Table(
        "cell", "cut", "final loss", "difference", "late mean", title="Validation loss of one cell, cut otherwise"
    )
    for row in result["rows"]:
        final, late = row["differences"]["final_val_loss"], row["differences"]["late_val_loss"]
        table.add_row(row["cell"], row["cut"], f"{row['final_val_loss']:.4f}", f"{final:+.2g}", f"{late:+.2g}")
    return table
