"""The file of a study: the shipped ones load, and a mistake is one line that names file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from replication.config import config_root
from replication.config.study import load_study
from replication.errors import UserError


def test_every_shipped_study_loads_and_says_only_what_it_changes() -> None:
    default = load_study()
    studies = {path.stem: load_study(path.stem) for path in (config_root() / "studies").glob("*.yaml")}
    assert studies["default"] == default and studies["default"].sha256 == default.sha256
    assert [*default.criteria] == ["overall"] and default.format == "text" and not default.exclude.rules
    paid = studies["paid"]
    assert paid.task == default.task and paid.sha256 != default.sha256
    assert [*paid.criteria] == ["overall", "coherence", "diversity"]
    assert paid.consent and "study@example.org" in paid.consent.contact
    assert paid.exclude.rules == {
        "failed_attention": "more than 1 failed attention items",
        "failed_gold": "more than 0 failed gold pairs",
        "fast_seconds": "a median time to a vote below 3 seconds",
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rubrik: x", "mine.yaml line 1: rubrik: no such key; the keys are texts, task"),
        ("task: x\ncriterion: []", "mine.yaml line 2: criterion: no such key; did you mean criteria?"),
        ("labels: {left: L, rigth: R}", "labels.rigth: no such key; did you mean labels.right?"),
        ("criteria: {}", "mine.yaml line 1: criteria: needs at least one entry"),
        ("criteria: {overall: W?, overall: X?}", "mine.yaml line 1: key 'overall' comes twice"),
        ("criteria: {overall: W?, reason: Y?}", "criteria.reason: must be a word of letters, digits and _"),
        ("survey: {a b: {question: Q, answers: {}}}", "survey.a b: must be a word of letters, digits and _"),
        ("survey: {a: {question: Q}}", "survey.a.answers: is missing"),
        ("exclude: {tie_share: 2}", "exclude.tie_share: 2.0 must lie in [0, 1]"),
        ("format: html", "format: must be one of text, markdown, not 'html'"),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_study(file)
    assert told in str(error.value) and "mine.yaml" in str(error.value) and "\n" not in str(error.value)
