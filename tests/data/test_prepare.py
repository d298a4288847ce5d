"""Preparing a corpus: nothing lost, the same each time, and never half a corpus taken for a whole one."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from paths import SUPPORT
from rich.console import Console
from small_corpus import END_OF_TEXT, texts, two_sources, uncut, write_folder, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from replication.config import DataConfig, RunConfig, SourceConfig, TokenizerConfig, TrainingConfig
from replication.data.blocks import PAD, block_count, cut
from replication.data.corpus import text_key
from replication.data.folder import read_manifest, request_differences, request_of
from replication.data.order import MixtureOrder
from replication.data.prepare import prepare
from replication.data.store import TokenStore, show_batch
from replication.data.tokenizer import train_tokenizer
from replication.errors import UserError, is_disk_full


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepare")
    data = two_sources(root)
    return data, root / "out", prepare(data, root / "out")


def files_of(folder):
    """{name: content} of every file but the manifest, which holds the time of day."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 15, 16, 17, 18, 32, 33, 34, 1000])
@pytest.mark.parametrize("size", [1, 16])
def test_blocks_predict_every_token_but_the_first_once(n_tokens, size):
    stream = np.arange(n_tokens, dtype=np.int32)
    batches, held = [], np.empty(0, dtype=np.int32)
    for i, part in enumerate(np.array_split(stream, 7)):
        held = np.concatenate([held, part])
        batches.append(cut(held, size, ended=i == 6))
        held = held[len(batches[-1]) * size :]
    assert sum(map(len, batches)) == block_count(n_tokens, size)
    if n_tokens < 2:
        return
    blocks = np.concatenate(batches)
    assert blocks.dtype == np.int32 and blocks.shape == (block_count(n_tokens, size), size + 1)
    targets = blocks[:, 1:]
    assert np.array_equal(targets[targets != PAD], stream[1:])
    assert (blocks[:-1] != PAD).all() and blocks[-1, 0] != PAD and blocks[-1, 1] != PAD
    assert np.array_equal(uncut(blocks), stream)


# ---------------------------------------------------------------- what is written


def test_every_document_comes_back_whole(prepared):
    _, out, manifest = prepared
    store = TokenStore.open(out)
    for source, (name, seed) in enumerate((("files", 1), ("lines", 2))):
        entry, found = manifest.sources[name], []
        for split in ("train", "validation"):
            size = store.sizes(split)[source]
            stream = uncut(store.read(split, np.full(size, source), np.arange(size)))
            assert len(stream) == entry.split(split).tokens
            assert entry.split(split).predicted_tokens == len(stream) - 1
            assert hashlib.sha256(stream.astype("<i4").tobytes()).hexdigest() == entry.split(split).sha256
            ends = np.flatnonzero(stream == store.end_of_text_id)
            assert len(ends) == entry.split(split).documents and ends[-1] == len(stream) - 1
            found += [store.tokenizer.decode(part[:-1]) for part in np.split(stream, ends + 1)[:-1]]
        assert sorted(found) == sorted(texts(40, seed=seed))
        assert any(END_OF_TEXT in text for text in found)
        assert found != texts(40, seed=seed), "neighbouring files must not be neighbours"
        assert entry.text_bytes == sum(len(text.encode()) for text in found)
        assert entry.text_bytes == entry.train.text_bytes + entry.validation.text_bytes


