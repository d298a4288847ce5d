"""DIR -> certificate.json, results.json, figures/, report.md and report.html.

The order is: read the run folders, compute every number once, write results.json, then write the texts from that file
alone. A folder with votes and no suite, of a panel on completions that were brought along, has a report of the votes
alone: without a verdict, as no certificate says that the arms may be compared. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from replication.config import AnalysisConfig, SuiteConfig
from replication.errors import UserError
from replication.protocol.certificate import Certificate, certify
from replication.protocol.preregistration import registered_rules
from replication.report.decisions import record_looks
from replication.report.drawing import WIDTH_INCHES, arm_styles, save_vector
from replication.report.effects import vote_figures
from replication.report.figures import draw_figures
from replication.report.load import MOST_READERS, CellData, load_cells
from replication.report.page import html, markdown, paragraphs
from replication.report.preference import NOT_DECIDED, Preference, analyse_votes, surveys
from replication.report.results import FORMAT, Results, compute_results, read_results, write_results
from replication.report.tables import write_tables
from replication.report.words import preference_lines, sentences
from replication.runs.files import read_object, remove_temporaries, write_json, write_text
from replication.runs.layout import SuiteDir
from replication.runs.records import from_json, to_json
from replication.runs.withdrawn import read_withdrawals
from replication.statistics.format import arm_name, clean
from replication.votes.record import counted_votes, read_note, read_panel_record


def write_report(
    suite_dir: SuiteDir, suite: SuiteConfig, width_inches: float = WIDTH_INCHES, tables: Collection[str] = ()
) -> Path:
    """Write the report of a suite in whatever state its cells are; returns the path of report.html.

    Args:
        width_inches: of the figures.
        tables: of "tex" and "csv", the forms in which DIR/tables gets the report's tables.

    Raises UserError where there is no such folder.
    """
    if not suite_dir.root.is_dir():
        raise UserError(f"{suite_dir.root}: no such folder; give the output folder of `replicate grid run`")
    remove_temporaries(suite_dir.root)
    made_from = suite_dir.inputs_sha256(suite_dir.cell(arm, seed) for seed in suite.seeds for arm in suite.arms)
    cells, results = collect(suite_dir, suite)
    figures = draw_figures(cells, results, suite_dir.figures, width_inches)
    if tables:
        write_tables(results, suite_dir.tables, tables)
    write_results(suite_dir.results, replace(results, figures=figures, made_from=made_from))
    return render(suite_dir)


def collect(suite_dir: SuiteDir, suite: SuiteConfig) -> tuple[list[CellData], Results]:
    """Read the folder once, compute every number and sentence of the report, and write certificate.json, and the look
    that this is into the ledger.

    Returns the cells, and the results but for the list of figures. Raises UserError where votes.csv holds what no vote
    can, or votes.json is damaged.
    """
    cells, certificate, results = compute(suite_dir, suite)
    if results.plan.sha256:
        configs = " ".join(f"{c['arm']}/seed-{c['seed']} {c['config_hash']}" for c in results.cells)
        of = {"plan_sha256": results.plan.sha256, "configs_sha256": sha256(configs.encode()).hexdigest()}
        record_looks(suite_dir, results.decisions, **of)
    withdrawn = to_json(read_withdrawals(suite_dir).entries)
    write_json(suite_dir.certificate, certificate.to_dict() | ({"withdrawn": withdrawn} if withdrawn else {}))
    return cells, results


def compute(
    suite_dir: SuiteDir, suite: SuiteConfig, readers: int = MOST_READERS
) -> tuple[list[CellData], Certificate, Results]:
    """What `collect` returns, and the certificate; nothing is written, and many journals are read by `readers`."""
    cells = load_cells(suite_dir, suite.arms, suite.seeds, readers)
    logged = {(cell.arm, cell.seed): cell.logged for cell in cells}
    rules = registered_rules(suite_dir, suite)
    certificate = certify(suite_dir, suite.arms, suite.seeds, logged, rules.analysis.strict_pairs)
    cells = [replace(cell, pooled=cell.seed not in certificate.not_pooled) for cell in cells]
    results = compute_results(suite_dir, suite, cells, certificate, counted_votes(suite_dir.votes), rules)
    note = read_note(suite_dir.votes_note, suite_dir.votes)
    if note:
        warned = [*results.warnings, note.warning] if note.warning else results.warnings
        results = replace(results, warnings=warned, votes_note=clean(note.to_dict()))
    told = replace(results, verdict=sentences(results), methods=paragraphs("methods.txt.j2", results))
    return cells, certificate, told


def render(suite_dir: SuiteDir) -> Path:
    """Write report.md and report.html from results.json and figures/ alone; returns the path of report.html.

    Raises UserError where there is no results.json.
    """
    results = read_results(suite_dir.results)
    text = markdown("report.md.j2", results)
    write_text(suite_dir.report_md, text)
    styles = arm_styles(results.suite.arms).items()
    colours = {name: style.colour for arm, style in styles for name in (arm, arm_name(arm))}
    write_text(suite_dir.report_html, html(text, f"{results.suite.name}: replication report", colours, suite_dir.root))
    return suite_dir.report_html


NO_VERDICT = (
    "an estimate, no verdict, as the runs are not here: nothing certifies that the arms may be compared, and no plan "
    "says what was to be found"
)


@dataclass(frozen=True)
class _Marginals:
    """What is read of the panel's marginals.json."""

    model_a: str | None = None
    model_b: str | None = None
    question_majorities: Mapping[str, object] | None = None


