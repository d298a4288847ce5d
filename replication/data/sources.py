"""Documents of each kind of source, in a fixed order, with a count of what could not be read as text.

A source is read part by part: a part is a file, or a shard of a hub data set. A stream knows its place, part and row,
and another stream can go on from there.
"""

from __future__ import annotations

import ast
import bz2
import glob
import gzip
import inspect
import io
import json
import lzma
import os
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from replication.config import SourceConfig
from replication.data.hub import hub_parts
from replication.data.order import PARTS, KeyedPermutation
from replication.data.render import columns_of, refusal, render, require_columns
from replication.data.retries import Retries, first_line, is_local
from replication.errors import UserError

if TYPE_CHECKING:
    import pyarrow

MAX_NAMED = 20

# Tests are not what the standard library says of itself; the rest is installed or generated on this machine.
MAX_MODULE_BYTES = 200_000
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}


@dataclass
class ReadReport:
    """What reading one source found; filled while its documents are read."""

    documents: int = 0
    """Documents that hold text."""
    empty: int = 0
    """Documents with nothing but white space; they are left out."""
    undecodable: int = 0
    """Files or lines that are not UTF-8 (or not Python, or not JSON); they are left out."""
    undecodable_files: list[str] = field(default_factory=list)
    """Names of the first 20 of those."""
    foreign: str = ""
    """What the bytes of the first of those files are, such as "a.txt is UTF-16 text"; "" where that is not known."""
    hidden: int = 0
    """Files of a folder whose path has a part that begins with a dot; they are left out."""
    other: int = 0
    """Other files of a folder: of another ending, or pipes, devices and dangling links; they are left out."""
    other_files: list[str] = field(default_factory=list)
    """Names of the first 20 of those."""

    def add_undecodable(self, name: str) -> None:
        self.undecodable += 1
        if len(self.undecodable_files) < MAX_NAMED:
            self.undecodable_files.append(name)


def left_out(report: ReadReport) -> str:
    """What a source's documents lack, for the end of a line; "" where that is nothing."""
    parts = [f"{report.empty:,} empty"] if report.empty else []
    parts += [f"{report.hidden:,} hidden"] if report.hidden else []
    for n, what, names in (
        (report.other, "of other kinds", report.other_files),
        (report.undecodable, "undecodable", report.undecodable_files),
    ):
        parts += [f"{n:,} {what}: {', '.join(names)}{', ...' if n > len(names) else ''}"] if n else []
    parts += [report.foreign] if report.foreign else []
    return f"; left out {'; '.join(parts)}" if parts else ""


def no_text(source: SourceConfig, report: ReadReport) -> UserError:
    found = f"no document holds text ({report.empty} empty, {report.undecodable} undecodable)"
    if report.foreign:
        return refusal(source, f"{found}; {report.foreign}", f"correct its kind, or turn it into {FORMS[source.kind]}")
    found += f"; such as {report.undecodable_files[0]}" if report.undecodable else ""
    found += "; its files are empty" if not report.empty + report.undecodable else ""
    return refusal(source, found, "check its kind, its path and the column of its text")


def counts_of(report: ReadReport) -> dict[str, Any]:
    """What was left out, for the manifest."""
    return {key: value for key, value in asdict(report).items() if key != "documents"}


Rows = Iterator[tuple[str, str | None]]
"""(name, text) of every row; None where it is not text."""


class Part(Protocol):
    """A file or a shard: what is read from one end to the other."""

    name: str

    def rows(self, place: Any) -> Rows:
        """The rows from a place on; None: all of them, even where some were read before."""

    def place(self) -> Any:
        """Where the rows stand, in plain values."""


class FilePart:
    """A part on this machine, whose rows are passed over by reading them again."""

    def __init__(self, source: SourceConfig, name: str, read: Callable[[], Rows]):
        self.name, self._source, self._read = name, source, read
        self._done = self._sum = 0  # rows, and the checksum of their text

    def rows(self, place: Any) -> Rows:
        """The rows from a place on.

        Raises:
            UserError: the part cannot be read, or the rows before the place are no longer those that were read.
        """
        passed, checksum = place or (0, 0)
        self._done = self._sum = 0
        for name, text in self._readable():
            self._done += 1
            self._sum = zlib.crc32((text or "").encode(errors="surrogatepass"), self._sum)
            if self._done > passed:
                yield name, text
            elif self._done == passed and self._sum != checksum:
                raise changed(self._source, [self.name])
        if self._done < passed:
            raise changed(self._source, [self.name])

    def _readable(self) -> Rows:
        try:
            yield from self._read()
        except UserError:
            raise
        except Exception as error:  # of files, decompressors and pyarrow: many classes
            reason = getattr(error, "strerror", None) or first_line(error)
            raise refusal(self._source, f"{self.name} cannot be read ({reason})", "mend or remove it") from error

    def place(self) -> list[int]:
        return [self._done, self._sum]


