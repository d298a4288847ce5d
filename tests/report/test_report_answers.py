"""The report's answers: plan, equivalence, the 2x2, other arms, how completions were sampled, the methods paragraph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reported import PLANTED, report
from synthetic_runs import build_suite, edit_manifest

from replication.config import AnalysisConfig
from replication.protocol.preregistration import plan_stamp, register
from replication.report import figures, load
from replication.report.comparisons import block_of
from replication.report.load import load_cells
from replication.runs.files import file_sha256, read_json


def test_other_arms_get_their_answers_and_no_words_of_the_2x2(tmp_path: Path) -> None:
    """`both` is planted 0.001 away, inside the margin; `token_gain` 0.25 away, a secondary question."""
    suite_dir, suite = build_suite(
        tmp_path / "out",
        arms=("baseline", "token_gain", "both"),
        seeds=(1, 2, 3, 4, 5),
        noise=0.001,
        effects={"both": {"val/loss_nats": 0.001}, "token_gain": {"val/loss_nats": 0.25}},
    )
    results, text, markdown = report(suite_dir, suite)
    assert results["loss"]["verdict"] == "equivalent" and results["factorial"] is None
    for page in (text, markdown):
        assert "Tie.** Validation loss" in markdown
        assert "Validation loss of token + layer gain beside baseline: equivalent within 0.02 nats" in page
        assert "two switches" not in page and "The 2x2" not in page
    rows = {row["id"]: row for row in results["secondary"]}
    assert list(rows) == ["loss_equivalence", "loss_difference_token_gain"]
    assert rows["loss_difference_token_gain"]["mean"] == pytest.approx(0.25, abs=0.01)
    assert rows["loss_difference_token_gain"]["verdict"] == "other than zero"
    smaller, larger = sorted(row["p"] for row in rows.values())
    assert sorted(row["p_holm"] for row in rows.values()) == pytest.approx([2 * smaller, max(2 * smaller, larger)])
    far = report(suite_dir, replace(suite, analysis=AnalysisConfig(treatment="token_gain", primary="loss")))
    assert far[0]["loss"]["verdict"] == "different beyond the margin"
    assert far[0]["verdict"]["headline"].startswith(
        "Validation loss of token gain beside baseline: higher by more than"
    )
    assert [row["id"] for row in far[0]["secondary"]] == ["preference", "loss_difference_both"]
    assert far[0]["secondary"][0]["p_holm"] is None and "no votes" in far[0]["secondary"][0]["verdict"]
    once = far[0]["secondary"][1]  # the preference without votes counts as p = 1, so this one is doubled
    assert once["p_holm"] == pytest.approx(min(1, 2 * once["p"]))


def test_the_2x2_finds_what_was_planted_and_says_where_it_cannot_be_read(tmp_path: Path) -> None:
    """0.25 in `both` alone: half of it is each main effect, all of it the interaction."""
    suite_dir, suite = build_suite(tmp_path / "out", effects=PLANTED, noise=0.0)
    results, text, markdown = report(suite_dir, suite)
    assert [e["mean"] for e in results["factorial"]["effects"]] == pytest.approx([0.125, 0.125, 0.25])
    assert results["factorial"]["n"] == 2
    assert "Interaction on the loss | 2 | +0.2500 | +0.2500 to +0.2500 (95 %)" in markdown
    for seed in suite.seeds:
        edit_manifest(suite_dir.cell("layer_gain", seed), initial_weights_sha256="f" * 64)
    results, text, _ = report(suite_dir, suite)
    assert [e["mean"] for e in results["factorial"]["effects"]] == [None] * 3
    assert "The 2x2 cannot be read: at no seed are all four arms complete and certified." in text


def test_controls_stand_beside_the_2x2(tmp_path: Path) -> None:
    arms = ("baseline", "token_gain", "layer_gain", "both", "shuffled_gain")
    suite_dir, suite = build_suite(tmp_path / "out", arms=arms, effects=PLANTED, noise=0.0)
    asked = [question.id for question in register(suite_dir, suite).record.plan.questions]
    results, _, markdown = report(suite_dir, suite)
    assert [e["mean"] for e in results["factorial"]["effects"]] == pytest.approx([0.125, 0.125, 0.25])
    assert [row["id"] for row in results["secondary"]] == asked[1:]
    assert asked[-1] == "loss_difference_shuffled_gain"
    assert {row["arm"] for row in results["gain"] if row["applied"]} == {"token_gain", "both"}
    (line,) = (line for line in markdown.splitlines() if "gradient budget is preserved" in line)
    assert "token gain 9 of 12; token + layer gain 9 of 12." in line, "a control has another weight in the gain's place"


def test_no_title_runs_out_of_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beyond, save = list[str](), figures.save_vector

    def look_and_save(figure: Figure, *more: Any) -> None:
        save(figure, *more)  # which sets its size
        FigureCanvasAgg(figure).draw()
        titles = [axes._left_title for axes in figure.axes]  # as axes.title is the one in the middle
        beyond.extend(t.get_text() for t in titles if t.get_window_extent().x1 > figure.bbox.x1)

    monkeypatch.setattr(figures, "save_vector", look_and_save)
    report(*build_suite(tmp_path / "out"), figures=True)
    assert beyond == []


def test_a_plan_that_was_followed_or_not_stands_in_the_first_lines(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,))
    registered = register(suite_dir, suite).record
    _, text, _ = report(suite_dir, suite)
    assert "after the data" in text.split("No votes yet: nobody")[0]
    suite_dir.plan.unlink()
    suite_dir.runs.rename(tmp_path / "later")
    registered = register(suite_dir, suite).record
    (tmp_path / "later").rename(suite_dir.runs)
    for arm in suite.arms:
        edit_manifest(suite_dir.cell(arm, 1), plan=plan_stamp(suite_dir.cell(arm, 1)))
    results, text, markdown = report(suite_dir, suite)
    assert results["plan"]["followed"] and results["plan"]["sha256"] == registered.sha256
    for page in (text, markdown):
        assert "The plan was followed" in page and registered.sha256 in page.split("Paragraphs to be pasted")[1]
    moved = replace(suite, analysis=replace(suite.analysis, margin_nats=0.5))
    results, text, markdown = report(suite_dir, moved)
    assert not results["plan"]["followed"]
    for page in (text, markdown):
        assert "analysis.margin" in page.replace("\\", "").split("No votes yet: nobody")[0]


def test_an_unreadable_plan_is_said_and_stops_nothing(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,))
    suite_dir.plan.write_text("{}")
    results, text, _ = report(suite_dir, suite)
    assert not results["plan"]["followed"] and "plan.json: is not a registered plan" in text
    assert "every result here is exploratory" in text


def test_completions_are_described_by_what_was_recorded_with_them(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,))
    for arm in suite.arms:
        samples = suite_dir.cell(arm, 1).samples
        settings = {"temperature": 0.5, "prompts_sha256": "a" * 64, "samples_sha256": file_sha256(samples)}
        edit_manifest(suite_dir.cell(arm, 1), generation=settings)
    results, text, _ = report(suite_dir, suite)
    assert "7 prompts, 14 completions a cell: temperature 0.5" in text
    assert not [key for key in results["config"]["all"] if key.startswith("generation.")]
    assert not [line for line in results["warnings"] if "completions" in line]
    with open(suite_dir.cell("both", 1).samples, "a") as file:
        file.write('{"completion": "added later"}\n')
    results, text, _ = report(suite_dir, suite)
    assert "not those that were recorded when they were sampled: both/seed-1" in text
    assert len(results["generation"]) == 2


def test_settings_stand_beside_the_published_run(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,))
    results, text, _ = report(suite_dir, suite)
    rows = {row["key"]: row for row in results["fidelity"]["rows"]}
    assert results["fidelity"]["run"] == "Phase 3" and "Fidelity: this suite beside the published run (Phase 3)" in text
    assert rows["training.steps, training.batch_tokens"]["here"] == "60, 2048"
    assert rows["training.steps, training.batch_tokens"]["verdict"] == "deviates"
    assert rows["layer_gain.t, layer_gain.m_min, layer_gain.m_max"]["verdict"] == "as published"


def test_divergences_are_read_at_the_published_shares_of_training(tmp_path: Path) -> None:
    """60 steps: the shares 1/30, 1/3 and 299/300 are steps 2, 20 and 59.8; logged are 5, 10, ... 60."""
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1, 2))
    results, text, _ = report(suite_dir, suite)
    here = results["divergence"]["here"]
    assert [(row["arm"], row["block"], row["steps"]) for row in here][:2] == [
        ("baseline", 0, [5, 20, 60]),
        ("baseline", 3, [5, 20, 60]),
    ]
    assert here[0]["mean"] == pytest.approx([0.5 + np.exp(-0.5), 0.5 + np.exp(-2), 0.5 + np.exp(-6)])
    assert here[0]["growth"] == pytest.approx(here[0]["mean"][2] / here[0]["mean"][0]) and len(here[0]["seeds"]) == 2
    assert "published, 1000, 10,000, 29,900" in text
    assert [block_of("fourth", n) for n in (4, 5, 20)] == [None, 3, 3]


def test_many_cells_are_read_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From MANY_CELLS on several processes read: the same cells in the same order."""
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1, 2), failed={("both", 1): 20})
    one = load_cells(suite_dir, suite.arms, suite.seeds)
    monkeypatch.setattr(load, "MANY_CELLS", 1)
    several = load_cells(suite_dir, suite.arms, suite.seeds)
    assert [(c.arm, c.seed, c.state) for c in one] == [(c.arm, c.seed, c.state) for c in several]
    for a, b in zip(one, several, strict=True):
        np.testing.assert_array_equal(a.train.column("gain/mean"), b.train.column("gain/mean"))
        assert a.logged == b.logged and a.manifest == b.manifest


def test_methods_can_be_pasted(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", seeds=(1, 2))
    results, text, markdown = report(suite_dir, suite)
    assert len(results["methods"]) == 4 and "\n" not in "".join(results["methods"])
    for words in ("60 steps of 2,048 tokens", "margin of 0.02 nats", "No votes on completions", "torch 2.13.0"):
        assert words in text and words in markdown
    assert read_json(suite_dir.results)["methods"] == results["methods"]
