"""`replicate bench head`: the ways to the losses, forward and backward, in peak memory and time.

The peak is counted first, on tensors that take no memory, so that any size can be asked about anywhere. Time and, on a
GPU, the allocator's own peak are measured where that fits the memory that is free.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
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

from replication.bench.blocks import synchronize
from replication.bench.loops import head_losses
from replication.bench.machine import Machine, describe
from replication.bench.result import Result
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
    counted_bytes: int | None  # peak of live tensors; None where the way does not run on fake tensors
    measured_bytes: int | None  # the GPU allocator's peak; None elsewhere
    seconds: float | None  # median of forward and backward
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
        rows = [
            (r.kind, _gib(r.counted_bytes), _gib(r.measured_bytes), r.seconds and f"{r.seconds:.3f}", r.note)
            for r in self.rows
        ]
        return [table(title, ["head", ">counted GiB", ">measured GiB", ">seconds", "remark"], rows)]


def _gib(n_bytes: int | None) -> str | None:
    return None if n_bytes is None else f"{n_bytes / 2**30:.2f}"


def bench_head(size: HeadSize, device: torch.device, repeats: int, console: Console) -> HeadBench:
    """Compare the heads at one size.

    Args:
        size: what to compute.
        device: where.
        repeats: timed runs of each; 0 counts only.
        console: for progress.
    """
    rows = []
    with progress(console) as bars:
        for kind in bars.track(KINDS, description="heads"):
            rows.append(_row(kind, size, device, repeats))
    return HeadBench(size, repeats, tuple(rows), describe(device))


def _row(kind: str, size: HeadSize, device: torch.device, repeats: int) -> HeadRow:
    if kind == "liger" and device.type != "cuda":
        return HeadRow(kind, None, None, None, "its kernels run on a GPU only")
    try:
        counted = None if kind == "liger" else count(kind, size, device)
        row = HeadRow(kind, counted, None, None, "" if repeats else "counted only")
        needed, free = ROOM * (counted or 0), free_bytes(device)
        if repeats and needed > free:
            return replace(row, note=f"not run: {needed / 2**30:.0f} GiB wanted, {free / 2**30:.0f} GiB free")
        return measure(row, size, device, repeats) if repeats else row
    except UserError as error:  # its package is missing
        return HeadRow(kind, None, None, None, str(error))


def count(kind: str, size: HeadSize, device: torch.device) -> int:
    """Peak bytes of live tensors in forward and backward, on fake tensors, eager."""
    with FakeTensorMode():
        run = _Run(kind, replace(size, compile=False), device)
        with CountAllocations() as counted:
            run()
    return counted.peak


def measure(row: HeadRow, size: HeadSize, device: torch.device, repeats: int) -> HeadRow:
    """`row` with time and, on a GPU, memory; one more run warms up."""
    run, seconds = _Run(row.kind, size, device), []
    on_gpu, before = device.type == "cuda", 0
    for i in range(repeats + 1):
        run.forget()
        synchronize()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        run()
        synchronize()
        if i:
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    del run
    gc.collect()
    return replace(row, seconds=statistics.median(seconds), measured_bytes=peak)


class _Run:
    """Forward and backward of one head; every token's loss gets a weight of its own, as the token gain gives it."""

    def __init__(self, kind: str, size: HeadSize, device: torch.device) -> None:
        self.size, self.device = size, device
        smallest = ModelConfig(
            vocab_size=size.vocabulary, d_model=size.width, n_blocks=1, n_heads=1, n_kv_heads=1, d_head=2, d_ff=1,
            feed_forward="dense", tied_head=True,
        )  # fmt: skip
        with torch.device(device):
            self.model = Transformer(smallest)
            torch.nn.init.normal_(self.model.head.weight, std=0.02)
            self.hidden_BTD = torch.randn(1, size.tokens, size.width, requires_grad=True)
            self.targets_BT = torch.randint(0, size.vocabulary, (1, size.tokens))
            self.weight_N = torch.rand(size.tokens)
        self.model.configure(ClusterConfig(head=kind, compile=size.compile))  # type: ignore[arg-type]

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.size.bf16):
            losses = head_losses(self.model, self.hidden_BTD, self.targets_BT, SMOOTHING)
        loss: Tensor = (losses.smoothed_N * self.weight_N).sum()
        del losses
        loss.backward()

    def forget(self) -> None:
        self.hidden_BTD.grad = self.model.head.weight.grad = None


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


# ---------------------------------------------------------------- counted memory


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
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, 0)  # its storage is older than the block, or known
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, tensor.untyped_storage().nbytes())
        return out

    def _see(self, tensor: torch.Tensor, n_bytes: int) -> None:
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
