"""What stands beside the verdict on the loss: smoothing, the validation set, the margin's worth, diverged cells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reported import report
from run_files import read_journal
from synthetic_runs import build_suite
from training_setup import fit, small_config

from replication.config import AnalysisConfig, DivergedRule
from replication.report.load import load_cell_files
from replication.runs.files import read_json, write_json, write_text
from replication.statistics.scaling import worth_in_tokens
from replication.statistics.seeds import equivalence

ARMS, SEEDS, Q = ("baseline", "both"), (1, 2, 3, 4, 5, 6), 40


def test_a_journal_has_the_loss_of_every_validation_sequence(tmp_path: Path) -> None:
    run = fit(small_config(), tmp_path / "runs" / "baseline" / "seed-1")
    lines = {line["step"]: line for line in read_journal(run.metrics) if "val/loss_nats" in line}
    assert set(lines) == {3, 6}
    for line in lines.values():
        assert len(line["per_sequence"]) == 4 and len(set(line["per_sequence"])) == 4
        assert np.mean(line["per_sequence"]) == pytest.approx(line["val/loss_nats"], abs=1e-5)
    read = load_cell_files(run, "baseline", 1).sequence_losses
    assert read.tolist() == [lines[3]["per_sequence"], lines[6]["per_sequence"]]


def test_the_noise_of_the_validation_set_is_that_of_the_paired_sequences(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=ARMS, seeds=SEEDS, noise=0.0)
    results, text, _ = report(suite_dir, suite)
    assert results["beside_loss"]["noise"] is None
    assert "conditional on this validation set; how far another set would move the difference was not recorded" in text

    rng = np.random.default_rng(0)
    of_sequence, effect_Q = rng.normal(0, 1, Q), 0.01 + rng.normal(0, 0.06, Q)
    planted = {seed: effect_Q + rng.normal(0, 0.01) + rng.normal(0, 0.05, Q) for seed in SEEDS}
    for arm, seed, run in suite_dir.cells():
        lines = read_journal(run.metrics)
        for line in lines:
            if "val/loss_nats" in line:
                losses = 4 + of_sequence + (planted[seed] if arm == "both" else 0)
                line |= {"per_sequence": losses.tolist(), "val/loss_nats": losses.mean()}
                line["val/loss_unsmoothed_nats"] = 1.5 * losses.mean()
        write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    results, text, _ = report(suite_dir, suite)
    noise, loss = results["beside_loss"]["noise"], results["loss"]
    differences = np.stack(list(planted.values()))
    assert noise["n_sequences"] == Q
    assert noise["se"] == pytest.approx(differences.mean(0).std(ddof=1) / np.sqrt(Q), rel=1e-3)
    assert loss["mean"] == pytest.approx(differences.mean(), abs=1e-4)
    assert noise["low"] < loss["low"] and loss["high"] < noise["high"], "another source of chance"
    assert "conditional on these 40 sequences of validation" in text
    assert "nats, 1.50 times as large" in text and "Validation loss, no smoothing, late mean" in text


def test_what_a_margin_is_worth_in_tokens() -> None:
    d, beta = 20e9, 0.3658
    share = worth_in_tokens(0.02, d)
    assert 2085.43 / (d * (1 + share)) ** beta == pytest.approx(2085.43 / d**beta - 0.02)
    assert 0.15 < share < 0.25
    assert worth_in_tokens(1.0, d) == float("inf")


def test_the_margin_has_its_reason_or_lacks_it(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=ARMS, seeds=(1,))
    _, text, _ = report(suite_dir, suite)
    assert "No reason was registered for the margin of 0.02 nats." in text
    assert "at 122,880 tokens is worth 0.2 % more tokens (extrapolated: no run of the fit was so small)" in text
    reason = AnalysisConfig(margin_reason="Seeds differ by as much.")
    _, text, _ = report(suite_dir, replace(suite, analysis=reason))
    assert "The margin's reason, as registered: Seeds differ by as much." in text and "No reason" not in text


def test_diverged_cells_that_did_not_finish_are_a_worst_case_beside_the_complete_ones(tmp_path: Path) -> None:
    lost = {("both", 3): 40}
    suite_dir, suite = build_suite(tmp_path / "out", arms=ARMS, seeds=SEEDS, failed=lost, noise=0.001)
    results, text, _ = report(suite_dir, suite)
    assert results["loss"]["n"] == 5 and results["beside_loss"]["worst"] is None and "Worst case" not in text
    run = suite_dir.cell("both", 3)
    write_json(run.failed, read_json(run.failed) | {"diverged": True})
    results, text, _ = report(suite_dir, replace(suite, diverged=DivergedRule(above_nats=9.0)))
    worst, loss = results["beside_loss"]["worst"], results["loss"]
    assert (worst["cells"], worst["nats"], worst["n"]) == (["both/seed-3"], 9.0, 6)
    own = results["quantities"][1]["values"]["baseline"][2]
    assert worst["mean"] == pytest.approx((5 * loss["mean"] + 9.0 - own) / 6)
    assert loss["verdict"] == "equivalent" and worst["verdict"] == "not decided"
    assert "Worst case, with what diverged and did not finish (both/seed-3) counted at 9.00 nats" in text


def test_the_worst_case_is_decided_as_the_question_is(tmp_path: Path) -> None:
    """At a margin at which its test rejects before Holm's correction, and not after it."""
    suite_dir, suite = build_suite(tmp_path / "out", seeds=SEEDS, steps=20, failed={("both", 3): 10})
    run = suite_dir.cell("both", 3)
    write_json(run.failed, read_json(run.failed) | {"diverged": True})
    loss = report(suite_dir, suite)[0]
    limit = loss["quantities"][1]["values"]["baseline"][2] + 0.004
    differences = [0.004 if d is None else d for d in loss["loss"]["differences"]]
    margin = next(float(m) for m in np.arange(0.001, 1.0, 0.0001) if equivalence(differences, m).p < 0.045)
    suite = replace(suite, diverged=DivergedRule(above_nats=limit))
    for primary, verdict in (("loss", "equivalent"), ("preference", "not decided")):
        analysis = replace(suite.analysis, margin_nats=margin, primary=primary)
        worst = report(suite_dir, replace(suite, analysis=analysis))[0]["beside_loss"]["worst"]
        assert worst["verdict"] == verdict, primary
