"""A report as its tests read it: results, text and tags of the page, Markdown."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from replication.config import SuiteConfig
from replication.report.report import collect, render, write_report
from replication.report.results import write_results
from replication.runs.files import read_json
from replication.runs.layout import SuiteDir

PLANTED = {"both": {"val/loss_nats": 0.25, "train/grad_norm": 0.5, "val/entropy_predicted_tokens_nats": -0.125}}


def report(suite_dir: SuiteDir, suite: SuiteConfig, figures: bool = False) -> tuple[dict[str, Any], str, str]:
    """Write the report, without figures unless asked for, which are most of its time; returns results, the page's text
    without tags, and the Markdown."""
    if figures:
        write_report(suite_dir, suite)
    else:
        write_results(suite_dir.results, collect(suite_dir, suite)[1])
    path = render(suite_dir)
    assert path == suite_dir.report_html
    return read_json(suite_dir.results), page_text(path), suite_dir.report_md.read_text()


class _Page(HTMLParser):
    """Tags and attributes of a page, and its rows as lists of cell texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def parsed(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


def page_text(path: Path) -> str:
    return " ".join("".join(parsed(path).text).split())
