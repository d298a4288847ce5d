"""`replicate bench data`: preparing a corpus beside its tokenizer alone, and the training loader beside the model.

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
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from replication.bench.blocks import Elapsed, Ratio, Result, facts, interleave
from replication.config import DataConfig, RunConfig, SourceConfig
from replication.console import progress
from replication.data.folder import CorpusManifest
from replication.data.module import CountFrom, TrainingBatches, batch_loader
from replication.data.prepare import prepare
from replication.data.sources import DocumentStream
from replication.data.store import TokenStore
from replication.data.tokenise import PIECE_BYTES, PIECE_DOCUMENTS, library_threads
from replication.data.tokenizer import TextTokenizer, load_tokenizer
from replication.errors import UserError

ALONE, PRODUCT = "tokenizer alone", "preparation"
VALIDATION_FRACTION = 0.1  # so that a few megabytes have documents in both splits
ROW_GROUP = 1000  # rows, as large sets have them


@dataclass
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
    alone_tokens_per_second_per_core: float = field(init=False)  # at the median turn
    product_tokens_per_second_per_core: float = field(init=False)
    median_ratio: float = field(init=False)  # of the speed of a preparation and of the tokenizer alone beside it
    lower_bound_95: float = field(init=False)  # one-sided, of that median; it needs 5 turns, and is 0 with fewer
    median_cpu_ratio: float = field(init=False)  # by CPU time: the tokenizer's share of what a preparation computes

    def __post_init__(self) -> None:
        self.alone_tokens_per_second_per_core = self.tokens / statistics.median(self.alone_seconds) / self.num_proc
        self.product_tokens_per_second_per_core = self.tokens / statistics.median(self.product_seconds) / self.num_proc
        self.ratios = _paired(self.alone_seconds, self.product_seconds)
        self.cpu_ratios = _paired(self.alone_cpu_seconds, self.product_cpu_seconds)
        self.median_ratio, self.median_cpu_ratio = statistics.median(self.ratios), statistics.median(self.cpu_ratios)
        inverse = Ratio.of([1 / ratio for ratio in self.ratios]).upper_bound_95
        self.lower_bound_95 = 1 / inverse if inverse else 0.0

    def table(self) -> Table:
        rows = {
            "text": f"{self.text_bytes / 1e6:,.1f} MB, {self.tokens:,} tokens",
            "processes": self.num_proc,
            "turns": len(self.product_seconds),
            "tokenizer alone": f"{self.alone_tokens_per_second_per_core:,.0f} tokens/s per core",
            "preparation": f"{self.product_tokens_per_second_per_core:,.0f} tokens/s per core",
            "ratio of speeds, median": f"{self.median_ratio:.3f}",
            "  95 % lower bound": f"{self.lower_bound_95:.3f}",
            "the same by CPU time": f"{self.median_cpu_ratio:.3f}",
        }
        return facts("preparing a corpus beside its tokenizer alone", rows)


def _paired(alone: tuple[float, ...], product: tuple[float, ...]) -> list[float]:
    """Speed of each preparation over that of the tokenizer alone: the mean of its two neighbours."""
    return [statistics.mean(pair) / p for p, pair in zip(product, pairwise(alone), strict=True)]


@dataclass
class LoaderBench:
    """Tokens a second of the training loader in each turn, and of the model that it feeds."""

    loader_workers: int
    micro_batch_tokens: int
    eaten_tokens_per_second: float
    tokens_per_second: tuple[float, ...]
    median_tokens_per_second: float = field(init=False)
    times: float = field(init=False)  # tokens that come for each that the model trains on, at the median turn

    def __post_init__(self) -> None:
        self.median_tokens_per_second = statistics.median(self.tokens_per_second)
        self.times = self.median_tokens_per_second / self.eaten_tokens_per_second

    def table(self) -> Table:
        rows = {
            "micro-batch": f"{self.micro_batch_tokens:,} tokens",
            "loader workers": self.loader_workers,
            "loader": f"{self.median_tokens_per_second:,.0f} tokens/s",
            "model": f"{self.eaten_tokens_per_second:,.0f} tokens/s",
            "loader over model": f"{self.times:,.1f}",
        }
        return facts("training loader beside the model", rows)


@dataclass(frozen=True)
class DataBench(Result):
    """Findings of one run of `bench data`."""

    bench: ClassVar = "data"
    loader: LoaderBench
    preparation: PreparationBench

    def tables(self) -> list[Table]:
        return [self.loader.table(), self.preparation.table()]


def bench_data(
    config: RunConfig, prepared: Path, turns: int, n_bytes: int, trained_per_second: float, console: Console
) -> DataBench:
    """Time the loader on a prepared corpus, and preparations of so much text with that one's tokenizer.

    `trained_per_second` are the tokens that one process of the training takes.
    """
    loader = bench_loader(config, TokenStore.open(prepared), trained_per_second)
    tokenizer = replace(config.data.tokenizer, path=str(prepared / "tokenizer.json"), revision=None)
    return DataBench(loader, bench_preparation(replace(config.data, tokenizer=tokenizer), turns, n_bytes, console))


def bench_loader(
    config: RunConfig, store: TokenStore, eaten_tokens_per_second: float, turns: int = 5, turn_seconds: float = 1.0
) -> LoaderBench:
    """Time the loader of a config's training in one process, with nothing that takes what it delivers.

    Raises UserError where the data do not fit the config, or the model takes nothing.
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


