"""`replicate bench step`: the four arms and a plain torch loop, block by block in one process on one set of weights.

The training that is timed is the real one. Between blocks it is paused: its interventions are switched, or the plain
loop runs a block with the same model and optimizer, so that memory holds one of each. The baseline arm runs between all
others, and what is reported of them is their time over the baseline's beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from replication.bench.blocks import RATIOS, Interleaved, interleave
from replication.bench.breakdown import Breakdown, Marks
from replication.bench.machine import PeakMemory, Utilisation, describe
from replication.bench.plain import PlainLoop
from replication.bench.product import ARMS, Product
from replication.bench.synthetic import SyntheticStore
from replication.bench.turns import Elapsed, share_one_heap
from replication.config import RunConfig, to_dict
from replication.training.environment import prepare_torch

REFERENCE, PLAIN = "baseline", "plain loop"


@dataclass(frozen=True)
class StepBench:
    """What one run of `bench step` measured."""

    config: RunConfig
    block_steps: int
    interleaved: Interleaved
    utilisation: Utilisation
    peak_bytes: dict[str, int]  # by contestant; cumulative on a CPU
    memory_kind: str
    breakdown: Breakdown
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, object]:
        c = self.interleaved
        return {
            "bench": "step",
            "machine": self.machine,
            "block_steps": self.block_steps,
            "interleaved": c.to_dict(),
            "baseline_over_plain_loop": asdict(c.reference_over(PLAIN)),
            "utilisation": {
                **asdict(self.utilisation),
                "baseline_full": self.utilisation.full(c.tokens_per_second(REFERENCE)),
                "baseline_causal": self.utilisation.causal(c.tokens_per_second(REFERENCE)),
            },
            "peak_bytes": {"kind": self.memory_kind, **self.peak_bytes},
            "breakdown": asdict(self.breakdown),
            "config": to_dict(self.config),
        }


def bench_step(config: RunConfig, block_steps: int, rounds: int, console: Console) -> StepBench:
    """Time a config's four arms beside the plain loop, in one process.

    Args:
        config: from `product.configure`.
        block_steps: optimizer steps in a block.
        rounds: blocks of each arm, and of the plain loop, that count.
        console: for progress.
    """
    prepare_torch(config)
    share_one_heap()
    store = SyntheticStore(config)
    with Progress(console=console) as progress:
        product = Product(config, store, block_steps)
        try:
            return _measure(product, store, rounds, progress)
        finally:
            product.close()


def _measure(product: Product, store: SyntheticStore, rounds: int, progress: Progress) -> StepBench:
    config, device, steps = product.config, product.device, product.block_steps
    plain = PlainLoop(config, store, device, steps, product.module.model, product.trainer.optimizers[0])
    memory, peaks = PeakMemory(device), dict.fromkeys((PLAIN, *ARMS), 0)

    def run(name: str) -> Elapsed:
        memory.start()
        if name == PLAIN:
            elapsed = product.block(plain.block)
        else:
            product.switch(name)
            elapsed = product.block()
        peaks[name] = max(peaks[name], memory.read())
        return elapsed

    others = [*(arm for arm in ARMS if arm != REFERENCE), PLAIN]
    interleaved = interleave(REFERENCE, others, rounds, steps * config.training.batch_tokens, run, progress)
    breakdown = take_breakdown(product, min(3, rounds))
    utilisation = Utilisation.of(config, device)
    return StepBench(config, steps, interleaved, utilisation, peaks, memory.kind, breakdown, describe(device))


def take_breakdown(product: Product, blocks: int) -> Breakdown:
    """Some blocks with marks, all interventions on; one more warms the marks up."""
    product.switch("both")
    marks = Marks(product.clock)
    marks.install(product.module.model, product.trainer.optimizers[0])
    product.trainer.callbacks.insert(1, marks)  # type: ignore[attr-defined]
    try:
        product.block()
        product.clock.start()
        for _ in range(blocks):
            product.block()
        seconds = product.clock.stop()
    finally:
        marks.remove()
    return Breakdown.of(seconds, blocks * product.block_steps)


# ---------------------------------------------------------------- in words


def step_tables(bench: StepBench) -> list[Table]:
    """The arms, then where a step's time goes, then what it was measured with; each fits 80 columns."""
    return [_arms_table(bench), _breakdown_table(bench.breakdown), _facts_table(bench)]


def _arms_table(bench: StepBench) -> Table:
    c, u = bench.interleaved, bench.utilisation
    table = Table(title="the arms beside the baseline, interleaved in one run", title_justify="left")
    table.add_column("")
    for name in ("tokens/s", "MFU", "peak GiB", *RATIOS):
        table.add_column(name, justify="right")
    for name in (PLAIN, *ARMS):
        speed, peak = c.tokens_per_second(name), bench.peak_bytes[name] / 2**30
        table.add_row(name, f"{speed:,.0f}", f"{u.full(speed):.1%}", f"{peak:.2f}", *c.ratio_cells(name))
    return table


def _breakdown_table(breakdown: Breakdown) -> Table:
    table = Table(title="where a step's time goes (arm both, with marks)", title_justify="left")
    table.add_column("part, forward and backward")
    table.add_column("ms a step", justify="right")
    table.add_column("share", justify="right")
    for part, milliseconds in breakdown.milliseconds.items():
        table.add_row(part, f"{milliseconds:,.2f}", f"{breakdown.share(part):.1%}")
    return table


def _facts_table(bench: StepBench) -> Table:
    c, u, config = bench.interleaved, bench.utilisation, bench.config
    over_plain, speed = c.reference_over(PLAIN), c.tokens_per_second(REFERENCE)
    versions = bench.machine["versions"]
    rows = {
        "baseline over plain": f"{over_plain} of its time, 95 % upper bound {over_plain.bound}; "
        f"{c.reference_over(PLAIN, 'cpu_seconds')} of its CPU time",
        "pairs": f"{over_plain.pairs} blocks of {bench.block_steps} steps each, {config.accumulation} micro-batch(es) "
        f"a step, a log line every {config.logging.log_every_steps}",
        "MFU": f"{u.full(speed):.1%} with all of the attention counted ({u.flops_per_token_full:.3g} FLOP/token), "
        f"{u.causal(speed):.1%} with its causal half ({u.flops_per_token_causal:.3g})",
        "of a peak of": f"{u.peak.flops_per_second / 1e12:,.3g} TFLOP/s ({u.peak.source})",
        "memory": bench.memory_kind,
        "machine": str(bench.machine["device"]),
        "versions": f"torch {versions['torch']}, lightning {versions['lightning']}",
        "compiled": "yes" if config.cluster.compile else "no",
    }
    table = Table(show_header=False, title="measured with", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
