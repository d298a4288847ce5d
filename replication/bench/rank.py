"""One process of `bench scaling`: python -m replication.bench.rank CONFIG OUT BLOCK_STEPS BLOCKS, by a launcher."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import psutil
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console

from replication.bench.machine import describe
from replication.bench.product import endless
from replication.bench.synthetic import SyntheticStore
from replication.bench.turns import Stopped, synchronize
from replication.config import load_run
from replication.data.module import Batch, TokenDataModule
from replication.data.store import TokenStore
from replication.processes.launcher import adopt_place
from replication.runs.files import write_json
from replication.runs.layout import RunDir
from replication.training.environment import prepare_torch
from replication.training.module import LanguageModel
from replication.training.ranks import is_first
from replication.training.train import build_trainer


class Timer(Callback):
    """First of the callbacks: times blocks of steps, and ends the training after the last."""

    def __init__(self, micro_batches: int, blocks: int, out: Path) -> None:
        self.micro_batches, self.blocks, self.out = micro_batches, blocks, out
        self.ends: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.micro_batches:
            return
        synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.blocks + 2:  # the first block warms up
            if is_first():
                self._write(pl_module.device)
            trainer.strategy.barrier()  # nobody leaves while another may still need it
            raise Stopped

    def _write(self, device: torch.device) -> None:
        seconds = [b - a for a, b in zip(self.ends[1:], self.ends[2:], strict=False)]
        cores, gpus = psutil.cpu_count(), torch.cuda.device_count()
        write_json(self.out, {"seconds": seconds, "machine": describe(device) | {"cores": cores, "gpus": gpus}})


def main(layer: str, out: str, block_steps: str, blocks: str) -> None:
    """Train as a rank of the run until the blocks are timed."""
    given = load_run([layer])
    adopt_place(given)
    config = endless(given, int(block_steps), "both")
    prepare_torch(config)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    store = SyntheticStore(config)
    # every rank needs a folder of its own name for the run that nobody keeps; the first writes into its own
    with tempfile.TemporaryDirectory() as folder:
        start = {"config hash": "", "data hash": store.hash}
        trainer = build_trainer(config, RunDir(Path(folder)), start, None, Console(file=io.StringIO()))
        timer = Timer(int(block_steps) * config.accumulation, int(blocks), Path(out))
        trainer.callbacks.insert(0, timer)  # type: ignore[attr-defined]
        module = LanguageModel(config, store.end_of_text_id)
        with contextlib.suppress(Stopped):
            trainer.fit(module, datamodule=TokenDataModule(config, cast(TokenStore, store)))
    sys.stdout.flush()
    os._exit(0)  # a process group that is torn down aborts now and then, and nothing is left to do


if __name__ == "__main__":
    main(*sys.argv[1:])
