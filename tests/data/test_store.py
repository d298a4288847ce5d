"""Reading a preparation: the blocks that were written, by source and index, and a refusal of whatever does not fit."""

import dataclasses
import json
import pickle
import timeit

import numpy as np
import pytest
from small_corpus import two_sources

from replication.config import ModelConfig, RunConfig, TokenizerConfig, TrainingConfig
from replication.data.blocks import PAD
from replication.data.order import MixtureOrder
from replication.data.prepare import prepare
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.runs.files import write_json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    config = two_sources(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replication.data.blocks.BATCH_TOKENS", 16_000)
        patch.setattr("replication.data.corpus.PIECE_DOCUMENTS", 5)
        prepare(config, root / "out")
    return dataclasses.replace(config, dir=str(root / "out"))


@pytest.fixture
def store(data):
    return TokenStore.open(data.dir)


def run_config(data, **keys):
    training = TrainingConfig(batch_tokens=8 * data.block_size_tokens)
    return RunConfig(data=data, **{"model": ModelConfig(vocab_size=320), "training": training, **keys}).check()


def test_blocks_are_those_that_datasets_reads(store, data):
    import datasets

    for split in ("train", "validation"):
        for source, name in enumerate(store.source_names):
            written = datasets.load_from_disk(f"{data.dir}/{split}/{name}")
            assert written.features["tokens"] == datasets.List(datasets.Value("int32"), length=17)
            assert store.sizes(split)[source] == len(written)
            expected = np.array(written["tokens"], dtype=np.int32)
            indices = np.arange(len(written))[::-1]
            found = store.read(split, np.full(len(indices), source), indices)
            assert found.dtype == np.int32
            assert np.array_equal(found, expected[::-1])


def test_a_batch_mixes_sources_and_may_be_written_to(store):
    sources, indices = MixtureOrder(store.sizes("train"), [3, 1], seed=0).global_batch(2, 8)
    batch = store.read("train", sources, indices)
    assert batch.shape == (8, 17) and batch.flags.writeable
    for row, source, index in zip(batch, sources, indices, strict=True):
        assert np.array_equal(row, store.read("train", [source], [index])[0])
    assert store.read("train", [], []).shape == (0, 17)


def test_valid_targets_count_what_is_not_padding(store):
    for split in ("train", "validation"):
        for source, size in enumerate(store.sizes(split)):
            indices = np.arange(size)
            blocks = store.read(split, np.full(size, source), indices)
            valid = store.valid_targets(split, np.full(size, source), indices)
            assert valid.dtype == np.int64
            assert np.array_equal(valid, (blocks[:, 1:] != PAD).sum(1))
    assert (store.valid_targets("train", [0, 1], [0, 0]) == 16).all()


def test_an_index_outside_is_our_own_fault(store):
    for index in (-1, store.sizes("train")[0]):
        with pytest.raises(AssertionError):
            store.read("train", [0], [index])


def test_chunks_of_a_large_source_are_found(store, data, tmp_path):
    """Blocks are written a thousand at a time here, so that a source of the small corpus has more than one chunk."""
    assert store.sizes("train")[0] > 2000
    views, ends = store._column("train", 0)
    assert len(views) > 2
    edges = [int(e) + d for e in ends[:-1] for d in (-1, 0)]
    stream = store.read("train", [0] * len(edges), edges)
    assert (stream[0::2, -1] == stream[1::2, 0]).all()  # neighbours share a token, across a chunk's edge too


def test_a_store_travels_to_other_processes(store):
    other = pickle.loads(pickle.dumps(store))
    assert other.hash == store.hash
    assert np.array_equal(other.read("train", [0, 1], [3, 4]), store.read("train", [0, 1], [3, 4]))


def test_how_long_reading_takes(store, publish):
    sources, indices = MixtureOrder(store.sizes("train"), [3, 1], seed=0).stream(0, 512)
    seconds = timeit.repeat(lambda: store.read("train", sources, indices), number=1, repeat=5)
    publish(f"store: 512 blocks read in {1000 * min(seconds):.1f} ms (best of 5)")


def test_the_tokenizer_decodes_blocks(store):
    tokenizer = store.tokenizer
    assert tokenizer is store.tokenizer
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (store.vocab_size, store.end_of_text_id) == (320, 0)
    assert "Document" in tokenizer.decode(store.read("train", [0] * 60, range(60)).ravel().clip(0))


def test_what_is_no_preparation_is_refused(tmp_path, data):
    with pytest.raises(UserError, match=r"data\.dir: is not set.*replicate prepare"):
        TokenStore.open(None)
    with pytest.raises(UserError, match=r"data\.dir: .*missing does not exist.*replicate prepare"):
        TokenStore.open(tmp_path / "missing")
    with pytest.raises(UserError, match=r"data\.dir: .* holds no complete preparation.*replicate prepare"):
        TokenStore.open(tmp_path)
    write_json(tmp_path / "manifest.json", {"format": 99})
    with pytest.raises(UserError, match="not of format 1"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        TokenStore.open(tmp_path)


def test_blocks_that_are_gone_or_fewer_are_refused(tmp_path, data):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(data.dir, copy)
    shutil.rmtree(copy / "train" / "lines")
    with pytest.raises(UserError, match=r"train/lines: cannot be read"):
        TokenStore.open(copy).read("train", [1], [0])
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["sources"]["files"]["train"]["blocks"] += 1
    write_json(copy / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"train/files: holds \d+ blocks and the manifest says \d+"):
        TokenStore.open(copy).read("train", [0], [0])


def test_a_config_that_fits_is_accepted_whatever_the_weights(store, data):
    store.check(run_config(data))
    lighter = tuple(dataclasses.replace(s, weight=9.0) for s in data.sources)
    store.check(run_config(dataclasses.replace(data, sources=lighter, num_proc=7, dir=None)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size_tokens": 8}, r"another data\.block_size_tokens"),
        ({"tokenizer": TokenizerConfig(vocab_size=512)}, r"another data\.tokenizer\.vocab_size"),
        ({"validation_fraction": 0.2}, r"another data\.validation_fraction"),
    ],
)
def test_data_of_another_config_are_refused(store, data, change, message):
    with pytest.raises(UserError, match=message):
        store.check(run_config(dataclasses.replace(data, **change)))


def test_other_sources_are_refused_by_name(store, data):
    files, lines = data.sources
    moved = dataclasses.replace(data, sources=(files, dataclasses.replace(lines, path="elsewhere.jsonl")))
    with pytest.raises(UserError, match=r"another data\.sources\.lines\.path"):
        store.check(run_config(moved))
    with pytest.raises(UserError, match=r"another data\.sources\.files\.place and data\.sources\.lines\.place"):
        store.check(run_config(dataclasses.replace(data, sources=(lines, files))))
    with pytest.raises(UserError, match=r"data\.sources\.lines"):
        store.check(run_config(dataclasses.replace(data, sources=(files,))))


def test_a_model_of_another_vocabulary_is_refused(store, data):
    with pytest.raises(UserError, match=r"model\.vocab_size: 2048, but the tokenizer of .* has 320"):
        store.check(run_config(data, model=ModelConfig(vocab_size=2048)))


def test_a_corpus_shorter_than_one_batch_is_refused(store, data):
    have = sum(store.sizes("train"))
    fits = TrainingConfig(batch_tokens=(have - have % 2) * 16)
    store.check(run_config(data, training=fits))
    beyond = TrainingConfig(batch_tokens=(have + 2 - have % 2) * 16)
    with pytest.raises(UserError, match=r"training\.batch_tokens: .* has \d+ \(corpus shorter than one batch\)"):
        store.check(run_config(data, training=beyond))
