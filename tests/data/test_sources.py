"""Every kind of source on real files: all text is read, and what is not text is counted and named."""

import ast
import bz2
import gzip
import inspect
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_corpus import texts, write_folder, write_jsonl

from replication.config import SourceConfig
from replication.data.files import _pieces
from replication.data.folder import MAX_NAMED
from replication.data.sources import DocumentStream, _docstrings, _python_parts, _stdlib_files, no_text
from replication.errors import UserError


def read(**keys):
    stream = DocumentStream(SourceConfig(name="x", **keys))
    found, report = list(stream), stream.report
    assert report.documents == len(found)
    return found, report


def test_a_folder_is_read_at_any_depth_in_a_fixed_order(tmp_path):
    write_folder(tmp_path / "a" / "b", texts(3))
    (tmp_path / "z.md").write_text("# Last\r\nline")
    (tmp_path / ".hidden").write_text("not asked for")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a")  # a loop is entered once
    found, report = read(kind="text", path=str(tmp_path))
    assert [name for name, _ in found] == ["a/b/0000.txt", "a/b/0001.txt", "a/b/0002.txt", "z.md"]
    assert [text for _, text in found] == [*texts(3), "# Last\r\nline"]
    assert report.hidden == 1
    assert read(kind="text", path=str(tmp_path))[0] == found


def test_a_glob_and_a_file(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", texts(2))
    (tmp_path / "a" / "skip.md").write_text("no")
    assert len(read(kind="text", path=str(tmp_path / "*" / "*.txt"))[0]) == 2
    assert len(read(kind="text", path=str(tmp_path / "**" / "*"))[0]) == 3
    monkeypatch.chdir(tmp_path)
    assert read(kind="text", path="a/skip.md")[0] == [("skip.md", "no")]


def test_one_large_file_is_split_where_the_source_says(tmp_path, monkeypatch):
    monkeypatch.setattr("replication.data.files.CHUNK", 7)  # less than a separator, and than a document
    documents, path = ["one\r\nline", "zwei é", "", "last 数"], tmp_path / "all.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "<|end of|>".join([*documents, ""]).encode())
    found, report = read(kind="text", path=str(path), split_on="<|end of|>")
    assert found == [("all.txt:1", "one\r\nline"), ("all.txt:2", "zwei é"), ("all.txt:4", "last 数")]
    assert report.empty == 2 and read(kind="text", path=str(path))[1].documents == 1
    for chunk, separator, text in itertools.product(
        range(1, 9), ("-", "--", "-+-"), ("-" * 7, "a-+-+-b--", "c" * 20, "")
    ):
        monkeypatch.setattr("replication.data.files.CHUNK", chunk)
        path.write_text(text)
        assert [text for _, text in _pieces(separator, "", path)] == text.split(separator)
    path.write_bytes(b"a--\xff--c")
    with pytest.raises(UserError, match=r"all\.txt cannot be read .*utf-8.*; fix or remove it"):
        read(kind="text", path=str(path), split_on="--")
    path.write_bytes(b"a--b--c")
    stream = DocumentStream(SourceConfig("x", path=str(path), split_on="--"))
    next(iter(stream))
    assert next(iter(DocumentStream(stream.source, stream.place())))[1] == "b", "another stream goes on within the file"


def test_empty_and_undecodable_files_are_counted_and_named(tmp_path):
    write_folder(tmp_path, texts(2))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t\n")
    for i in range(25):
        (tmp_path / f"latin{i:02d}.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    found, report = read(kind="text", path=str(tmp_path))
    assert len(found) == 2
    assert (report.empty, report.undecodable) == (2, 26)
    assert report.undecodable_files == [f"latin{i:02d}.txt" for i in range(MAX_NAMED)]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_missing_path_is_named_with_the_source(tmp_path, kind):
    with pytest.raises(UserError, match=r"data\.sources: source 'x': no file.* matches .*nowhere.*; .*current folder"):
        read(kind=kind, path=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file"):
        read(kind=kind, path=str(tmp_path / "empty"))


def test_json_lines_plain_and_compressed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(3), field="body")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": "zipped"}) + "\n")
    (tmp_path / "README").write_text("not data")
    found, _ = read(kind="jsonl", path=str(tmp_path), text_field="body")
    assert [text for _, text in found] == [*texts(3), "zipped"]
    assert found[0][0] == "a.jsonl:1"


def test_json_lines_that_are_no_text_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": ""}\n\n{"text": null}\n{broken\n'
        b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "end"}'
    )
    found, report = read(kind="jsonl", path=str(path))
    assert [text for _, text in found] == ["good", "end"]
    assert (report.empty, report.undecodable) == (3, 3)
    assert report.undecodable_files == ["a.jsonl:5", "a.jsonl:6", "a.jsonl:7"]