def write_votes_report(suite_dir: SuiteDir) -> Path:
    """Write results.json, figures/ and report.md; returns the path of report.md.

    Raises UserError where votes.csv holds what no vote can, no votes, or those on several pairs of arms or of several
    suites.
    """
    votes = counted_votes(suite_dir.votes)
    counts = from_json(_Marginals, read_object(suite_dir.judging / "marginals.json"), lenient=True)
    pairs = {(vote.suite, *sorted((vote.arm_left, vote.arm_right))) for vote in votes}
    if len(pairs) != 1:
        what = "no votes" if not votes else "votes on several pairs of arms or of several suites"
        raise UserError(f"{suite_dir.votes}: holds {what}; without a suite.yaml the report is of one pair")
    name, *arms = pairs.pop()
    if [counts.model_b, counts.model_a] == arms:  # the panel named its baseline first; else they are in order of name
        arms.reverse()
    full_set = read_panel_record(suite_dir.judging).votes_per_judge or AnalysisConfig().votes_per_judge
    analysis = replace(AnalysisConfig(), baseline=arms[0], treatment=arms[1], votes_per_judge=full_set)
    details = (counts.question_majorities or {}).get("details")
    categories = {row["question_id"]: row["category"] for row in details} if isinstance(details, list) else {}
    seeds, said = {arms[1]: {vote.seed for vote in votes}}, surveys(suite_dir)
    found = analyse_votes(votes, name, analysis, seeds, categories, surveys=said)
    assert found is not None
    undecided = replace(found, decision=NOT_DECIDED, why=NO_VERDICT, more_seeds=None)
    preference = from_json(Preference, clean(to_json(undecided)))
    note = read_note(suite_dir.votes_note, suite_dir.votes)
    figures = vote_figures(preference, arm_styles(arms))
    for figure, drawn in figures:
        save_vector(figure, suite_dir.figures / drawn.file)
    results = {
        "format": FORMAT,
        "suite": {"name": name, "arms": arms},
        "preference": preference,
        "votes_note": note.to_dict() if note else None,
        "warnings": [note.warning] if note and note.warning else [],
        "lines": preference_lines(preference),
        "figures": [drawn for _, drawn in figures],
    }
    write_json(suite_dir.results, clean(to_json(results)))
    write_text(suite_dir.report_md, markdown("votes.md.j2", results))
    return suite_dir.report_md
