"""Blocks of steps of several contestants in one order, and the ratios that come of it.

A machine's speed wanders. So a reference runs before and after every block of another contestant, and each block is
compared with the mean of the two reference blocks beside it: what wanders more slowly than that cancels.

Lightning, transformers and LitGPT do not hand control back after some steps. So each training has a thread, calls
`pause` before every block and stays there until its next turn: exactly one thread runs at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from rich.progress import Progress
from scipy.stats import quantile_test

ClockName = Literal["seconds", "cpu_seconds"]
"""A field of Block."""
RATIOS = (">time", ">95 % upper", ">CPU time")
"""Columns of a table, over the reference: time, its bound, CPU time of the process (the host's, beside a GPU)."""
M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

# ---------------------------------------------------------------- ratios


class Elapsed(NamedTuple):
    """Time that a block took."""

    seconds: float
    cpu_seconds: float  # of all threads of this process: what other processes take away is not in it


@dataclass(frozen=True)
class Block:
    """Some optimizer steps of one contestant."""

    name: str
    seconds: float
    cpu_seconds: float  # on a CPU that others use too, the steadier of the two


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios of times; below 1 is faster than the reference."""

    median: float
    upper_bound_95: float | None  # one-sided bound of the median, from order statistics; none below five pairs
    pairs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        bound = float(quantile_test(values, p=0.5, alternative="less").confidence_interval(0.95).high)
        return cls(statistics.median(values), bound if math.isfinite(bound) else None, len(values))

    def __str__(self) -> str:
        return f"{self.median:.4f}"

    @property
    def bound(self) -> str:
        return "of 5 pairs on" if self.upper_bound_95 is None else f"{self.upper_bound_95:.4f}"


@dataclass(frozen=True)
class Interleaved:
    """Every block in the order in which it ran; reference blocks stand at all even places.

    Args:
        reference: name of the contestant that the others are compared with.
        block_tokens: tokens that one block trains.
        blocks: without the ones that warmed up.
    """

    reference: str
    block_tokens: int
    blocks: tuple[Block, ...]
    figures: ClassVar = ("tokens_per_second", "time_over_reference", "cpu_time_over_reference")

    @property
    def others(self) -> list[str]:
        return sorted({block.name for block in self.blocks} - {self.reference})

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """At the median block of each contestant."""
        return {n: self.block_tokens / statistics.median(self.times(n)) for n in (self.reference, *self.others)}

    @property
    def time_over_reference(self) -> dict[str, Ratio]:
        return {name: Ratio.of(self.ratios(name)) for name in self.others}

    @property
    def cpu_time_over_reference(self) -> dict[str, Ratio]:
        return {name: Ratio.of(self.ratios(name, "cpu_seconds")) for name in self.others}

    def times(self, name: str, clock: ClockName = "seconds") -> list[float]:
        return [getattr(block, clock) for block in self.blocks if block.name == name]

    def ratios(self, name: str, clock: ClockName = "seconds") -> list[float]:
        """Each block of `name` over the mean of the two reference blocks beside it."""
        times = [getattr(block, clock) for block in self.blocks]
        places = [i for i, block in enumerate(self.blocks) if block.name == name]
        return [times[i] / statistics.mean((times[i - 1], times[i + 1])) for i in places]

    def reference_over(self, name: str, clock: ClockName = "seconds") -> Ratio:
        """The other way round: the reference's time over that of `name`, with a bound of its own."""
        return Ratio.of([1 / ratio for ratio in self.ratios(name, clock)])

    def ratio_cells(self, name: str) -> tuple[str, str, str]:
        """The columns RATIOS of a table's row."""
        if name == self.reference:
            return "1", "", "1"
        ratio = self.time_over_reference[name]
        return f"{ratio}", ratio.bound, f"{self.cpu_time_over_reference[name]}"


def running_order(reference: str, others: Sequence[str], rounds: int) -> list[str]:
    """reference, other, reference, other, ..., reference: each of the others once a round, and another first each time.

    Raises:
        AssertionError: there is nobody to compare with.
    """
    assert others
    turned = [[*others[r % len(others) :], *others[: r % len(others)]] for r in range(rounds)]
    return [reference, *(name for one in turned for other in one for name in (other, reference))]


def interleave(
    reference: str,
    others: Sequence[str],
    rounds: int,
    block_tokens: int,
    run: Callable[[str], Elapsed],
    progress: Progress,
    warm_up: bool = True,
) -> Interleaved:
    """Run everybody's blocks in the running order.

    Args:
        reference: who is compared with.
        others: who is compared.
        rounds: blocks of each of them that count.
        block_tokens: tokens that a block trains.
        run: runs one block of the named contestant.
        progress: gets a task for the blocks.
        warm_up: begin with one block of each that is dropped.
    """
    order = running_order(reference, others, rounds)
    dropped = [reference, *others] if warm_up else []
    task, blocks = progress.add_task("", total=len(dropped) + len(order)), []
    for i, name in enumerate([*dropped, *order]):
        progress.update(task, description=f"{'warm-up' if i < len(dropped) else 'block'}: {name}")
        blocks.append(Block(name, *run(name)))
        progress.advance(task)
    return Interleaved(reference, block_tokens, tuple(blocks[len(dropped) :]))


# ---------------------------------------------------------------- trainings that pause

Pause = Callable[[], None]
"""Called by a training before the first step of every block."""


class Stopped(BaseException):
    """Ends a paused training from inside; nothing is wrong."""


class Turns:
    """A training in a thread of its own, which runs only inside `block`.

    Args:
        train: the whole training.
    """

    def __init__(self, train: Callable[[Pause], None]) -> None:
        self._train = train
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._instead: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        self._advance()  # to its first pause: what it takes to set up is in no block

    def block(self, instead: Callable[[], None] | None = None) -> Elapsed:
        """Run to the next pause, and wait for the device.

        Args:
            instead: work that is done in the training's thread while the training itself stays where it is. Memory is
                handed out by thread, so that only work in one thread, or in threads of one kind, compares fairly.

        Raises:
            BaseException: what the training raised.
        """
        assert self._thread.is_alive(), "the training has ended before its last block"
        self._instead = instead
        started, cpu_started = time.perf_counter(), time.process_time()
        self._advance()
        return Elapsed(time.perf_counter() - started, time.process_time() - cpu_started)

    def close(self) -> None:
        """End the training where it is paused, or at its next pause, and wait for its thread."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def _advance(self) -> None:
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        self._go.acquire()
        try:
            self._train(self._pause)
        except Stopped:
            pass
        except BaseException as error:  # it is raised again where the block was asked for
            self._error = error
        finally:
            self._paused.release()

    def _pause(self) -> None:
        while not self._closed:
            synchronize()
            self._paused.release()
            self._go.acquire()
            if self._closed:
                break
            if self._instead is None:
                return
            self._instead()
        raise Stopped


def share_one_heap() -> None:
    """Let every thread take memory where the main thread does, as a training that runs alone does.

    glibc otherwise gives threads heaps of their own, which hand large tensors back to the system and take them again at
    every step, each at its own rate: the same step then costs one thread a tenth more than another. To be called before
    the first thread; does nothing where there is no such setting.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