def test_a_missing_field_is_refused_with_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["text"], field="body")
    message = r"source 'x': a\.jsonl:1 has no field 'text'; set text_field to one of: id, body"
    with pytest.raises(UserError, match=message):
        read(kind="jsonl", path=str(path))
    with pytest.raises(UserError, match=r"field 'id' holds an int, not text; set text_field to one of: body$"):
        read(kind="jsonl", path=str(path), text_field="id")
    path.write_text("[1, 2]\n")
    with pytest.raises(UserError, match="is a JSON list"):
        read(kind="jsonl", path=str(path))
    path.write_text('[\n{"text": "a"},\n{"text": "b"}\n]')
    with pytest.raises(UserError, match=r"a\.jsonl is a JSON array; write one object a line"):
        read(kind="jsonl", path=str(path))


def write_parquet(path, rows, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(rows))), field: pyarrow.array(rows, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def test_parquet(tmp_path):
    write_parquet(tmp_path / "b.parquet", [*texts(3), None, ""])
    write_parquet(tmp_path / "deep" / "c.parquet", ["one more"])
    found, report = read(kind="parquet", path=str(tmp_path))
    assert [text for _, text in found] == [*texts(3), "one more"]
    assert report.empty == 2
    with pytest.raises(UserError, match=r"source 'x': b\.parquet has no field 'body'.*: id, text"):
        read(kind="parquet", path=str(tmp_path), text_field="body")


def test_a_damaged_container_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", texts(3))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"source 'x': .*a\.parquet cannot be read"):
        read(kind="parquet", path=str(tmp_path))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=r"source 'x': .*a\.jsonl\.gz cannot be read"):
        read(kind="jsonl", path=str(tmp_path))