def test_the_manifest_says_what_was_read(prepared, tmp_path):
    data, out, manifest = prepared
    assert manifest == read_manifest(out)
    stored = json.loads((out / "manifest.json").read_text())
    assert stored["hash"] == manifest.hash and stored["sources"]["files"]["train"] == dataclasses.asdict(
        manifest.sources["files"].train
    )
    names = ["manifest.json", "origins.json", "tokenizer.json", "train", "validation"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert manifest.format == 1 and manifest.request == request_of(data)
    assert (manifest.vocab_size, manifest.end_of_text_id, manifest.block_size_tokens) == (320, 0, 16)
    assert {"datasets", "tokenizers", "python"} <= set(manifest.packages)
    files = manifest.sources["files"]
    assert files.documents == 40 == files.train.documents + files.validation.documents
    assert (files.kind, files.empty, files.undecodable, files.undecodable_files) == ("text", 0, 0, [])
    for entry in manifest.sources.values():
        assert 0.1 <= entry.validation.text_bytes / entry.text_bytes < 0.2


def test_left_out_files_are_reported(tmp_path):
    folder = write_folder(tmp_path / "files", texts(30))
    (folder / "empty.txt").write_bytes(b"\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    source = SourceConfig(name="files", path=str(folder))
    console = Console(record=True, width=200, file=StringIO())
    data = DataConfig(block_size_tokens=16, sources=(source,), tokenizer=TokenizerConfig(vocab_size=300))
    entry = prepare(data, tmp_path / "out", console).sources["files"]
    assert (entry.documents, entry.empty, entry.undecodable) == (30, 1, 1)
    assert entry.undecodable_files == ["binary.txt"]
    assert "files: 30 documents" in (printed := console.export_text())
    assert "left out 1 empty; 1 undecodable: binary.txt" in printed


def test_identical_documents_never_straddle_the_split(tmp_path):
    shared = texts(60, seed=5)
    folder = write_folder(tmp_path / "files", [*shared, *shared])
    lines = write_jsonl(tmp_path / "lines.jsonl", [*shared[:30], *texts(5, seed=6)])
    sources = (
        SourceConfig(name="files", path=str(folder)),
        SourceConfig(name="lines", kind="jsonl", path=str(lines)),
    )
    tokenizer = TokenizerConfig(vocab_size=300)
    prepare(DataConfig(sources=sources, tokenizer=tokenizer, validation_fraction=0.15), tmp_path / "out")
    store = TokenStore.open(tmp_path / "out")
    split_of = {}
    for split in ("train", "validation"):
        found = []
        for source in range(2):
            size = store.sizes(split)[source]
            stream = uncut(store.read(split, np.full(size, source), np.arange(size)))
            found += store.tokenizer.decode(stream, skip_special_tokens=False).split("Document ")[1:]
        split_of[split] = {text.split(".\n")[0] for text in found if ".\n" in text}
    whole = {text.split(".\n")[0].removeprefix("Document ") for text in shared}
    assert split_of["train"] | split_of["validation"] >= whole and split_of["validation"]
    first_lines = {text: text.split(".\n")[0].removeprefix("Document ") for text in shared}
    assert len(set(first_lines.values())) == 60
    # "lines" has five documents of its own, numbered like shared ones; leave their numbers out.
    assert not (split_of["train"] & split_of["validation"]) - {str(i) for i in range(5)}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_two_preparations_are_the_same_to_the_byte(prepared, tmp_path, num_proc):
    data, out, manifest = prepared
    console = Console(file=StringIO(), force_terminal=True)  # with bars
    again = prepare(dataclasses.replace(data, num_proc=num_proc), tmp_path / "out", console)
    assert again.hash == manifest.hash
    mine, other = files_of(tmp_path / "out"), files_of(out)
    assert set(mine) == set(other)
    assert [name for name in mine if mine[name] != other[name] and name.endswith((".arrow", "tokenizer.json"))] == []


def test_the_hash_follows_the_content(prepared, tmp_path):
    data, _, manifest = prepared
    longer = dataclasses.replace(data, block_size_tokens=32)
    assert prepare(longer, tmp_path / "longer").hash != manifest.hash
    changed = write_folder(tmp_path / "files", [*texts(39, seed=1), "something else " * 100])
    sources = (dataclasses.replace(data.sources[0], path=str(changed)), data.sources[1])
    assert prepare(dataclasses.replace(data, sources=sources), tmp_path / "changed").hash != manifest.hash


def test_a_tokenizer_file_is_used_as_it_is(prepared, tmp_path):
    data, out, manifest = prepared
    loaded = dataclasses.replace(data, tokenizer=TokenizerConfig(path=str(out / "tokenizer.json")))
    again = prepare(loaded, tmp_path / "out")
    assert again.hash == manifest.hash and again.vocab_size == 320


def test_the_tokenizer_sees_each_source_in_proportion_and_a_bounded_text(prepared, monkeypatch, tmp_path):
    from replication.data import prepare as module

    seen = []
    real = module.train_tokenizer
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 60_000)
    monkeypatch.setattr(module, "train_tokenizer", lambda c, t: real(c, [seen.append(x) or x for x in t]))
    prepare(prepared[0], tmp_path / "out")
    assert 0.8 * 60_000 < sum(map(len, seen)) <= 60_000
    of_files = sum(len(text) for text in seen if any(text in whole for whole in texts(40, seed=1)))
    assert 0.35 < of_files / sum(map(len, seen)) < 0.65


@pytest.mark.parametrize("budget", [None, 3200])
def test_shares_far_from_what_was_asked_and_unknown_text_are_told(prepared, tmp_path, budget):
    """The 40 words of a tokenizer against texts of others, a long document that falls to validation, a heavy source."""
    words = {token: i for i, token in enumerate(["<eos>", "<unk>", *(f"w{i}" for i in range(40))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "words.json"))
    known = [" ".join(f"w{(i * j) % 40}" for j in range(30)) for i in range(1, 80)]
    first = min(text_key(text.encode()) for text in known)
    long = next(text for i in range(10**6) if text_key((text := f"w1 u{i} " * 2000).encode()) < first)
    sources = (
        SourceConfig(name="long", path=str(write_folder(tmp_path / "long", [*known, long])), weight=50),
        SourceConfig(name="plain", path=str(write_folder(tmp_path / "plain", known * 2))),
    )
    data = DataConfig(
        block_size_tokens=16,
        sources=sources,
        tokenizer=TokenizerConfig(path=str(tmp_path / "words.json"), end_of_text="<eos>"),
        num_proc=1,
        token_budget=budget,
        validation_fraction=0.02,
    )
    console = Console(record=True, width=300, file=StringIO())
    manifest = prepare(data, tmp_path / "out", console)
    printed = console.export_text()
    entry = manifest.sources["long"]
    unknown = 2000 * (long.index(" w1", 3) - 3)  # bytes of the long document's second word
    assert (entry.train.unknown_bytes, entry.validation.unknown_bytes) == (0, unknown)
    share = unknown / entry.text_bytes
    assert f"; {share:.2%} of it unknown to the tokenizer" in printed
    assert f"long: warning: {share:.1%} of it is unknown to the tokenizer; take one that knows this text" in printed
    assert re.search(
        r"long: warning: validation holds 6\d\.\d% of its tokens, .*_fraction asks for 2\.0%: whole", printed
    )
    assert ("long: warning: by the weights training reads it " in printed) == (budget is None)
    assert budget or "plain: warning: " not in printed


# ---------------------------------------------------------------- an OUT that exists


def test_a_second_call_repeats_nothing(prepared):
    data, out, manifest = prepared
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    other_weights = tuple(dataclasses.replace(s, weight=5.0) for s in data.sources)
    assert prepare(dataclasses.replace(data, num_proc=2, dir="x", sources=other_weights), out) == manifest
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_local_files_that_changed_since_are_told(tmp_path):
    folder = write_folder(tmp_path / "files", texts(12))
    lines = write_jsonl(tmp_path / "lines.jsonl", texts(12, seed=3))
    sources = (
        SourceConfig(name="files", path=str(folder)),
        SourceConfig(name="lines", kind="jsonl", path=str(lines)),
    )
    own = tmp_path / "tokenizer.json"
    own.write_text(train_tokenizer(TokenizerConfig(vocab_size=300), texts(12)).json())
    tokenizer = TokenizerConfig(path=str(own))
    data = DataConfig(block_size_tokens=16, sources=sources, tokenizer=tokenizer, num_proc=1, validation_fraction=0.1)
    manifest = prepare(data, tmp_path / "out")

    def told():
        console = Console(record=True, width=300, file=StringIO())
        assert prepare(data, tmp_path / "out", console).hash == manifest.hash
        return [line for line in console.export_text().splitlines() if "warning" in line]

    assert told() == []
    with open(folder / "0000.txt", "a") as file:
        file.write("more")
    (folder / "0001.txt").rename(folder / "later.txt")
    (line,) = told()
    assert line.startswith("files: warning: 3 local file(s) are of another size or time than when they were prepared")
    assert "(0000.txt, 0001.txt, later.txt)" in line and line.endswith("out or choose another --out")
    lines.unlink()  # a corpus that is not here is no other corpus
    assert len(told()) == 1
    own.write_text(json.dumps(json.loads(own.read_text())))  # the same one
    assert len(told()) == 1
    own.write_text(train_tokenizer(TokenizerConfig(vocab_size=299), texts(12)).json())
    assert told()[0].startswith(f"tokenizer: warning: {own} is another one than the corpus was prepared with; to")
    own.unlink()
    assert len(told()) == 1


def test_another_request_is_refused_by_key(prepared):
    data, out, _ = prepared
    changed = dataclasses.replace(data, validation_fraction=0.3, tokenizer=TokenizerConfig(vocab_size=400))
    keys = r"data\.tokenizer\.vocab_size and data\.validation_fraction"
    with pytest.raises(
        UserError, match=rf"out: holds a preparation with another {keys}; choose another --out, or remove"
    ):
        prepare(changed, out)
    assert request_differences(request_of(data), request_of(data)) == []


def test_a_folder_that_holds_something_else_is_refused_and_kept(prepared, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"exists and is not a preparation; choose another --out"):
        prepare(prepared[0], tmp_path)
    with pytest.raises(UserError, match=r"mine\.txt: is a file"):
        prepare(prepared[0], tmp_path / "mine.txt")
    with pytest.raises(UserError, match=r"cannot be written"):
        prepare(prepared[0], tmp_path / "mine.txt" / "below")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_empty_folder_is_filled(prepared, tmp_path):
    (tmp_path / "out").mkdir()
    assert prepare(prepared[0], tmp_path / "out").hash == prepared[2].hash


# ---------------------------------------------------------------- a corpus that cannot be


@pytest.mark.parametrize(
    "sources, message",
    [
        ((), r"data\.sources: names no source"),
        ((SourceConfig(name="../x", path="a"),), r"data\.sources: name '\.\./x' must be letters"),
        ((SourceConfig(name="x", path="nowhere"),), r"data\.sources: source 'x': no file matches nowhere; .*"),
    ],
)
def test_a_missing_corpus_is_refused_and_leaves_nothing(tmp_path, sources, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(sources=sources), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "documents, vocab_size, block, message",
    [
        (["", " \n"], 300, 16, r"source 'x': no document holds text \(2 empty, 0 undecodable\)"),
        (["only one document " * 100], 300, 16, r"source 'x': its 1 document\(s\) all fall to validation"),
        (texts(2), 257, 100_000, r"source 'x': its train split has \d+ tokens, fewer than the 100001 that one block"),
        (texts(10), 60_000, 16, r"data\.tokenizer\.vocab_size: the corpus yields \d+ entries"),
    ],
)
def test_a_corpus_too_small_is_refused_and_leaves_nothing(tmp_path, documents, vocab_size, block, message):
    folder = write_folder(tmp_path / "x", documents)
    tokenizer = TokenizerConfig(vocab_size=vocab_size)
    source = SourceConfig(name="x", path=str(folder))
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(block_size_tokens=block, sources=(source,), tokenizer=tokenizer), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# ---------------------------------------------------------------- interruptions


def start(root, code, num_proc=2):
    """A real process that prepares root/out after running some code."""
    script = f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(SUPPORT)!r})
        from pathlib import Path
        from small_corpus import two_sources
        from replication.data import folder, prepare
        from replication.data.tokenizer import TextTokenizer
        from replication.errors import UserError
        root = Path({str(root)!r})
        data = two_sources(root, n=200, num_proc={num_proc})
    """
    script = textwrap.dedent(script) + textwrap.dedent(code) + "\nprepare.prepare(data, root / 'out')\n"
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


SLOW = """
from replication.data import corpus
corpus.PIECE_DOCUMENTS = 50
real = TextTokenizer.encode_counted
def slow(self, texts):
    time.sleep(0.4)
    return real(self, texts)
