"""`replicate bench scaling`: the product's own training on 1, 2, ... processes of this machine.

Each number of processes is a run of its own, started as `replicate train` starts its ranks. Weak scaling keeps the work
of a process and grows the batch; strong scaling keeps the batch and cuts it finer. One process, started by the
launcher, is `python -m replication.bench.scaling CONFIG OUT BLOCK_STEPS BLOCKS`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table

from replication.bench.blocks import Result
from replication.bench.loops import END_OF_TEXT, Machine, Stopped, describe, synchronize, synthetic_store
from replication.bench.product import endless, silent_trainer
from replication.config import RunConfig, load_run, to_yaml
from replication.console import progress, table
from replication.data.module import TokenDataModule
from replication.errors import UserError
from replication.processes.launcher import adopt_place, run_ranks
from replication.runs.files import write_text
from replication.runs.records import read_record, write_record
from replication.training.environment import determinism, prepare_torch
from replication.training.module import LanguageModel
from replication.training.ranks import is_first

Mode = Literal["weak", "strong"]


@dataclass(frozen=True)
class Node(Machine):
    """The machine that the processes share."""

    cores: int | None
    gpus: int


@dataclass(frozen=True)
class Measured:
    """One run, as its first rank writes it."""

    seconds: tuple[float, ...]
    machine: Node


@dataclass
class ScalingRow:
    """One number of processes."""

    ranks: int
    batch_tokens: int
    micro_batch_sequences: int
    accumulation: int
    block_steps: int
    seconds: tuple[float, ...]  # of each block, on the first rank; all wait for the slowest at every step
    tokens_per_second: float = field(init=False)
    efficiency: float = field(init=False)  # tokens per second and process, relative to the fewest processes that ran

    def __post_init__(self) -> None:
        self.tokens_per_second = self.block_steps * self.batch_tokens / statistics.median(self.seconds)


@dataclass
class ScalingBench(Result):
    """Findings of one run of `bench scaling`."""

    bench: ClassVar = "scaling"
    machine: Node
    mode: Mode
    rows: tuple[ScalingRow, ...]
    config: RunConfig

    def __post_init__(self) -> None:
        first = self.rows[0]
        for row in self.rows:
            row.efficiency = row.tokens_per_second / row.ranks / (first.tokens_per_second / first.ranks)

    def tables(self) -> list[Table]:
        shared = "" if self.machine.gpus else f"; all share {self.machine.cores} CPU core(s)"
        title = f"{self.mode} scaling, {self.config.cluster.strategy}, {self.machine.device}{shared}"
        columns = [">processes", ">batch tokens", ">micro-batch", ">accum.", ">tokens/s", ">efficiency"]
        rows = [
            (r.ranks, f"{r.batch_tokens:,}", r.micro_batch_sequences, r.accumulation, f"{r.tokens_per_second:,.0f}",
             f"{r.efficiency:.1%}")
            for r in self.rows
        ]  # fmt: skip
        return [table(title, columns, rows)]


def at_ranks(config: RunConfig, ranks: int, mode: Mode) -> RunConfig:
    """The config on so many processes of one node; raises UserError where there is no such thing."""
    cluster, training = config.cluster, config.training
    if cluster.nodes > 1:
        raise UserError("cluster.nodes: bench scaling starts the processes of one machine; choose 1")
    if cluster.strategy == "single":
        raise UserError("cluster.strategy: single is one process; choose ddp, zero1, zero2 or zero3")
    if mode == "weak":
        training = replace(training, batch_tokens=training.batch_tokens * ranks)
    return replace(config, training=training, cluster=replace(cluster, devices=ranks)).check()


def bench_scaling(
    config: RunConfig, ranks: list[int], mode: Mode, block_steps: int, blocks: int, console: Console
) -> ScalingBench:
    """Time these numbers of processes, ascending, in so many blocks that count; one more warms up.

    The batch of the config is that of one process in weak scaling. Raises UserError where a run of some failed.
    """
    configs, rows, measured = [at_ranks(config, n, mode) for n in ranks], [], None
    with progress(console) as bars, tempfile.TemporaryDirectory() as folder:
        for one in bars.track(configs, description="numbers of processes"):
            layer, out = Path(folder) / f"{one.world_size}.yaml", Path(folder) / f"{one.world_size}.json"
            write_text(layer, to_yaml(one))
            command = [sys.executable, "-P", "-m", "replication.bench.scaling", str(layer), str(out)]
            code = run_ranks([*command, str(block_steps), str(blocks)], one.world_size, one.cluster.stop_signal)
            if code:
                raise UserError(
                    f"bench scaling: {one.world_size} process(es) of {one.cluster.strategy} ended with code {code}; "
                    "what they said stands above"
                )
            measured = read_record(out, Measured)
            assert measured is not None, "the first rank has ended well without a result"
            cut = (one.training.batch_tokens, one.micro_batch_sequences, one.accumulation)
            rows.append(ScalingRow(one.world_size, *cut, block_steps, measured.seconds))
    assert measured is not None, "no number of processes was asked for"
    return ScalingBench(measured.machine, mode, tuple(rows), config)


def train_as_rank(layer: str, out: str, block_steps: int, blocks: int) -> None:
    """Train as a rank of the run until the blocks are timed; the first rank writes them."""
    given = load_run([layer])
    adopt_place(given)
    config = endless(given, block_steps, "both")
    prepare_torch(config)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:  # each rank's own; the first writes into it

        def time_block() -> None:
            synchronize()
            ends.append(time.perf_counter())
            if len(ends) < blocks + 2:  # the first block warms up
                return
            if is_first():
                about = vars(describe(module.device))
                node = Node(**about, cores=psutil.cpu_count(), gpus=torch.cuda.device_count())
                write_record(Path(out), Measured(tuple(b - a for a, b in pairwise(ends[1:])), node))
            trainer.strategy.barrier()  # nobody leaves while another may still need it
            raise Stopped

        trainer, module = silent_trainer(config, folder, block_steps, time_block), LanguageModel(config, END_OF_TEXT)
        with determinism(config.training.deterministic), contextlib.suppress(Stopped):
            trainer.fit(module, datamodule=TokenDataModule(config, synthetic_store(config)))
    sys.stdout.flush()
    os._exit(0)  # a process group that is torn down aborts now and then, and nothing is left to do


if __name__ == "__main__":
    train_as_rank(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
