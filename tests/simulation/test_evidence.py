"""`replicate calibrate` and `replicate power`: short forms of the simulations, against independent ones."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reported import report
from synthetic_runs import build_suite
from vote_records import record, write_votes

from replication.cli.main import main
from replication.errors import UserError
from replication.simulation.calibration import (
    LengthScenario,
    LossScenario,
    PanelScenario,
    VoteScenario,
    declared_grid,
    measure,
)
from replication.simulation.panels import PANELS, Panel
from replication.simulation.power import (
    Fitted,
    Study,
    fewest_seeds,
    fit,
    fit_ballots,
    power,
    power_row,
    spread_between_groups,
    studies,
)
from replication.simulation.simulate import Spread, draw_scores, preference_for, true_share, vote_pattern
from replication.statistics.crossed import CrossedDesign
from replication.statistics.preference import Ballots
from replication.statistics.seeds import power_of_equivalence, sd_upper_bound

PRIMARY = Spread(seed=0.05, prompt=0.2, judge=0.1, seed_prompt=0.15)


# ---------------------------------------------------------------- simulated votes


def test_a_panel_is_balanced():
    who = vote_pattern(5, 32, 40)
    assert len(who) == 32 * 40
    assert len(set(zip(who.prompt.tolist(), who.judge.tolist(), strict=True))) == len(who)
    assert np.bincount(who.seed).tolist() == [256] * 5
    assert np.bincount(who.seed * 32 + who.prompt).min() >= 8 - 1
    short = vote_pattern(5, 32, 40, votes_per_judge=8)
    assert np.bincount(short.prompt).tolist() == [10] * 32 and np.bincount(short.judge).tolist() == [8] * 40


def test_spreads_and_shares_come_out_as_declared():
    rng = np.random.default_rng(0)
    scores = draw_scores(0.5, Spread(seed=0.1), 1 / 3, vote_pattern(8, 8, 8), 500, rng)
    assert (scores == 0.5).mean() == pytest.approx(1 / 3, abs=0.01)
    decisive = np.where(scores == 0.5, np.nan, scores)
    between = np.nanmean(decisive[:, vote_pattern(8, 8, 8).seed == 0], axis=1)
    assert between.var() == pytest.approx(0.1**2 + 0.24 / (8 * 2 / 3), rel=0.15)  # a seed has 8 votes
    mean = preference_for(0.6, PRIMARY)
    assert true_share(mean, PRIMARY) == pytest.approx(0.6, abs=1e-9)
    drawn = draw_scores(mean, PRIMARY, 0.0, vote_pattern(5, 8, 8), 4000, rng)
    assert drawn.mean() == pytest.approx(0.6, abs=0.006)


def test_a_spread_is_found_in_marginals_and_binomial_noise_is_not():
    rng = np.random.default_rng(0)
    n = np.full(400, 25)
    chances = np.clip(0.6 + 0.15 * rng.standard_normal(400), 0, 1)
    assert spread_between_groups(rng.binomial(n, chances), n) == pytest.approx(0.15, abs=0.02)
    assert spread_between_groups(rng.binomial(n, 0.6), n) < 0.03
    assert np.isnan(spread_between_groups([1], [2]))


def test_a_pilots_votes_give_every_spread():
    rng = np.random.default_rng(3)
    who = vote_pattern(40, 40, 40)
    score = draw_scores(0.5, Spread(0.15, 0.2, 0.1), 0.2, who, 1, rng)[0]
    yes = np.ones(len(who), dtype=bool)
    judge = who.judge.astype(str)
    fitted = fit_ballots(Ballots(score, who.seed, who.prompt, judge, yes, yes, judge), "pilot")
    assert (fitted.seed, fitted.prompt, fitted.judge) == pytest.approx((0.15, 0.2, 0.1), abs=0.05)
    assert fitted.ties == pytest.approx(0.2, abs=0.03)


# ---------------------------------------------------------------- the tests on known truths


def test_the_primary_decision_keeps_its_level_where_the_naive_one_does_not():
    row = measure(VoteScenario(5, 32, 40, 0.5, PRIMARY), 400, 0)
    tests = row["tests"]
    assert 0.02 <= tests["crossed"]["rejected"] <= 0.08  # 2,000 experiments say 3 to 7 %
    assert 0.92 <= tests["crossed"]["coverage"] <= 0.98
    assert tests["naive"]["rejected"] > 0.35
    assert tests["sign_flip"]["rejected"] == 0  # five seeds cannot reach 5 %
    small = VoteScenario(3, 6, 5, 0.5, PRIMARY)
    assert measure(small, 20, 0) == measure(small, 20, 0)


def test_equivalence_at_the_margin_and_the_loss_tests_at_no_effect():
    at_margin = measure(LossScenario(6, 0.5, 1.0), 2000, 0)
    assert 0.03 <= at_margin["tests"]["equivalence"]["rejected"] <= 0.07
    null = measure(LossScenario(6, 0.5, 0.0), 2000, 0)
    assert null["tests"]["equivalence"]["rejected"] >= null["truth"]["predicted"] - 0.03
    for name in ("paired_t", "token_gain", "layer_gain", "interaction"):
        assert 0.03 <= null["tests"][name]["rejected"] <= 0.07
        assert 0.93 <= null["tests"][name]["coverage"] <= 0.97


def test_a_panel_is_as_declared():
    rng = np.random.default_rng(0)
    skewed = Panel("", seed_spread=0.8, is_skewed=True)
    effects = skewed.seed_effects(rng.standard_normal(400_000))
    assert effects.mean() == pytest.approx(0, abs=0.01) and effects.std() == pytest.approx(0.8, rel=0.05)
    assert np.median(effects) < -0.2  # the tail is on the right
    who = skewed.pattern(16)
    for share in (0.5, 0.6):
        scores = skewed.scores(share, who, 16, 1500, rng)
        assert scores[scores != 0.5].mean() == pytest.approx(share, abs=0.015)
    copies = Panel("", copies=(7, 1))
    who = copies.pattern(16)
    scores = copies.scores(0.5, who, 16, 1, rng)[0]
    for of in (scores, who.seed, who.prompt):
        assert all(np.array_equal(of[who.judge == 0], of[who.judge == k]) for k in range(33, 40))
    sizes = np.bincount(Panel("", is_unequal=True).pattern(32).judge)
    assert (sizes.max(), sizes.min()) == (32, 8)


def test_related_judges_keep_the_level_only_as_clusters():
    """400 experiments; 2,000 of each of all panels: simulation/README.md."""
    six = next(panel for panel in PANELS if panel.name == "40 models of 6 vendors")
    tests = measure(PanelScenario(six, 32, 0.5), 400, 0)["tests"]
    assert tests["verdict"]["rejected"] <= 0.065 and tests["verdict"]["coverage"] >= 0.935
    assert tests["by_judge"]["rejected"] > 0.08
    one = next(panel for panel in PANELS if panel.vendors == (40,))
    withheld = measure(PanelScenario(one, 16, 0.5), 100, 0)["tests"]
    assert withheld["verdict"] == {"rejected": 0.0, "coverage": None, "given": 0.0}
    assert withheld["by_judge"]["rejected"] > 0.2


def test_the_stated_power_is_that_of_a_plain_simulation():
    """Restated vote by vote: what `draw_scores` draws at once, and a share of decisive votes alone in the design."""
    study = Study(5, 8, 6, Spread(0.05, 0.1, 0.05, 0.1), 0.75, 0.25)
    rng = np.random.default_rng(5)
    found, n = 0, 400
    for _ in range(n):
        seeds, prompts, judges = (sd * rng.standard_normal(k) for sd, k in ((0.05, 5), (0.1, 8), (0.05, 6)))
        pairs = 0.1 * rng.standard_normal((5, 8))
        votes = []
        for judge in range(6):
            for prompt in range(8):
                seed = (prompt + judge + judge // 5) % 5
                chance = 0.75 + seeds[seed] + prompts[prompt] + judges[judge] + pairs[seed, prompt]
                if rng.random() > 0.25:
                    votes.append((seed, prompt, judge, float(rng.random() < chance)))
        seed, prompt, judge, chosen = np.array(votes).T
        t = CrossedDesign(seed, prompt, judge).t(chosen)
        found += t.p < 0.05 and t.mean > 0.5
    assert power(study, 1000, 0) == pytest.approx(found / n, abs=0.07)


def test_what_length_drives_is_found_and_at_equal_length_is_not():
    found = measure(LengthScenario(5, 16, 20, 1.0, 0.1), 80, 0)["tests"]
    assert found["crossed"]["rejected"] > 0.8 > 0.1 > found["equal_texts"]["rejected"]
    assert found["equal_texts"]["coverage"] > 0.9


def test_the_declared_grid_has_what_was_declared():
    votes = [cell for cell in declared_grid() if isinstance(cell, VoteScenario)]
    null = {(c.spread.seed, c.spread.prompt, c.spread.judge) for c in votes if c.share == 0.5}
    assert null == {(s, p, j) for s in (0.0, 0.05, 0.1) for p in (0.0, 0.2) for j in (0.0, 0.1)}
    assert sum(cell.primary for cell in votes) == 3


def test_fewest_seeds_are_the_fewest():
    spread = {"seed": 0.0, "prompt": 0.2, "seed_prompt": 0.1}
    rows = [
        {"spread": spread, "prompts": 32, "judges": 40, "seeds": n, "power": p}
        for n, p in ((3, 0.5), (8, 0.9), (5, 0.81))
    ]
    assert fewest_seeds(rows)[0]["fewest_seeds"] == 5
    assert fewest_seeds(rows[:1])[0]["fewest_seeds"] is None


# ---------------------------------------------------------------- the commands


def test_calibrate_writes_its_files_and_goes_on(tmp_path, capsys):
    argv = ["calibrate", "--out", str(tmp_path), "--experiments", "20", "--jobs", "1", "--prompts", "8"]
    assert main([*argv, "--judges", "6"]) in (0, 1)  # 20 experiments keep no bounds
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert {row["experiments"] for row in found["rows"]} == {20}
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert "primary scenario" in (tmp_path / "calibration.md").read_text()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-3]) + "\n" + lines[-1][:40])  # stopped in the middle
    main([*argv, "--judges", "6"])
    assert json.loads((tmp_path / "calibration.json").read_text()) == found


def test_workers_end_with_their_parent(tmp_path):
    words = ["calibrate", "--experiments", "1000000", "--jobs", "2", "--out", str(tmp_path)]
    for sent in (signal.SIGTERM, signal.SIGKILL):
        parent = subprocess.Popen([sys.executable, "-m", "replication", *words], stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_for(lambda: len(children.read_text().split()) == 2)  # noqa: B023  (called within the round)
        workers = [Path("/proc", child) for child in children.read_text().split()]
        parent.send_signal(sent)
        parent.wait(60)
        wait_for(lambda: not any(worker.exists() for worker in workers))  # noqa: B023


def wait_for(what):
    give_up = time.monotonic() + 60
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_power_reads_the_published_schema(tmp_path, capsys):
    prompts = [{"a": 10 + i % 7, "b": 20 - i % 5, "tie": 9} for i in range(20)]
    judges = [{"a": 7, "b": 8 + i % 4, "ties": 5, "n": 20 + i % 4} for i in range(30)]
    (tmp_path / "phase3_ab_preference.json").write_text(
        json.dumps({"question_majorities": {"details": prompts}, "judges": judges})
    )
    sizes = ["--seeds", "3,6", "--prompts", "16", "--judges", "8", "--simulations", "50", "--jobs", "1"]
    out = tmp_path / "power"
    assert main(["power", "--votes", str(tmp_path), "--out", str(out), "--have", "3", *sizes]) == 0
    found = json.loads((out / "power.json").read_text())
    assert len(found["rows"]) == 2 * 3 * 3 and (out / "power.png").stat().st_size > 10_000
    assert "fitted to" in found["assumptions"][0] and "25 %, 50 %, 75 %" in found["assumptions"][2]
    between = {round(row["spread"]["prompt"] ** 2 + row["spread"]["seed_prompt"] ** 2, 6) for row in found["rows"]}
    assert len(between) == 1  # the variance of one pair is split, not doubled
    assert {row["votes"] for row in found["rows"]} == {8 * 16}
    assert found["rows"][0]["gpu_hours_2_arms"] == 3 * 2 * 180


def test_a_given_interaction_is_not_split_and_votes_per_judge_stay():
    given = {"prompt": 0.2, "judge": 0.1, "seed_prompt": 0.15, "seed_judge": 0.0, "prompt_judge": 0.0}
    sizes = ([5], [32, 128], [40])
    every, words = studies(given, [0.05], None, Fitted(""), sizes, 0.6, votes_per_judge=32)
    assert [(s.spread.prompt, s.spread.seed_prompt) for s in every] == [(0.2, 0.15)] * 2
    assert {power_row(s, 4, 0)["votes"] for s in every} == {32 * 40}
    one = ([0.05], None, Fitted(""), ([5], [32], [40]), 0.6)
    split, words = studies(given | {"seed_prompt": None}, *one, seed_prompt_shares=(0.36,))
    assert (split[0].spread.prompt, split[0].spread.seed_prompt) == pytest.approx((0.16, 0.12))
    assert any("36 % is taken to be seed x prompt" in line for line in words)


SMALL = [
    *("--seeds", "5,8", "--prompts", "8", "--judges", "6", "--simulations", "4", "--jobs", "1"),
    *("--seed-spread", "0", "--seed-prompt-share", "0.5"),
]


def test_power_has_that_of_the_loss_before_any_data(tmp_path, capsys):
    assert main(["power", "--out", str(tmp_path), "--loss-sd", "0.01,0.04", "--margin-nats", "0.02", *SMALL]) == 0
    _, of_loss = (tmp_path / "power.md").read_text().split("# Power to show losses equivalent within 0.02 nats")
    assert f"| 0.01 | {100 * power_of_equivalence(5, 0.01, 0.02):.0f} %" in of_loss and "| 0.04 |" in of_loss
    assert main(["power", "--pilot", str(tmp_path / "none"), *SMALL]) == 2
    assert "results.json: no such file; run `replicate report`" in capsys.readouterr().err


def test_the_sd_of_a_pilot_and_its_upper_bound_are_swept(tmp_path):
    suite_dir, suite = build_suite(tmp_path / "pilot", arms=("baseline", "both"), seeds=(1, 2, 3))
    results, *_ = report(suite_dir, suite)
    assert main(["power", "--pilot", str(suite_dir.root), "--out", str(tmp_path / "power"), *SMALL]) == 0
    sd, text = results["loss"]["sd"], (tmp_path / "power" / "power.md").read_text()
    assert f"| {sd:.2g} |" in text and f"| {sd_upper_bound(sd, 3):.2g} |" in text

    votes = record(seeds=(1, 2, 3))
    more = [replace(v, vote_id=f"more-{i}", arm_left="token_gain") for i, v in enumerate(votes) if v.arm_left == "both"]
    write_votes(suite_dir.votes, votes)
    alone = fit(suite_dir.root)
    write_votes(suite_dir.votes, [*votes, *more])
    assert fit(suite_dir.root) == alone, "the pair of the primary question"
    suite_dir.suite.unlink()
    with pytest.raises(UserError, match="holds votes on 2 pairs of arms; put it beside"):
        fit(suite_dir.root)


def test_marginals_of_another_schema_are_named(tmp_path, capsys):
    file = tmp_path / "marginals.json"
    file.write_text(json.dumps({"question_majorities": {"details": [{"a": 1, "b": "2"}]}, "judges": []}))
    assert main(["power", "--votes", str(file)]) == 2
    assert "marginals.json: question_majorities.details[0].b must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["calibrate", "--experiments", "0"], "--experiments: 0 must be at least 1"),
        (["calibrate", "--seeds", "1"], "--seeds: 1 must be at least 2"),
        (["calibrate", "--judges", "1"], "--judges: 1 must be at least 2"),
        (["calibrate", "--seed", "-1"], "--seed: -1 must be at least 0"),
        (["calibrate", "--random-seed", "-1"], "--random-seed is --seed now"),
        (["power", "--processes", "0"], "--processes is --jobs now"),
        (["power", "--share", "0.5"], "--share: 0.5 is no preference"),
        (["power", "--votes", "nowhere"], "--votes: nowhere holds neither votes.csv nor"),
        (["power", "--seed-spread", "0,2"], "--seed-spread: 2.0 must lie in [0, 0.5]"),
        (["power", "--prompts", "1"], "--prompts: 1 must be at least 2"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err