TextTokenizer.encode_counted = slow
"""
KILL_BEFORE_RENAME = """
def die(a, b):
    os.kill(os.getpid(), signal.SIGKILL)
sync = folder._sync
def last_moment(partial):
    sync(partial)
    os.rename = die
folder._sync = last_moment
"""


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The hash of the corpus of start()."""
    root = tmp_path_factory.mktemp("undisturbed")
    return prepare(two_sources(root, n=200), root / "out").hash


def test_a_killed_preparation_is_started_over(tmp_path, undisturbed):
    out = tmp_path / "out"
    process = start(tmp_path, SLOW)
    wait_for((tmp_path / "out.partial" / "train" / "files" / "state.json").exists)
    children = children_of(process.pid)
    assert children, "tokenising runs in processes of its own"
    with pytest.raises(UserError, match=r"out\.partial: another process is preparing this corpus"):
        prepare(two_sources(tmp_path, n=200), out)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.partial" / "train" / "files").is_dir()
    with pytest.raises(UserError, match=r"data\.dir: .*out does not exist"):
        TokenStore.open(out)
    wait_for(lambda: not any(map(is_alive, children)), seconds=5)
    assert prepare(two_sources(tmp_path, n=200), out).hash == undisturbed
    assert not (tmp_path / "out.partial").exists()


