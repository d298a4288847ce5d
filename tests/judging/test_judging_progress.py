"""What the administrator's page counts, against examples worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from replication.judging import progress
from replication.judging.progress import Part
from replication.votes.tally import Tally


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
    sides = ("left", "right", "tie", "both_bad")
    assert [progress.chosen_text(row("a", "i", c)) for c in sides] == ["first", "second", None, None]
    assert [progress.chosen_text(row("a", "i", c, False)) for c in ("left", "right")] == ["second", "first"]


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
        row("a", "z", "left", assignment_id=9, expected="left", category="gold", cast_at=66.0),
        row("b", "i", "tie"),
    ]
    people = [SimpleNamespace(judge_id=name, kind="human", vendor="", survey=None, token_sha256="x", started_at=1.0)
              for name in "abc"]  # fmt: skip
    one, other, nobody = (
        progress.of_judge(person, [r for r in rows if r.judge_id == person.judge_id], n, n)
        for person, n in zip(people, (12, 1, 3), strict=True)
    )
    assert one == progress.JudgeProgress(
        "a", "human", "", {}, True, True, votes=Part(9, 12), first=Part(4, 12), n_no_choice=0, n_repeats=2,
        ties=Part(0, 4), both_bad=Part(1, 4), left=Part(2, 3), attention=Part(1, 2), repeats_alike=Part(1, 2),
        gold=Part(1, 1), median_seconds=4.5, last_vote_at=70.0,
    )  # fmt: skip
    assert (other.ties, other.left.value, other.median_seconds) == (Part(1, 1), None, None)
    assert (nobody.votes, nobody.last_vote_at) == (Part(0, 3), None)
    assert [judge.state for judge in (one, other, nobody)] == ["voting", "finished", "started"]
    assert [judge.is_done for judge in (one, other, nobody)] == [False, True, False]
    assert progress.left_share(rows) == Part(2, 3)
    assert Part(50, 100).chance() == (pytest.approx(0.4), pytest.approx(0.6))
    assert Part(0, 0).chance() is None


def judge(**more: Any) -> progress.JudgeProgress:
    usual = {"judge_id": "a", "kind": "human", "vendor": "", "survey": {}, "has_link": True, "has_started": True}
    counts = {"votes": Part(20, 20), "first": Part(20, 20), "n_no_choice": 0, "n_repeats": 0, "ties": Part(4, 20)}
    shares = {
        "both_bad": Part(0, 20),
        "left": Part(8, 16),
        "attention": Part(1, 1),
        "gold": Part(1, 1),
        "repeats_alike": Part(0, 0),
    }
    return progress.JudgeProgress(**(usual | counts | shares | {"median_seconds": 21.0, "last_vote_at": 0.0} | more))


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ({}, []),
        ({"median_seconds": 9.9}, ["fast"]),
        ({"median_seconds": 10.0}, []),  # a third of the usual 30 s
        ({"median_seconds": 9.9, "kind": "model"}, []),
        ({"left": Part(14, 16)}, ["one-sided"]),  # 3 to 13 of 16 in 99 of 100 by chance
        ({"left": Part(2, 16)}, ["one-sided"]),
        ({"left": Part(13, 16)}, []),
        ({"left": Part(0, 0)}, ["all ties"]),
        ({"left": Part(0, 0), "first": Part(7, 20)}, []),
        ({"attention": Part(1, 2), "first": Part(7, 20)}, ["failed check"]),
        ({"gold": Part(0, 1)}, ["failed check"]),
    ],
)
def test_what_is_to_be_looked_at_of_a_judge(more: dict[str, Any], flags: list[str]) -> None:
    assert judge(**more).flags(30.0) == flags


def test_pace_and_expected_end() -> None:
    day, hour = 24 * 3600.0, 3600.0
    assert progress.pace([], 5, day) is None and progress.pace([0.0], 5, 2 * day) is None
    assert progress.pace([0.0, 1.0, hour], 6, 2 * hour) == (1.5, 6 * hour)
    assert progress.pace([0.0, 2 * day, 2.5 * day], 0, 2.5 * day + 1) == pytest.approx((2 / 24, 2.5 * day + 1))


def test_coverage_counts_first_votes_by_prompt_and_kind() -> None:
    rows = [
        row("a", "i", "tie"),
        row("b", "i", "tie"),
        row("a", "i", "tie", repeats=1),
        row("m", "i", "left", kind="model"),
    ]
    planned = {(2, "hard", "human"): 4, (1, "plain", "model"): 3, (1, "plain", "human"): 5}
    assert progress.coverage(rows, planned) == [
        progress.PromptNumbers(1, "plain", {"human": Part(2, 5), "model": Part(1, 3)}),
        progress.PromptNumbers(2, "hard", {"human": Part(0, 4)}),
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
    assert progress.agreement(rows) == {"human": Part(2, 4), "model": Part(0, 0), "human and model": Part(4, 5)}


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
    arms = ("baseline", "both")
    assert progress.results(rows, truth, arms) == [
        progress.ArmResult("human", None, *arms, Tally(1, 2, 1)),
        progress.ArmResult("human", 1, *arms, Tally(0, 1, 1)),
        progress.ArmResult("human", 2, *arms, Tally(1, 1, 0)),
    ]
    assert progress.results(rows, {}, arms) == []


def test_the_survey_is_counted() -> None:
    surveys = [None, {}, {"background": "ml"}, {"background": "ml", "native_english": "no"}]
    assert progress.survey_counts(surveys) == (2, {"background": {"ml": 2}, "native_english": {"no": 1}})
