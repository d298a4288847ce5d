"""The one count of votes, against examples worked by hand."""

import dataclasses
import math

import pytest

from replication.votes.record import CHOICES, Vote
from replication.votes.tally import Tally, chosen_arm, count, count_by, first_votes, total, votes_per_judge, winner

VOTE = Vote("v1", "s", 1, "baseline", "both", 7, 0, 2, "a", "human", "", "left", "2026-11-24T10:00:00+0000", 21.5, "")


def test_who_won_whatever_the_sides():
    assert [winner(choice, "x", "y") for choice in CHOICES] == ["x", "y", None, None]
    swapped = dataclasses.replace(VOTE, arm_left="both", arm_right="baseline")
    assert [chosen_arm(VOTE), chosen_arm(swapped)] == ["baseline", "both"]
    assert chosen_arm(dataclasses.replace(VOTE, choice="both_bad")) is None


def test_a_tally_of_a_pair():
    chosen = ["both", "baseline", None, "both", None]
    t = count(chosen, "baseline", "both")
    assert t == Tally(baseline=1, treatment=2, ties=2)
    assert (t.n, t.decisive, t.share, t.tie_share, t.leans) == (5, 3, pytest.approx(2 / 3), 0.4, "treatment")
    with pytest.raises(AssertionError, match="other arms"):
        count(["token_gain"], "baseline", "both")


@pytest.mark.parametrize(
    ("tally", "leans"),
    [(Tally(2, 1, 0), "baseline"), (Tally(1, 1, 5), "even"), (Tally(0, 0, 5), "ties"), (Tally(), "ties")],
)
def test_an_even_split_and_ties_alone_are_no_majority(tally, leans):
    assert tally.leans == leans


def test_nothing_has_no_share():
    assert math.isnan(Tally(ties=3).share) and math.isnan(Tally().tie_share) and Tally(ties=3).tie_share == 1


def test_tallies_add_up():
    assert total([Tally(1, 2, 3), Tally(10, 20, 30)]) == Tally(11, 22, 33)
    assert total([]) == Tally()


def test_a_repeat_is_no_first_vote():
    again = dataclasses.replace(VOTE, vote_id="v2", repeat_of="v1")
    model = dataclasses.replace(VOTE, vote_id="v3", judge_id="m", judge_kind="model")
    assert first_votes([VOTE, again, model]) == [VOTE, model]
    assert votes_per_judge([VOTE, again, model]) == {"a": 1, "m": 1}
    assert votes_per_judge([VOTE, again, model], ["model"]) == {"m": 1}


def test_votes_are_counted_by_any_group():
    other = dataclasses.replace(VOTE, vote_id="v2", prompt_id=8, choice="tie")
    model = dataclasses.replace(VOTE, vote_id="v3", judge_id="m", choice="right")
    votes = [other, VOTE, model]
    by_prompt = count_by(votes, lambda vote: vote.prompt_id, "baseline", "both")
    assert list(by_prompt.items()) == [(8, Tally(0, 0, 1)), (7, Tally(1, 1, 0))]
    assert count_by(votes, lambda vote: vote.judge_id, "both", "baseline") == {"a": Tally(0, 1, 1), "m": Tally(1, 0, 0)}
