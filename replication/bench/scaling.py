"""`replicate bench scaling`: the product's own training on 1, 2, ... processes of this machine.

Each number of processes is a run of its own, started as `replicate train` starts its ranks. Weak scaling keeps the work
of a process and grows the batch; strong scaling keeps the batch and cuts it finer.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from replication.config import RunConfig, to_dict, to_yaml
from replication.errors import UserError
from replication.processes.launcher import run_ranks
from replication.runs.files import read_json, write_text

Mode = Literal["weak", "strong"]


@dataclass(frozen=True)
class ScalingRow:
    """One number of processes."""

    ranks: int
    batch_tokens: int
    micro_batch_sequences: int
    accumulation: int
    block_steps: int
    seconds: tuple[float, ...]  # of each block, on the first rank; all wait for the slowest at every step

    @property
    def tokens_per_second(self) -> float:
        return self.block_steps * self.batch_tokens / statistics.median(self.seconds)


@dataclass(frozen=True)
class ScalingBench:
    """What one run of `bench scaling` measured."""

    config: RunConfig
    mode: Mode
    rows: tuple[ScalingRow, ...]
    machine: dict[str, Any]

    def efficiency(self, row: ScalingRow) -> float:
        """Tokens per second and process, relative to the fewest processes that ran."""
        first = self.rows[0]
        return row.tokens_per_second / row.ranks / (first.tokens_per_second / first.ranks)

    def to_dict(self) -> dict[str, object]:
        extra = [{"tokens_per_second": r.tokens_per_second, "efficiency": self.efficiency(r)} for r in self.rows]
        return {
            "bench": "scaling",
            "machine": self.machine,
            "mode": self.mode,
            "rows": [dataclasses.asdict(row) | more for row, more in zip(self.rows, extra, strict=True)],
            "config": to_dict(self.config),
        }


def at_ranks(config: RunConfig, ranks: int, mode: Mode) -> RunConfig:
    """The config on so many processes of one node.

    Raises:
        UserError: the batch cannot be cut so; nodes are several; one process is the only kind of the strategy.
    """
    cluster, training = config.cluster, config.training
    if cluster.nodes > 1:
        raise UserError("cluster.nodes: bench scaling starts the processes of one machine; choose 1")
    if cluster.strategy == "single":
        raise UserError("cluster.strategy: single is one process; choose ddp, zero1, zero2 or zero3")
    if mode == "weak":
        training = dataclasses.replace(training, batch_tokens=training.batch_tokens * ranks)
    return dataclasses.replace(
        config, training=training, cluster=dataclasses.replace(cluster, devices=ranks)
    ).check()  # fmt: skip


def bench_scaling(
    config: RunConfig, ranks: list[int], mode: Mode, block_steps: int, blocks: int, console: Console
) -> ScalingBench:
    """Time each number of processes.

    Args:
        config: the user's, on one process; its batch is that of one process in weak scaling.
        ranks: numbers of processes, ascending.
        mode: weak or strong.
        block_steps: optimizer steps in a block.
        blocks: that count; one more warms up.
        console: for progress.

    Raises:
        UserError: a run of some processes failed; what they said stands above.
    """
    configs = [at_ranks(config, n, mode) for n in ranks]
    rows, machine = [], {}
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(ranks))
        for n, one in zip(ranks, configs, strict=True):
            progress.update(task, description=f"{n} process(es)")
            out = Path(folder) / f"{n}.json"
            measured = _run(one, out, block_steps, blocks)
            machine = measured["machine"]
            cut = (one.training.batch_tokens, one.micro_batch_sequences, one.accumulation)
            rows.append(ScalingRow(n, *cut, block_steps, tuple(measured["seconds"])))
            progress.advance(task)
    return ScalingBench(config, mode, tuple(rows), machine)


def _run(config: RunConfig, out: Path, block_steps: int, blocks: int) -> dict[str, Any]:
    """One run; what its first rank wrote."""
    layer = out.with_suffix(".yaml")
    write_text(layer, to_yaml(config))
    worker = [sys.executable, "-P", "-m", "replication.bench.rank", str(layer), str(out), str(block_steps), str(blocks)]
    code = run_ranks(worker, config.world_size, config.cluster.stop_signal)
    if code:
        raise UserError(
            f"bench scaling: {config.world_size} process(es) of {config.cluster.strategy} ended with code {code}; "
            "what they said stands above"
        )
    measured: dict[str, Any] | None = read_json(out)
    assert measured is not None, "the first rank has ended well without a result"
    return measured


# ---------------------------------------------------------------- in words


def scaling_table(bench: ScalingBench) -> Table:
    """The numbers of processes side by side; it fits 80 columns."""
    strategy = bench.config.cluster.strategy
    shared = "" if bench.machine["gpus"] else f"; all share {bench.machine['cores']} CPU core(s)"
    table = Table(title=f"{bench.mode} scaling, {strategy}, {bench.machine['device']}{shared}", title_justify="left")
    for name in ("processes", "batch tokens", "micro-batch", "accum.", "tokens/s", "efficiency"):
        table.add_column(name, justify="right")
    for row in bench.rows:
        table.add_row(
            str(row.ranks), f"{row.batch_tokens:,}", str(row.micro_batch_sequences), str(row.accumulation),
            f"{row.tokens_per_second:,.0f}", f"{bench.efficiency(row):.1%}",
        )  # fmt: skip
    return table
