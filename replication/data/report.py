"""What reading a source found, and left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

MAX_NAMED = 20


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


def counts_of(report: ReadReport) -> dict[str, Any]:
    """What was left out, for the manifest."""
    return {key: value for key, value in asdict(report).items() if key != "documents"}
