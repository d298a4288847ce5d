"""Streamed preparations: the budget to the token, the same end after any interruption, and a bounded disk."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from io import StringIO

import datasets
import huggingface_hub.errors
import numpy as np
import pytest
import yaml
from hub_sets import SETS, as_local, write_set
from paths import SUPPORT
from rich.console import Console
from small_corpus import END_OF_TEXT, texts, uncut, write_folder, write_jsonl

from replication.config import DataConfig, SourceConfig, TokenizerConfig, find_config, load_run, to_dict
from replication.console import Meter
from replication.data import blocks, corpus, tokenise
from replication.data.blocks import SplitWriter
from replication.data.corpus import text_key
from replication.data.folder import SplitState, changed_sources, read_manifest, request_of
from replication.data.hub import may_pass
from replication.data.prepare import prepare
from replication.data.sources import DocumentStream
from replication.data.store import TokenStore
from replication.data.tokenise import Tokens
from replication.data.tokenizer import train_tokenizer
from replication.errors import UserError
from replication.runs.records import read_record, to_json, write_record

T, BLOCKS = 16, 5000
HTTP = sys.modules[huggingface_hub.errors.HTTPError.__module__.partition(".")[0]]  # the client that the hub's uses


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer file, so that no test has to train one."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TokenizerConfig(vocab_size=320), texts(30)).json())
    return TokenizerConfig(path=str(path))


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder in the layout of FineWeb-Edu: three files of 200 rows."""
    return write_set(tmp_path_factory.mktemp("hub") / "web", "fineweb_edu", n_rows=200, n_shards=3)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few documents, and every one of them saved."""
    monkeypatch.setattr(corpus, "PIECE_DOCUMENTS", 10)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0)


def web_config(web, tokenizer, blocks=BLOCKS, **keys):
    source = SourceConfig(name="web", kind="hub", path=str(web), subset="sample-10BT")
    fixed = {"block_size_tokens": T, "validation_fraction": 0.1, "num_proc": 1, "token_budget": blocks * T}
    return DataConfig(sources=(source,), tokenizer=tokenizer, **{**fixed, **keys})


@pytest.fixture(scope="module")
def undisturbed(web, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return prepare(web_config(web, tokenizer), out)


def prepared_lines(data, out):
    console = Console(record=True, width=300, file=StringIO())
    manifest = prepare(data, out, console)
    return manifest, console.export_text()


def streams(out, split="train"):
    """Each source's decoded documents of a split."""
    store = TokenStore.open(out)
    for i, name in enumerate(store.source_names):
        n = store.sizes(split)[i]
        tokens = uncut(store.read(split, np.full(n, i), np.arange(n)))
        ends = np.flatnonzero(tokens == store.end_of_text_id) + 1
        yield name, [store.tokenizer.decode(part).removesuffix(END_OF_TEXT) for part in np.split(tokens, ends)]


# ---------------------------------------------------------------- the published mix


@pytest.fixture(scope="module")
def mix(tokenizer, tmp_path_factory):
    """configs/data/published_mix.yaml over local folders of the same schemas, prepared."""
    root = tmp_path_factory.mktemp("mix")
    data = load_run(["data/published_mix.yaml"]).data
    assert {s.name for s in data.sources} == set(SETS) and len(SETS) == 13
    few = dataclasses.replace(tokenizer, padded_vocab_size=400)
    data = as_local(data, root, block_size_tokens=T, token_budget=1000 * T, tokenizer=few, validation_fraction=0.2)
    return data, root / "out", prepare(data, root / "out")


def test_every_source_of_the_published_mix_is_read_as_its_set_is_laid_out(mix):
    _, out, _ = mix
    found = {name: documents[0] for name, documents in streams(out, "validation")}
    begins = {
        "fineweb_edu": r"Web \d+\. ",
        "wikipedia": r"T\d+ is\. ",
        "gutenberg": r"CHAPTER \d+\r\n\r\n",
        "ultrachat": r"User: [a-z ]+\.\nAssistant: [a-z ]+\.\nUser: ",
        "wildchat": r"User: [a-z ]+\.\nAssistant: ",
        "hh_rlhf": r"\n\nHuman: \d+ [a-z ]+\.\n\nAssistant: ",
        "slimorca": r"[a-z ]+\.\nUser: [a-z ]+\.\nAssistant: ",
        "alpaca": r"[a-z ]+\.\n(Input \d+\n)?[a-z]",
        "dolly": r"[a-z ]{4}",
        "metamath": r"What is \d+\?\nIt is\.",
        "codeparrot": r"def f_\d+\(x\):\n\treturn x",
        "codefeedback": r"[a-z ]+\.\nAnswer \d+\.",
        "magicoder": r"[a-z ]+\.\n```python\nprint",
    }
    assert {name: found[name] for name, form in begins.items() if not re.match(form, found[name])} == {}


