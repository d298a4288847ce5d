"""`replicate bench peers`: one dense model and batch in our training, in a plain torch loop, and in other trainers.

All of them take turns in one process, with the plain loop between any two. Beside them the two interventions: ours, and
as a first version writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from replication.bench.blocks import RATIOS, Interleaved, interleave
from replication.bench.machine import describe
from replication.bench.naive import NaiveLoop
from replication.bench.others import missing, train_with_hugging_face, train_with_litgpt
from replication.bench.plain import PlainLoop
from replication.bench.product import Product, configure
from replication.bench.synthetic import SyntheticStore
from replication.bench.turns import Elapsed, Pause, Turns, share_one_heap
from replication.config import RunConfig, to_dict
from replication.errors import UserError
from replication.training.environment import prepare_torch

PLAIN, NAIVE = "plain loop", "both, naive"
PRODUCTS = {"product": "baseline", "both, product": "both"}
OTHERS = {"HF Trainer": train_with_hugging_face, "LitGPT": train_with_litgpt}
NAMES = ("product", "HF Trainer", "LitGPT", "both, product", NAIVE)
PACKAGES = ("torch", "lightning", "transformers", "accelerate", "litgpt")


class Contestant(Protocol):
    """A training that runs block by block."""

    def block(self) -> Elapsed:
        """Run the next block."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class PeersBench:
    """What one run of `bench peers` measured."""

    config: RunConfig
    block_steps: int
    interleaved: Interleaved
    skipped: dict[str, str]  # what the contestants lack that did not run
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, object]:
        return {
            "bench": "peers",
            "machine": self.machine,
            "block_steps": self.block_steps,
            "interleaved": self.interleaved.to_dict(),
            "skipped": self.skipped,
            "config": to_dict(self.config),
        }

    @property
    def names(self) -> list[str]:
        return [name for name in NAMES if name not in self.skipped]


def check_comparable(config: RunConfig) -> None:
    """Raise UserError for a model or optimizer that the others have not."""
    if config.model.feed_forward != "dense":
        raise UserError("model.feed_forward: bench peers compares a dense model; remove model.feed_forward=moe")
    if config.training.optimizer != "adamw":
        raise UserError(
            f"training.optimizer: bench peers trains with AdamW everywhere, not {config.training.optimizer}; remove it"
        )


def bench_peers(config: RunConfig, block_steps: int, rounds: int, console: Console) -> PeersBench:
    """Time the contestants that are installed.

    Args:
        config: the user's; dense.
        block_steps: optimizer steps in a block.
        rounds: blocks of each contestant that count.
        console: for progress.
    """
    check_comparable(config)
    config = configure(config, block_steps, "baseline")
    prepare_torch(config)
    share_one_heap()
    skipped = {name: lack for name in NAMES if (lack := missing(name))}
    contestants: dict[str, Contestant] = {}
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("setting up", total=None)
            for name in (PLAIN, *(n for n in NAMES if n not in skipped)):
                progress.update(task, description=f"setting up: {name}")
                contestants[name] = _contestant(name, config, block_steps)
            progress.remove_task(task)
            others, tokens = list(contestants)[1:], block_steps * config.training.batch_tokens
            run: Callable[[str], Elapsed] = lambda name: contestants[name].block()  # noqa: E731
            interleaved = interleave(PLAIN, others, rounds, tokens, run, progress)
    finally:
        for contestant in contestants.values():
            contestant.close()
    machine = describe(_device(config)) | {"versions": versions()}
    return PeersBench(config, block_steps, interleaved, skipped, machine)


def _device(config: RunConfig) -> torch.device:
    on_gpu = config.cluster.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def _contestant(name: str, config: RunConfig, block_steps: int) -> Contestant:
    store, device = SyntheticStore(config), _device(config)
    if name in PRODUCTS:
        return Product(configure(config, block_steps, PRODUCTS[name]), store, block_steps)
    if name in OTHERS:
        return Turns(lambda pause: OTHERS[name](config, store, device, block_steps, pause))
    return Turns(lambda pause: _train_by_hand(NaiveLoop if name == NAIVE else PlainLoop, config, block_steps, pause))


def _train_by_hand(kind: type[PlainLoop], config: RunConfig, block_steps: int, pause: Pause) -> None:
    loop = kind(config, SyntheticStore(config), _device(config), block_steps)
    while True:
        pause()
        loop.block()


def versions() -> dict[str, str | None]:
    """Versions of what is compared; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


# ---------------------------------------------------------------- in words

REMARKS = {
    PLAIN: "the same step in torch alone",
    "product": "Lightning, callbacks, journal, TensorBoard",
    "HF Trainer": "the same model; logs kept in memory",
    "LitGPT": "its own model and loop; no smoothing",
    "both, product": "both interventions, as trained here",
    NAIVE: "host reads, quantiles, loop over names",
}


def peers_tables(bench: PeersBench) -> list[Table]:
    """The contestants, then what they are; each fits 80 columns."""
    c = bench.interleaved
    table = Table(title="one dense model and batch, interleaved in one run", title_justify="left")
    table.add_column("")
    for name in ("tokens/s", "speed", *RATIOS):
        table.add_column(name, justify="right")
    for name in (PLAIN, *bench.names):
        speed = 1.0 if name == PLAIN else 1 / c.ratio(name).median
        table.add_row(name, f"{c.tokens_per_second(name):,.0f}", f"{speed:.4f}", *c.ratio_cells(name))
    return [table, _facts_table(bench)]


def _facts_table(bench: PeersBench) -> Table:
    c, config = bench.interleaved, bench.config
    table = Table(show_header=False, title="what they are", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in (PLAIN, *NAMES):
        table.add_row(name, bench.skipped.get(name, REMARKS[name]))
    present = {k: v for k, v in bench.machine["versions"].items() if v}
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in present.items()))
    table.add_row("machine", f"{bench.machine['device']}, {bench.machine['threads']} CPU thread(s)")
    table.add_row("compiled", "yes" if config.cluster.compile else "no")
    pairs = c.ratio(bench.names[0]).pairs
    table.add_row("pairs", f"{pairs} blocks of {bench.block_steps} steps, a log line every "
                  f"{config.logging.log_every_steps}")  # fmt: skip
    return table
