"""Blocks of steps of several contestants in one order, and the ratios that come of it.

A machine's speed wanders. So a reference runs before and after every block of another contestant, and each block is
compared with the mean of the two reference blocks beside it: what wanders more slowly than that cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.progress import Progress
from scipy.stats import quantile_test

from replication.bench.turns import Elapsed

ClockName = Literal["seconds", "cpu_seconds"]
"""A field of Block."""


RATIOS = ("time", "95 % upper", "CPU time")
"""Columns of a table, over the reference: time, its bound, CPU time of the process (the host's, beside a GPU)."""


@dataclass(frozen=True)
class Block:
    """Some optimizer steps of one contestant."""

    name: str
    seconds: float
    cpu_seconds: float  # of this process; on a CPU that others use too, the steadier of the two


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

    def seconds(self, name: str) -> list[float]:
        return [block.seconds for block in self.blocks if block.name == name]

    def tokens_per_second(self, name: str) -> float:
        return self.block_tokens / statistics.median(self.seconds(name))

    def ratios(self, name: str, clock: ClockName = "seconds") -> list[float]:
        """Each block of `name` over the mean of the two reference blocks beside it."""
        times = [getattr(block, clock) for block in self.blocks]
        places = [i for i, block in enumerate(self.blocks) if block.name == name]
        return [times[i] / statistics.mean((times[i - 1], times[i + 1])) for i in places]

    def ratio(self, name: str, clock: ClockName = "seconds") -> Ratio:
        return Ratio.of(self.ratios(name, clock))

    def reference_over(self, name: str, clock: ClockName = "seconds") -> Ratio:
        """The other way round: the reference's time over that of `name`, with a bound of its own."""
        return Ratio.of([1 / ratio for ratio in self.ratios(name, clock)])

    def ratio_cells(self, name: str) -> tuple[str, str, str]:
        """The columns RATIOS of a table's row."""
        if name == self.reference:
            return "1", "", "1"
        ratio = self.ratio(name)
        return f"{ratio}", ratio.bound, f"{self.ratio(name, 'cpu_seconds')}"

    def to_dict(self) -> dict[str, object]:
        names = sorted({block.name for block in self.blocks} - {self.reference})
        return {
            "reference": self.reference,
            "block_tokens": self.block_tokens,
            "tokens_per_second": {name: self.tokens_per_second(name) for name in [self.reference, *names]},
            "time_over_reference": {name: asdict(self.ratio(name)) for name in names},
            "cpu_time_over_reference": {name: asdict(self.ratio(name, "cpu_seconds")) for name in names},
            "blocks": [asdict(block) for block in self.blocks],
        }


def running_order(reference: str, others: Sequence[str], rounds: int) -> list[str]:
    """reference, other, reference, other, ..., reference: each of the others once a round, and another first each time.

    Raises:
        AssertionError: there is nobody to compare with.
    """
    assert others
    turned = [others[r % len(others) :] + others[: r % len(others)] for r in range(rounds)]  # type: ignore[operator]
    return [reference, *(name for one in turned for other in one for name in (other, reference))]


def interleave(
    reference: str,
    others: Sequence[str],
    rounds: int,
    block_tokens: int,
    run: Callable[[str], Elapsed],
    progress: Progress,
) -> Interleaved:
    """Run everybody's blocks in the running order, after one block of each that warms up and is dropped.

    Args:
        reference: who is compared with.
        others: who is compared.
        rounds: blocks of each of them that count.
        block_tokens: tokens that a block trains.
        run: runs one block of the named contestant.
        progress: gets a task for the blocks.
    """
    order = running_order(reference, others, rounds)
    task = progress.add_task("warm-up", total=len(order) + len(others) + 1)
    for name in (reference, *others):
        progress.update(task, description=f"warm-up: {name}")
        run(name)
        progress.advance(task)
    blocks = []
    for name in order:
        progress.update(task, description=f"block: {name}")
        blocks.append(Block(name, *run(name)))
        progress.advance(task)
    return Interleaved(reference, block_tokens, tuple(blocks))
