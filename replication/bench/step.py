"""`replicate bench step`: the four arms and a plain torch loop, block by block in one process on one set of weights.

The training that is timed is the real one. Between blocks it is paused: its interventions are switched, or the plain
loop runs a block with the same model and optimizer, so that memory holds one of each. The baseline arm runs between all
others, and what is reported of them is their time over the baseline's beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from replication.bench.blocks import RATIOS, Elapsed, Interleaved, Ratio, interleave, share_one_heap
from replication.bench.breakdown import Breakdown, Marks
from replication.bench.loops import PlainLoop, synthetic_store
from replication.bench.machine import Machine, PeakMemory, Utilisation, describe
from replication.bench.product import ARMS, Product
from replication.bench.result import Result, facts
from replication.config import RunConfig
from replication.console import progress, table
from replication.training.environment import prepare_torch

REFERENCE, PLAIN = "baseline", "plain loop"


@dataclass(frozen=True)
class StepBench(Result):
    """Findings of one run of `bench step`."""

    bench: ClassVar = "step"
    figures: ClassVar = ("baseline_over_plain_loop",)
    machine: Machine
    block_steps: int
    interleaved: Interleaved
    utilisation: Utilisation
    peak_bytes: dict[str, Any]  # its kind, and bytes by contestant; cumulative on a CPU
    breakdown: Breakdown
    config: RunConfig

    @property
    def baseline_over_plain_loop(self) -> Ratio:
        return self.interleaved.reference_over(PLAIN)

    def tables(self) -> list[Table]:
        """The arms, then where a step's time goes, then what it was measured with."""
        speeds, u = self.interleaved.tokens_per_second, self.utilisation
        arms = [
            (n, f"{speeds[n]:,.0f}", f"{u.full(speeds[n]):.1%}", f"{self.peak_bytes[n] / 2**30:.2f}",
             *self.interleaved.ratio_cells(n))
            for n in (PLAIN, *ARMS)
        ]  # fmt: skip
        title = "the arms beside the baseline, interleaved in one run"
        return [table(title, ["", ">tokens/s", ">MFU", ">peak GiB", *RATIOS], arms), self.breakdown.table(),
                facts("measured with", self._facts())]  # fmt: skip

    def _facts(self) -> dict[str, str]:
        u, config, versions = self.utilisation, self.config, self.machine.versions
        over_plain, cpu = self.baseline_over_plain_loop, self.interleaved.reference_over(PLAIN, "cpu_seconds")
        return {
            "baseline over plain": f"{over_plain} of its time, 95 % upper bound {over_plain.bound}; "
            f"{cpu} of its CPU time",
            "pairs": f"{over_plain.pairs} blocks of {self.block_steps} steps each, {config.accumulation} "
            f"micro-batch(es) a step, a log line every {config.logging.log_every_steps}",
            "MFU": f"{u.baseline_full:.1%} with all of the attention counted "
            f"({u.flops_per_token_full:.3g} FLOP/token), {u.baseline_causal:.1%} with its causal half "
            f"({u.flops_per_token_causal:.3g})",
            "of a peak of": f"{u.peak.flops_per_second / 1e12:,.3g} TFLOP/s ({u.peak.source})",
            "memory": self.peak_bytes["kind"],
            "machine": self.machine.device,
            "versions": f"torch {versions['torch']}, lightning {versions['lightning']}",
            "compiled": "yes" if config.cluster.compile else "no",
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
    with progress(console) as bars:
        product = Product(config, synthetic_store(config), block_steps)
        try:
            return _measure(product, rounds, bars)
        finally:
            product.close()


def _measure(product: Product, rounds: int, bars: Progress) -> StepBench:
    config, device, steps = product.config, product.device, product.block_steps
    shared = product.module.model, product.trainer.optimizers[0]
    plain = PlainLoop(config, synthetic_store(config), device, steps, *shared)
    memory, peaks = PeakMemory(device), dict.fromkeys((PLAIN, *ARMS), 0)

    def run(name: str) -> Elapsed:
        memory.start()
        if name != PLAIN:
            product.switch(name)
        elapsed = product.block(plain.block if name == PLAIN else None)
        peaks[name] = max(peaks[name], memory.read())
        return elapsed

    others = [*(arm for arm in ARMS if arm != REFERENCE), PLAIN]
    blocks = interleave(REFERENCE, others, rounds, steps * config.training.batch_tokens, run, bars)
    breakdown = take_breakdown(product, min(3, rounds))
    utilisation = Utilisation.of(config, device, blocks.tokens_per_second[REFERENCE])
    peak_bytes = {"kind": memory.kind, **peaks}
    return StepBench(describe(device), steps, blocks, utilisation, peak_bytes, breakdown, config)


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
