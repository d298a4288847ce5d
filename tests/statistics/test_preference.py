"""Preference from votes: estimators against references, and records that are short of something."""

import json
from collections import Counter

import numpy as np
import pytest
from scipy import stats as scipy_stats
from vote_records import SEEDS, record, vote

from replication.config import AnalysisConfig
from replication.protocol.paper import VOTES
from replication.report.preference import NOT_DECIDED, analyse_votes
from replication.runs.records import to_json
from replication.statistics.alike import alike_judges, as_one
from replication.statistics.format import clean
from replication.statistics.preference import (
    agreement,
    ballots,
    binomial_p,
    bootstrap_share,
    chance_range,
    krippendorff_alpha,
    self_consistency,
    shares_by,
)
from replication.votes.tally import votes_per_judge

ANALYSIS = AnalysisConfig(baseline="baseline", treatment="both", votes_per_judge=8, bootstrap_resamples=400)
CERTIFIED = {"both": SEEDS, "token_gain": SEEDS}
CATEGORIES = {p: "factual" if p < 4 else "creative" for p in range(8)}


def analyse(votes, **changes):
    found = to_json(analyse_votes(votes, "s", AnalysisConfig(**(vars(ANALYSIS) | changes)), CERTIFIED, CATEGORIES))
    json.dumps(clean(found), allow_nan=False)  # a file can hold it, and what is missing is null
    return found


# ---------------------------------------------------------------- estimators


def test_sides_are_undone_and_both_bad_is_a_tie():
    votes = [
        vote(0, choice="left"),
        vote(1, choice="right"),
        vote(2, choice="left", left="baseline", right="both"),
        vote(3, choice="right", left="baseline", right="both"),
        vote(4, choice="both_bad"),
        vote(5, choice="tie"),
        vote(6, choice="left", right="token_gain"),
        vote(7, choice="right", repeat_of="v0"),
    ]
    b = ballots(votes, "baseline", "both")
    assert b.score.tolist() == [1, 0, 0, 1, 0.5, 0.5]
    assert b.treatment_left.tolist() == [True, True, False, False, True, True]
    assert self_consistency(votes) == (0, 1)


def test_what_chance_gives_of_the_left_is_exact():
    """Of 341 votes 152 to 189 lie within (44.6 to 55.4 %); the normal approximation said 44.7 to 55.3 %."""
    low, high = chance_range(341)
    assert [round(100 * bound, 1) for bound in (low, high)] == [44.6, 55.4]
    assert low <= 152 / 341 and high >= 189 / 341 and not low <= 151 / 341 and not high >= 190 / 341
    outside = scipy_stats.binomtest(190, 341).pvalue / 2
    assert outside < 0.025 < scipy_stats.binomtest(189, 341).pvalue / 2
    assert np.isnan(chance_range(0)).all()
    for n in (1, 2, 7, 100, 1000):
        low, high = chance_range(n)
        inside = scipy_stats.binom.cdf(high * n, n, 0.5) - scipy_stats.binom.cdf(low * n - 1, n, 0.5)
        assert inside >= 0.95 and low + high == pytest.approx(1)


def test_the_naive_p_is_scipys_exact_binomial():
    for k, n in ((470, 784), (3, 3), (5, 10), (0, 7)):
        assert binomial_p(k, n) == pytest.approx(scipy_stats.binomtest(k, n).pvalue)
    assert np.isnan(binomial_p(0, 0))


def test_shares_by_seed_leave_ties_out():
    shares = shares_by([1, 0, 0.5, 1, 0.5, 0.5], [3, 3, 3, 1, 1, 2])
    assert shares[:1].tolist() == [1.0] and np.isnan(shares[1]) and shares[2] == 0.5


