"""Documents of each kind of source, in a fixed order, with a count of what could not be read as text.

A source is read part by part: a part is a file, or a shard of a hub data set. A stream knows its place, part and row,
and another stream can go on from there.
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from replication.config import SourceConfig
from replication.data.files import ENDINGS, FORMS, FilePart, Rows, changed, file_parts
from replication.data.folder import MAX_NAMED, Place, ReadReport
from replication.data.hub import HubPart, Notify, hub_parts
from replication.data.order import PARTS, KeyedPermutation
from replication.data.render import refusal
from replication.errors import UserError

# Tests are not what the standard library says of itself; the rest is installed or generated on this machine.
MAX_MODULE_BYTES = 200_000
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}


class DocumentStream:
    """(id, text) of the documents that hold text; empty and undecodable ones are counted in its `report`."""

    def __init__(
        self,
        source: SourceConfig,
        place: Place | None = None,
        shuffled: bool = False,
        notify: Notify | None = None,
        cache_dir: Path | None = None,
    ):
        """Raises UserError where nothing is at the path, or the hub does not give the set.

        Args:
            source: what to read; a hub source at the revision that it names.
            place: what another stream's place() gave; none: the beginning.
            shuffled: whether the parts come in a fixed shuffled order, because that of a crawl or of lengths would
                make the beginning of a large set a biased sample of it; otherwise in the order of their names.
            notify: gets a line when a connection drops, before another try; none: the first failure is final.
            cache_dir: where `datasets` may keep files; none: its own choice.
        """
        self.source = source
        self.report = copy.deepcopy(place.report) if place is not None else ReadReport()
        parts: Sequence[FilePart | HubPart]
        if source.kind == "hub":
            parts = hub_parts(source, notify, cache_dir)
        else:
            parts = file_parts(source, self.report) if source.kind in ENDINGS else _python_parts(source)
        n = len(parts)
        order = KeyedPermutation(n, (PARTS,))(np.arange(n)) if shuffled else np.arange(n)
        self._parts = [parts[i] for i in order]
        self._turn = place.turn if place is not None else 0
        self._start: Any = place.row if place is not None else None
        if place is not None and (n, self._part_name()) != (place.parts, place.part):
            raise changed(source, [f"{place.parts} parts then, {n} now"])

    def check_first(self) -> None:
        """Read the first document for what there is to refuse in it, or that there is none; then go back."""
        report, turn, start = copy.deepcopy(self.report), self._turn, self._start
        if next(iter(self), None) is None and not report.documents:
            raise no_text(self.source, self.report)
        self._turn, self._start = turn, start
        vars(self.report).update(vars(report))  # in place: the parts count in the one that there is

    def __iter__(self) -> Iterator[tuple[str, str]]:
        while self._turn < len(self._parts):
            for name, text in self._parts[self._turn].rows(self._start):
                if text is not None and not text.strip():
                    self.report.empty += 1
                elif text is None or not _is_unicode(text):
                    self.report.undecodable += 1
                    self.report.undecodable_files += [name] if self.report.undecodable <= MAX_NAMED else []
                else:
                    self.report.documents += 1
                    yield name, text
            self._turn += 1
            self._start = None

    def place(self) -> Place:
        """The place after the document that the stream gave last."""
        row = self._parts[self._turn].place() if self._turn < len(self._parts) else None
        return Place(len(self._parts), self._part_name(), self._turn, row, copy.deepcopy(self.report))

    def _part_name(self) -> str | None:
        return self._parts[self._turn].name if self._turn < len(self._parts) else None


def _is_unicode(text: str) -> bool:
    """Whether the text can be stored: JSON can spell half a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def no_text(source: SourceConfig, report: ReadReport) -> UserError:
    found = f"no document holds text ({report.empty} empty, {report.undecodable} undecodable)"
    if report.foreign:
        return refusal(source, f"{found}; {report.foreign}", f"correct its kind, or turn it into {FORMS[source.kind]}")
    found += f"; such as {report.undecodable_files[0]}" if report.undecodable else ""
    found += "; its files are empty" if not report.empty + report.undecodable else ""
    return refusal(source, found, "check its kind, its path and the column of its text")


def _python_parts(source: SourceConfig) -> list[FilePart]:
    """Text that every Python carries: help topics, modules (or their docstrings) of its library, installed packages."""
    if source.kind == "python_topics":
        from pydoc_data.topics import topics

        return [FilePart(source, "topics", lambda: iter(sorted(topics.items())))]
    if source.kind == "python_packages":
        root = Path(sysconfig.get_paths()["purelib"])
        # What is larger than a module is data in disguise.
        files = [(name, path) for name, path in _modules(root) if path.stat().st_size <= MAX_MODULE_BYTES]
        if not files:
            raise refusal(source, f"no module is installed in {root}", "take another kind")
    else:
        files = _stdlib_files()
    docstrings = source.kind == "python_docstrings"
    return [FilePart(source, name, partial(_module, docstrings, name, path)) for name, path in files]


def _stdlib_files() -> list[tuple[str, Path]]:
    """The standard library's modules, without what the build writes about this machine."""
    found = _modules(Path(sysconfig.get_paths()["stdlib"]))
    return [(name, file) for name, file in found if not name.startswith(("config-", "_sysconfigdata"))]


def _modules(root: Path) -> list[tuple[str, Path]]:
    """(name, path) of the modules under a folder, without tests."""
    named = [(file.relative_to(root), file) for file in root.rglob("*.py")]
    return sorted((name.as_posix(), file) for name, file in named if not NOT_STDLIB.intersection(name.parts))


def _module(docstrings: bool, name: str, path: Path) -> Rows:
    """The text of a module in the encoding that it declares, or its docstrings; None where it cannot be decoded."""
    raw, text = path.read_bytes(), None
    with suppress(SyntaxError, UnicodeDecodeError):
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
    yield name, _docstrings(text) if docstrings and text is not None else text


def _docstrings(text: str) -> str | None:
    """Docstrings of a module, its classes and functions, in the order of the file; None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return "\n\n".join(inspect.cleandoc(docstring) for docstring in found if docstring and docstring.strip())
