"""What the administrator's page counts, against examples worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from replication.judging import numbers
from replication.judging.numbers import Share


def row(judge: str, item: str, choice: str, first_is_left: bool = True, **more: Any) -> SimpleNamespace:
    usual = {
        "kind": "human",
        "vendor": "",
        "prompt_id": 1,
        "category": "plain",
        "repeats": None,
        "expected": None,
        "seconds": None,
        "cast_at": 0.0,
        "assignment_id": 0,
    }
    return SimpleNamespace(**(usual | more), judge_id=judge, item_id=item, choice=choice, first_is_left=first_is_left)


def test_a_choice_without_its_sides() -> None:
    assert [numbers.verdict(c, True) for c in ("left", "right", "tie", "both_bad")] == ["first", "second", "tie", "tie"]
    assert [numbers.verdict(c, False) for c in ("left", "right")] == ["second", "first"]


def test_numbers_of_a_judge() -> None:
    rows = [
        row("a", "i", "left", assignment_id=1, seconds=4.0, cast_at=10.0),
        row("a", "j", "right", assignment_id=2, seconds=1.0, cast_at=20.0),
        row("a", "k", "left", assignment_id=3, seconds=9.0, cast_at=30.0),
        row("a", "l", "both_bad", assignment_id=4, cast_at=40.0),
        row("a", "i", "right", False, assignment_id=5, repeats=1, seconds=5.0, cast_at=50.0),  # the same text again
        row("a", "j", "right", False, assignment_id=6, repeats=2, cast_at=60.0),  # the other text
        row("a", "x", "left", assignment_id=7, expected="left", cast_at=70.0),
        row("a", "y", "tie", assignment_id=8, expected="right", cast_at=65.0),
        row("b", "i", "tie"),
    ]
    one, other, nobody = numbers.by_judge(rows, {"a": 12, "b": 1, "c": 3})
    assert one == numbers.JudgeNumbers(
        "a", Share(8, 12), ties=Share(0, 4), both_bad=Share(1, 4), left=Share(2, 3), median_seconds=4.5,
        last_vote_at=70.0, attention=Share(1, 2), repeats=Share(1, 2),
    )  # fmt: skip
    assert (other.ties, other.left.value, other.median_seconds) == (Share(1, 1), None, None)
    assert (nobody.votes, nobody.last_vote_at) == (Share(0, 3), None)
    assert numbers.left_share(rows) == Share(2, 3)
    assert Share(50, 100).chance_margin == pytest.approx(0.098, abs=1e-3)


def test_coverage_counts_first_votes_by_prompt_and_kind() -> None:
    rows = [
        row("a", "i", "tie"),
        row("b", "i", "tie"),
        row("a", "i", "tie", repeats=1),
        row("m", "i", "left", kind="model"),
    ]
    planned = {(2, "hard", "human"): 4, (1, "plain", "model"): 3, (1, "plain", "human"): 5}
    assert numbers.coverage(rows, planned) == [
        numbers.PromptNumbers(1, "plain", {"human": Share(2, 5), "model": Share(1, 3)}),
        numbers.PromptNumbers(2, "hard", {"human": Share(0, 4)}),
    ]


def test_agreement_is_over_pairs_of_judges_of_an_item() -> None:
    rows = [
        row("a", "i", "left"),
        row("b", "i", "right", False),  # first, as a
        row("c", "i", "left", False),  # second
        row("a", "j", "tie"),
        row("b", "j", "both_bad"),
        row("m", "j", "tie", kind="model"),
        row("m", "i", "left", kind="model"),
        row("a", "i", "right", repeats=1),  # not a first vote
        row("a", "k", "left"),  # alone
    ]
    assert numbers.agreement(rows) == {"human": Share(2, 4), "model": Share(0, 0), "human and model": Share(4, 5)}


def test_results_by_arm() -> None:
    truth = {
        "i": SimpleNamespace(seed=2, arm_first="both", arm_second="baseline"),
        "j": SimpleNamespace(seed=1, arm_first="baseline", arm_second="both"),
    }
    rows = [
        row("a", "i", "left"),  # both
        row("b", "i", "left", False),  # baseline
        row("a", "j", "right"),  # both
        row("b", "j", "both_bad"),
        row("b", "j", "left", repeats=1),
        row("a", "attention", "left", expected="left"),
    ]
    assert numbers.results(rows, truth) == [
        numbers.Tally("human", "baseline", "both", None, 1, 2, 1),
        numbers.Tally("human", "baseline", "both", 1, 0, 1, 1),
        numbers.Tally("human", "baseline", "both", 2, 1, 1, 0),
    ]
    assert numbers.results(rows, {}) == []


def test_the_survey_is_counted() -> None:
    surveys = [None, {}, {"background": "ml"}, {"background": "ml", "native_english": "no"}]
    assert numbers.survey_counts(surveys) == (2, {"background": {"ml": 2}, "native_english": {"no": 1}})
