"""DIR -> certificate.json, results.json, figures/*.png, report.html and report.md.

The order is: read the run folders, compute every number once, write results.json, then render both reports from that
file alone. Imports no torch.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from replication.config import SuiteConfig
from replication.errors import UserError
from replication.protocol.certificate import certify
from replication.report.drawing import arm_styles
from replication.report.figures import draw_figures
from replication.report.load import Cell, load_cells
from replication.report.methods import data_words, methods
from replication.report.results import compute_results
from replication.report.verdict import verdict
from replication.runs.files import read_object, remove_temporaries, write_json, write_text
from replication.runs.layout import SuiteDir
from replication.statistics import format as shown
from replication.votes.note import read_note
from replication.votes.record import read_votes


def write_report(suite_dir: SuiteDir, suite: SuiteConfig) -> Path:
    """Write the report of a suite in whatever state its cells are.

    Args:
        suite_dir: the output folder.
        suite: names and order of arms and seeds.

    Returns:
        The path of report.html.

    Raises:
        UserError: there is no such folder.
    """
    if not suite_dir.root.is_dir():
        raise UserError(f"{suite_dir.root}: no such folder; give the output folder of `replicate grid run`")
    remove_temporaries(suite_dir.root)
    made_from = suite_dir.inputs_sha256(suite_dir.cell(arm, seed) for seed in suite.seeds for arm in suite.arms)
    cells, results = collect(suite_dir, suite)
    results["made_from"] = made_from
    results["figures"] = [asdict(drawn) for drawn in draw_figures(cells, results, suite_dir.figures)]
    write_json(suite_dir.results, results)
    return render(suite_dir)


def collect(suite_dir: SuiteDir, suite: SuiteConfig) -> tuple[list[Cell], dict[str, Any]]:
    """Read the folder once, write certificate.json, and compute every number and sentence of the report.

    Args:
        suite_dir: the output folder.
        suite: names and order of arms and seeds.

    Returns:
        (cells, results but for the list of figures).

    Raises:
        UserError: votes.csv holds what no vote can, or votes.json is damaged.
    """
    cells = load_cells(suite_dir, suite.arms, suite.seeds)
    logged = {(cell.arm, cell.seed): cell.logged for cell in cells}
    certificate = certify(suite_dir, suite.arms, suite.seeds, logged, suite.analysis.strict_pairs)
    cells = [replace(cell, pooled=cell.seed not in certificate.not_pooled) for cell in cells]
    write_json(suite_dir.certificate, certificate.to_dict())
    results = compute_results(suite_dir, suite, cells, certificate, read_votes(suite_dir.votes))
    note = read_note(suite_dir.votes_note, suite_dir.votes)
    results["votes_note"] = note.to_dict() if note else None
    if note and note.warning:
        results["warnings"].append(note.warning)
    results["verdict"] = verdict(results)
    results["methods"] = methods(results)
    results["figures"] = []
    return cells, results


def render(suite_dir: SuiteDir) -> Path:
    """Write report.html and report.md from results.json and figures/ alone; returns the path of report.html.

    Raises:
        UserError: there is no results.json.
    """
    results = read_object(suite_dir.results)
    if not results:
        raise UserError(f"{suite_dir.results}: no such file; run `replicate report` on the folder")
    images = {figure["file"]: _data_uri(suite_dir.figures / figure["file"]) for figure in results["figures"]}
    colours = {name: style.colour for name, style in arm_styles(results["suite"]["arms"]).items()}
    write_text(suite_dir.report_md, template("report.md.j2").render(r=results))
    write_text(suite_dir.report_html, template("report.html.j2").render(r=results, images=images, colours=colours))
    return suite_dir.report_html


def template(name: str) -> Any:
    """A template; the HTML one escapes everything, the Markdown one only what passes its filters `cell` and `fence`."""
    environment = Environment(
        loader=PackageLoader("replication.report"),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": shown.number,
        "signed": shown.signed,
        "count": shown.count,
        "percent": shown.percent,
        "duration": shown.duration,
        "plain": shown.plain,
        "p": shown.p_value,
        "data_words": data_words,
        "cell": shown.markdown_cell,
        "fence": shown.markdown_fence,
    }
    environment.globals |= {"row": _row}
    return environment.get_template(name)


def _row(cells: Sequence[Any]) -> str:
    """One line of a Markdown table; everything in it is escaped."""
    return "| " + " | ".join(shown.markdown_cell(cell) for cell in cells) + " |"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
