"""The measure of a speed: the machine's arithmetic peak, its memory, and the versions that ran."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from replication.bench.blocks import synchronize
from replication.config import RunConfig
from replication.model.size import flops_per_token
from replication.runs.manifest import package_versions
from replication.training.environment import cpu_name

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


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def arithmetic_peak(device: torch.device, precision: str) -> Peak:
    """The published peak of a known GPU in bf16; elsewhere what a large product reaches on this machine now."""
    name = device_name(device)
    if device.type == "cuda" and precision == "bf16-mixed":
        for known, peak in BF16_PEAKS.items():
            if known in name:
                return Peak(peak, f"published, {known}, dense bf16")
    return measured_peak(device, precision)


def measured_peak(device: torch.device, precision: str) -> Peak:
    """The best of some square products of the precision's matrix type."""
    dtype = {"bf16-mixed": torch.bfloat16, "32-true": torch.float32, "64-true": torch.float64}[precision]
    size = PEAK_SIZE * (8 if device.type == "cuda" else 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        best = min(best, time.perf_counter() - started)
    where = "" if device.type == "cuda" else f", {torch.get_num_threads()} CPU thread(s)"
    return Peak(2 * size**3 / best, f"measured, {size}-square products in {str(dtype).removeprefix('torch.')}{where}")


@dataclass(frozen=True)
class Utilisation:
    """Model FLOPs utilisation: the share of the peak that the model's own arithmetic makes up, in two conventions."""

    flops_per_token_full: float  # all of the attention counts
    flops_per_token_causal: float  # only what the causal mask leaves
    peak: Peak
    baseline_full: float
    baseline_causal: float

    @classmethod
    def of(cls, config: RunConfig, device: torch.device, tokens_per_second: float) -> Utilisation:
        """At the baseline's speed."""
        full, causal = (flops_per_token(config.model, config.data.block_size_tokens, c) for c in (False, True))
        peak = arithmetic_peak(device, config.training.precision)
        share = tokens_per_second / peak.flops_per_second
        return cls(full, causal, peak, full * share, causal * share)

    def full(self, tokens_per_second: float) -> float:
        """At another speed, with all of the attention counted."""
        return self.flops_per_token_full * tokens_per_second / self.peak.flops_per_second


class PeakMemory:
    """Peak bytes of what runs between `start` and `read`: of the GPU exactly; of a CPU process, all of it so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "allocated on the GPU" if device.type == "cuda" else "resident, whole process so far"

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Machine:
    """Where a result was measured, and with what."""

    device: str
    threads: int
    versions: Mapping[str, str | None]


def describe(device: torch.device) -> Machine:
    return Machine(device_name(device), torch.get_num_threads(), package_versions())
