"""Speed of the data: preparing a corpus beside its tokenizer alone, and the training loader beside what the model eats.

Both sides of the first take turns in one run, so that they see the same machine at the same time; each preparation is
compared with the mean of the tokenizer's times before and after it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import quantile_test

from replication.config import DataConfig, RunConfig, SourceConfig
from replication.data.module import CountFrom, TrainingBatches, batch_loader
from replication.data.prepare import prepare
from replication.data.sources import documents
from replication.data.store import TokenStore
from replication.data.tokenise import PIECE_BYTES, PIECE_DOCUMENTS, library_threads
from replication.data.tokenizer import TextTokenizer, load_tokenizer
from replication.errors import UserError

T = TypeVar("T")
Seconds = tuple[float, float]  # by the clock, and of CPU

VALIDATION_FRACTION = 0.1  # so that a few megabytes have documents in both splits
ROW_GROUP = 1000  # rows, as large sets have them


@dataclass(frozen=True)
class PreparationBench:
    """Seconds of each turn, in the order in which they ran: alone, product, alone, product, ..., alone.

    CPU seconds are those of all processes together: where others use the machine as well, they say more than the clock.
    """

    num_proc: int
    tokens: int
    text_bytes: int
    alone_seconds: tuple[float, ...]
    product_seconds: tuple[float, ...]
    alone_cpu_seconds: tuple[float, ...]
    product_cpu_seconds: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Speed of each preparation over that of the tokenizer alone: the mean of its two neighbours."""
        return _paired(self.alone_seconds, self.product_seconds)

    @property
    def cpu_ratios(self) -> list[float]:
        """The same by CPU time: the tokenizer's share of what a preparation computes."""
        return _paired(self.alone_cpu_seconds, self.product_cpu_seconds)

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def lower_bound(self) -> float:
        """One-sided 95 % lower confidence bound of the median ratio; it needs 5 turns, and is 0 with fewer."""
        low = float(quantile_test(self.ratios, p=0.5, alternative="greater").confidence_interval(0.95).low)
        return max(0.0, low) if low == low else 0.0

    def per_core(self, seconds: tuple[float, ...]) -> float:
        """Tokens a second and process, at the median turn."""
        return self.tokens / statistics.median(seconds) / self.num_proc

    def to_dict(self) -> dict[str, object]:
        return {
            "num_proc": self.num_proc,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "alone_tokens_per_second_per_core": self.per_core(self.alone_seconds),
            "product_tokens_per_second_per_core": self.per_core(self.product_seconds),
            "median_ratio": self.median_ratio,
            "lower_bound_95": self.lower_bound,
            "median_cpu_ratio": statistics.median(self.cpu_ratios),
            "alone_seconds": list(self.alone_seconds),
            "product_seconds": list(self.product_seconds),
            "alone_cpu_seconds": list(self.alone_cpu_seconds),
            "product_cpu_seconds": list(self.product_cpu_seconds),
        }


def _paired(alone: tuple[float, ...], product: tuple[float, ...]) -> list[float]:
    return [statistics.mean(pair) / p for p, pair in zip(product, pairwise(alone), strict=True)]


def bench_preparation(data: DataConfig, turns: int, n_bytes: int, console: Console) -> PreparationBench:
    """Time streamed preparations of some text beside the tokenizer alone, over the same number of processes.

    The preparation is the whole of it: processes started, Parquet read, split, tokenised, cut, hashed, written, synced.
    The tokenizer alone has the texts in memory and drops its tokens; its processes are started beforehand.

    Args:
        data: sources of text, num_proc and a tokenizer that is loaded, not trained.
        turns: preparations that count.
        n_bytes: text that is taken from the beginnings of the sources, in equal parts.
        console: for progress.

    Raises:
        UserError: no tokenizer is named, or a source cannot be read.
    """
    if data.tokenizer.path is None:
        raise UserError("data.tokenizer.path: bench data times a tokenizer that is loaded; name a tokenizer.json")
    tokenizer, texts = load_tokenizer(data.tokenizer), _texts(data, n_bytes)
    sizes = [len(text.encode()) for text in texts]
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        root = Path(folder)
        config = _corpus(data, tokenizer, texts, root)
        task = progress.add_task("turns", total=turns + 1)
        product: list[Seconds] = []
        with _alone(tokenizer, _batches(texts, sizes), data.num_proc) as alone:
            by_itself = [alone()]
            for turn in range(turns):
                progress.advance(task)
                manifest, seconds = _timed(lambda turn=turn: prepare(config, root / f"out-{turn}"))  # type: ignore[misc]
                product.append(seconds)
                by_itself.append(alone())
    entry = manifest.sources["bench"]
    tokens = entry.train.tokens + entry.validation.tokens
    alone_seconds, alone_cpu = zip(*by_itself, strict=True)
    seconds, cpu = zip(*product, strict=True)
    return PreparationBench(data.num_proc, tokens, sum(sizes), alone_seconds, seconds, alone_cpu, cpu)


def _timed(work: Callable[[], T]) -> tuple[T, Seconds]:
    """What some work gives, and how long it took; processes count once they have ended."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    value = work()
    return value, (time.perf_counter() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _texts(data: DataConfig, n_bytes: int) -> list[str]:
    texts: list[str] = []
    for source in data.sources:
        left = n_bytes // len(data.sources)
        for _, text in documents(source):
            texts.append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return texts


def _corpus(data: DataConfig, tokenizer: TextTokenizer, texts: list[str], root: Path) -> DataConfig:
    """The texts as a local set in the hub's layout, and a config that streams all of it."""
    (root / "set").mkdir()
    pq.write_table(pa.table({"text": texts}), root / "set" / "train.parquet", row_group_size=ROW_GROUP)
    (root / "tokenizer.json").write_text(tokenizer.json(), encoding="utf-8")
    return replace(
        data,
        sources=(SourceConfig(name="bench", kind="hub", path=str(root / "set")),),
        tokenizer=replace(data.tokenizer, path=str(root / "tokenizer.json"), revision=None),
        validation_fraction=VALIDATION_FRACTION,
        token_budget=sum(len(text.encode()) + 1 for text in texts),  # no tokenizer of bytes makes more
    )