ROWS = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, lambda raw: zstd(raw[:16]) + zstd(raw[16:])]
)
def test_packed_lines_are_read_under_any_name(tmp_path, pack):
    for name in ("A.JSONL.GZ", "b.jsonl.zst", "c.json", "d.Ndjson.xz", "e.jsonl.bz2"):
        (tmp_path / name).write_bytes(pack(ROWS))
    found, report = read(kind="jsonl", path=str(tmp_path))
    assert len(found) == 10 and found[0] == ("A.JSONL.GZ:1", "one") and report.other == 0
    whole = pack(ROWS * 2000)
    for damaged in (whole[:-8], whole[: len(whole) // 2] + bytes(40) + whole[len(whole) // 2 + 40 :]):
        (tmp_path / "c.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"source 'x': c\.json cannot be read \(.+\); fix or remove it"):
            read(kind="jsonl", path=str(tmp_path))


def zstd(raw):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "raw, what",
    [
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16 text"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16 text"),
        (b'{\n  "text": "a"\n}\n', "JSON with an object over several lines"),
        ('{"text": "é"}\n'.encode("latin-1"), "not UTF-8"),
        (b"PK\x03\x04\x14\0\0\xff", "a zip archive"),
        (b"PAR1\x15\xff", "Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"a Git LFS pointer in place of the data"),
    ],
)
def test_what_is_no_json_lines_is_told_by_its_bytes(tmp_path, raw, what):
    """Alone it is the reason why there is no text; beside good files it is named."""
    (tmp_path / "b.jsonl").write_bytes(raw)
    stream = DocumentStream(SourceConfig(name="x", kind="jsonl", path=str(tmp_path)))
    assert list(stream) == [] and stream.report.undecodable_files[0] == "b.jsonl:1"
    message = (
        rf"\(0 empty, \d undecodable\); b\.jsonl is {what}.*; correct its kind, or turn it into UTF-8 text with one"
    )
    assert re.search(message, str(no_text(stream.source, stream.report)))
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    assert len(read(kind="jsonl", path=str(tmp_path))[0]) == 2
    (tmp_path / "a.parquet").write_bytes(raw.replace(b"PAR1", b"PAR2"))
    with pytest.raises(UserError, match=r"source 'x': .*a\.parquet is .*; correct its kind, or fix or remove it"):
        read(kind="parquet", path=str(tmp_path))


def test_a_text_that_is_none_says_why(tmp_path):
    source = SourceConfig(name="x", path=str(tmp_path))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for raw, what in (
        (gzip.compress(b"text"), "gzip data"),
        ("[é".encode("latin-1"), "not UTF-8"),
        ("plain letters".encode("utf-16-le"), "UTF-16 text"),
        (pointer, "a Git LFS pointer in place of the data (git lfs pull)"),
    ):
        (tmp_path / "a.txt").write_bytes(raw)
        assert list(stream := DocumentStream(source)) == []
        assert f"a.txt is {what}; correct its kind, or turn it into UTF-8 text" in str(no_text(source, stream.report))
        assert stream.report.left_out() == f"; left out 1 undecodable: a.txt; a.txt is {what}"


def test_rows_that_cannot_be_decoded_are_counted_one_by_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b"[" * 100_000 + bytes(600) + b"\n" + ROWS + b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n"
    )
    found, report = read(kind="jsonl", path=str(tmp_path))
    assert len(found) == 2 and report.undecodable_files == ["a.jsonl:1", "a.jsonl:4"]
    strings = pyarrow.array([b"good", b"\xff\xfe", b"too", None], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "a.parquet")
    found, report = read(kind="parquet", path=str(tmp_path))
    assert [text for _, text in found] == ["good", "too"]
    assert (report.empty, report.undecodable_files) == (1, ["a.parquet:1"])


def test_marks_and_line_ends_inside_json_are_text(tmp_path):
    texts = ["a\u2028b\x85c\x0bd", "nul \0 end", "tab\tand\r\n", "\ufeffmark", "🙂"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [text for _, text in read(kind="jsonl", path=str(tmp_path))[0]] == texts


def test_what_is_passed_over_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_bytes(ROWS)
    found, report = read(kind="jsonl", path=str(tmp_path))
    assert len(found) == 4 and found[0][0] == r"\xff.jsonl:1"
    others = ["gone.jsonl", "loop.jsonl", "notes.md", "pipe.jsonl"]
    assert (report.other, report.other_files) == (4, others)
    assert report.left_out() == f"; left out 4 of other kinds: {', '.join(others)}"
    with pytest.raises(
        UserError, match=r"no file \(\.parquet\) in .*; left out 6 of other kinds: .*; correct its kind"
    ):
        read(kind="parquet", path=str(tmp_path))
    for kind in ("text", "jsonl", "parquet"):
        with pytest.raises(UserError, match=r"pipe\.jsonl is a pipe or a device, not a file; write it to a file first"):
            read(kind=kind, path=str(tmp_path / "pipe.jsonl"))


def test_what_may_not_be_read_is_refused(tmp_path, monkeypatch):
    write_folder(tmp_path / "a" / "b", texts(3))
    denied = PermissionError(13, "Permission denied", str(tmp_path / "a"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"0001\.txt cannot be read \(Permission denied\)"),
    ):
        real = Path.read_bytes
        patch.setattr(Path, "read_bytes", lambda p: real(p) if p.name != "0001.txt" else (_ for _ in ()).throw(denied))
        read(path=str(tmp_path))
    real_scan = os.scandir

    def scan(path):
        if str(path).endswith("b"):
            raise denied
        return real_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UserError, match=r"/a cannot be read \(Permission denied\); fix or remove it"):
        read(path=str(tmp_path))


@pytest.mark.parametrize("value", [1.5, True, None, b"bytes", {"a": "b"}])
def test_a_field_without_text_is_never_offered_again(tmp_path, value):
    table = pyarrow.table({"text": [value], "n": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    if value is None:
        assert read(kind="parquet", path=str(tmp_path))[1].empty == 1
        return
    with pytest.raises(
        UserError, match=r"field 'text' holds an? \w+, not text; write it as text, or name another column"
    ):
        read(kind="parquet", path=str(tmp_path))


def test_a_hub_data_set_through_a_local_folder(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", [*texts(3), ""])
    write_parquet(tmp_path / "set" / "test.parquet", ["held out"])
    folder = str(tmp_path / "set")
    found, report = read(kind="hub", path=folder)
    assert [text for _, text in found] == texts(3)
    assert report.empty == 1
    assert [text for _, text in read(kind="hub", path=folder, split="test")[0]] == ["held out"]
    with pytest.raises(UserError, match=r"has no field 'body'; set text_field to one of: id, text"):
        read(kind="hub", path=folder, text_field="body")
    with pytest.raises(UserError, match=r"load_dataset failed for path .*split nosuch.*check these keys"):
        read(kind="hub", path=folder, split="nosuch")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"source 'x': load_dataset failed for path nobody/nothing.*network") as caught:
        read(kind="hub", path="nobody/nothing")
    assert "\n" not in str(caught.value)


def test_python_topics():
    from pydoc_data.topics import topics

    found, _ = read(kind="python_topics")
    assert dict(found) == topics
    assert [name for name, _ in found] == sorted(topics)


def test_python_packages_are_the_installed_modules_without_tests_and_tables():
    parts = _python_parts(SourceConfig(name="x", kind="python_packages"))
    names = [part.name for part in parts]
    assert "yaml/loader.py" in names and names == sorted(names) and not any("/tests/" in name for name in names)
    packages = Path(sysconfig.get_paths()["purelib"])
    assert all((packages / name).stat().st_size <= 200_000 for name in names)
    loader = next(part for part in parts if part.name == "yaml/loader.py")
    assert list(loader.rows(None)) == [("yaml/loader.py", (packages / "yaml/loader.py").read_text())]


def test_python_source_is_the_library_without_its_tests():
    found, report = read(kind="python_source")
    sources = dict(found)
    assert len(found) > 500 and report.undecodable == 0
    assert {"ast.py", "asyncio/base_events.py", "json/decoder.py"} <= set(sources)
    assert not [name for name in sources if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert sources["ast.py"] == Path(ast.__file__).read_bytes().decode()
    assert [name for name, _ in found] == sorted(sources)


def test_python_docstrings_are_cleaned_and_in_order(monkeypatch):
    files = [(name, path) for name, path in _stdlib_files() if name.count("/") == 0]
    monkeypatch.setattr("replication.data.sources._stdlib_files", lambda: files)
    found, report = read(kind="python_docstrings")
    assert len(found) > 100 and report.empty > 0 and report.undecodable == 0
    assert report.documents + report.empty == len(files)
    assert [name for name, _ in found] == sorted(name for name, _ in found)
    assert inspect.cleandoc(ast.parse.__doc__) in dict(found)["ast.py"]
    module = '"""Module."""\nclass A:\n    """\n    Of A.\n\n        More.\n    """\n    def f(self): "Of f."\n'
    module += 'def silent(): x = "no docstring"\nasync def g():\n    """Of g."""\n'
    assert _docstrings(module) == "Module.\n\nOf A.\n\n    More.\n\nOf f.\n\nOf g."
    assert _docstrings("x = 1") == ""
    assert _docstrings("print 'Python 2'") is None


def test_the_data_modules_load_without_torch():
    modules = ["order", "sources", "tokenizer", "prepare", "store", "folder"]
    code = f"import sys; {'; '.join(f'import replication.data.{m}' for m in modules)}; "
    code += "sys.exit(bool({'torch', 'datasets', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
