"""`replicate bench rates`: the rates that the time model assumes, measured on this device with a config's own shapes.

Products, grouped products, attention kernels, fused bytes, launches, routing and Newton-Schulz, and the step that the
measured ones predict (model/cost.py). A part that this device cannot compute is named, and the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from replication.bench.blocks import Result
from replication.bench.loops import Machine, describe, synchronize
from replication.config import RunConfig
from replication.console import say, table
from replication.errors import first_line
from replication.model.cost import H100, Rates, StepTime, newton_schulz_flops, predict_step
from replication.model.head import chunk_rows
from replication.model.size import muon_matrices, padded_vocabulary
from replication.model.transformer import attend
from replication.runs.files import write_json
from replication.training.muon import NewtonSchulz, orthogonalise

LAUNCHES = 1000
Measurement = tuple[str, float, Callable[[], object]]
"""(what, work of a call in FLOP or bytes, the call)."""


@dataclass(frozen=True)
class RateRow:
    """One call."""

    rate: str  # the field of Rates that it measures; empty: none
    name: str
    milliseconds: float | None = None  # median
    per_second: float | None = None  # FLOP or bytes
    note: str = ""


@dataclass(frozen=True)
class RateBench(Result):
    """Measured rates beside the assumed ones, and both predictions."""

    bench: ClassVar = "rates"
    config: RunConfig
    rows: tuple[RateRow, ...]
    measured: Rates  # the median of each field's rows; what was not measured is as assumed
    predicted: StepTime
    assumed: StepTime
    machine: Machine

    def tables(self) -> list[Table]:
        rows = [
            (r.name, r.milliseconds and f"{r.milliseconds:.3f}", r.per_second and f"{r.per_second / 1e12:.3g}",
             f"{getattr(H100, r.rate) / 1e12:.3g}" if r.rate and r.per_second else None, r.note)
            for r in self.rows
        ]  # fmt: skip
        speeds = (
            f"{self.predicted.tokens_per_second:,.0f} tokens/s predicted, {self.assumed.tokens_per_second:,.0f} on "
        )
        return [table(f"{speeds}assumed rates", ["call", ">ms", ">10^12/s", ">assumed", "remark"], rows)]


def bench_rates(config: RunConfig, device: torch.device, repeats: int, out: Path | None, console: Console) -> RateBench:
    """Time every call `repeats` times; each is printed, and in `out`, as it comes: a call cut off has told some."""
    rows: list[RateRow] = []
    for rate, measurements in _measurements(config, device):
        for name, work, call in measurements:
            try:
                seconds = _seconds(call, repeats)
                rows.append(RateRow(rate, name, 1e3 * seconds, work / seconds if work else None))
            except (RuntimeError, NotImplementedError) as error:  # this device has no such kernel
                rows.append(RateRow(rate, name, note=first_line(error)))
            say(console, f"{rows[-1].name}: {rows[-1].note or f'{rows[-1].milliseconds:.3f} ms'}")
            if out:
                write_json(out, {"bench": "rates", "rows": [vars(row) for row in rows]})
    found = {
        rate: statistics.median(values)
        for rate in vars(H100)
        if (values := [r.per_second for r in rows if r.rate == rate and r.per_second])
    }
    launches = [r.milliseconds for r in rows if r.rate == "launch_seconds" and r.milliseconds]
    measured = replace(H100, **found, **({"launch_seconds": launches[0] / 1e3 / LAUNCHES} if launches else {}))
    step = predict_step(config, measured)
    return RateBench(config, tuple(rows), measured, step, predict_step(config), describe(device))


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of some calls, each waited for; the first one warms up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _measurements(config: RunConfig, device: torch.device) -> Iterator[tuple[str, list[Measurement]]]:
    """By the field of Rates: calls in bf16 with the shapes of one micro-batch."""
    m = config.model
    n, width, hidden, padded = (
        config.micro_batch_sequences * config.data.block_size_tokens, m.d_model, m.d_ff, padded_vocabulary(m),
    )  # fmt: skip

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, up, rows = made(n, width), made(hidden, width), chunk_rows(n, m.vocab_size, fused=device.type == "cuda")
    weight, slopes, chunk = made(padded, width), made(rows, padded), made(rows, width)
    odd = made(rows * m.vocab_size).view(rows, m.vocab_size)
    head = 2.0 * rows * width * padded
    yield (
        "products",
        [
            (f"{n} x {width} x {hidden}", 2.0 * n * width * hidden, lambda: x @ up.T),
            ("logits of a chunk", head, lambda: chunk @ weight.T),
            ("its hidden states' gradient", head, lambda: slopes @ weight),
            ("its weight's gradient", head, lambda: slopes.T @ chunk),
        ],
    )
    yield "", [("its weight's gradient, rows not padded", 2.0 * rows * width * m.vocab_size, lambda: odd.T @ chunk)]
    if m.feed_forward == "moe":
        slots, experts = n * m.top_k, m.n_experts
        sent, stacked = made(slots, width), made(experts, 2 * hidden, width)
        ends = (torch.arange(1, experts + 1, device=device) * slots // experts).to(torch.int32)
        back = made(slots, 2 * hidden)
        work = 4.0 * slots * width * hidden
        yield (
            "grouped",
            [
                ("experts, forward", work, lambda: F.grouped_mm(sent, stacked.transpose(1, 2), offs=ends)),
                ("experts, gradient of the input", work, lambda: F.grouped_mm(back, stacked, offs=ends)),
                ("experts, gradient of the weights", work, lambda: F.grouped_mm(back.T, sent, offs=ends)),
            ],
        )
        chosen, probs = torch.randint(experts, (slots,), device=device), torch.rand(n, experts, device=device)
        yield (
            "",
            [
                ("top-k", 0.0, lambda: probs.topk(m.top_k)),
                ("sort of int64", 0.0, lambda: chosen.argsort(stable=True)),
                ("sort of bytes", 0.0, lambda: chosen.to(torch.uint8).argsort(stable=True)),
            ],
        )
    length, batch = config.data.block_size_tokens, config.micro_batch_sequences
    q, k, v = (
        made(batch, length, heads, m.d_head).transpose(1, 2).requires_grad_()
        for heads in (m.n_heads, m.n_kv_heads, m.n_kv_heads)
    )

    def attention(kernel: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(q, k, v, True, kernel).sum(), (q, k, v))

    work = 3.5 * 4 * batch * m.n_heads * length**2 * m.d_head / 2
    own = "hopper" if device.type == "cuda" else "auto"
    yield "attention", [("attention, as trained", work, attention(own))]
    yield "", [(f"attention, {kernel}", work, attention(kernel)) for kernel in ("flash", "cudnn", "efficient")]
    stream = torch.empty(n * width * 8, device=device)
    yield "memory", [("fp32 numbers in place", 8.0 * stream.numel(), lambda: stream.mul_(0.5))]
    small = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            small.add_(1.0)

    yield "launch_seconds", [(f"{LAUNCHES} launches", 0.0, launch)]
    how = NewtonSchulz(torch.bfloat16, gram=config.training.muon_gram)
    for _, r, c in {(0, r, c) for _, r, c in muon_matrices(m)}:
        matrices = [torch.randn(r, c, device=device) for _ in range(8)]
        work = 8 * newton_schulz_flops(r, c, how.gram)
        yield "", [(f"Newton-Schulz, 8 of {r} x {c}", work, lambda m=matrices: orthogonalise(m, how))]  # type: ignore[misc]
