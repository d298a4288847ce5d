"""`replicate bench head`: the ways to the losses, forward and backward, in peak memory and time.

The peak is counted first, on tensors that take no memory, so that any size can be asked about anywhere. Time and, on a
GPU, the allocator's own peak are measured where that fits the memory that is free.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from replication.bench.blocks import Result
from replication.bench.loops import Machine, describe, synchronize
from replication.config import ClusterConfig, ModelConfig
from replication.console import progress, table
from replication.errors import UserError
from replication.model.transformer import Transformer

KINDS = ("logits", "chunked", "liger")
SMOOTHING = 0.1
ROOM = 1.5
"""Times the counted peak that must be free before a head is run: kernels have buffers of their own."""


@dataclass(frozen=True)
class HeadSize:
    """Size of the head, and its arithmetic."""

    tokens: int
    vocabulary: int
    width: int
    bf16: bool  # autocast to bf16, weights in fp32
    compile: bool


@dataclass(frozen=True)
class HeadRow:
    """One way to the losses; bytes come on top of weights, hidden states and targets, gradients included."""

    kind: str
    counted_bytes: int | None = None  # peak of live tensors; None where the way does not run on fake tensors
    measured_bytes: int | None = None  # the GPU allocator's peak; None elsewhere
    seconds: float | None = None  # median of forward and backward
    note: str = ""


@dataclass(frozen=True)
class HeadBench(Result):
    """Findings of one run of `bench head`."""

    bench: ClassVar = "head"
    size: HeadSize
    repeats: int
    rows: tuple[HeadRow, ...]
    machine: Machine

    def tables(self) -> list[Table]:
        s = self.size
        title = (
            f"{s.tokens:,} tokens x {s.vocabulary:,} vocabulary x {s.width:,} width, "
            f"{'bf16' if s.bf16 else 'fp32'}{', compiled' if s.compile else ''}"
        )

        def gib(n_bytes: int | None) -> str | None:
            return None if n_bytes is None else f"{n_bytes / 2**30:.2f}"

        rows = [
            (r.kind, gib(r.counted_bytes), gib(r.measured_bytes), r.seconds and f"{r.seconds:.3f}", r.note)
            for r in self.rows
        ]
        return [table(title, ["head", ">counted GiB", ">measured GiB", ">seconds", "remark"], rows)]


def bench_head(size: HeadSize, device: torch.device, repeats: int, console: Console) -> HeadBench:
    """Compare the heads at one size, in so many timed runs of each; 0 counts only."""
    with progress(console) as bars:
        rows = [_row(kind, size, device, repeats) for kind in bars.track(KINDS, description="heads")]
    return HeadBench(size, repeats, tuple(rows), describe(device))


def _row(kind: str, size: HeadSize, device: torch.device, repeats: int) -> HeadRow:
    """One head, counted on fake tensors and eager, then run where it fits; one more run warms up."""
    on_gpu, counted = device.type == "cuda", None
    if kind == "liger" and not on_gpu:
        return HeadRow(kind, note="its kernels run on a GPU only")
    try:
        if kind != "liger":
            with FakeTensorMode():
                run = _runner(kind, replace(size, compile=False), device)
                with CountAllocations() as allocations:
                    run()
            counted = allocations.peak
        if not repeats:
            return HeadRow(kind, counted, note="counted only")
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
        needed = ROOM * (counted or 0)
        if needed > free:
            note = f"not run: {needed / 2**30:.0f} GiB wanted, {free / 2**30:.0f} GiB free"
            return HeadRow(kind, counted, note=note)
        run = _runner(kind, size, device)
    except UserError as error:  # its package is missing
        return HeadRow(kind, note=str(error))
    seconds, before = [], 0
    for _ in range(repeats + 1):
        synchronize()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    return HeadRow(kind, counted, peak, statistics.median(seconds[1:]))


def _runner(kind: str, size: HeadSize, device: torch.device) -> Callable[[], None]:
    """Forward and backward of one head; every token's loss gets a weight of its own, as the token gain gives it."""
    smallest = ModelConfig(
        vocab_size=size.vocabulary, d_model=size.width, n_blocks=1, n_heads=1, n_kv_heads=1, d_head=2, d_ff=1,
        feed_forward="dense", tied_head=True,
    )  # fmt: skip
    with torch.device(device):
        model = Transformer(smallest)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        hidden_BTD = torch.randn(1, size.tokens, size.width, requires_grad=True)
        targets_BT = torch.randint(0, size.vocabulary, (1, size.tokens))
        weight_N = torch.rand(size.tokens)
    model.configure(ClusterConfig(head=kind, compile=size.compile))  # type: ignore[arg-type]

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=size.bf16):
            losses = model.losses(hidden_BTD, targets_BT, SMOOTHING).losses
        loss: Tensor = (losses.smoothed_N * weight_N).sum()
        del losses
        loss.backward()
        hidden_BTD.grad = model.head.weight.grad = None

    return run


class CountAllocations(TorchDispatchMode):
    """Bytes of the storages made inside the block, on real tensors or on fake ones: `live` now, `peak` at most.

    What a kernel allocates and frees inside itself is not seen; every result of an operator is, views counted once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._see(tensor, 0)  # its storage is older than the block, or known
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, tensor.untyped_storage().nbytes())
        return out

    def _see(self, tensor: Tensor, n_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self.live -= n_bytes
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