def test_every_source_has_its_share_to_the_block(mix):
    data, out, manifest = mix
    store = TokenStore.open(out)
    assert not [name for name, s in manifest.sources.items() if s.ended_before_its_share]
    for source, size in zip(data.sources, store.sizes("train"), strict=True):
        assert size == round(1000 * source.weight), source.name
        entry = manifest.sources[source.name].train
        assert entry.predicted_tokens == size * T and entry.tokens == size * T + 1
    assert manifest.vocab_size == 400 and store.tokenizer.vocab_size == 320


def test_the_shipped_mixes_add_up_and_are_pinned():
    """Shares to the sequence, and commits where there are any: a branch is resolved and recorded instead."""
    for name, unpinned in (("published_mix", {"gutenberg", "codeparrot"}), ("fineweb_edu", set())):
        data = load_run([f"data/{name}.yaml"]).data
        assert sum(corpus.share_blocks(data)) * data.block_size_tokens == data.token_budget
        assert {s.name for s in data.sources if s.revision is None} == unpinned
        assert all(len(s.revision) == 40 for s in data.sources if s.revision)
        assert data.tokenizer.padded_vocab_size == 100_031 and len(data.tokenizer.revision) == 40
        assert set(yaml.safe_load(find_config(f"data/{name}.yaml").read_text())) == {"training", "data"}


# ---------------------------------------------------------------- budget, split, order


def test_the_split_is_by_key_and_validation_is_bounded(web, tokenizer, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "VALIDATION_TOKENS", 10 * T)
    manifest = prepare(web_config(web, tokenizer), tmp_path / "out")
    entry = manifest.sources["web"]
    assert entry.train == undisturbed.sources["web"].train
    assert (entry.validation.blocks, entry.validation.tokens) == (10, 10 * T + 1)
    for split in ("train", "validation"):
        (_, documents), *_ = streams(tmp_path / "out", split)
        for text in documents[:-1]:  # the last is cut off
            assert (text_key(text.encode()) < 0.1 * 2**64) == (split == "validation")


def test_files_come_in_a_fixed_order_that_is_not_theirs(web, tokenizer, tmp_path):
    prepare(web_config(web, tokenizer, blocks=10**6), tmp_path / "out")
    (_, documents), *_ = streams(tmp_path / "out")
    shards = [int(text.split(".")[0].removeprefix("Web ")) // 200 for text in documents if text]
    order = [shard for shard, _ in itertools.groupby(shards)]
    assert sorted(order) == [0, 1, 2] and order != [0, 1, 2]


def test_a_source_that_ends_early_is_said_and_recorded(web, tokenizer, tmp_path):
    manifest, printed = prepared_lines(web_config(web, tokenizer, blocks=10**6), tmp_path / "out")
    entry = manifest.sources["web"]
    assert entry.ended_before_its_share and entry.documents == 600
    assert "web: ended after" in printed and "training repeats it" in printed
    assert entry.train.predicted_tokens == entry.train.tokens - 1


def test_local_files_and_a_trained_tokenizer(tmp_path):
    folder = write_folder(tmp_path / "files", texts(60, seed=1))
    lines = write_jsonl(tmp_path / "lines.jsonl", ["", *texts(60, seed=2)])
    sources = (
        SourceConfig(name="files", path=str(folder), weight=3.0),
        SourceConfig(name="lines", kind="jsonl", path=str(lines), weight=1.0),
        SourceConfig(name="topics", kind="python_topics", weight=1.0),
    )
    config = DataConfig(
        block_size_tokens=T,
        sources=sources,
        tokenizer=TokenizerConfig(vocab_size=300),
        token_budget=20_000,
        validation_fraction=0.2,
    )
    manifest = prepare(config, tmp_path / "out")
    blocks = [s.train.blocks for s in manifest.sources.values()]
    assert blocks == [750, 250, 250] and manifest.vocab_size == 300
    assert manifest.sources["lines"].empty == 1
    heavier = tuple(dataclasses.replace(s, weight=2.0) for s in sources)
    with pytest.raises(UserError, match=r"another data\.sources\.files\.weight and"):
        prepare(dataclasses.replace(config, sources=heavier), tmp_path / "out")


# ---------------------------------------------------------------- interruptions


def test_writing_goes_on_from_any_state(tmp_path, monkeypatch):
    monkeypatch.setattr("replication.data.blocks.BATCH_TOKENS", 50)
    monkeypatch.setattr("replication.data.blocks.SHARD_BYTES", 3000)
    stream_n = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.int32)
    none = np.zeros(1, dtype=np.int64)
    parts = [(Tokens(part, np.array([len(part)]), none), none) for part in np.array_split(stream_n, 83)]
    whole = SplitWriter(tmp_path / "whole", T)
    for part in parts:
        whole.add(*part)
    expected = whole.finish()
    for stop in (1, 2, 17, 40, 82):
        folder, state = tmp_path / str(stop), None
        first = SplitWriter(folder, T)
        for i, part in enumerate(parts):
            first.add(*part)
            if i == stop:
                write_record(tmp_path / "state.json", first.save())
                state = read_record(tmp_path / "state.json", SplitState)
            if i == stop + 9:
                first.save()  # and then a kill: all after the state is to be cut off
                break
        second = SplitWriter(folder, T, state=state)
        for part in parts[stop + 1 :]:
            second.add(*part)
        assert second.finish() == expected
        read = datasets.load_from_disk(str(folder))
        assert len(read) == expected.blocks and np.array_equal(uncut(np.array(read["tokens"])), stream_n)
        assert len(list(folder.glob("*.arrow"))) > 1


