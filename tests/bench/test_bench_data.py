"""`bench.data`: both sides tokenise the same text, and the figures are computed as it says."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console
from small_corpus import texts, two_sources

from replication.bench.data import (
    LoaderBench,
    PreparationBench,
    bench_loader,
    bench_preparation,
)
from replication.config import RunConfig, TokenizerConfig, TrainingConfig
from replication.data.prepare import prepare
from replication.data.store import TokenStore
from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError
from replication.runs.records import to_json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    data = two_sources(root)
    prepare(data, root / "out")
    return dataclasses.replace(data, tokenizer=TokenizerConfig(path=str(root / "out" / "tokenizer.json"))), root / "out"


def test_ratios_pair_each_preparation_with_its_neighbours():
    bench = PreparationBench(2, 600, 1, (1.0, 3.0, 1.0), (4.0, 2.0), (1.0, 1.0, 1.0), (2.0, 2.0))
    assert bench.ratios == [0.5, 1.0] and bench.median_ratio == 0.75
    assert bench.cpu_ratios == [0.5, 0.5]
    assert bench.product_tokens_per_second_per_core == 100.0
    assert bench.lower_bound_95 == 0.0, "two turns say nothing"
    ones = (1.0,) * 10
    many = PreparationBench(1, 1, 1, ones, tuple(1 / (0.8 + i / 100) for i in range(9)), ones, ones[1:])
    assert many.lower_bound_95 == pytest.approx(0.81)  # the 2nd of 9: P(Binomial(9, 1/2) <= 1) = 0.02


def test_a_preparation_is_timed_beside_its_tokenizer(corpus):
    data = dataclasses.replace(corpus[0], num_proc=2)
    bench = bench_preparation(data, 2, 10**9, Console(file=io.StringIO()))
    assert bench.text_bytes == sum(len(t.encode()) for seed in (1, 2) for t in texts(40, seed=seed))
    tokenizer = TextTokenizer((corpus[1] / "tokenizer.json").read_text(), data.tokenizer.end_of_text)
    assert bench.tokens == sum(len(tokenizer.encode(t)) + 1 for seed in (1, 2) for t in texts(40, seed=seed))
    assert (len(bench.alone_seconds), len(bench.product_seconds)) == (3, 2)
    assert to_json(bench)["median_ratio"] == bench.median_ratio > 0
    assert bench.table().row_count == 8
    untrained = dataclasses.replace(data, tokenizer=TokenizerConfig())
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: bench data times a tokenizer that is loaded"):
        bench_preparation(untrained, 2, 1, Console(file=io.StringIO()))


def test_the_loader_of_the_training_is_timed(corpus):
    data, out = corpus
    store = TokenStore.open(out)
    data = dataclasses.replace(data, tokenizer=TokenizerConfig(vocab_size=320))
    config = RunConfig(data=data, training=TrainingConfig(batch_tokens=64 * 16)).check()
    bench = bench_loader(config, store, eaten_tokens_per_second=1000.0, turns=2, turn_seconds=0.05)
    assert len(bench.tokens_per_second) == 2 and min(bench.tokens_per_second) > 0
    assert bench.times == pytest.approx(sum(bench.tokens_per_second) / 2 / 1000.0)
    assert to_json(bench)["times"] == bench.times and bench.table().row_count == 5
    assert LoaderBench(0, 1, 10.0, (50.0, 70.0, 60.0)).times == 6.0
    with pytest.raises(UserError, match="must be positive"):
        bench_loader(config, store, 0.0)
