"""Local files: those that a path means, the kind of their bytes, and the rows they hold."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from replication.config import SourceConfig
from replication.data.folder import MAX_NAMED, ReadReport
from replication.data.render import columns_of, refusal, render, require_columns
from replication.errors import UserError, first_line

Rows = Iterator[tuple[str, str | None]]
"""(name, text) of every row; None where it is not text."""


class FilePart:
    """A part on this machine, whose rows are passed over by reading them again."""

    def __init__(self, source: SourceConfig, name: str, read: Callable[[], Rows]):
        self.name, self._source, self._read = name, source, read
        self._done = self._sum = 0  # rows, and the checksum of their text

    def rows(self, place: Any) -> Rows:
        """The rows from a place on; None: all of them, even where some were read before.

        Raises UserError where it cannot be read, or the rows before the place are no longer those that were read.
        """
        passed, checksum = place or (0, 0)
        self._done = self._sum = 0
        try:
            for name, text in self._read():
                self._done += 1
                self._sum = zlib.crc32((text or "").encode(errors="surrogatepass"), self._sum)
                if self._done > passed:
                    yield name, text
                elif self._done == passed and self._sum != checksum:
                    raise changed(self._source, [self.name])
        except UserError:
            raise
        except Exception as error:  # of files, decompressors and pyarrow: many classes
            reason = getattr(error, "strerror", None) or first_line(error)
            raise refusal(self._source, f"{self.name} cannot be read ({reason})", "fix or remove it") from error
        if self._done < passed:
            raise changed(self._source, [self.name])

    def place(self) -> list[int]:
        """The place at which the rows stand, in plain values."""
        return [self._done, self._sum]


def changed(source: SourceConfig, names: Sequence[str]) -> UserError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    found = f"its files have changed since the preparation began: {', '.join(names[:3])}{more}"
    return refusal(source, found, "restore them, or remove the unfinished folder (.partial) and run again")


FORMS = {"text": "UTF-8 text", "jsonl": "UTF-8 text with one JSON object a line", "parquet": "Parquet"}
ENDINGS = {
    "text": ("",),
    "jsonl": tuple(f"{of}{by}" for of in (".jsonl", ".json", ".ndjson") for by in ("", ".gz", ".bz2", ".xz", ".zst")),
    "parquet": (".parquet",),
}


def file_parts(source: SourceConfig, report: ReadReport) -> list[FilePart]:
    """The files of a source, in the order of their names; what is passed over goes into the report."""
    read = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[source.kind]
    return [FilePart(source, name, partial(read, source, report, name, path)) for name, path in _files(source, report)]


def place(source: SourceConfig) -> Path:
    """What the path of a source means on this machine."""
    return Path(source.folder or "", source.path or "").expanduser()


def is_local(source: SourceConfig) -> bool:
    """Whether a hub source's path is a folder of this machine."""
    return source.path is not None and place(source).is_dir()


def local_files(source: SourceConfig) -> dict[str, list[int]] | None:
    """{name: [size in bytes, time of change in ns]} of the files that a source is read from; None where it has none."""
    if source.kind in ENDINGS:
        found = _files(source, ReadReport())
    elif source.kind == "hub" and is_local(source):
        folder = place(source)
        found = [(str(file.relative_to(folder)), file) for file in _walk(source, folder) if file.is_file()]
    else:
        return None
    return {name: [(stat := path.stat()).st_size, stat.st_mtime_ns] for name, path in found}


def _files(source: SourceConfig, report: ReadReport) -> list[tuple[str, Path]]:
    """(name, path) of the files that source.path means: a file, a folder's files at any depth, or a glob's matches."""
    assert source.path is not None
    path, endings = place(source), ENDINGS[source.kind]
    report.hidden, report.other, report.other_files = 0, 0, []  # one that goes on has counted them before
    if path.is_file():
        return [(path.name, path)]
    found = []
    if path.is_dir():
        for name, file in sorted((str(file.relative_to(path)), file) for file in _walk(source, path)):
            if not name.lower().endswith(endings) or not file.is_file():
                report.other += 1
                report.other_files += [_printable(name)] if report.other <= MAX_NAMED else []
            elif any(part.startswith(".") for part in Path(name).parts):
                report.hidden += 1
            else:
                found.append((name, file))
    else:
        named = glob.glob(str(Path(source.path).expanduser()), root_dir=source.folder, recursive=True)
        found = [(name, file) for name in named if (file := Path(source.folder or "", name)).is_file()]
    if found:
        return sorted((_printable(name), file) for name, file in found)
    kinds = f" ({', '.join(e for e in endings if e.count('.') == 1)})" if endings != ("",) else ""
    if path.exists() and not path.is_dir():
        raise refusal(source, f"{source.path} is a pipe or a device, not a file", "write it to a file first")
    if report.other or report.hidden:
        nothing = f"no file{kinds} in {source.path}{report.left_out()}"
        raise refusal(source, nothing, "correct its kind or path")
    means = f"a relative path means beside the file that says it, or in the current folder, {Path.cwd()}"
    remedy = f"{means}; correct data.sources.path, or fetch the corpus"
    raise refusal(source, f"no file{kinds} matches {source.path}", remedy)


