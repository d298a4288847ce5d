"""What completions are like, arm by arm; whether a preference stands at equal length, and without any one of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reported import report
from scipy import special
from synthetic_runs import build_suite, edit_manifest
from vote_records import vote, write_votes

from replication.config import AnalysisConfig
from replication.report.completions import robustness
from replication.runs.files import write_text
from replication.statistics.adjusted import equal_texts_logit

ARMS, SEEDS = ("baseline", "both"), (1, 2, 3, 4, 5, 6)


def test_every_report_says_what_the_completions_are_like(tmp_path: Path) -> None:
    texts = {("both", seed): "the sea and the sea and the sea and" for seed in SEEDS[:2]}
    suite_dir, suite = build_suite(tmp_path / "out", arms=ARMS, seeds=SEEDS[:2], completions=texts)
    for seed in SEEDS[:2]:
        run = suite_dir.cell("baseline", seed)
        lines = [json.loads(line) for line in run.samples.read_text().splitlines()]
        write_text(run.samples, "".join(json.dumps(x | {"stopped": x["sample"] == 0}) + "\n" for x in lines))
    results, _, markdown = report(suite_dir, suite)
    rows = {row["name"]: row for row in results["completions"]}
    assert rows["share that ends by itself"]["values"] == {"baseline": [0.5, 0.5], "both": [1.0, 1.0]}
    (pair,) = rows["share that ends by itself"]["pairs"]
    assert (pair["mean"], pair["n"], pair["n_positive"]) == (0.5, 2, 2)
    assert rows["repeated 4-grams"]["means"]["both"] == pytest.approx(3 / 6)
    section = markdown.split("## Completions")[1].split("\n## ")[0]
    assert "| share that ends by itself | 0.500 | 1.000<br>+0.500" in section and "compression" in section

    edit_manifest(suite_dir.cell("both", 2), generation={"temperature": 1.5})  # not alike, so not compared
    results, *_ = report(suite_dir, suite)
    assert results["completions"][0]["values"] == {"baseline": [0.5, 0.5], "both": [1.0, None]}


def test_a_length_that_drives_the_votes_is_no_preference_at_equal_length(tmp_path: Path) -> None:
    """Longer texts of `both`, and judges who like what is long whatever the arm."""
    suite_dir, suite = build_suite(tmp_path / "out", arms=ARMS, seeds=SEEDS)
    rng, votes, length = np.random.default_rng(3), [], {}
    for arm, seed, run in suite_dir.cells():
        lines = [json.loads(line) for line in run.samples.read_text().splitlines()]
        for line in lines:
            n = int(rng.integers(4, 40) * (2 if arm == "both" else 1))
            length.setdefault((arm, seed, line["prompt_id"]), n)  # of the first sample, which is judged
            line["completion"] = " ".join(f"w{rng.integers(1000)}" for _ in range(n))
        write_text(run.samples, "".join(json.dumps(line) + "\n" for line in lines))
    for judge in range(30):
        for seed in SEEDS:
            for prompt in range(1, 8):
                ratio = np.log(length["both", seed, prompt] / length["baseline", seed, prompt])
                left = "left" if rng.random() < special.expit(1.5 * ratio) else "right"
                choice = {0: "tie", 1: "both_bad"}.get(judge % 10, left) if prompt > 3 else left
                votes.append(vote(len(votes), seed, prompt, f"j{judge}", choice, suite="synthetic"))
    write_votes(suite_dir.votes, votes)
    results, text, _ = report(suite_dir, suite)
    assert results["preference"]["decision"] == "preferred" and results["preference"]["estimate"] > 0.65
    found = results["robustness"]
    assert found["equal"]["low"] < 0.5 < found["equal"]["high"] and found["equal"]["estimate"] < 0.6
    assert "At equal length and repetition of both texts the share for token + layer gain is" in text
    for of in found["left_out"]:
        assert of["low"] <= results["preference"]["estimate"] <= of["high"]
    by_seed = {row["seed"]: row["estimate"] for row in results["preference"]["per_seed"]["rows"]}
    assert int(found["left_out"][0]["without_low"]) == max(by_seed, key=lambda seed: by_seed[seed])
    easier, harder = found["ease"]
    assert (easier["both_bad"], easier["ties"]) == (0.0, 0.0) and harder["both_bad"] == harder["ties"] > 0.05

    flips, wins = found["flips"], [v for v in votes if v.choice == "left"]
    assert found["is_decided"] and 0 < flips < len(wins)
    suite_dir.cell("both", 1).samples.unlink()
    _, text, _ = report(suite_dir, suite)
    assert "Not adjusted for length and repetition" in text


def test_votes_that_the_flips_take_away_end_the_decision(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=ARMS, seeds=SEEDS, samples=False)
    rng = np.random.default_rng(0)
    votes = [
        vote(0, seed, prompt, f"j{judge}", "left" if rng.random() < 0.6 else "right", suite="synthetic")
        for judge in range(20) for seed in SEEDS for prompt in range(8)
    ]  # fmt: skip
    votes = [replace(v, vote_id=f"v{i}") for i, v in enumerate(votes)]
    write_votes(suite_dir.votes, votes)
    results, *_ = report(suite_dir, suite)
    p, analysis = results["preference"]["p"], AnalysisConfig().resolved(ARMS)
    near, beyond, never = (robustness(votes, analysis, {}, [], below) for below in (1.2 * p, 0.8 * p, np.nan))
    assert near and beyond and never and near.is_decided and not beyond.is_decided, "by what p has to be below"
    assert near.flips and beyond.flips and near.flips < results["robustness"]["flips"] and never.flips is None
    k, order = results["robustness"]["flips"], sorted(range(len(votes)), key=lambda i: (
        votes[i].seed, votes[i].prompt_id, votes[i].judge_id))  # fmt: skip
    wins = [i for i in order if votes[i].choice == "left"]
    for n, decided in ((k - 1, True), (k, False)):
        flipped = list(votes)
        for i in np.linspace(0, len(wins) - 1, n).round().astype(int):
            flipped[wins[i]] = replace(flipped[wins[i]], choice="right")
        write_votes(suite_dir.votes, flipped)
        p = report(suite_dir, suite)[0]["preference"]["p"]
        assert (p < 0.05) is decided


def test_the_parts_of_the_estimate_are_those_of_the_plain_regression() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(0.4, 1, (4000, 2))
    y = (rng.random(4000) < special.expit(0.3 + x @ [1.0, -0.5])).astype(float)
    parts = equal_texts_logit(y, x)
    import statsmodels.api as sm

    fitted = sm.Logit(y, sm.add_constant(x)).fit(disp=0, cov_type="HC0")
    assert parts.mean() == pytest.approx(fitted.params[0])
    assert parts.std() / np.sqrt(len(y)) == pytest.approx(fitted.bse[0])
    assert np.isnan(equal_texts_logit(y, np.zeros((4000, 1)))).all(), "nothing varies"
    assert np.isnan(equal_texts_logit(y, (2 * y - 1)[:, None])).all(), "it tells every vote"
