# ruff: noqa: E402
"""What every rank of a test runs: a list of cells, in one start of the processes (DeepSpeed takes seconds to import).

cells.jsonl holds one object a line: name, arm and flags, and where they are wanted "flags_of_rank_1" on top, "n_blocks"
of the model, "blocks" of the store, the steps after which to "keep" the weights, the steps (from 0) whose gradients
"overflow_at", "leave_free": bytes of the disk after step 4, "small_parts": buckets, sub-groups and batches of matrices
so small that every one of them is cut, and "scale_as_published": the published loop over
`param.grad`, which ZeRO leaves empty.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from replication.training.environment import import_torchmetrics

import_torchmetrics()  # before Lightning does, as a training starts

from lightning import Callback
from memory_store import MemoryStore
from paths import CHECKOUT, SUPPORT
from training_setup import MODEL, fit, small_config

import replication.training.train as train_module
from replication.training import muon, strategies
from replication.training.strategies import consolidated_weights, multiply_whole


class KeepWeights(Callback):
    """Stores the whole weights after chosen steps, in the precision in which they are trained."""

    def __init__(self, config, root: Path, steps: list[int]) -> None:
        self.config, self.root, self.steps = config, root, steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.at_boundary and trainer.global_step in self.steps:
            weights = consolidated_weights(self.config, pl_module.model)
            if trainer.is_global_zero:
                torch.save(weights, self.root / f"weights-{trainer.global_step:03d}.pt")


class KeepGains(Callback):
    """Stores the gain of every token that this rank weighted: gains-RANK.pt, [micro-batches, groups, tokens]."""

    def __init__(self, root: Path) -> None:
        self.root, self.gains = root, []

    def on_fit_start(self, trainer, pl_module) -> None:
        weigh = pl_module.weigh_tokens
        if weigh is not None:
            pl_module.weigh_tokens = lambda *losses: self.gains.append(weigh(*losses)) or self.gains[-1]

    def on_fit_end(self, trainer, pl_module) -> None:
        if self.gains:
            torch.save(torch.stack(self.gains), self.root / f"gains-{trainer.global_rank}.pt")


class Overflow(Callback):
    """Makes the gradients of chosen steps infinite, by way of one weighted token on each rank."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step in self.steps:
            loss.register_hook(lambda gradient: gradient * float("inf"))


class FillDisk(Callback):
    """After step 4 leaves so many bytes free on the file system of the cell's folder."""

    def __init__(self, folder: Path, leave: int) -> None:
        self.folder, self.leave = folder, leave

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        filler = self.folder.parent / "filler"
        if pl_module.at_boundary and trainer.global_step == 4 and trainer.is_global_zero and not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(self.folder).free - self.leave))


def run_cell(cell: dict, root: Path) -> None:
    """Train one cell in root/name."""
    mine = cell.get("flags_of_rank_1", []) if os.environ.get("RANK") == "1" else []
    model = dataclasses.replace(MODEL, n_blocks=cell.get("n_blocks", MODEL.n_blocks))
    config = small_config(cell["arm"], *cell["flags"], *mine, model=model)
    folder = root / cell["name"]
    folder.mkdir(parents=True, exist_ok=True)
    build, multiplier = train_module.build_trainer, train_module.gradient_multiplier
    sizes = strategies.BUCKET_ELEMENTS, strategies.SUB_GROUP_ELEMENTS, muon.BATCH_ELEMENTS

    def with_keeper(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.callbacks += [KeepWeights(config, folder, cell.get("keep", [])), KeepGains(folder)]
        trainer.callbacks += [Overflow(cell["overflow_at"])] if "overflow_at" in cell else []
        trainer.callbacks += [FillDisk(folder, cell["leave_free"])] if "leave_free" in cell else []
        return trainer

    train_module.build_trainer = with_keeper
    if cell.get("small_parts"):
        strategies.BUCKET_ELEMENTS, strategies.SUB_GROUP_ELEMENTS, muon.BATCH_ELEMENTS = 1000, 3000, 2000
    if cell.get("scale_as_published"):
        train_module.gradient_multiplier = lambda config: multiply_whole
    try:
        fit(config, folder, MemoryStore(blocks=tuple(cell.get("blocks", (6, 5)))))
    finally:
        train_module.build_trainer, train_module.gradient_multiplier = build, multiplier
        strategies.BUCKET_ELEMENTS, strategies.SUB_GROUP_ELEMENTS, muon.BATCH_ELEMENTS = sizes


def run_cells_on_ranks(cells: list[dict], root: Path, ranks: int = 2) -> None:
    """Run all cells on real ranks over gloo, started as the product starts them."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    script = (
        "import sys; from replication.processes.launcher import run_ranks; "
        "sys.exit(run_ranks([sys.executable, *sys.argv[2:]], int(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ranks), str(SUPPORT / "rank_cells.py"), str(root)],
        capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{CHECKOUT}:{SUPPORT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-20_000:]


def main(root: Path) -> None:
    for line in (root / "cells.jsonl").read_text().splitlines():
        run_cell(json.loads(line), root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
