"""Documents of each kind of source, in a fixed order, with a count of what could not be read as text."""

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replication.config import SourceConfig
from replication.errors import UserError

MAX_NAMED = 20

# Tests are not what the standard library says of itself; the rest is installed or generated on this machine.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}


@dataclass
class ReadReport:
    """What reading one source found; filled while documents() runs."""

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


Documents = Iterator[tuple[str, str]]


def documents(source: SourceConfig, report: ReadReport | None = None, cache_dir: Path | None = None) -> Documents:
    """Yield (id, text) of every document that holds text, in the same order each time.

    Empty and undecodable ones are counted in the report, never raised for.

    Args:
        source: what to read.
        report: counts, final when the iterator is exhausted.
        cache_dir: where `datasets` may keep files; none: its own choice.

    Raises:
        UserError: nothing at the path, a missing text field, a damaged container, or a hub that cannot be reached.
    """
    report = report if report is not None else ReadReport()
    for name, text in _READERS[source.kind](source, report, cache_dir):
        if not text.strip():
            report.empty += 1
        elif not _is_unicode(text):
            report.add_undecodable(name)
        else:
            report.documents += 1
            yield name, text


def _is_unicode(text: str) -> bool:
    """Whether the text can be stored: JSON can spell half a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(source: SourceConfig, problem: str, remedy: str) -> UserError:
    return UserError(f"data.sources: source '{source.name}': {problem}; {remedy}")


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
        report.hidden += len(found) - len(visible)
        found = visible
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        found = [(str(match), match) for match in matches if match.is_file()]
    if not found:
        kinds = f" ({', '.join(endings)})" if endings != ("",) else ""
        remedy = (
            f"paths are relative to the current folder, {Path.cwd()}; correct data.sources.path, or fetch the corpus"
        )
        raise _refusal(source, f"no file{kinds} matches {source.path}", remedy)
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


def _text(source: SourceConfig, report: ReadReport, cache_dir: Path | None) -> Documents:
    for name, path in _files(source, report):
        try:
            yield name, path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            report.add_undecodable(name)
        except OSError as error:
            raise _refusal(source, f"{path} cannot be read ({error.strerror})", "mend or remove it") from error


def _jsonl(source: SourceConfig, report: ReadReport, cache_dir: Path | None) -> Documents:
    for name, path in _files(source, report, (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz")):
        try:
            with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    yield from _json_line(source, report, f"{name}:{number}", line)
        except (OSError, EOFError) as error:
            raise _refusal(source, f"{path} cannot be read ({error})", "mend or remove it") from error


def _json_line(source: SourceConfig, report: ReadReport, name: str, line: bytes) -> Documents:
    if not line.strip():
        report.empty += 1
        return
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError:  # UnicodeDecodeError is one
        report.add_undecodable(name)
        return
    if not isinstance(row, dict):
        raise _refusal(
            source, f"{name} is a JSON {type(row).__name__}", 'write one object a line, such as {"text": ...}'
        )
    yield name, _field(source, row, name)


def _parquet(source: SourceConfig, report: ReadReport, cache_dir: Path | None) -> Documents:
    import pyarrow
    import pyarrow.parquet

    for name, path in _files(source, report, (".parquet",)):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _require_field(source, file.schema_arrow.names, name)
                rows = (
                    row
                    for batch in file.iter_batches(batch_size=512, columns=[source.text_field])
                    for row in batch.to_pylist()
                )
                for number, row in enumerate(rows):
                    yield f"{name}:{number}", _field(source, row, f"{name}:{number}")
        except (OSError, pyarrow.ArrowException) as error:
            raise _refusal(source, f"{path} cannot be read ({first_line(error)})", "mend or remove it") from error


# ---------------------------------------------------------------- data sets by name


def _hub(source: SourceConfig, report: ReadReport, cache_dir: Path | None) -> Documents:
    """Rows of `datasets.load_dataset`, streamed: nothing is stored twice, and a local folder works as well as an id."""
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
            cache_dir=str(cache_dir) if cache_dir else None,
        )
        columns = rows.column_names
        if columns:
            _require_field(source, columns, str(source.path))
            rows = rows.select_columns([source.text_field])
        for number, row in enumerate(rows):
            name = f"{source.path}:{number}"
            yield name, _field(source, row, name)
    except UserError:
        raise
    except Exception as error:  # connection, permission, no such id, subset or split: many classes of many packages
        where = f"path {source.path}, subset {source.subset}, split {source.split}, revision {source.revision}"
        raise _refusal(
            source,
            f"load_dataset failed for {where} ({type(error).__name__}: {first_line(error)})",
            "check these keys and the network, or download it and give local files",
        ) from error


def _require_field(source: SourceConfig, names: list[str], where: str) -> None:
    if source.text_field not in names:
        raise _refusal(
            source,
            f"{where} has no field '{source.text_field}'",
            f"set text_field to one of: {', '.join(names)}",
        )


def _field(source: SourceConfig, row: Mapping[str, Any], where: str) -> str:
    """The document of one row; null is an empty one."""
    _require_field(source, list(row), where)
    value = row[source.text_field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _refusal(
            source,
            f"{where}: field '{source.text_field}' holds a {type(value).__name__}, not text",
            f"set text_field to one of: {', '.join(row)}",
        )
    return value


# ---------------------------------------------------------------- text that every Python carries


def _python_topics(source: SourceConfig, report: ReadReport, cache_dir: Path | None) -> Documents:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _stdlib_files() -> list[tuple[str, Path]]:
    """(name, path) of the standard library's modules, without tests and what the build writes about this machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = [(file.relative_to(root), file) for file in root.rglob("*.py")]
    return sorted(
        (name.as_posix(), file)
        for name, file in named
        if not NOT_STDLIB.intersection(name.parts) and not name.parts[0].startswith(("config-", "_sysconfigdata"))
    )


def _python_source(source: SourceConfig, report: ReadReport, cache_dir: Path | None) -> Documents:
    for name, path in _stdlib_files():
        text = _python_text(path.read_bytes())
        if text is None:
            report.add_undecodable(name)
        else:
            yield name, text


def _python_docstrings(source: SourceConfig, report: ReadReport, cache_dir: Path | None) -> Documents:
    for name, path in _stdlib_files():
        text = _python_text(path.read_bytes())
        found = _docstrings(text) if text is not None else None
        if found is None:
            report.add_undecodable(name)
        else:
            yield name, found


def _python_text(raw: bytes) -> str | None:
    """The text of a module in the encoding that it declares; None where it cannot be decoded."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None


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


def first_line(error: BaseException) -> str:
    """The first line of another package's error, or its class: fit for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


_READERS: dict[str, Callable[[SourceConfig, ReadReport, Path | None], Documents]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hub": _hub,
    "python_topics": _python_topics,
    "python_docstrings": _python_docstrings,
    "python_source": _python_source,
}
