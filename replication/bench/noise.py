"""`replicate bench noise`: one cell trained again and again, cut otherwise each time, so that rounding alone differs.

Arm, seed, data and objective are the suite's; strategy, micro-batch or kernels are not. In exact arithmetic all would
end alike, so what they differ in is no effect of an arm: the floor that stands beside the margin in the report. Each
run is one of `grid run`, in DIR/noise/<cut>; a second call goes on where the first stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from rich.console import Console
from rich.table import Table

from replication.bench.blocks import Result
from replication.config import (
    Keys,
    RunConfig,
    SuiteConfig,
    load_run,
    machine_cut,
    refuse_differences,
    scientific,
    scientific_hash,
)
from replication.console import say, table
from replication.data.prepare import prepare
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.grid.cells import Cell, write_configs
from replication.grid.local import run_cells
from replication.objectives.plugins import keep_plugins
from replication.report.comparisons import quantities
from replication.report.load import load_cell_files
from replication.runs.files import remove_tree, write_json
from replication.runs.layout import SuiteDir
from replication.runs.manifest import Manifest, code_hash, code_identity, find_manifest
from replication.runs.starts import code_of, logged_cells, refuse_other_data, unlike

CUTS = ("micro-batch", "head", "attention", "checkpointing", "ranks", "again")
LOSSES = ("final_val_loss", "late_val_loss")


def cuts(config: RunConfig, kinds: Sequence[str]) -> Iterator[tuple[str, RunConfig | None, str]]:
    """(name, config, "") of each cut of the kinds, or (name, None, why it is left out)."""
    c, n = config.cluster, config.micro_batch_sequences
    head, attention = "logits" if c.head != "logits" else "chunked", "auto" if c.attention == "math" else "math"
    of_kind: dict[str, list[tuple[str, Keys]]] = {
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


@dataclass(frozen=True)
class NoiseRow:
    """One run: its losses, by the names that `analysis.loss` may have, and their differences to the cell as it is."""

    cell: str
    cut: str
    config_hash: str
    precision: str
    steps: int
    machine: Keys
    final_val_loss: float
    late_val_loss: float
    differences: dict[str, float]


@dataclass(frozen=True)
class NoiseBench(Result):
    """Findings of `bench noise`, as DIR/noise.json holds them."""

    bench: ClassVar = "noise"
    suite: str
    code_hash: str | None
    packages: Mapping[str, str | None]
    rows: list[NoiseRow] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """A row for each run; differences in nats."""
        columns = ["cell", "cut", ">final loss", ">difference", ">late mean"]
        rows = [
            (r.cell, r.cut, f"{r.final_val_loss:.4f}", *(f"{r.differences[loss]:+.2g}" for loss in LOSSES))
            for r in self.rows
        ]
        return [table("Validation loss of one cell, cut otherwise", columns, rows)]


def bench_noise(
    suite: SuiteConfig, suite_dir: SuiteDir, bases: Sequence[Cell], kinds: Sequence[str], console: Console
) -> NoiseBench:
    """Train the base cells as they are and in every cut of these kinds; DIR/noise.json is written after each run.

    Raises UserError where a run failed, DIR has cells of other data, or DIR/noise runs of another config, cut or code.
    """
    data = bases[0].config.data
    if data.dir is None:
        prepare(data, suite_dir.data, console)
    store = TokenStore.open(data.dir or suite_dir.data)
    refuse_other_data(logged_cells(suite_dir.runs), str(store.dir), store.hash)
    data = replace(data, dir=str(store.dir.resolve()))
    code = code_identity()
    result = NoiseBench(suite.name, code.code_hash, code.packages)
    for base in bases:
        config = replace(base.config, data=data, generation=replace(base.config.generation, prompts=None))
        first: dict[str, float] = {}
        for name, cut, why in [("as it is", config, ""), *cuts(config, kinds)]:
            if cut is None:
                say(console, f"{name}: left out ({why})")
                continue
            losses = _losses(name, cut, suite, suite_dir, console)
            first = first or losses
            result.rows.append(
                NoiseRow(
                    cell=base.name,
                    cut=name,
                    config_hash=scientific_hash(cut),
                    precision=cut.training.precision,
                    steps=cut.training.steps,
                    machine=machine_cut(cut),
                    final_val_loss=losses["final_val_loss"],
                    late_val_loss=losses["late_val_loss"],
                    differences={key: value - first[key] for key, value in losses.items()},
                )
            )
            write_json(suite_dir.noise, result.to_dict())
    return result


def _losses(
    name: str, config: RunConfig, suite: SuiteConfig, suite_dir: SuiteDir, console: Console
) -> dict[str, float]:
    """Train one cut, unless it is there; its LOSSES."""
    folder = SuiteDir(suite_dir.root / "noise" / re.sub(r"\W+", "-", name))
    cell, anew = Cell(config.arm, config.seed, folder.cell(config.arm, config.seed), config), folder.root.parent
    if cell.run.config.is_file():
        there = load_run([cell.run.config])
        then, now = (scientific(c) | machine_cut(c) for c in (there, config))
        refuse_differences(f"{cell.run.root}: was run otherwise", then, now, f"remove {anew}, and measure anew")
    keep_plugins(suite.plugins, folder.plugins)
    write_configs([cell])
    say(console, f"{cell.name}, {name}:")
    outcome = run_cells([cell], folder, 1, console)
    if not (outcome.complete or outcome.skipped):
        raise UserError(f"{cell.run.root}: the run did not end (log: {cell.run.log}); the same command goes on")
    ran = code_of(find_manifest(cell.run) or Manifest())
    changed = unlike({"this run": ran, "now": [{"code_hash": code_hash()}]})
    if changed:
        raise UserError(f"{cell.run.root}: ran other code ({changed}); remove {anew}, and measure anew")
    remove_tree(cell.run.checkpoints)  # the losses are in the journal
    read = load_cell_files(cell.run, cell.arm, cell.seed)
    return {q.key: q.value(read) for q in quantities(suite.analysis.late_validations) if q.key in LOSSES}