def changed(source: SourceConfig, names: Sequence[str]) -> UserError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    found = f"its files have changed since the preparation began: {', '.join(names[:3])}{more}"
    return refusal(source, found, "restore them, or remove the unfinished folder (.partial) and run again")


class DocumentStream:
    """The documents of a source that hold text; empty and undecodable ones are counted, never raised for."""

    def __init__(
        self,
        source: SourceConfig,
        report: ReadReport | None = None,
        place: dict[str, Any] | None = None,
        shuffled: bool = False,
        retries: Retries | None = None,
        cache_dir: Path | None = None,
    ):
        """
        Args:
            source: what to read; a hub source at the revision that it names.
            report: counts, final when the stream is exhausted.
            place: what another stream's place() gave; none: the beginning.
            shuffled: whether the parts come in a fixed shuffled order, because that of a crawl or of lengths would
                make the beginning of a large set a biased sample of it; otherwise in the order of their names.
            retries: what to do when a connection drops; none: the first failure is final.
            cache_dir: where `datasets` may keep files; none: its own choice.

        Raises:
            UserError: nothing at the path, or a hub that does not give the set.
        """
        self.source, self.report = source, report if report is not None else ReadReport()
        if place is not None:
            self._take(place["report"])
        retries = retries or Retries(source)
        self._parts: Sequence[Part] = (
            hub_parts(source, retries, cache_dir) if source.kind == "hub" else _PARTS[source.kind](source, self.report)
        )
        n = len(self._parts)
        self._order = KeyedPermutation(n, (PARTS,))(np.arange(n)).tolist() if shuffled else list(range(n))
        self._turn: int = place["turn"] if place else 0
        self._start: Any = place["row"] if place else None
        if place is not None and (n, self._part_name()) != (place["parts"], place["part"]):
            raise changed(source, [f"{place['parts']} parts then, {n} now"])

    def check_first(self) -> None:
        """Read the first document for what there is to refuse in it, and go back to where the stream stands.

        Raises:
            UserError: it cannot be rendered, or there is none.
        """
        report, turn, start = asdict(self.report), self._turn, self._start
        if next(iter(self), None) is None and not report["documents"]:
            raise no_text(self.source, self.report)
        self._turn, self._start = turn, start
        self._take(report)

    def _take(self, report: dict[str, Any]) -> None:
        for key, value in report.items():
            setattr(self.report, key, list(value) if isinstance(value, list) else value)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        while self._turn < len(self._order):
            part = self._parts[self._order[self._turn]]
            for name, text in part.rows(self._start):
                if text is not None and not text.strip():
                    self.report.empty += 1
                elif text is None or not _is_unicode(text):
                    self.report.add_undecodable(name)
                else:
                    self.report.documents += 1
                    yield name, text
            self._turn += 1
            self._start = None

    def place(self) -> dict[str, Any]:
        """Where the stream stands after the document that it gave last, in plain values."""
        inside = self._turn < len(self._order)
        row = self._parts[self._order[self._turn]].place() if inside else None
        report = asdict(self.report)
        return {"parts": len(self._parts), "part": self._part_name(), "turn": self._turn, "row": row, "report": report}

    def _part_name(self) -> str | None:
        return self._parts[self._order[self._turn]].name if self._turn < len(self._order) else None


