"""Blocks of steps of several contestants in one order, the ratios that come of it, and the form of a result.

A machine's speed wanders. So a reference runs before and after every block of another contestant, and each block is
compared with the mean of the two reference blocks beside it: what wanders more slowly than that cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from rich.progress import Progress
from rich.table import Column, Table
from scipy.stats import quantile_test

from replication.console import table
from replication.runs.files import write_json
from replication.runs.records import to_json

ClockName = Literal["seconds", "cpu_seconds"]
"""A field of Block."""
RATIOS = (">time", ">95 % upper", ">CPU time")
"""Columns of a table, over the reference: time, its bound, CPU time of the process (the host's, beside a GPU)."""


class Result:
    """Findings of one bench; a subclass is a dataclass, whose figures are fields that it computes of the others."""

    bench: ClassVar[str]

    def to_dict(self) -> Mapping[str, object]:
        """The file that --out names."""
        return {"bench": self.bench, **to_json(self)}

    def tables(self) -> list[Table]:
        """The result on a terminal of 80 columns."""
        raise NotImplementedError


def facts(title: str, rows: Mapping[str, object]) -> Table:
    """A table of names and what is to be said of them."""
    return table(title, [Column(no_wrap=True), Column(overflow="fold")], list(rows.items()), header=False)


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


@dataclass
class Interleaved:
    """Every block that counts, in the order in which it ran; the reference's stand at all even places."""

    reference: str
    block_tokens: int  # that one block trains
    blocks: tuple[Block, ...]
    tokens_per_second: dict[str, float] = field(init=False)  # at the median block of each contestant
    time_over_reference: dict[str, Ratio] = field(init=False)
    cpu_time_over_reference: dict[str, Ratio] = field(init=False)

    def __post_init__(self) -> None:
        others = sorted({block.name for block in self.blocks} - {self.reference})
        medians = {name: statistics.median(self.times(name)) for name in (self.reference, *others)}
        self.tokens_per_second = {name: self.block_tokens / seconds for name, seconds in medians.items()}
        self.time_over_reference = {name: Ratio.of(self.ratios(name)) for name in others}
        self.cpu_time_over_reference = {name: Ratio.of(self.ratios(name, "cpu_seconds")) for name in others}

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
    """reference, other, reference, ..., reference: each of the others once a round, and another first each time."""
    assert others, "there is nobody to compare with"
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
    keep: Path | None = None,
) -> Interleaved:
    """Run everybody's blocks, of so many tokens each, in the running order; `run` runs one of the named contestant.

    Each of the others has `rounds` blocks that count, and with `warm_up` everyone a first one that is dropped. The file
    `keep` has every block as soon as it ends: a call that is cut off has told what it knew.
    """
    order = running_order(reference, others, rounds)
    dropped = [reference, *others] if warm_up else []
    task, blocks = progress.add_task("", total=len(dropped) + len(order)), []
    for i, name in enumerate([*dropped, *order]):
        progress.update(task, description=f"{'warm-up' if i < len(dropped) else 'block'}: {name}")
        blocks.append(Block(name, *run(name)))
        progress.advance(task)
        if keep:
            write_json(keep, {"unfinished": True, "block_tokens": block_tokens, "blocks": to_json(blocks)})
    return Interleaved(reference, block_tokens, tuple(blocks[len(dropped) :]))
