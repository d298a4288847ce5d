"""`replicate bench step`: the four arms and a plain torch loop, block by block in one process on one set of weights.

The training that is timed is the real one. Between blocks it is paused: its interventions are switched, or the plain
loop runs a block with the same model and optimizer, so that memory holds one of each. The baseline arm runs between all
others, and what is reported of them is their time over the baseline's beside it.
"""

from __future__ import annotations

import resource
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table

from replication.bench.blocks import RATIOS, Elapsed, Interleaved, Ratio, Result, facts, interleave
from replication.bench.loops import Machine, PlainLoop, describe, prepare, synchronize
from replication.bench.product import ARMS, Breakdown, Product, take_breakdown
from replication.config import RunConfig
from replication.console import progress, table
from replication.model.size import flops_per_token
from replication.training.environment import determinism

REFERENCE, PLAIN = "baseline", "plain loop"
# Dense bf16 with fp32 accumulation, FLOP/s, from NVIDIA's data sheets and architecture papers; figures "with sparsity"
# are twice as high and are not these. The first name that the device's own contains counts.
BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
PEAK_SIZE = 1024
PEAK_SECONDS = 0.5


@dataclass(frozen=True)
class Peak:
    """Highest speed at which a device multiplies matrices."""

    flops_per_second: float
    source: str


def arithmetic_peak(device: torch.device, precision: str) -> Peak:
    """The published peak of a known GPU in bf16; elsewhere the best of some large products on this machine now."""
    name, on_gpu = describe(device).device, device.type == "cuda"
    known = next((k for k in BF16_PEAKS if k in name), None) if on_gpu and precision == "bf16-mixed" else None
    if known:
        return Peak(BF16_PEAKS[known], f"published, {known}, dense bf16")
    dtype = {"bf16-mixed": torch.bfloat16, "32-true": torch.float32, "64-true": torch.float64}[precision]
    size = PEAK_SIZE * (8 if on_gpu else 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        best = min(best, time.perf_counter() - started)
    where = "" if on_gpu else f", {torch.get_num_threads()} CPU thread(s)"
    return Peak(2 * size**3 / best, f"measured, {size}-square products in {str(dtype).removeprefix('torch.')}{where}")


@dataclass(frozen=True)
class Utilisation:
    """Model FLOPs utilisation: the share of the peak that the model's own arithmetic makes up, in two conventions."""

    flops_per_token_full: float  # all of the attention counts
    flops_per_token_causal: float  # only what the causal mask leaves
    peak: Peak
    baseline_full: float
    baseline_causal: float


@dataclass(frozen=True)
class StepBench(Result):
    """Findings of one run of `bench step`."""

    bench: ClassVar = "step"
    machine: Machine
    block_steps: int
    interleaved: Interleaved
    utilisation: Utilisation
    peak_bytes: dict[str, int | str]  # its kind, and bytes by contestant; cumulative on a CPU
    breakdown: Breakdown
    config: RunConfig
    baseline_over_plain_loop: Ratio

    def tables(self) -> list[Table]:
        """The arms, then where a step's time goes, then what it was measured with."""
        u, config, versions = self.utilisation, self.config, self.machine.versions
        speeds, per_token = self.interleaved.tokens_per_second, u.flops_per_token_full / u.peak.flops_per_second
        arms = [
            (n, f"{speeds[n]:,.0f}", f"{speeds[n] * per_token:.1%}", f"{int(self.peak_bytes[n]) / 2**30:.2f}",
             *self.interleaved.ratio_cells(n))
            for n in (PLAIN, *ARMS)
        ]  # fmt: skip
        over_plain, cpu = self.baseline_over_plain_loop, self.interleaved.reference_over(PLAIN, "cpu_seconds")
        measured_with = {
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
        title = "the arms beside the baseline, interleaved in one run"
        columns = ["", ">tokens/s", ">MFU", ">peak GiB", *RATIOS]
        return [table(title, columns, arms), self.breakdown.table(), facts("measured with", measured_with)]


def bench_step(
    config: RunConfig, block_steps: int, rounds: int, console: Console, out: Path | None = None
) -> StepBench:
    """Time the four arms of a config from `product.configure` beside the plain loop: so many blocks of each count.

    `out` has every block as it comes.
    """
    prepare(config)
    deterministic = determinism(config.training.deterministic)
    with deterministic, progress(console) as bars, closing(Product(config, block_steps)) as product:
        device, on_gpu = product.device, product.device.type == "cuda"
        shared = product.module.model, product.trainer.optimizers[0]
        plain = PlainLoop(config, device, block_steps, shared)
        peaks = dict.fromkeys((PLAIN, *ARMS), 0)

        def run(name: str) -> Elapsed:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            if name != PLAIN:
                product.switch(name)
            elapsed = product.block(plain.block if name == PLAIN else None)
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) if on_gpu else resident)
            return elapsed

        others = [*(arm for arm in ARMS if arm != REFERENCE), PLAIN]
        blocks = interleave(REFERENCE, others, rounds, block_steps * config.training.batch_tokens, run, bars, keep=out)
        breakdown = take_breakdown(product, min(3, rounds))
    full, causal = (flops_per_token(config.model, config.data.block_size_tokens, c) for c in (False, True))
    peak = arithmetic_peak(device, config.training.precision)
    share = blocks.tokens_per_second[REFERENCE] / peak.flops_per_second
    utilisation = Utilisation(full, causal, peak, full * share, causal * share)
    used: dict[str, int | str] = {
        "kind": "allocated on the GPU" if on_gpu else "resident, whole process so far",
        **peaks,
    }
    over = blocks.reference_over(PLAIN)
    return StepBench(describe(device), block_steps, blocks, utilisation, used, breakdown, config, over)
