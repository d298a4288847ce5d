"""Where a step's time goes: marks in the order of execution, each of which says what runs from here on.

A part of the model is wrapped between two identities whose forward and backward leave the marks, so that its share of
backward is seen too. On a GPU a mark is a CUDA event in the stream, elsewhere a clock reading. Marks cost something, so
a breakdown is taken in blocks of its own, after those that are compared.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from replication.bench.loops import HEAD
from replication.console import table
from replication.data.module import Batch
from replication.model.transformer import Transformer

REST = "rest"
DATA = "data wait"
OPTIMIZER = "clipping and optimizer"


class Clock:
    """Marks of one phase; off until `start`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.running = device, False
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self._marks, self.running = [], True
        self(REST)

    def __call__(self, part: str) -> None:
        """From here on `part` runs."""
        if self.running:
            self._marks.append((part, self._now()))

    def stop(self) -> dict[str, float]:
        """Seconds of each part since `start`; they add up to the whole time."""
        self(REST)
        self.running = False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
        return dict(seconds)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Mark(torch.autograd.Function):
    """The identity; says `ahead` on the way forward and `back` on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, ahead: str, back: str) -> Tensor:
        clock(ahead)
        ctx.clock, ctx.back = clock, back
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.clock(ctx.back)
        return gradient, None, None, None


def timed(call: Callable[..., Any], part: str, clock: Clock) -> Callable[..., Any]:
    """`call` with marks around it, forward and backward: its first argument and its first result are tensors."""

    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _mark_first(call(_Mark.apply(x, clock, part, REST), *args, **kwargs), part, clock)

    return wrapper


def _mark_first(out: Any, part: str, clock: Clock) -> Any:
    """`out` with the mark of a part's end on its first tensor, however deep in tuples that is."""
    if isinstance(out, Tensor):
        return _Mark.apply(out, clock, REST, part)
    items = (_mark_first(out[0], part, clock), *out[1:])
    return type(out)(*items) if hasattr(out, "_fields") else items


def parts_of(model: Transformer) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, attribute that is called, part); a compiled block is one part, for its kernels are of all of it."""
    for block in cast(Iterable[Any], model.blocks):
        if block._compiled_call_impl is not None:
            yield block, "_compiled_call_impl", "blocks, compiled"
            continue
        yield block.attention, "forward", "attention"
        yield block.feed_forward, "forward", "experts" if model.config.feed_forward == "moe" else "feed-forward"
    yield model, HEAD, "head"


class Marks(Callback):
    """Puts the marks into a training and takes them out again."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._undo = ExitStack()

    def install(self, model: Transformer, optimizer: Optimizer) -> None:
        for module, name, part in parts_of(model):
            original, own = getattr(module, name), module.__dict__
            self._undo.callback(partial(own.__setitem__, name, original) if name in own else partial(own.pop, name))
            own[name] = timed(original, part, self.clock)
        handle = optimizer.register_step_post_hook(lambda *_: self.clock(REST))
        self._undo.callback(handle.remove)

    def remove(self) -> None:
        self._undo.close()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.clock(OPTIMIZER)  # the layer scale, the clipping and the update; the optimizer's own hook ends it


class MarkedLoader:
    """A loader's batches, with marks around the wait for each."""

    def __init__(self, loader: Iterable[Batch], clock: Clock) -> None:
        self.loader, self.clock = loader, clock

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            self.clock(DATA)
            batch = next(batches)  # endless
            self.clock(REST)
            yield batch


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of each part of a step of the product, all interventions on, forward and backward together."""

    steps: int
    milliseconds: dict[str, float]

    @classmethod
    def of(cls, seconds: dict[str, float], steps: int) -> Breakdown:
        longest = sorted(seconds, key=lambda part: (part == REST, -seconds[part]))
        return cls(steps, {part: 1000 * seconds[part] / steps for part in longest})

    def table(self) -> Table:
        whole = sum(self.milliseconds.values())
        rows = [(part, f"{ms:,.2f}", f"{ms / whole:.1%}") for part, ms in self.milliseconds.items()]
        columns = ["part, forward and backward", ">ms a step", ">share"]
        return table("where a step's time goes (arm both, with marks)", columns, rows)