def command(config, out, *code):
    """The command line in a process of its own, with small pieces that take a while."""
    path = out.parent / "config.yaml"
    batch = {"training": {"batch_tokens": 1024}, "data": to_dict(config)}
    path.write_text(yaml.safe_dump(batch))
    script = f"""
        import sys, time
        from replication.data import corpus, tokenise
        from replication.data.tokenizer import TextTokenizer
        corpus.PIECE_DOCUMENTS, corpus.SAVE_SECONDS = 10, 0
        real = TextTokenizer.encode_counted
        def slow(self, texts):
            time.sleep(0.05)
            return real(self, texts)
        TextTokenizer.encode_counted = slow
        from replication.cli.main import main
        sys.exit(main(["prepare", "--config", {str(path)!r}, "--out", {str(out)!r}]))
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], **pipes)


def saved_tokens(out, name="web"):
    try:
        state = json.loads((out.with_name("out.partial") / "progress" / f"{name}.json").read_text())
        return state["writer"]["train"]["blocks"]["tokens"]
    except (FileNotFoundError, TypeError):  # not begun, or finished
        return 0


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_it_goes_on_where_it_stopped(web, tokenizer, undisturbed, tmp_path, small_pieces, monkeypatch):
    """SIGKILL, then the same command: the same data, and nothing that was saved is tokenised again."""
    config, out = web_config(web, tokenizer, num_proc=2), tmp_path / "out"
    process = command(config, out)
    wait_until(lambda: saved_tokens(out) > 30_000, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert not out.exists()
    kept = saved_tokens(out)
    again = []
    real = tokenise.tokens_of
    monkeypatch.setattr(tokenise, "tokens_of", lambda t, x: again.append(found := real(t, x)) or found)
    manifest, printed = prepared_lines(dataclasses.replace(config, num_proc=1), out)
    assert f"web: goes on after {kept:,} of {BLOCKS * T + 1:,} training tokens" in printed
    assert manifest.hash == undisturbed.hash and manifest.sources == undisturbed.sources
    n_again, whole = sum(len(t.stream) for t in again), undisturbed.sources["web"].train.tokens
    assert n_again < 1.2 * (whole - kept) + 2000 < 0.9 * whole, (n_again, kept)
    names = ["manifest.json", "origins.json", "tokenizer.json", "train", "validation"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_what_an_earlier_version_left_is_read_and_gone_on_with(tmp_path, monkeypatch):
    """A folder of version 0.1.0, killed in its second source, and the manifest that it would have ended with."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "first.jsonl", texts(12, seed=1))
    write_jsonl(tmp_path / "second.jsonl", ["", *texts(30, seed=2)])
    partial = shutil.copytree(SUPPORT / "old_preparation" / "partial", tmp_path / "out.partial")
    shutil.copy(partial / "tokenizer.json", tmp_path)
    request = json.loads((partial / "request.json").read_text())
    request["packages"] |= {name: version(name) for name in ("datasets", "tokenizers")}
    (partial / "request.json").write_text(json.dumps(request))
    sources = tuple(SourceConfig(name=n, kind="jsonl", path=f"{n}.jsonl") for n in ("first", "second"))
    keys = {"validation_fraction": 0.1, "num_proc": 1, "token_budget": 2 * 300 * T, "block_size_tokens": T}
    data = DataConfig(sources=sources, tokenizer=TokenizerConfig(path="tokenizer.json"), **keys)
    manifest, printed = prepared_lines(data, tmp_path / "out")
    old = read_manifest(SUPPORT / "old_preparation")
    assert "second: goes on after 3,976 of 4,801 training tokens" in printed and "first: goes on" not in printed
    assert (manifest.hash, manifest.request, manifest.sources) == (old.hash, old.request, old.sources)
    assert to_json(old) == json.loads((SUPPORT / "old_preparation" / "manifest.json").read_text())
    shutil.copy(SUPPORT / "old_preparation" / "manifest.json", tmp_path / "out")
    assert [len(documents) for _, documents in streams(tmp_path / "out")] == [4, 3]
    assert prepare(data, tmp_path / "out") == old


