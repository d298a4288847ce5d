"""DIR -> certificate.json, results.json, figures/*.png, report.html and report.md.

The order is: read the run folders, compute every number once, write results.json, then render both reports from that
file alone. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from replication.config import SuiteConfig
from replication.errors import UserError
from replication.protocol.certificate import certify
from replication.report.drawing import arm_styles
from replication.report.figures import draw_figures
from replication.report.load import Cell, load_cells
from replication.report.methods import data_words, methods
from replication.report.page import html, markdown
from replication.report.results import compute_results
from replication.report.verdict import verdict
from replication.runs.files import read_object, remove_temporaries, write_json, write_text
from replication.runs.layout import SuiteDir
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
    text = markdown("report.md.j2", results, data_words=data_words)
    write_text(suite_dir.report_md, text)
    colours = {name: style.colour for name, style in arm_styles(results["suite"]["arms"]).items()}
    title = f"{results['suite']['name']}: replication report"
    write_text(suite_dir.report_html, html(text, title, colours, suite_dir.root))
    return suite_dir.report_html