def _batches(texts: list[str], sizes: list[int]) -> list[list[str]]:
    """The texts in batches as large as a preparation's pieces."""
    batches: list[list[str]] = [[]]
    n_bytes = 0
    for text, size in zip(texts, sizes, strict=True):
        batches[-1].append(text)
        n_bytes += size
        if len(batches[-1]) >= PIECE_DOCUMENTS or n_bytes >= PIECE_BYTES:
            batches.append([])
            n_bytes = 0
    return batches


_alone_tokenizer: TextTokenizer | None = None
_alone_batches: list[list[str]] = []


@contextmanager
def _alone(tokenizer: TextTokenizer, batches: list[list[str]], num_proc: int) -> Iterator[Callable[[], Seconds]]:
    """Gives a function that tokenises every batch as a preparation's pool would: as many processes, or threads.

    The processes inherit the texts.
    """
    global _alone_tokenizer, _alone_batches
    _alone_tokenizer, _alone_batches = tokenizer, batches
    numbers = range(len(batches))
    with library_threads(num_proc == 1), ExitStack() as stack:
        each: Callable[..., Iterable[float]] = map
        if num_proc > 1:
            executor = stack.enter_context(ProcessPoolExecutor(num_proc, get_context("fork")))
            executor.submit(os.getpid).result()
            each = executor.map

        def turn() -> Seconds:
            started = time.perf_counter()
            cpu = sum(each(_encode, numbers))
            return time.perf_counter() - started, cpu

        yield turn
    _alone_tokenizer, _alone_batches = None, []


def _encode(number: int) -> float:
    """Tokenise a batch and drop its tokens; CPU seconds."""
    assert _alone_tokenizer is not None
    started = time.process_time()
    _alone_tokenizer.encode_only(_alone_batches[number])
    return time.process_time() - started


def preparation_table(bench: PreparationBench) -> Table:
    """The figures in words."""
    rows = {
        "text": f"{bench.text_bytes / 1e6:,.1f} MB, {bench.tokens:,} tokens",
        "processes": str(bench.num_proc),
        "turns": str(len(bench.product_seconds)),
        "tokenizer alone": f"{bench.per_core(bench.alone_seconds):,.0f} tokens/s per core",
        "preparation": f"{bench.per_core(bench.product_seconds):,.0f} tokens/s per core",
        "ratio of speeds, median": f"{bench.median_ratio:.3f}",
        "  95 % lower bound": f"{bench.lower_bound:.3f}",
        "the same by CPU time": f"{statistics.median(bench.cpu_ratios):.3f}",
    }
    return _table("preparing a corpus beside its tokenizer alone", rows)


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table("", "", title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


# ---------------------------------------------------------------- the training loader


@dataclass(frozen=True)
class LoaderBench:
    """Tokens a second of the training loader in each turn, and of the model that it feeds."""

    loader_workers: int
    micro_batch_tokens: int
    eaten_tokens_per_second: float
    tokens_per_second: tuple[float, ...]

    @property
    def times(self) -> float:
        """How many times what the model eats the loader delivers, at the median turn."""
        return statistics.median(self.tokens_per_second) / self.eaten_tokens_per_second

    def to_dict(self) -> dict[str, object]:
        return {
            "loader_workers": self.loader_workers,
            "micro_batch_tokens": self.micro_batch_tokens,
            "eaten_tokens_per_second": self.eaten_tokens_per_second,
            "median_tokens_per_second": statistics.median(self.tokens_per_second),
            "times": self.times,
            "tokens_per_second": list(self.tokens_per_second),
        }


def bench_loader(
    config: RunConfig, store: TokenStore, eaten_tokens_per_second: float, turns: int = 5, turn_seconds: float = 1.0
) -> LoaderBench:
    """Time the loader of a config's training, with nothing that eats what it delivers.

    Args:
        config: batch, order and loader_workers are taken from it; one process is timed.
        store: the prepared data.
        eaten_tokens_per_second: what one process of the training takes.
        turns: how often the speed is taken.
        turn_seconds: how long for.

    Raises:
        UserError: the data do not fit the config, or the model eats nothing.
    """
    if eaten_tokens_per_second <= 0:
        raise UserError(f"eaten_tokens_per_second: {eaten_tokens_per_second} must be positive")
    store.check_data(config)
    batches = iter(batch_loader(config, TrainingBatches(config, store), CountFrom(0)))
    micro_batch_tokens = config.micro_batch_sequences * store.block_size_tokens
    next(batches)  # starts the workers and maps the files
    speeds = []
    for _ in range(turns):
        started, n = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < turn_seconds:
            next(batches)
            n += 1
        speeds.append(n * micro_batch_tokens / seconds)
    return LoaderBench(config.cluster.loader_workers, micro_batch_tokens, eaten_tokens_per_second, tuple(speeds))


def loader_table(bench: LoaderBench) -> Table:
    """The figures in words."""
    rows = {
        "micro-batch": f"{bench.micro_batch_tokens:,} tokens",
        "loader workers": str(bench.loader_workers),
        "loader": f"{statistics.median(bench.tokens_per_second):,.0f} tokens/s",
        "model": f"{bench.eaten_tokens_per_second:,.0f} tokens/s",
        "loader over model": f"{bench.times:,.1f}",
    }
    return _table("training loader beside the model", rows)