class Interruption:
    """Ctrl-C at the n-th line that the streaming and the writing execute; 0: none, the lines are counted."""

    def __init__(self, n=0):
        self.n, self.lines = n, 0

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error):
        sys.settrace(self._before)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename in (corpus.__file__, blocks.__file__) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                raise KeyboardInterrupt
        return self._line


def test_ctrl_c_at_any_line_costs_no_token(tokenizer, tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr("replication.data.blocks.SHARD_BYTES", 10_000)
    monkeypatch.setattr(corpus, "PIECE_DOCUMENTS", 2)
    lines = write_jsonl(tmp_path / "lines.jsonl", texts(40))
    source = SourceConfig(name="web", kind="jsonl", path=str(lines))
    config = dataclasses.replace(web_config(lines, tokenizer, blocks=1000), sources=(source,))
    with Interruption() as counted:
        expected = prepare(config, tmp_path / "expected")
    points = np.linspace(1, counted.lines, 25).astype(int).tolist()
    ends, saved = [], []
    for n in points:
        out = tmp_path / str(n) / "out"
        with pytest.raises(KeyboardInterrupt), Interruption(n):
            prepare(config, out)
        saved.append(saved_tokens(out))
        ends.append(prepare(config, out).hash)
    assert ends == [expected.hash] * len(points)
    assert max(saved) > 0.5 * 1000 * T, "some of the calls had work to go on with"


@pytest.fixture
def line(monkeypatch):
    """The connection under `datasets`: set line["fails"] to the reads (of tables, counted) that are to fail.

    A local set is taken for one of the hub.
    """
    from datasets.packaged_modules.parquet.parquet import Parquet

    state = {"reads": 0, "fails": set(), "error": ConnectionResetError("Connection reset by peer")}
    real = Parquet._generate_tables

    def generate(self, *args, **kwargs):
        for found in real(self, *args, **kwargs):
            state["reads"] += 1
            if state["reads"] in state["fails"]:
                raise state["error"]
            yield found

    monkeypatch.setattr(Parquet, "_generate_tables", generate)
    monkeypatch.setattr("replication.data.hub.PAUSES_SECONDS", (0, 0, 0))
    monkeypatch.setattr("replication.data.hub.Retries._is_local", lambda self: False)
    return state


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), HTTP.ReadTimeout("slow"), TimeoutError(), OSError("broken pipe")]
)
def test_a_dropped_connection_is_taken_up(web, tokenizer, undisturbed, tmp_path, small_pieces, line, error):
    line |= {"fails": {1, 2, 30, 31, 40}, "error": error}
    manifest, printed = prepared_lines(web_config(web, tokenizer), tmp_path / "out")
    assert manifest.hash == undisturbed.hash
    assert printed.count("web: reading failed") >= 4 and "(2 of 3)" in printed and type(error).__name__ in printed


def test_a_line_that_stays_down_keeps_what_was_done(web, tokenizer, undisturbed, tmp_path, small_pieces, line):
    line["fails"] = set(range(30, 1000))
    with pytest.raises(UserError, match=r"source 'web': load_dataset failed 4 times in a row .*same command again"):
        prepare(web_config(web, tokenizer), tmp_path / "out")
    assert saved_tokens(tmp_path / "out") > 0
    line["fails"] = set()
    manifest, printed = prepared_lines(web_config(web, tokenizer), tmp_path / "out")
    assert manifest.hash == undisturbed.hash and "web: goes on after" in printed


