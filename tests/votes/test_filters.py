"""The published filters: who is left out, by which measure of pace, and that two measures of it disagree."""

import dataclasses
import math

from replication.config import AnalysisConfig
from replication.votes.record import Vote
from replication.votes.tally import (
    JudgeVotes,
    Tally,
    judge_votes,
    kept,
    published_filters,
    seconds_between_votes,
    seconds_to_choose,
)

VOTE = Vote("v1", "s", 1, "baseline", "both", 7, 0, 2, "a", "human", "", "left", "2026-11-24T10:00:00+0000", 21.5, "")
RULES = AnalysisConfig(fast_seconds=15.0, tie_share=0.8, votes_per_judge=4)


def judge(name: str, pace: float = 30.0, n: int = 4, ties: int = 0, is_human: bool = True) -> JudgeVotes:
    return JudgeVotes(name, is_human, Tally(0, n - ties, ties), pace, n)


def excluded(judges: list[JudgeVotes], rules: AnalysisConfig = RULES) -> dict[str, set[str]]:
    return {row.label: set(row.excluded) for row in published_filters(judges, rules)}


def test_each_rule_leaves_out_whom_it_names_and_the_last_row_all_of_them():
    judges = [
        judge("fast", pace=14.9),
        judge("on the line", pace=15.0, n=5, ties=4),
        judge("ties", n=6, ties=5),
        judge("few", n=3),
        judge("unknown", pace=math.nan),
        judge("author"),
        judge("model", pace=0.5, is_human=False),
    ]
    people = {"fast", "on the line", "ties", "few", "unknown", "author"}
    assert excluded(judges, dataclasses.replace(RULES, experimenters=("author", "absent"))) == {
        "all judges": set(),
        "models only": people,
        "people only": {"model"},
        "without people faster than 15 s in the median": {"fast"},
        "without judges with more than 80% ties": {"ties"},
        "without those who run the experiment": {"author"},
        "without judges of fewer than 4 votes": {"few"},
        "without all of these judges": {"fast", "ties", "author", "few"},
    }
    assert "without those who run the experiment" not in excluded(judges)
    last = published_filters(judges, RULES)[-1]
    assert [judge.name for judge in kept(judges, last)] == ["on the line", "unknown", "author", "model"]


def test_the_two_measures_of_pace_disagree_about_who_is_fast():
    """Quick choices with long pauses between them: fast by the time to choose, not by the paper's gap; and vice versa.

    The second judge had the pairs open for long before the first choice, as in windows side by side.
    """
    shown_after_pauses = [0.0, 60.0, 120.0, 180.0]
    to_choose, cast_at = [5.0] * 4, [shown + 5.0 for shown in shown_after_pauses]
    assert seconds_to_choose(to_choose) == 5.0 and seconds_between_votes(cast_at) == 60.0
    many_windows = [40.0, 45.0, 50.0, 55.0]  # all shown at 0
    assert seconds_to_choose(many_windows) == 47.5 and seconds_between_votes(many_windows) == 5.0
    fast_by = {}
    for measure, paces in {
        "to choose": {"pauses": 5.0, "windows": 47.5},
        "between votes": {"pauses": 60.0, "windows": 5.0},
    }.items():
        row = published_filters([judge(name, pace) for name, pace in paces.items()], RULES)[3]
        fast_by[measure] = set(row.excluded)
    assert fast_by == {"to choose": {"pauses"}, "between votes": {"windows"}}


def test_pace_is_unknown_where_nothing_tells_it():
    assert math.isnan(seconds_to_choose([])) and math.isnan(seconds_to_choose([math.nan]))
    assert seconds_to_choose([math.nan, 4.0, 8.0]) == 6.0
    assert math.isnan(seconds_between_votes([])) and math.isnan(seconds_between_votes([5.0]))
    assert seconds_between_votes([30.0, 0.0, 10.0]) == 15.0, "whatever the order"


def test_votes_of_a_judge_are_first_votes_on_the_pair():
    votes = [
        VOTE,
        dataclasses.replace(VOTE, vote_id="v2", prompt_id=8, choice="tie", seconds=10.5),
        dataclasses.replace(VOTE, vote_id="v3", choice="right", repeat_of="v1"),
        dataclasses.replace(VOTE, vote_id="v4", prompt_id=9, arm_right="token_gain"),
        dataclasses.replace(VOTE, vote_id="v5", judge_id="m", judge_kind="model", choice="right", seconds=math.nan),
    ]
    person, model = judge_votes(votes, "baseline", "both")
    assert person == JudgeVotes("a", True, Tally(1, 0, 1), 16.0, 2)
    assert (model.name, model.is_human, model.tally) == ("m", False, Tally(0, 1, 0)) and math.isnan(model.pace_seconds)