def test_a_bootstrap_of_independent_units_equals_scipys():
    rng = np.random.default_rng(0)
    scores, unit = (rng.random(80) < 0.6).astype(float), np.arange(80)
    ours = bootstrap_share(scores, [unit], np.random.default_rng(1), 4000)
    theirs = scipy_stats.bootstrap(
        (scores,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.013)  # one vote in 80


def test_resampled_levels_multiply():
    # Two seeds of one vote each: the share is of seed 1, of seed 2, or of both, with 1/4, 1/4 and 1/2.
    low, high = bootstrap_share([0.0, 1.0], [[1, 2], [5, 5]], np.random.default_rng(0), 400)
    assert (low, high) == (0.0, 1.0)
    assert np.isnan(bootstrap_share([1.0, 1.0, 0.5], [[1, 2, 3]], np.random.default_rng(0), 40)).all()


def test_an_even_split_is_a_majority_of_neither():
    ties = ballots([vote(n, prompt=n, choice="tie") for n in range(2)], "baseline", "both")
    assert agreement(ties, ties).same_majority == 0
    wins = ballots([vote(n, prompt=n) for n in range(2)], "baseline", "both")
    assert agreement(wins, wins).same_majority == 2


def test_krippendorffs_published_example():
    # Krippendorff 2011, section C: four observers, twelve units; nominal 0.743, interval 0.849.
    observers = (
        (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
        (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
        (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
        (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
    )
    values, units = zip(
        *((v, u) for row in observers for u, v in enumerate(row) if v is not None), strict=True
    )  # fmt: skip
    assert krippendorff_alpha(values, units, ordered=False) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(values, units) == pytest.approx(0.849, abs=5e-4)
    assert np.isnan(krippendorff_alpha([1, 1], [0, 0])) and np.isnan(krippendorff_alpha([], []))


# ---------------------------------------------------------------- all of it


def test_a_planted_preference_is_found_and_everything_is_there():
    found = analyse(record())
    assert found["p"] < 0.05 and found["why"] == ""
    assert (found["n_votes"], found["n_seeds"], found["n_prompts"], found["n_judges"]) == (80, 6, 8, 10)
    assert found["low"] < found["estimate"] < found["high"] and found["low"] > 0.5
    assert found["estimate"] == pytest.approx(found["n_treatment"] / found["n_decisive"])
    win_half = (found["n_treatment"] + found["n_ties"] / 2) / 80
    assert found["win_half"]["estimate"] == pytest.approx(win_half)
    assert found["sign_flip"]["smallest"] == 2 / 2**6
    assert {row["name"] for row in found["categories"]} == {"factual", "creative"}
    assert sum(row["n_votes"] for row in found["kinds"]) == 80
    assert found["per_seed"]["scope"] == "conditional on these prompts and judges"
    assert found["agreement"]["people_and_models"]["n_prompts"] == 8


def test_the_seeds_of_a_new_study_are_named_unless_the_interval_excludes_what_it_would_look_for():
    found = analyse(record(share=0.55))
    assert found["low"] < VOTES.share < found["high"] and found["p"] > 0.05
    more = found["more_seeds"]
    assert (more["seeds"] is None) == bool(more["limit"])
    assert analyse(record(share=0.2, n_judges=40))["more_seeds"] is None


def test_the_published_filters_leave_out_whom_they_name():
    votes = record(n_judges=6)
    votes += [vote(100 + p, 1 + p % 6, p, "fast", "left", seconds=5.0) for p in range(8)]
    votes += [vote(200 + p, 1 + p % 6, p, "quick-model", "left", seconds=5.0, kind="model") for p in range(8)]
    votes += [vote(300 + p, 1 + p % 6, p, "tied", "tie" if p else "left") for p in range(8)]
    votes += [vote(400, 1, 0, "short", "left")]
    votes += [vote(500 + p, 1 + p % 6, p, "author", "left") for p in range(8)]
    rows = {row["name"]: row for row in analyse(votes, experimenters=("author",))["filters"]}
    left_out = {name: 81 - row["n_votes"] for name, row in rows.items()}
    assert left_out == {
        "all judges": 0,
        "models only": 49,
        "people only": 32,
        "without people faster than 15 s in the median": 8,
        "without judges with more than 80% ties": 8,
        "without those who run the experiment": 8,
        "without judges of fewer than 8 votes": 1,
        "without all of these judges": 25,
    }


def test_votes_that_may_not_count_are_counted_aloud():
    votes = record()
    votes += [vote(900, suite="other"), vote(901, seed=7), vote(902, left="focal")]
    found = analyse(votes)
    assert found["n_votes"] == 80
    assert found["left_out"] == [
        "1 vote of another suite than s: not used",
        "1 vote on a seed whose pair does not pass the certificate: not used",
        "1 vote on an arm that no certified pair has: not used",
    ]


def test_repeats_serve_self_consistency_alone():
    votes = record()
    again = [
        vote(500 + i, v.seed, v.prompt_id, v.judge_id, "tie", v.arm_right, v.arm_left, repeat_of=v.vote_id)
        for i, v in enumerate(votes[:10])
    ]
    plain, found = analyse(votes), analyse(votes + again)
    assert found["primary"] == plain["primary"]
    assert found["agreement"]["repeats"] == 10
    assert found["agreement"]["repeats_same"] == Counter(v.choice for v in votes[:10])["tie"]


def test_other_pairs_are_secondary():
    votes = record() + [vote(700 + p, 1 + p % 6, p, "j0", "left", "token_gain") for p in range(8)]
    (row,) = analyse(votes)["other_pairs"]
    assert (row["baseline"], row["treatment"], row["n_votes"], row["estimate"]) == ("baseline", "token_gain", 8, 1.0)


# ---------------------------------------------------------------- related judges


def models(n_judges, vendors, seed=0):
    """Votes of models; vendors in turn."""
    of = {f"j{k}": vendors[k % len(vendors)] for k in range(n_judges)}
    votes = record(n_judges=n_judges, random_seed=seed)
    return [type(v)(**(vars(v) | {"judge_kind": "model", "vendor": of[v.judge_id]})) for v in votes]


def test_models_of_a_vendor_are_one_cluster_and_people_their_own():
    votes = [vote(0), vote(1, judge="b"), *(vote(2 + k, judge=f"m{k}", kind="model", vendor="x") for k in range(3))]
    b = ballots([*votes, vote(9, judge="m9", kind="model")], "baseline", "both")
    assert b.cluster.tolist() == ["judge a", "judge b", *["vendor x"] * 3, "vendor unknown"]


def test_few_vendors_are_named_in_the_verdict():
    found = analyse(models(20, ("x", "y", "z")))
    assert found["p"] < 0.05 and found["why"] == ""
    assert found["primary"]["note"].endswith("as to models conditional on these vendors (x, y, z)")
    assert analyse(models(20, ("w", "x", "y", "z")))["primary"]["note"] == ""
    one = analyse(models(20, ("x",)))
    assert np.isnan(one["p"]) and one["why"] == "conditional on the one vendor"


def test_vendors_are_not_named_where_people_alone_have_the_preference():
    assert analyse(record(n_judges=40))["primary"]["note"] == ""  # 20 people, 20 models of one vendor
    divided = [v for v in record(n_judges=40, share=0.95) if v.judge_kind == "model" or v.judge_id in ("j0", "j2")]
    found = analyse(divided)
    assert found["n_judges"] == 22 and "conditional on these vendors (x)" in found["primary"]["note"]


def copied(votes, of, name):
    own = [v for v in votes if v.judge_id == of]
    return [type(v)(**(vars(v) | {"vote_id": f"{name}-{v.vote_id}", "judge_id": name})) for v in own]


def long_record(seed=0):
    """Ten people, each 40 votes on as many prompts, which all like the treatment's text on every third."""
    rng = np.random.default_rng(seed)
    votes = []
    for judge, prompt in np.ndindex(10, 40):
        left, right = ("both", "baseline") if rng.random() < 0.5 else ("baseline", "both")
        wins = "left" if (left == "both") == (rng.random() < (0.95 if prompt % 3 == 0 else 0.5)) else "right"
        choice = "tie" if rng.random() < 0.2 else wins
        votes.append(vote(len(votes), 1 + (judge + prompt) % 3, prompt, f"j{judge}", choice, left, right))
    return votes


def test_copied_votes_are_found_and_count_as_one_judge():
    votes = long_record()
    assert analyse(votes)["alike"] == []
    found = analyse([*votes, *copied(votes, "j3", "again")])
    (pair,) = found["alike"]
    assert pair["judges"] == ["again", "j3"] and pair["same"] == pair["shared"] == 40 and pair["p"] < 1e-6
    b = ballots([*votes, *copied(votes, "j3", "again")], "baseline", "both")
    merged = as_one(b, alike_judges(b))
    assert len(set(merged.cluster)) == 10 and len(set(merged.judge)) == 11


def test_the_same_sides_in_the_same_order_are_found_on_other_pairs():
    votes = long_record()
    shown = [
        type(v)(**(vars(v) | {"prompt_id": v.prompt_id + 100, "arm_left": v.arm_right, "arm_right": v.arm_left}))
        for v in copied(votes, "j3", "again")
    ]
    (pair,) = alike_judges(ballots([*votes, *shown], "baseline", "both"))
    assert pair.judges == ("again", "j3") and pair.where == "in the same order"


def test_honest_judges_are_seldom_suspected():
    """Twelve records, strong agreement on which text is better: no pair of 45 in any."""
    assert sum(len(alike_judges(ballots(long_record(seed), "baseline", "both"))) for seed in range(12)) == 0


# ---------------------------------------------------------------- short of something


def test_no_votes_is_nothing():
    assert analyse_votes([], "s", ANALYSIS, CERTIFIED, CATEGORIES) is None


def test_votes_on_no_certified_pair():
    found = analyse_votes(record(), "s", ANALYSIS, {"both": ()}, CATEGORIES)
    assert (found.n_votes, found.decision) == (0, NOT_DECIDED)
    assert found.why == "there are no usable votes on this pair"


def test_one_seed_says_nothing_of_the_method():
    found = analyse(record(seeds=(1,)))
    assert found["decision"] == NOT_DECIDED and "one seed" in found["why"]
    assert np.isnan(found["p"]) and found["primary"]["note"] == "conditional on the one seed"
    assert np.isnan(found["bootstrap"]["low"]) and np.isnan(found["per_seed"]["p"])


def test_all_ties():
    found = analyse(record(ties=1.0))
    assert found["n_decisive"] == 0 and np.isnan(found["estimate"])
    assert found["primary"]["note"] == "none of the 80 votes is decisive"
    assert found["win_half"]["estimate"] == 0.5 and np.isnan(found["win_half"]["p"])
    assert "every vote is a tie" in found["win_half"]["note"]
    assert found["decision"] == NOT_DECIDED and np.isnan(found["naive"]["p"])


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_every_decisive_vote_for_one_arm(ties):
    found = analyse(record(share=1.0, ties=ties))
    assert found["estimate"] == 1.0 and np.isnan(found["p"]) and np.isnan(found["bootstrap"]["low"])
    assert found["decision"] == NOT_DECIDED and "every decisive vote is for the treatment" in found["why"]


def test_seeds_of_nothing_but_ties_are_no_evidence():
    votes = [v if v.seed <= 2 else type(v)(**(vars(v) | {"choice": "tie"})) for v in record(n_judges=40)]
    found = analyse(votes)
    assert (found["n_seeds"], found["n"]) == (6, 2)
    assert found["decision"] == NOT_DECIDED
    assert found["why"] == "2 seeds have decisive votes, and at least 5 are asked for (analysis.min_seeds)"
    assert found["sign_flip"]["smallest"] == 2 / 2**2


def test_one_judge_says_nothing_of_others():
    found = analyse([v for v in record(n_judges=40) if v.judge_id == "j0"])
    assert found["n_judges"] == 1 and np.isnan(found["p"]) and found["decision"] == NOT_DECIDED
    assert "conditional on the one judge" in found["primary"]["note"]
    assert found["high"] <= 1 and found["low"] >= 0


def test_a_refused_seed_makes_nobodys_set_partial():
    certified = {"both": SEEDS[:-1], "token_gain": SEEDS}
    found = analyse_votes(record(), "s", ANALYSIS, {"both": certified["both"]}, CATEGORIES)
    rows = {row["name"]: row["n_votes"] for row in found.filters}
    assert rows["without judges of fewer than 8 votes"] == rows["all judges"] > 0


def test_a_judge_with_one_vote_and_a_single_vote():
    found = analyse([*record(), vote(999, 2, 3, "once", "left")])
    assert found["n_judges"] == 11 and np.isfinite(found["p"])
    found = analyse([vote()])
    assert found["estimate"] == 1.0 and found["primary"]["note"] == "a single decisive vote has no interval"


def test_fewer_seeds_than_planned_are_not_decided():
    found = analyse(record(seeds=(1, 2, 3, 4)))
    assert found["decision"] == NOT_DECIDED
    assert found["why"] == "4 seeds have decisive votes, and at least 5 are asked for (analysis.min_seeds)"


def test_a_frozen_plan_is_named_where_there_is_one():
    found = analyse_votes(record(seeds=(1,)), "s", ANALYSIS, CERTIFIED, CATEGORIES, is_planned=True)
    assert found.why == "one seed has decisive votes, and the plan asks for at least 5"


def test_the_left_side_is_of_people_and_stands_beside_chance():
    people = [vote(n, seed=1, choice="left" if n < 60 else "right") for n in range(100)]
    left = analyse(people)["agreement"]["left"]
    assert (left["share"], left["n"], left["has_models"], left["is_outside"]) == (0.6, 100, False, False)
    assert (left["low"], left["high"]) == (0.4, 0.6)  # scipy's binomial, by hand: 40 to 60 of 100
    models = [vote(n, seed=1, judge="m", kind="model", choice="right") for n in range(100, 300)]
    assert analyse([*people, *models])["agreement"]["left"] == left | {"has_models": True}
    assert analyse(models)["agreement"]["left"] is None
    more = [*people, *(vote(n, seed=1, choice="left") for n in range(300, 310))]
    assert analyse(more)["agreement"]["left"]["is_outside"]


def test_a_filter_that_leaves_nobody_says_so():
    rows = {row["name"]: row["note"] for row in analyse([vote()])["filters"]}
    assert rows["models only"] == "leaves no votes" and rows["all judges"] == "a single decisive vote has no interval"


def test_votes_per_judge_counts_first_votes_of_the_kinds_that_count():
    votes = [vote(0), vote(1, judge="m", kind="model"), vote(2, repeat_of="v0")]
    assert votes_per_judge(votes, ("human",)) == {"a": 1}