def response(status):
    return HTTP.Response(status, request=HTTP.Request("GET", "https://hub"))


def test_what_passes_and_what_does_not():
    from fsspec.exceptions import FSTimeoutError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    wrapped = RuntimeError("failed")
    wrapped.__cause__ = GatedRepoError("gated", response=response(403))
    passing = [
        ConnectionError("reset"),
        HTTP.ConnectError("no route"),
        FSTimeoutError(),
        HfHubHTTPError("busy", response=response(503)),
        HfHubHTTPError("slower", response=response(429)),
    ]
    final = [
        datasets.exceptions.DatasetNotFoundError("no such set"),
        RepositoryNotFoundError("404", response=response(404)),
        HfHubHTTPError("no", response=response(403)),
        OfflineModeIsEnabled("offline"),
        ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
        wrapped,
    ]
    assert [may_pass(e, online=True) for e in passing] == [True] * len(passing)
    assert [may_pass(e, online=True) for e in final] == [False] * len(final)
    # a file that was listed and is not found, or rows that cannot be parsed: a broken line, unless nothing was opened
    assert may_pass(FileNotFoundError("x"), online=True) and not may_pass(FileNotFoundError("x"), online=False)
    assert may_pass(ValueError("x"), online=True) and not may_pass(ValueError("Unknown split"), online=False)


def test_a_full_disk_keeps_what_was_done(web, tokenizer, undisturbed, tmp_path, small_pieces, monkeypatch):
    real, out = SplitWriter._write, tmp_path / "out"

    def write(self, blocks):
        if self.tokens > 20_000:
            raise OSError(28, "No space left on device")
        real(self, blocks)

    monkeypatch.setattr(SplitWriter, "_write", write)
    with pytest.raises(UserError, match=r"disk full while writing .*out\.partial: what was done is kept; free space"):
        prepare(web_config(web, tokenizer), out)
    monkeypatch.setattr(SplitWriter, "_write", real)
    assert 10_000 < saved_tokens(out) <= 20_000
    assert prepare(web_config(web, tokenizer), out).hash == undisturbed.hash


def test_a_disk_that_is_full_for_a_moment_costs_no_token(
    web, tokenizer, undisturbed, tmp_path, small_pieces, monkeypatch
):
    real, calls = SplitWriter._write, itertools.count()

    def write(self, blocks):
        if next(calls) == 20:
            raise OSError(28, "No space left on device")
        real(self, blocks)

    monkeypatch.setattr(SplitWriter, "_write", write)
    with pytest.raises(UserError, match="disk full"):
        prepare(web_config(web, tokenizer), tmp_path / "out")
    assert saved_tokens(tmp_path / "out") > 0
    assert prepare(web_config(web, tokenizer), tmp_path / "out").hash == undisturbed.hash


