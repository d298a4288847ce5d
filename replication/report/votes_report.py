"""The report of votes alone: of a panel on completions that were brought along, without the runs they come from.

DIR/votes.csv -> results.json, figures/preference.png and report.md: the estimates of the preference section, and no
verdict, as no certificate says that the arms may be compared. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from replication.config import AnalysisConfig
from replication.errors import UserError
from replication.report.drawing import arm_styles
from replication.report.figures import save_figure
from replication.report.judged import NOT_DECIDED, analyse_votes
from replication.report.page import markdown
from replication.report.preference_figures import preference_figure
from replication.report.preference_words import preference_lines
from replication.runs.files import read_object, write_json, write_text
from replication.runs.layout import SuiteDir
from replication.statistics.format import clean
from replication.votes.note import read_note
from replication.votes.record import Vote, read_votes

NO_VERDICT = (
    "an estimate, no verdict, as the runs are not here: nothing certifies that the arms may be compared, and no plan "
    "says what was to be found"
)


def write_votes_report(suite_dir: SuiteDir) -> Path:
    """Write the report of a folder that has votes and no suite; returns the path of report.md.

    Raises:
        UserError: votes.csv holds what no vote can, no votes, or those on several pairs of arms or of several suites.
    """
    votes = read_votes(suite_dir.votes)
    counts = read_object(suite_dir.judging / "marginals.json")
    arms = _arms(suite_dir, votes, counts)
    note = read_note(suite_dir.votes_note, suite_dir.votes)
    results = {
        "format": 1,
        "suite": {"name": votes[0].suite, "arms": list(arms)},
        "preference": _preference(votes, arms, counts, _full_set(suite_dir)),
        "votes_note": note.to_dict() if note else None,
        "warnings": [note.warning] if note and note.warning else [],
    }
    results = clean(results)
    results["lines"] = preference_lines(results["preference"])
    figure, drawn = preference_figure(results, arm_styles(arms))
    results["figures"] = [asdict(save_figure(figure, drawn, suite_dir.figures))]
    write_json(suite_dir.results, results)
    write_text(suite_dir.report_md, markdown("votes.md.j2", results))
    return suite_dir.report_md


def _arms(suite_dir: SuiteDir, votes: list[Vote], counts: dict[str, Any]) -> tuple[str, str]:
    """(baseline, treatment): as the panel named them; where that is not known, in order of name."""
    pairs = {tuple(sorted((vote.arm_left, vote.arm_right))) for vote in votes}
    if len(pairs) != 1 or len({vote.suite for vote in votes}) != 1:
        found = "no votes" if not votes else "votes on several pairs of arms or of several suites"
        raise UserError(f"{suite_dir.votes}: holds {found}; without a suite.yaml the report is of one pair")
    first, second = pairs.pop()
    return (second, first) if (counts.get("model_a"), counts.get("model_b")) == (second, first) else (first, second)


def _full_set(suite_dir: SuiteDir) -> int:
    """Votes of a full set: the panel's, where it is here."""
    panel = read_object(suite_dir.judging / "panel.json")
    return int(panel.get("votes_per_judge", AnalysisConfig().votes_per_judge))


def _preference(
    votes: list[Vote], arms: tuple[str, str], counts: dict[str, Any], votes_per_judge: int
) -> dict[str, Any]:
    analysis = replace(AnalysisConfig(), baseline=arms[0], treatment=arms[1], votes_per_judge=votes_per_judge)
    details = counts.get("question_majorities", {}).get("details", [])
    categories = {row["question_id"]: row["category"] for row in details}
    seeds = {vote.seed for vote in votes}
    found = analyse_votes(votes, votes[0].suite, analysis, {arms[1]: seeds}, categories)
    assert found is not None
    return found | {"decision": NOT_DECIDED, "why": NO_VERDICT, "more_seeds": None}