def test_a_preparation_killed_at_the_last_moment_is_not_complete(tmp_path, undisturbed):
    process = start(tmp_path, KILL_BEFORE_RENAME)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert prepare(two_sources(tmp_path, n=200), tmp_path / "out").hash == undisturbed


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path):
    process = start(tmp_path, SLOW)
    wait_for(lambda: (tmp_path / "out.partial" / "tokenizer.json").exists() and children_of(process.pid))
    for child in children_of(process.pid):
        os.kill(child, signal.SIGKILL)
    assert "abruptly" in process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_ctrl_c_leaves_nothing(tmp_path):
    process = start(tmp_path, SLOW)
    wait_for(lambda: (tmp_path / "out.partial" / "tokenizer.json").exists() and children_of(process.pid))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# ---------------------------------------------------------------- a full disk


CATCH = """
try:
    prepare.prepare(data, root / "out")
except UserError as error:
    sys.exit(str(error))
sys.exit("no error")
"""


def assert_disk_full(process, out):
    message = process.communicate(timeout=60)[1].strip()
    assert message.splitlines()[-1].startswith(f"disk full while writing {out}.partial"), message
    assert "free space or choose another --out" in message
    assert process.returncode == 1
    assert not out.exists() and not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    "limit_bytes, num_proc, vocab_size",
    [
        (200_000, 1, 320),  # while reading
        (460_000, 2, 257),  # while tokenising, in a worker: 4 bytes a byte, shared by two
        (1_200_000, 1, 257),  # while tokenising
    ],
)
def test_a_file_too_large_is_one_line_and_leaves_nothing(tmp_path, limit_bytes, num_proc, vocab_size):
    code = f"""
        import dataclasses, resource
        from replication.config import TokenizerConfig
        data = dataclasses.replace(data, tokenizer=TokenizerConfig(vocab_size={vocab_size}))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))
    """
    process = start(tmp_path, textwrap.dedent(code) + CATCH, num_proc)
    assert_disk_full(process, tmp_path / "out")