def bench_preparation(data: DataConfig, turns: int, n_bytes: int, console: Console) -> PreparationBench:
    """Time streamed preparations of some text beside the tokenizer alone, over the same number of processes.

    The preparation is the whole of it: processes started, Parquet read, split, tokenised, cut, hashed, written, synced.
    The tokenizer alone has the texts in memory and drops its tokens; its processes are started beforehand. Text is
    taken from the beginnings of the sources, in equal parts. Raises UserError for a tokenizer that is to be trained.
    """
    if data.tokenizer.path is None:
        raise UserError("data.tokenizer.path: bench data times a tokenizer that is loaded; name a tokenizer.json")
    tokenizer, texts = load_tokenizer(data.tokenizer), list[str]()
    for source in data.sources:
        left = n_bytes // len(data.sources)
        for _, text in DocumentStream(source):
            texts.append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    text_bytes = sum(len(text.encode()) for text in texts)
    manifests: list[CorpusManifest] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        progress(console) as bars,
        _alone(tokenizer, texts, data.num_proc) as tokenise,
    ):
        root = Path(folder)
        (root / "set").mkdir()  # a local set in the hub's layout, to be streamed whole
        pq.write_table(pa.table({"text": texts}), root / "set" / "train.parquet", row_group_size=ROW_GROUP)
        (root / "tokenizer.json").write_text(tokenizer.json(), encoding="utf-8")
        corpus = replace(
            data,
            sources=(SourceConfig(name="bench", kind="hub", path=str(root / "set")),),
            tokenizer=replace(data.tokenizer, path=str(root / "tokenizer.json"), revision=None),
            validation_fraction=VALIDATION_FRACTION,
            token_budget=text_bytes + len(texts),  # no tokenizer of bytes makes more
        )

        def run(name: str) -> Elapsed:
            if name == ALONE:
                return tokenise()
            started, before = time.perf_counter(), os.times()
            manifests.append(prepare(corpus, root / f"out-{len(manifests)}"))
            cpu = sum(os.times()[:4]) - sum(before[:4])  # of this process, and of those that it started and that ended
            return Elapsed(time.perf_counter() - started, cpu)

        done = interleave(ALONE, [PRODUCT], turns, 0, run, bars, warm_up=False)  # tokens: known only afterwards
    entry = manifests[0].sources["bench"]
    tokens = entry.train.tokens + entry.validation.tokens
    wall = (tuple(done.times(name)) for name in (ALONE, PRODUCT))
    cpu = (tuple(done.times(name, "cpu_seconds")) for name in (ALONE, PRODUCT))
    return PreparationBench(data.num_proc, tokens, text_bytes, *wall, *cpu)


_inherited: tuple[TextTokenizer, list[list[str]]] | None = None
"""What the tokenizer's processes take over from the one that forks them: batches as large as a preparation's pieces."""


@contextmanager
def _alone(tokenizer: TextTokenizer, texts: list[str], num_proc: int) -> Iterator[Callable[[], Elapsed]]:
    """A function that tokenises every text as a preparation's pool would: as many processes, or threads."""
    global _inherited
    batches, n_bytes = [list[str]()], 0
    for text in texts:
        batches[-1].append(text)
        n_bytes += len(text.encode())
        if len(batches[-1]) >= PIECE_DOCUMENTS or n_bytes >= PIECE_BYTES:
            batches.append([])
            n_bytes = 0
    _inherited = tokenizer, batches
    with library_threads(num_proc == 1), ExitStack() as stack:
        each: Callable[..., Iterable[float]] = map
        if num_proc > 1:
            executor = stack.enter_context(ProcessPoolExecutor(num_proc, get_context("fork")))
            executor.submit(os.getpid).result()
            each = executor.map

        def turn() -> Elapsed:
            started = time.perf_counter()
            cpu = sum(each(_encode, range(len(batches))))
            return Elapsed(time.perf_counter() - started, cpu)

        yield turn
    _inherited = None


def _encode(number: int) -> float:
    """Tokenise a batch and drop its tokens; CPU seconds."""
    assert _inherited is not None
    tokenizer, batches = _inherited
    started = time.process_time()
    tokenizer.encode_only(batches[number])
    return time.process_time() - started
