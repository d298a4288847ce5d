"""Sweeps of the learning rate: planned, and compared at the best rate of each with what diverged counted in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reported import report
from synthetic_runs import build_suite, cell_config, edit_manifest, rewrite_config

from replication.config import AnalysisConfig, SuiteConfig, load_suite, without_neutral
from replication.errors import UserError
from replication.protocol.preregistration import build_plan, plan_hash
from replication.runs.layout import SuiteDir

RATES = {"baseline": 0.001, "token_gain": 0.002, "layer_gain": 0.001, "both": 0.002}
SWEEPS = {"plain": ("baseline", "token_gain"), "changed": ("layer_gain", "both")}


def swept_suite(root: Path, effects: dict[str, float], **more: object) -> tuple[SuiteDir, SuiteConfig]:
    """Two sweeps of two rates at five seeds: four synthetic arms, each with a rate of its own."""
    planted = {arm: {"val/loss_nats": value} for arm, value in effects.items()}
    suite_dir, suite = build_suite(root, seeds=(1, 2, 3, 4, 5), noise=0.001, effects=planted, **more)
    for seed in suite.seeds:
        for arm, rate in RATES.items():
            config, run = cell_config(suite, arm, seed), suite_dir.cell(arm, seed)
            rewrite_config(run, replace(config, training=replace(config.training, learning_rate=rate)))
            edit_manifest(run, arm_keys=["arm", "training.learning_rate", "token_gain.enabled", "layer_gain.enabled"])
    return suite_dir, replace(suite, analysis=AnalysisConfig(primary="loss", sweeps=SWEEPS))


def test_sweeps_are_compared_at_the_best_rate_of_each(tmp_path: Path) -> None:
    """Best are token_gain in the one and layer_gain in the other, which is planted 0.05 above it."""
    effects = {"baseline": 0.3, "token_gain": 0.0, "layer_gain": 0.05, "both": 0.2}
    results, text, markdown = report(*swept_suite(tmp_path / "out", effects))
    assert results["sweeps"]["seeds"] == [1, 2, 3, 4, 5]
    plain, changed = results["sweeps"]["sweeps"]
    assert (plain["best"], plain["edge"], changed["best"], changed["edge"]) == (
        "token_gain", "highest", "layer_gain", "lowest",
    )  # fmt: skip
    assert [rate["rate"] for rate in plain["rates"]] == [0.001, 0.002]
    assert [rate["chosen_at"] for rate in plain["rates"]] == [[], [1, 2, 3, 4, 5]]
    assert plain["rates"][0]["mean"] - plain["rates"][1]["mean"] == pytest.approx(0.3, abs=0.003)
    (answer,) = results["sweeps"]["answers"]
    assert answer["mean"] == pytest.approx(0.05, abs=0.003) and answer["p"] < 0.001 and answer["n"] == 5
    assert [row["id"] for row in results["secondary"]][::4] == ["preference", "best_rate_changed"]  # the 2x2 between
    assert results["secondary"][-1]["verdict"] == "other than zero"
    for page in (text, markdown):
        assert "changed beside plain, each at the learning rate that the other seeds choose: +0.0" in page
        assert "The best rate of plain, 0.002, is the highest that was tried" in page
        assert "0.002, the highest" in page.replace("**", "")


def test_a_rate_that_diverged_is_not_the_best_and_costs_no_seed(tmp_path: Path) -> None:
    effects = {"baseline": 0.3, "layer_gain": 0.05, "both": 0.2, "token_gain": -0.1}
    suite_dir, suite = swept_suite(tmp_path / "out", effects, failed={("token_gain", 2): 30})
    edited = suite_dir.cell("token_gain", 2).metrics
    edited.write_text(edited.read_text().replace('"train/loss_nats": [', '"train/loss_nats": [null, '))
    results, _, _ = report(suite_dir, replace(suite, diverged=replace(suite.diverged, above_nats=3.9, for_steps=5)))
    assert [row["arm"] for row in results["diverged"] if row["state"] == "failed"] == ["token_gain"]
    plain = results["sweeps"]["sweeps"][0]
    assert results["sweeps"]["seeds"] == [1, 2, 3, 4, 5]
    assert plain["rates"][1]["losses"][1] == 3.9
    alone = results["sweeps"]["answers"][0]["differences"]
    assert np.isfinite(np.array(alone, dtype=float)).all()


def test_a_seed_without_all_arms_is_left_out(tmp_path: Path) -> None:
    suite_dir, suite = swept_suite(tmp_path / "out", {}, interrupted={("both", 3): 20})
    results, text, _ = report(suite_dir, suite)
    assert results["sweeps"]["seeds"] == [1, 2, 4, 5] and results["sweeps"]["answers"][0]["n"] == 4
    assert results["secondary"][-1]["verdict"] == "not decided: 4 of the 5 seeds that a verdict needs"
    assert "Mean and sd over 4 seeds" in text


def test_a_sweep_is_a_question_of_the_plan_and_its_absence_changes_no_hash() -> None:
    plan = build_plan(load_suite("rates_laptop"))
    assert [q.id for q in plan.questions] == ["loss_equivalence", "preference", "best_rate_both"]
    assert "those of `baseline_rate_15`, `baseline_rate_30`, `baseline_rate_60`" in plan.questions[-1].test
    tree = without_neutral(build_plan(load_suite("laptop")))
    assert "sweeps" not in tree["analysis"] and len(plan_hash(tree)) == 64


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        ({"a": ("both_rate_15", "none"), "b": ("both_rate_60", "both_rate_30")}, "none is not an arm of the suite"),
        ({"a": ("both_rate_15", "both_rate_30"), "b": ("both_rate_60", "both_rate_30")}, "names both_rate_30 twice"),
        ({"a": ("both_rate_15", "both_rate_30")}, "needs two sweeps or more of as many arms each"),
        ({"a": ("both_rate_15", "both_rate_30"), "b": ("baseline_rate_30",)}, "needs two sweeps or more of as many"),
        (
            {"a": ("both_rate_15", "baseline_rate_30"), "b": ("both_rate_60", "both_rate_30")},
            "arms of a differ in layer_gain.enabled, token_gain.enabled too",
        ),
    ],
)
def test_sweeps_that_are_none_are_refused(sweeps: dict[str, tuple[str, ...]], said: str) -> None:
    suite = load_suite("rates_laptop")
    with pytest.raises(UserError, match=said):
        build_plan(replace(suite, analysis=replace(suite.analysis, sweeps=sweeps)))