def test_a_kill_before_the_rename_costs_nothing(web, tokenizer, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("replication.data.folder._sync", lambda folder: signal.raise_signal(signal.SIGINT))
        prepare(web_config(web, tokenizer), tmp_path / "out")
    monkeypatch.setattr(tokenise, "tokens_of", lambda tokenizer, texts: pytest.fail("tokenised again"))
    assert prepare(web_config(web, tokenizer), tmp_path / "out").hash == undisturbed.hash


def test_progress_says_how_much_how_fast_and_how_long(web, tokenizer, tmp_path, small_pieces, monkeypatch):
    clock = itertools.count()
    meter = Meter(total=1000, done=100, clock=lambda: next(clock) * 10.0)
    meter.now = 200
    assert str(meter).startswith("200 of 1,000 tokens (20%), ") and str(meter).endswith(" left")
    meter = Meter(total=1000, done=100, clock=iter([0.0, 10.0, 10.0, 10.0]).__next__)
    meter.now = 200
    assert str(meter) == "200 of 1,000 tokens (20%), 10 tokens/s, 0:01:20 left"
    monkeypatch.setattr("replication.console.LINE_SECONDS", 0)
    _, printed = prepared_lines(web_config(web, tokenizer, blocks=1000), tmp_path / "lines")
    assert re.search(r"web \(1 of 1\): [\d,]+ of 16,001 tokens \(\d+%\), [\d,]+ tokens/s, \S+ left", printed)
    config = web_config(web, tokenizer, blocks=10, validation_fraction=0.02)
    two = (config.sources[0], dataclasses.replace(config.sources[0], name="again", text_field="url"))
    _, printed = prepared_lines(dataclasses.replace(config, sources=two), tmp_path / "two")
    assert re.search(r"again \(2 of 2\): .* of 81 tokens \(.*; all sources: 100%, 0:00:00 left", printed)
    assert "web: has its share; reads on until validation has one block" in printed
    shown = Console(file=(screen := StringIO()), force_terminal=True, width=150)
    prepare(web_config(web, tokenizer, blocks=1000), tmp_path / "bars", shown)
    assert "of 16,001 tokens" in screen.getvalue()


# ---------------------------------------------------------------- requests and commits


def test_another_request_does_not_take_over_the_work(web, tokenizer, tmp_path, small_pieces, line):
    line["fails"], out = set(range(30, 1000)), tmp_path / "out"
    config = web_config(web, tokenizer)
    with pytest.raises(UserError):
        prepare(config, out)
    kept = saved_tokens(out)
    for change, named in (
        ({"block_size_tokens": 32}, r"another data\.block_size_tokens"),
        (
            {"tokenizer": dataclasses.replace(tokenizer, padded_vocab_size=999)},
            r"another data\.tokenizer\.padded_vocab_size",
        ),
        ({"validation_fraction": 0.2}, r"another data\.validation_fraction"),
        ({"sources": (dataclasses.replace(config.sources[0], weight=2.0),)}, r"another data\.sources\.web\.weight"),
        ({"token_budget": None}, r"a data\.token_budget of 80,000, and this config has none"),
    ):
        with pytest.raises(UserError, match=rf"out\.partial: holds unfinished work with {named}; set what"):
            prepare(dataclasses.replace(config, **change), out)
    assert saved_tokens(out) == kept > 0


def conversations(path, roles):
    rows = ({"messages": [{"role": r, "content": t}]} for r, t in zip(roles, texts(len(roles)), strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_corrected_source_is_begun_anew_and_the_others_are_kept(tokenizer, tmp_path, small_pieces, monkeypatch):
    good = SourceConfig(name="good", kind="jsonl", path=str(write_jsonl(tmp_path / "good.jsonl", texts(40, seed=1))))
    chat = conversations(tmp_path / "chat.jsonl", ["user"] * 35 + ["tool"] * 5)
    named = {"user": "User: {content}\n"}
    bad = SourceConfig(name="bad.1", kind="jsonl", path=chat, text_field="messages", messages=named)
    data = dataclasses.replace(web_config(chat, tokenizer, blocks=10_000), sources=(good, bad))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"chat\.jsonl:36: a message of role 'tool'"):
        prepare(data, out)
    assert saved_tokens(out, "bad.1") > 0
    mended = dataclasses.replace(data, sources=(good, dataclasses.replace(bad, messages={**named, "tool": ""})))
    expected = prepare(mended, tmp_path / "expected")
    read = []
    real = tokenise.tokens_of
    monkeypatch.setattr(tokenise, "tokens_of", lambda t, x: read.extend(x) or real(t, x))
    manifest, printed = prepared_lines(mended, out)
    assert "bad.1: its keys have changed since; begun anew, what the other sources have is kept" in printed
    assert manifest.hash == expected.hash and manifest.sources == expected.sources
    assert len(read) == 35 and all(text.startswith("User: ") for text in read)


def test_a_trained_tokenizer_depends_on_every_source():
    a = request_of(DataConfig(sources=(SourceConfig(name="a"),), token_budget=100))
    b = request_of(DataConfig(sources=(SourceConfig(name="a", text_field="body"),), token_budget=100))
    assert changed_sources(a, b) == []
    a["tokenizer"]["path"] = b["tokenizer"]["path"] = "x.json"
    assert changed_sources(a, b) == ["a"] and changed_sources(a, {**b, "block_size_tokens": 1}) == []


def test_mistakes_of_the_last_source_are_found_before_the_first_is_tokenised(web, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "tokens_of", lambda t, x: pytest.fail("tokenised"))
    config = web_config(web, tokenizer)
    chat = conversations(tmp_path / "chat.jsonl", ["tool"])
    lines = write_jsonl(tmp_path / "lines.jsonl", texts(3))
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", " "])
    parquet = str(web / "sample" / "10BT" / "000_00000.parquet")
    for keys, message in (
        ({"kind": "jsonl", "path": str(lines), "text_field": "body"}, r"has no field 'body'"),
        ({"kind": "jsonl", "path": str(lines), "text_field": "id"}, r"field 'id' holds an int, not text"),
        ({"kind": "parquet", "path": parquet, "text_field": "body"}, r"has no field 'body'"),
        ({"kind": "jsonl", "path": chat, "text_field": "messages", "messages": {"user": ""}}, r"of role 'tool'"),
        ({"kind": "jsonl", "path": str(blank)}, r"source 'last': no document holds text \(2 empty, 0 undecodable\)"),
        ({"kind": "hub", "path": str(web), "text_field": "score"}, r"field 'score' holds a float, not text"),
    ):
        sources = (*config.sources, SourceConfig(name="last", **keys))
        with pytest.raises(UserError, match=message):
            prepare(dataclasses.replace(config, sources=sources), tmp_path / "out")


def test_the_first_document_is_given_back(web, tmp_path):
    lines = write_jsonl(tmp_path / "lines.jsonl", ["", *texts(3)])
    hub = SourceConfig(name="web", kind="hub", path=str(web), subset="sample-10BT")
    for source in (hub, SourceConfig(name="lines", kind="jsonl", path=str(lines))):
        checked, plain = (DocumentStream(source, shuffled=True) for _ in range(2))
        checked.check_first()
        assert list(checked) == list(plain) and checked.place() == plain.place()


def test_a_branch_is_resolved_once(web, tokenizer, undisturbed, tmp_path, small_pieces, monkeypatch, line):
    """The commit of the first call is read to the end, though the branch moves, and is named for the config."""
    commits = iter(["a" * 40, "b" * 40])
    asked = []

    def dataset_info(self, path, revision=None, timeout=None):
        asked.append((path, revision))
        return type("Info", (), {"sha": next(commits)})

    real = datasets.load_dataset
    read = []

    def load(path, *args, revision=None, **keys):
        read.append(revision)
        return real(str(web) if path == "someone/web" else path, *args, **keys)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    config = web_config(web, tokenizer)
    source = dataclasses.replace(config.sources[0], path="someone/web", revision="main")
    config = dataclasses.replace(config, sources=(source,))
    line["fails"] = set(range(30, 1000))
    with pytest.raises(UserError):
        prepare(config, tmp_path / "out")
    line["fails"] = set()
    manifest, printed = prepared_lines(config, tmp_path / "out")
    assert asked == [("someone/web", "main")] and set(read) == {"a" * 40}
    assert manifest.sources["web"].revision == "a" * 40 and manifest.hash == undisturbed.hash
    assert f"web: to pin what was read, set  revision: {'a' * 40}" in printed


def test_mistakes_are_one_line_and_not_retried(web, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("retried"))
    config = web_config(web, tokenizer)
    for change, message in (
        ({"split": "nosuch"}, r"load_dataset failed for .*split nosuch"),
        ({"subset": "sample-1BT"}, r"load_dataset failed for .*subset sample-1BT"),
        ({"text_field": "body"}, r"has no field 'body'; set text_field to one of: text, id"),
        ({"text_field": "int_score"}, r"holds an int, not text"),
    ):
        source = dataclasses.replace(config.sources[0], **change)
        with pytest.raises(UserError, match=message):
            prepare(dataclasses.replace(config, sources=(source,)), tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"data\.token_budget: the tokens that are missing need .* MiB free"):
        prepare(config, tmp_path / "out")
    small = dataclasses.replace(tokenizer, padded_vocab_size=300)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"padded_vocab_size: 300 is less than the 320 entries"):
        prepare(dataclasses.replace(config, tokenizer=small), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_local_sets_that_cannot_be_read_are_not_retried(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("retried"))
    whole = gzip.compress(b'{"text": "a"}\n' * 20_000)
    for name, raw, message in (
        ("empty.jsonl", b"", r"source 'web': \S+ has no rows; check its subset and split"),
        ("cut.jsonl.gz", whole[:-20], r"load_dataset failed for .*; check these keys, and fix or replace the files"),
    ):
        (folder := tmp_path / name.partition(".")[0]).mkdir()
        (folder / name).write_bytes(raw)
        config = web_config(folder, tokenizer)
        source = dataclasses.replace(config.sources[0], subset=None)
        with pytest.raises(UserError, match=message):
            prepare(dataclasses.replace(config, sources=(source,)), tmp_path / "out")


def test_files_that_changed_meanwhile_are_refused(tokenizer, tmp_path, small_pieces, line):
    web = write_set(tmp_path / "web", "fineweb_edu", n_rows=200, n_shards=3)
    line["fails"] = set(range(30, 1000))
    with pytest.raises(UserError):
        prepare(web_config(web, tokenizer), tmp_path / "out")
    (web / "sample" / "10BT" / "000_00000.parquet").unlink()
    line["fails"] = set()
    gone = r"source 'web': its files have changed since the preparation began: sample/10BT/000_00000\.parquet; restore"
    with pytest.raises(UserError, match=gone):
        prepare(web_config(web, tokenizer), tmp_path / "out")


@pytest.mark.parametrize(
    "edit", ["earlier rows gone", "an earlier row", "a later file", "touched", "not begun", "tokenizer"]
)
def test_local_files_edited_meanwhile_are_refused_and_touched_ones_are_not(
    tokenizer, tmp_path, small_pieces, monkeypatch, edit
):
    folder = tmp_path / "lines"
    for i in range(2):
        write_jsonl(folder / f"{i}.jsonl", texts(60, seed=i))
    (folder / "notes.md").write_text("passed over")
    source = SourceConfig(name="web", kind="jsonl", path=str(folder))
    later = SourceConfig(name="later", kind="jsonl", path=str(write_jsonl(tmp_path / "later.jsonl", texts(40, seed=7))))
    config = dataclasses.replace(web_config(folder, tokenizer, blocks=4000), sources=(source, later))
    own = shutil.copy(tokenizer.path, tmp_path / "tokenizer.json")
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(path=str(own)))
    expected, out = prepare(config, tmp_path / "expected"), tmp_path / "out"
    real, writes = SplitWriter._write, itertools.count()

    def write(self, blocks):
        if next(writes) == 3:
            raise KeyboardInterrupt
        real(self, blocks)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SplitWriter, "_write", write)
        prepare(config, out)
    assert saved_tokens(out) > 0
    place = json.loads((out.with_name("out.partial") / "progress" / "web.json").read_text())["place"]
    current, other = (folder / place["part"], folder / {"0.jsonl": "1.jsonl", "1.jsonl": "0.jsonl"}[place["part"]])
    lines = current.read_text().splitlines(keepends=True)
    match edit:
        case "earlier rows gone":
            current.write_text("".join(lines[5:]))
        case "an earlier row":
            current.write_text("".join([lines[0].replace("Document 0", "Document 9"), *lines[1:]]))
        case "a later file":
            other.write_text(other.read_text() + lines[0])
        case "touched":
            current.touch()
        case "not begun":
            write_jsonl(tmp_path / "later.jsonl", texts(50, seed=8))
        case "tokenizer":
            own.write_text(train_tokenizer(TokenizerConfig(vocab_size=300), texts(30)).json())
            with pytest.raises(
                UserError, match=r"data\.tokenizer\.path: .*\.json has changed since the preparation began"
            ):
                prepare(config, out)
            return
    if edit in ("touched", "not begun"):
        manifest = prepare(config, out)
        assert (manifest.hash == expected.hash) == (edit == "touched")
        assert manifest.sources["web"] == expected.sources["web"]
        assert manifest.sources["web"].other_files == ["notes.md"]
        return
    name = other.name if edit == "a later file" else current.name
    message = rf"source 'web': its files have changed since the preparation began: {name}; restore them, or remove"
    with pytest.raises(UserError, match=message):
        prepare(config, out)


# ---------------------------------------------------------------- disk


def size_of(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0


def test_the_disk_never_holds_more_than_the_tokens(web, tokenizer, tmp_path, small_pieces, monkeypatch):
    sizes = []
    real = corpus.write_progress

    def watched(*args):
        real(*args)
        sizes.append(size_of(tmp_path))

    monkeypatch.setattr(corpus, "write_progress", watched)
    manifest = prepare(web_config(web, tokenizer), tmp_path / "out")
    final = size_of(tmp_path)
    assert len(sizes) > 20 and max(sizes) < 1.1 * final
    entry = manifest.sources["web"]
    tokens = entry.train.blocks + entry.validation.blocks
    overhead = final - tokens * (T + 1) * 4 - (tmp_path / "out" / "tokenizer.json").stat().st_size
    assert overhead < 40_000, "nothing is stored twice"
    assert not (tmp_path / "out.partial").exists()