@pytest.fixture
def tiny_disk(tmp_path):
    """A mounted file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting needs root; the file size limit above covers the same path")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tiny_disk):
    process = start(tmp_path, "root = root / 'disk'" + CATCH)
    assert_disk_full(process, tiny_disk / "out")
    assert list(tiny_disk.iterdir()) == []


def test_a_full_disk_is_known_however_it_is_wrapped():
    full = OSError(28, "No space left on device")
    wrapped = RuntimeError("worker failed")
    wrapped.__cause__ = full
    assert is_disk_full(full) and is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("[Errno 122] Disk quota exceeded: 'x'"))
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470"))
    assert not is_disk_full(OSError(13, "Permission denied")) and not is_disk_full(ValueError("no space here"))


# ---------------------------------------------------------------- showing a batch


def test_show_batch_prints_what_the_order_says(prepared):
    data, out, _ = prepared
    config = RunConfig(data=data, training=TrainingConfig(batch_tokens=8 * 16), seed=4)
    console = Console(record=True, width=80, file=StringIO())
    show_batch(config, out, 7, console, full=True)
    header, *lines = console.export_text().splitlines()
    assert "step 7, data seed 4: 8 sequences" in header
    store = TokenStore.open(out)
    sources, indices = MixtureOrder(store.sizes("train"), [3, 1], seed=4).global_batch(7, 8)
    tokens = store.read("train", sources, indices)
    assert len(lines) == 8
    for i, line in enumerate(lines):
        position, name, _, block, text = line.split(maxsplit=4)
        assert (int(position), name, int(block)) == (i, store.source_names[sources[i]], indices[i])
        assert text == repr(store.tokenizer.decode(tokens[i][tokens[i] != PAD], skip_special_tokens=False))


def test_show_batch_shortens_and_refuses(prepared):
    data, out, _ = prepared
    config = RunConfig(data=data, training=TrainingConfig(batch_tokens=8 * 16))
    console = Console(record=True, width=80, file=StringIO())
    show_batch(dataclasses.replace(config, data=data), out, 0, console)
    assert all(len(line) < 130 for line in console.export_text().splitlines())
    with pytest.raises(UserError, match="--show-batch: step -1"):
        show_batch(config, out, -1, console)


def test_no_process_is_left_behind():
    assert multiprocessing.active_children() == []
