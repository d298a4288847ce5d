"""Documents of each kind of source, in a fixed order, with a count of what could not be read as text.

A source is read part by part: a part is a file, or a shard of a hub data set. A stream knows its place, part and row,
and another stream can go on from there.
"""

from __future__ import annotations

import ast
import glob
import gzip
import inspect
import io
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from replication.config import SourceConfig
from replication.data.hub import hub_parts
from replication.data.order import PARTS, KeyedPermutation
from replication.data.render import columns_of, refusal, render, require_columns
from replication.data.retries import Retries, first_line
from replication.errors import UserError

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
    hidden: int = 0
    """Files of a folder whose path has a part that begins with a dot; they are left out."""

    def add_undecodable(self, name: str) -> None:
        self.undecodable += 1
        if len(self.undecodable_files) < MAX_NAMED:
            self.undecodable_files.append(name)


def left_out(report: ReadReport) -> str:
    """What a source's documents lack, for the end of a line; "" where that is nothing."""
    parts = [f"{report.empty:,} empty"] if report.empty else []
    parts += [f"{report.hidden:,} hidden"] if report.hidden else []
    if report.undecodable:
        more = ", ..." if report.undecodable > len(report.undecodable_files) else ""
        parts += [f"{report.undecodable:,} undecodable: {', '.join(report.undecodable_files)}{more}"]
    return f"; left out {'; '.join(parts)}" if parts else ""


def no_text(source: SourceConfig, report: ReadReport) -> UserError:
    found = f"no document holds text ({report.empty} empty, {report.undecodable} undecodable)"
    return refusal(source, found, "check its kind and path")


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

    def __init__(self, name: str, read: Callable[[], Rows]):
        self.name, self._read, self._done = name, read, 0

    def rows(self, place: Any) -> Rows:
        self._done = place or 0
        for row in islice(self._read(), self._done, None):
            self._done += 1
            yield row

    def place(self) -> int:
        return self._done


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
            raise refusal(
                source,
                f"its files have changed since the preparation began ({place['parts']} then, {n} now)",
                "restore them, or remove the unfinished folder and run again",
            )

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


def _files(source: SourceConfig, report: ReadReport, endings: tuple[str, ...] = ("",)) -> list[tuple[str, Path]]:
    """(name, path) of the files that source.path means: a file, a folder's files at any depth, or a glob's matches."""
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        found = [(str(file.relative_to(path)), file) for file in _walk(path) if file.name.lower().endswith(endings)]
        visible = [(name, file) for name, file in found if not any(p.startswith(".") for p in Path(name).parts)]
        report.hidden = len(found) - len(visible)
        found = visible
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        found = [(str(match), match) for match in matches if match.is_file()]
    if not found:
        kinds = f" ({', '.join(endings)})" if endings != ("",) else ""
        remedy = (
            f"paths are relative to the current folder, {Path.cwd()}; correct data.sources.path, or fetch the corpus"
        )
        raise refusal(source, f"no file{kinds} matches {source.path}", remedy)
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder; linked folders are entered, each real folder once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root) / name for name in files)


def _text_parts(source: SourceConfig, report: ReadReport) -> list[Part]:
    return [FilePart(name, partial(_text, source, name, path)) for name, path in _files(source, report)]


def _text(source: SourceConfig, name: str, path: Path) -> Rows:
    try:
        yield name, path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        yield name, None
    except OSError as error:
        raise refusal(source, f"{path} cannot be read ({error.strerror})", "mend or remove it") from error


def _jsonl_parts(source: SourceConfig, report: ReadReport) -> list[Part]:
    files = _files(source, report, (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz"))
    return [FilePart(name, partial(_jsonl, source, name, path)) for name, path in files]


def _jsonl(source: SourceConfig, name: str, path: Path) -> Rows:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield f"{name}:{number}", _json_line(source, f"{name}:{number}", line)
    except (OSError, EOFError) as error:
        raise refusal(source, f"{path} cannot be read ({error})", "mend or remove it") from error


def _json_line(source: SourceConfig, name: str, line: bytes) -> str | None:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError:  # UnicodeDecodeError is one
        return None
    if not isinstance(row, dict):
        raise refusal(
            source, f"{name} is a JSON {type(row).__name__}", 'write one object a line, such as {"text": ...}'
        )
    return render(source, row, name)


def _parquet_parts(source: SourceConfig, report: ReadReport) -> list[Part]:
    files = _files(source, report, (".parquet",))
    return [FilePart(name, partial(_parquet, source, name, path)) for name, path in files]


def _parquet(source: SourceConfig, name: str, path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_columns(source, file.schema_arrow.names, name)
            batches = file.iter_batches(batch_size=512, columns=columns_of(source))
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield f"{name}:{number}", render(source, row, f"{name}:{number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise refusal(source, f"{path} cannot be read ({first_line(error)})", "mend or remove it") from error


# ---------------------------------------------------------------- text that every Python carries


def _topic_parts(source: SourceConfig, report: ReadReport) -> list[Part]:
    from pydoc_data.topics import topics

    return [FilePart("topics", lambda: iter(sorted(topics.items())))]


def _stdlib_parts(read: Callable[[bytes], str | None], source: SourceConfig, report: ReadReport) -> list[Part]:
    return [FilePart(name, partial(_module, read, name, path)) for name, path in _stdlib_files()]


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
    return [FilePart(name, partial(_module, _python_text, name, path)) for name, path in small]


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
    "text": _text_parts,
    "jsonl": _jsonl_parts,
    "parquet": _parquet_parts,
    "python_topics": _topic_parts,
    "python_docstrings": partial(_stdlib_parts, _docstrings_of),
    "python_source": partial(_stdlib_parts, _python_text),
    "python_packages": _package_parts,
}