def documents(
    source: SourceConfig, report: ReadReport | None = None, cache_dir: Path | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every document that holds text, in the same order each time.

    Args:
        source: what to read.
        report: counts, final when the iterator is exhausted.
        cache_dir: where `datasets` may keep files; none: its own choice.

    Raises:
        UserError: nothing at the path, a missing text field, a damaged container, or a hub that cannot be reached.
    """
    yield from DocumentStream(source, report, cache_dir=cache_dir)


def _is_unicode(text: str) -> bool:
    """Whether the text can be stored: JSON can spell half a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- local files

PACKED: tuple[tuple[bytes, str, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", "gzip data", gzip.open),
    (b"BZh", "bzip2 data", bz2.open),
    (b"\xfd7zXZ\x00", "xz data", lzma.open),
    (b"\x28\xb5\x2f\xfd", "zstd data", lambda path: _zstd(path)),
    (b"\x50\x2a\x4d\x18", "zstd data", lambda path: _zstd(path)),  # a frame of its own before the first
)
MAGIC = (
    *((magic, what) for magic, what, _ in PACKED),
    (b"PAR1", "Parquet"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x04\x22\x4d\x18", "lz4 data"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"%PDF", "PDF"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the data (git lfs pull)"),
    (b"\xff\xfe\x00\x00", "UTF-32 text"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
HEAD_BYTES = 512
ARRAY = "a JSON array"
PRETTY = "JSON with an object over several lines"

FORMS = {"text": "UTF-8 text", "jsonl": "UTF-8 text with one JSON object a line", "parquet": "Parquet"}
ENDINGS = {
    "text": ("",),
    "jsonl": tuple(f"{of}{by}" for of in (".jsonl", ".json", ".ndjson") for by in ("", ".gz", ".bz2", ".xz", ".zst")),
    "parquet": (".parquet",),
}


def what_bytes_are(head: bytes) -> str:
    """What a file that begins so is, where that is not what it was taken for; "" where that cannot be told."""
    for magic, what in MAGIC:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive"
    head = head[:HEAD_BYTES]
    zeros = sorted((head[::2].count(0), head[1::2].count(0)))
    return "UTF-16 text" if zeros[1] > len(head) / 4 and not zeros[0] else ""


def _json_form(line: bytes) -> str:
    """What JSON with such a first line may be, that is not one object a line; "" where it looks like nothing known."""
    if b"\r" in line.rstrip():
        return "text whose lines end in a carriage return alone"
    first = b"".join(line[:HEAD_BYTES].split())
    return ARRAY if first.startswith((b"[{", b'["')) or first == b"[" else PRETTY * (first == b"{")


def local_files(source: SourceConfig) -> dict[str, list[int]] | None:
    """{name: [size in bytes, time of change in ns]} of the files that a source is read from; None where it has none.

    Raises:
        UserError: nothing at the path.
    """
    if source.kind in ENDINGS:
        found = _files(source, ReadReport())
    elif source.kind == "hub" and is_local(source):
        folder = Path(str(source.path))
        found = [(str(file.relative_to(folder)), file) for file in _walk(source, folder) if file.is_file()]
    else:
        return None
    return {name: [(stat := path.stat()).st_size, stat.st_mtime_ns] for name, path in found}


def _files(source: SourceConfig, report: ReadReport) -> list[tuple[str, Path]]:
    """(name, path) of the files that source.path means: a file, a folder's files at any depth, or a glob's matches."""
    assert source.path is not None
    path, endings = Path(source.path).expanduser(), ENDINGS[source.kind]
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        found = []
        for name, file in sorted((str(file.relative_to(path)), file) for file in _walk(source, path)):
            if not name.lower().endswith(endings) or not file.is_file():
                report.other += 1
                report.other_files += [_printable(name)] if report.other <= MAX_NAMED else []
            elif any(part.startswith(".") for part in Path(name).parts):
                report.hidden += 1
            else:
                found.append((name, file))
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        found = [(str(match), match) for match in matches if match.is_file()]
    if not found:
        raise _no_file(source, path, report)
    return sorted((_printable(name), file) for name, file in found)


def _printable(name: str) -> str:
    """A file name, whose bytes need not be UTF-8, as text that can be."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _no_file(source: SourceConfig, path: Path, report: ReadReport) -> UserError:
    endings = ENDINGS[source.kind]
    kinds = f" ({', '.join(e for e in endings if e.count('.') == 1)})" if endings != ("",) else ""
    if path.exists() and not path.is_dir():
        return refusal(source, f"{source.path} is a pipe or a device, not a file", "write it to a file first")
    if report.other or report.hidden:
        found = f"no file{kinds} in {source.path}{left_out(report)}"
        return refusal(source, found, "correct its kind or path")
    remedy = f"paths are relative to the current folder, {Path.cwd()}; correct data.sources.path, or fetch the corpus"
    return refusal(source, f"no file{kinds} matches {source.path}", remedy)


def _walk(source: SourceConfig, folder: Path) -> Iterator[Path]:
    """Every file below a folder; linked folders are entered, each real folder once."""

    def fail(error: OSError) -> None:
        raise refusal(source, f"{error.filename} cannot be read ({error.strerror})", "mend or remove it") from error

    seen = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root) / name for name in files)


Reader = Callable[[SourceConfig, ReadReport, str, Path], Rows]


def _file_parts(read: Reader, source: SourceConfig, report: ReadReport) -> list[Part]:
    return [FilePart(source, name, partial(read, source, report, name, path)) for name, path in _files(source, report)]


def _text(source: SourceConfig, report: ReadReport, name: str, path: Path) -> Rows:
    raw = path.read_bytes()
    try:
        yield name, raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        _note_foreign(report, name, what_bytes_are(raw) or "not UTF-8")
        yield name, None


def _note_foreign(report: ReadReport, name: str, what: str) -> None:
    report.foreign = report.foreign or f"{name} is {what}"


def _jsonl(source: SourceConfig, report: ReadReport, name: str, path: Path) -> Rows:
    with _unpacked(path) as file:
        for number, line in enumerate(file, 1):
            text = _json_line(source, f"{name}:{number}", line)
            if text is None and number == 1 and (what := what_bytes_are(line) or _json_form(line)):
                if what == ARRAY:  # whose last element alone may be a line
                    raise refusal(source, f"{name} is {what}", 'write one object a line, such as {"text": ...}')
                _note_foreign(report, name, what)  # and read on: one damaged line may look like anything
            yield f"{name}:{number}", text


def _unpacked(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked where it begins as a packed file does, whatever its name."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    return next((unpack(path) for magic, _, unpack in PACKED if head.startswith(magic)), None) or open(path, "rb")


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def _json_line(source: SourceConfig, name: str, line: bytes) -> str | None:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is one of the former
        return None
    if not isinstance(row, dict):
        raise refusal(
            source, f"{name} is a JSON {type(row).__name__}", 'write one object a line, such as {"text": ...}'
        )
    return render(source, row, name)


def _parquet(source: SourceConfig, report: ReadReport, name: str, path: Path) -> Rows:
    import pyarrow.parquet

    with open(path, "rb") as raw:
        head = raw.read(HEAD_BYTES)
    if not head.startswith((b"PAR1", b"PARE")):
        what = what_bytes_are(head) or ("not Parquet" if head else "empty")
        raise refusal(source, f"{path} is {what}", "correct its kind, or mend or remove it")
    with pyarrow.parquet.ParquetFile(path) as file:
        require_columns(source, file.schema_arrow.names, name)
        number = 0
        for batch in file.iter_batches(batch_size=512, columns=columns_of(source)):
            for row in _decoded(batch):
                yield f"{name}:{number}", None if row is None else render(source, row, f"{name}:{number}")
                number += 1


def _decoded(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for those whose strings are not UTF-8, or values none of Python's."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):  # UnicodeDecodeError is one of the former
        if batch.num_rows == 1:
            return [None]
        half = batch.num_rows // 2
        return _decoded(batch.slice(0, half)) + _decoded(batch.slice(half))


# ---------------------------------------------------------------- text that every Python carries


def _topic_parts(source: SourceConfig, report: ReadReport) -> list[Part]:
    from pydoc_data.topics import topics

    return [FilePart(source, "topics", lambda: iter(sorted(topics.items())))]


def _stdlib_parts(read: Callable[[bytes], str | None], source: SourceConfig, report: ReadReport) -> list[Part]:
    return [FilePart(source, name, partial(_module, read, name, path)) for name, path in _stdlib_files()]


def _module(read: Callable[[bytes], str | None], name: str, path: Path) -> Rows:
    yield name, read(path.read_bytes())


def _stdlib_files() -> list[tuple[str, Path]]:
    """(name, path) of the standard library's modules, without tests and what the build writes about this machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = [(file.relative_to(root), file) for file in root.rglob("*.py")]
    return sorted(
        (name.as_posix(), file)
        for name, file in named
        if not NOT_STDLIB.intersection(name.parts) and not name.parts[0].startswith(("config-", "_sysconfigdata"))
    )


def _package_parts(source: SourceConfig, report: ReadReport) -> list[Part]:
    """Modules of the installed packages, without their tests; what is larger than a module is data in disguise."""
    root = Path(sysconfig.get_paths()["purelib"])
    named = [(file.relative_to(root), file) for file in root.rglob("*.py")]
    files = sorted((name.as_posix(), file) for name, file in named if not NOT_STDLIB.intersection(name.parts))
    small = [(name, file) for name, file in files if file.stat().st_size <= MAX_MODULE_BYTES]
    if not small:
        raise refusal(source, f"no module is installed in {root}", "take another kind")
    return [FilePart(source, name, partial(_module, _python_text, name, path)) for name, path in small]


def _python_text(raw: bytes) -> str | None:
    """The text of a module in the encoding that it declares; None where it cannot be decoded."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None


def _docstrings_of(raw: bytes) -> str | None:
    text = _python_text(raw)
    return _docstrings(text) if text is not None else None


def _docstrings(text: str) -> str | None:
    """Docstrings of a module, its classes and functions, in the order of the file; None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return "\n\n".join(inspect.cleandoc(docstring) for docstring in found if docstring and docstring.strip())


_PARTS: dict[str, Callable[[SourceConfig, ReadReport], list[Part]]] = {
    "text": partial(_file_parts, _text),
    "jsonl": partial(_file_parts, _jsonl),
    "parquet": partial(_file_parts, _parquet),
    "python_topics": _topic_parts,
    "python_docstrings": partial(_stdlib_parts, _docstrings_of),
    "python_source": partial(_stdlib_parts, _python_text),
    "python_packages": _package_parts,
}