def _printable(name: str) -> str:
    """A file name, whose bytes need not be UTF-8, as text that can be."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _walk(source: SourceConfig, folder: Path) -> Iterator[Path]:
    """Every file below a folder; linked folders are entered, each real folder once."""

    def fail(error: OSError) -> None:
        raise refusal(source, f"{error.filename} cannot be read ({error.strerror})", "fix or remove it") from error

    seen = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root) / name for name in files)


def _text(source: SourceConfig, report: ReadReport, name: str, path: Path) -> Rows:
    with open(path, "rb") as file:
        is_pointer = what_bytes_are(file.read(HEAD_BYTES)) == POINTER
    if source.split_on is not None and not is_pointer:
        yield from _pieces(source.split_on, name, path)
        return
    raw, text = path.read_bytes(), None
    what = what_bytes_are(raw)
    with suppress(UnicodeDecodeError):
        text = raw.decode("utf-8-sig") if what not in (UTF_16, POINTER) else None  # either may decode as UTF-8
    if text is None:
        report.foreign = report.foreign or f"{name} is {what or 'not UTF-8'}"
    yield name, text


def _pieces(separator: str, name: str, path: Path) -> Rows:
    """The documents of one file, of which no more is in memory than one document and a chunk."""
    number, chunk = 1, "-"
    held = [""]  # the document that goes on; the end of its last part may begin a separator
    with open(path, encoding="utf-8-sig", newline="") as file:
        while chunk:
            chunk = file.read(CHUNK)
            *whole, rest = (held.pop() + chunk).split(separator)
            if whole:
                whole[0], held = "".join((*held, whole[0])), []
            cut = max(0, len(rest) - len(separator) + 1)
            held += [rest[:cut], rest[cut:]]
            for text in whole if chunk else [*whole, "".join(held)]:
                yield f"{name}:{number}", text
                number += 1


def _jsonl(source: SourceConfig, report: ReadReport, name: str, path: Path) -> Rows:
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    # Unpacked where it begins as a packed file does, whatever its name.
    unpack = next((unpack for magic, _, unpack in PACKED if head.startswith(magic)), partial(open, mode="rb"))
    with unpack(path) as file:
        for number, line in enumerate(file, 1):
            text = _json_line(source, f"{name}:{number}", line)
            if text is None and number == 1 and (what := what_bytes_are(line) or _json_form(line)):
                if what == ARRAY:  # whose last element alone may be a line
                    raise refusal(source, f"{name} is {what}", ONE_A_LINE)
                report.foreign = report.foreign or f"{name} is {what}"  # and read on: one damaged line may look so
            yield f"{name}:{number}", text


def _json_line(source: SourceConfig, name: str, line: bytes) -> str | None:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is one of the former
        return None
    if not isinstance(row, dict):
        raise refusal(source, f"{name} is a JSON {type(row).__name__}", ONE_A_LINE)
    return render(source, row, name)


def _parquet(source: SourceConfig, report: ReadReport, name: str, path: Path) -> Rows:
    import pyarrow.parquet

    with open(path, "rb") as raw:
        head = raw.read(HEAD_BYTES)
    if not head.startswith((b"PAR1", b"PARE")):
        what = what_bytes_are(head) or ("not Parquet" if head else "empty")
        raise refusal(source, f"{path} is {what}", "correct its kind, or fix or remove it")
    with pyarrow.parquet.ParquetFile(path) as file:
        require_columns(source, file.schema_arrow.names, name)
        number = 0
        for batch in file.iter_batches(batch_size=512, columns=columns_of(source)):
            for row in _decoded(batch):
                yield f"{name}:{number}", None if row is None else render(source, row, f"{name}:{number}")
                number += 1


def _decoded(batch: Any) -> list[Mapping[str, Any] | None]:
    """The rows of an Arrow batch; None for those whose strings are not UTF-8, or values none of Python's."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):  # UnicodeDecodeError is one of the former
        if batch.num_rows == 1:
            return [None]
        half = batch.num_rows // 2
        return _decoded(batch.slice(0, half)) + _decoded(batch.slice(half))


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


PACKED: tuple[tuple[bytes, str, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", "gzip data", gzip.open),
    (b"BZh", "bzip2 data", bz2.open),
    (b"\xfd7zXZ\x00", "xz data", lzma.open),
    (b"\x28\xb5\x2f\xfd", "zstd data", _zstd),
    (b"\x50\x2a\x4d\x18", "zstd data", _zstd),  # a frame of its own before the first
)
UTF_16 = "UTF-16 text"
POINTER = "a Git LFS pointer in place of the data (git lfs pull)"
ARRAY = "a JSON array"
PRETTY = "JSON with an object over several lines"
ONE_A_LINE = 'write one object a line, such as {"text": ...}'
MAGIC = (
    *((magic, what) for magic, what, _ in PACKED),
    (b"PAR1", "Parquet"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x04\x22\x4d\x18", "lz4 data"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"%PDF", "PDF"),
    (b"version https://git-lfs", POINTER),
    (b"\xff\xfe\x00\x00", "UTF-32 text"),
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
)
HEAD_BYTES = 512
CHUNK = 1 << 20  # characters of a file that is split


def what_bytes_are(head: bytes) -> str:
    """Kind of a file that begins so, where it is not the one it was taken for; "" where that cannot be told."""
    if found := next((what for magic, what in MAGIC if head.startswith(magic)), ""):
        return found
    if head[257:262] == b"ustar":
        return "a tar archive"
    head = head[:HEAD_BYTES]
    fewer, more = sorted((head[::2].count(0), head[1::2].count(0)))
    return UTF_16 if more > len(head) / 4 and not fewer else ""


def _json_form(line: bytes) -> str:
    """Form of JSON with such a first line that is not one object a line; "" where it looks like nothing known."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    if b"\r" in line.rstrip():
        return "text whose lines end in a carriage return alone"
    first = b"".join(line[:HEAD_BYTES].split())
    return ARRAY if first.startswith((b"[{", b'["')) or first == b"[" else PRETTY * (first == b"{")
