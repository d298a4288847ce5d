"""The report over whole, broken and hostile run folders: it says what it does not know, and makes up no number."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from paths import CHECKOUT
from reported import PLANTED, page_text, parsed, report
from synthetic_runs import ARMS, build_suite, edit_journal, edit_manifest, edit_start

from replication.config import AnalysisConfig, DivergedRule, SuiteConfig
from replication.errors import UserError
from replication.report.report import render, write_report
from replication.runs.files import read_json, write_json, write_text
from replication.runs.layout import SuiteDir
from replication.statistics import format as shown

FIGURES = {
    "answer.svg",
    "validation_loss.svg",
    "train_loss.svg",
    "paired_differences.svg",
    "token_gain.svg",
    "layer_divergence.svg",
    "layer_scale.svg",
    "gradient_norm.svg",
    "token_entropies.svg",
    "divergence_blocks.svg",
}
OF_THE_2X2 = {"factorial.svg"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteDir, SuiteConfig]:
    """Four arms, two seeds, one planted effect and no noise, with its report."""
    suite_dir, suite = build_suite(tmp_path_factory.mktemp("whole") / "out", effects=PLANTED, noise=0.0)
    write_report(suite_dir, suite)
    return suite_dir, suite


# ---------------------------------------------------------------- a whole suite


def test_every_output_is_there_and_small(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    suite_dir, _ = whole
    pictures = {kind: set(suite_dir.figures.glob(f"*.{kind}")) for kind in ("svg", "pdf")}
    assert {path.name for path in pictures["svg"]} == FIGURES | OF_THE_2X2
    assert {path.with_suffix(".svg") for path in pictures["pdf"]} == pictures["svg"]
    assert all(5_000 < path.stat().st_size < 300_000 for path in pictures["svg"] | pictures["pdf"])
    assert read_json(suite_dir.certificate)["holds"] is True


def test_page_is_self_contained(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    page = parsed(whole[0].report_html)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [attrs for tag, attrs in page.tags if tag == "script" and "src" in attrs]
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == len(FIGURES | OF_THE_2X2)
    assert all(src and src.startswith("data:image/svg+xml;base64,") for src in sources)
    links = {attrs["href"] for _, attrs in page.tags if "href" in attrs}
    assert links == {f"#{attrs['id']}" for tag, attrs in page.tags if tag == "section"} and "#loss" in links
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_markdown_links_every_figure_relatively(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    text = whole[0].report_md.read_text()
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert set(linked) == {f"figures/{name}" for name in FIGURES | OF_THE_2X2}
    assert all((whole[0].root / link).is_file() for link in linked)


def test_planted_differences_are_found_exactly(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    results = read_json(whole[0].results)
    for quantity in results["quantities"]:
        both = next(pair for pair in quantity["pairs"] if pair["arm"] == "both")
        expected = {"final_val_loss": 0.25, "late_val_loss": 0.25, "entropy_predicted_tokens": -0.125}
        if quantity["key"] in expected:
            assert both["differences"] == pytest.approx([expected[quantity["key"]]] * 2)
            assert both["sd"] == pytest.approx(0, abs=1e-12)


def test_page_shows_the_numbers_of_results_json(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    results = read_json(whole[0].results)
    rows = [" | ".join(row) for row in parsed(whole[0].report_html).rows]
    markdown = whole[0].report_md.read_text()
    for quantity in results["quantities"]:
        for pair in quantity["pairs"]:
            digits = shown.places(pair["low"], pair["high"])
            numbers = [str(pair["n"]), shown.signed(pair["mean"], digits), shown.number(pair["sd"], digits)]
            numbers.append(shown.between(pair["low"], pair["high"]))
            row = " | ".join([shown.arm_name(pair["arm"]), *numbers])
            assert any(found.startswith(row) for found in rows) and row in markdown
        for i, seed in enumerate(results["suite"]["seeds"]):
            digits = [shown.places(pair["low"], pair["high"]) for pair in quantity["pairs"]]
            row = [shown.signed(p["differences"][i], d) for p, d in zip(quantity["pairs"], digits, strict=True)]
            row = " | ".join([str(seed), *row])
            assert row in rows and row in markdown
    for cell in results["cells"]:
        start = f"{cell['arm']} | {cell['seed']} | complete | 60 of 60 | 122,880 | {cell['last_val_loss_nats']:.4f} | "
        assert any(row.startswith(start + f"{cell['late_val_loss']:.4f}") for row in rows), start
    for gain in results["gain"]:
        assert any(f"{gain['n_failing']} of {gain['n_measured']}" in row for row in rows)


def test_templates_take_every_number_from_results_json(whole: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> None:
    """A number changed in results.json, and nothing else, changes in both reports."""
    shutil.copytree(whole[0].root, tmp_path / "out")
    suite_dir = SuiteDir(tmp_path / "out")
    results = read_json(suite_dir.results)
    results["quantities"][0]["pairs"][0]["differences"][0] = 12.3456
    results["cells"][3]["last_val_loss_nats"] = 65.4321
    write_json(suite_dir.results, results)
    render(suite_dir)
    for path in (suite_dir.report_html, suite_dir.report_md):
        assert "+12.3456" in path.read_text() and "65.4321" in path.read_text()


def test_verdict_says_what_two_seeds_cannot_show(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    text = page_text(whole[0].report_html)
    assert "Not decided. Validation loss of token + layer gain beside baseline: 2 of the 5 seeds that a" in text
    assert "Preference: no votes yet." in text
    assert "smallest p that an exact sign-flip test can reach is 0.5" in text
    assert (
        "is not equality" in text
        and "every result here is exploratory" in text
        and "No judgements of preference were made" in text
    )


def test_published_numbers_stand_beside_ours(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    results = read_json(whole[0].results)
    text = page_text(whole[0].report_html)
    for number in ("3.946", "3.950", "7.214", "7.425", "1.74", "2.50"):
        assert number in text
    entropy = results["published"]["rows"][1]
    assert entropy["here_difference"] == pytest.approx(-0.125)
    assert entropy["here_direction"] == "lower at 2 of 2 seeds"


def test_budget_is_counted_from_the_journal(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    """The synthetic mean gain is 1 + exp(-6 step / 60) at every fifth step: above 1.01 up to step 45."""
    failing = sum(math.exp(-step / 10) > 0.01 for step in range(5, 61, 5))
    gain = read_json(whole[0].results)["gain"]
    assert {(row["n_failing"], row["n_measured"]) for row in gain} == {(failing, 12)}
    assert {row["last_failing_step"] for row in gain} == {45}


def test_report_can_be_reproduced_byte_for_byte(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    suite_dir, suite = whole
    before = suite_dir.results.read_bytes(), suite_dir.report_html.read_bytes()
    write_report(suite_dir, suite)
    assert before == (suite_dir.results.read_bytes(), suite_dir.report_html.read_bytes())


def test_reproduce_names_the_flags_of_the_run(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,))
    suite.run["training"]["steps"], kept = 999, suite.run["training"]["steps"]
    try:
        results, _, _ = report(suite_dir, suite)
    finally:
        suite.run["training"]["steps"] = kept
    assert any("--training.steps=60" in line for line in results["reproduce"])


# ---------------------------------------------------------------- incomplete input


def test_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    suite = SuiteConfig(name="s", arms=("baseline",), seeds=(1,))
    with pytest.raises(UserError, match="no such folder"):
        write_report(SuiteDir(tmp_path / "nowhere"), suite)


def test_nothing_can_be_said_of_nothing(tmp_path: Path) -> None:
    suite = SuiteConfig(name="empty", arms=("baseline", "both"), seeds=(1, 2))
    results, text, markdown = report(SuiteDir(tmp_path), suite, figures=True)
    assert "Nothing can be said: none of the 4 cells of this suite is complete." in text
    assert "Nothing can be said" in markdown
    assert results["pairs_used"] == []
    assert all(pair["mean"] is None for quantity in results["quantities"] for pair in quantity["pairs"])
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == FIGURES


def test_failed_missing_and_unfinished_cells_are_listed(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(
        tmp_path / "out",
        failed={("layer_gain", 2): 20},
        interrupted={("token_gain", 2): 3},
        missing=[("both", 2)],
    )
    results, text, markdown = report(suite_dir, suite)
    states = {(c["arm"], c["seed"]): c["state"] for c in results["cells"]}
    assert states["layer_gain", 2] == "failed"
    assert states["token_gain", 2] == "interrupted"
    assert states["both", 2] == "pending"
    assert "5 of 8 cells are complete; 3 are not: token gain at seed 2 (interrupted)" in text
    for page in (text, markdown):
        assert "the loss was not finite" in page
        assert "second line that no table shows" not in page
        assert "one seed: no interval" in page
    assert "at one seed, which has no interval; 4 more seeds to reach the 5" in text
    assert {(pair["arm"], pair["seed"]) for pair in results["pairs_refused"]} == {(arm, 2) for arm in ARMS[1:]}


def test_refused_pairs_enter_no_difference(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", effects=PLANTED)
    edit_manifest(suite_dir.cell("both", 2), initial_weights_sha256="f" * 64)
    results, text, _ = report(suite_dir, suite)
    for quantity in results["quantities"]:
        both = next(pair for pair in quantity["pairs"] if pair["arm"] == "both")
        assert both["n"] == 1 and both["differences"][1] is None and both["note"] == "one seed: no interval"
        assert quantity["values"]["both"][1] is not None
    assert "1 pair is refused" in text and "initial_weights_sha256 is ffff" in text


def test_one_arm_compares_nothing(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline",), seeds=(1,))
    _, text, _ = report(suite_dir, suite)
    assert "No comparison can be made: only one arm was run." in text


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", seeds=(7,))
    _, text, _ = report(suite_dir, suite)
    assert "at one seed, which has no interval" in text and "one seed: no interval" in text


def test_six_seeds_are_enough_for_a_verdict(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=tuple(range(6)))
    results, text, _ = report(suite_dir, suite)
    assert results["suite"]["smallest_sign_flip_p"] == 0.03125
    assert results["loss"]["enough_seeds"] and "a verdict needs (" not in text


def test_nan_in_a_journal_stays_missing(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"))
    lines = suite_dir.cell("both", 1).metrics.read_text()
    write_text(suite_dir.cell("both", 1).metrics, re.sub(r'"val/loss_nats":[\d.]+', '"val/loss_nats":null', lines))
    edit_journal(suite_dir.cell("both", 1), 60, **{"gain/mean": float("nan"), "scale/block_00": None})
    results, _, _ = report(suite_dir, suite)
    both = results["quantities"][0]["pairs"][0]
    assert both["differences"][0] is None and both["n"] == 1
    row = next(c for c in results["cells"] if (c["arm"], c["seed"]) == ("both", 1))
    assert row["last_val_loss_nats"] is None and row["final_val_loss"] is None
    assert "NaN" not in suite_dir.results.read_text()


def test_a_validation_before_the_last_step_is_not_final(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,))
    run = suite_dir.cell("both", 1)
    kept = [x for x in run.metrics.read_text().splitlines() if not ('"step":60,' in x and "val/" in x)]
    write_text(run.metrics, "\n".join(kept) + "\n")
    results, _, _ = report(suite_dir, suite)
    assert results["quantities"][0]["pairs"][0]["differences"] == [None]


BROKEN = ["", "{", '{"git": 3, "packages": [], "arm_keys": 5, "tokens": "x", "step": null, "data": 1}', "\x00"]


@pytest.mark.parametrize("text", BROKEN)
def test_damaged_files_do_not_stop_the_report(tmp_path: Path, text: str) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1, 2, 3, 4))
    for seed, name in enumerate(["manifest", "config", "metrics", "samples"], 1):
        write_text(getattr(suite_dir.cell("both", seed), name), text)
    write_text(suite_dir.data / "manifest.json", text)
    results, _, _ = report(suite_dir, suite)
    assert results["pairs_used"] == [{"arm": "both", "seed": 4}]


def test_no_samples_and_no_data_are_said(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(
        tmp_path / "out", arms=("baseline", "both"), seeds=(1,), samples=False, data_manifest=False
    )
    results, text, markdown = report(suite_dir, suite)
    assert results["data"] is None and results["samples"] == []
    assert "No completions were generated." in text and "No completions were generated." in markdown
    assert "no prepared corpus of its own" in text


def test_other_folders_and_equal_weights_are_warned_of(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,))
    shutil.copytree(suite_dir.cell("both", 1).root, suite_dir.cell("stray", 5).root)
    same = read_json(suite_dir.cell("baseline", 1).manifest)["final_weights_sha256"]
    packages = read_json(suite_dir.cell("both", 1).manifest)["packages"] | {"recorded since": None}
    git = {"commit": "other", "dirty": True}
    edit_manifest(suite_dir.cell("both", 1), final_weights_sha256=same, git=git, packages=packages)
    _, text, _ = report(suite_dir, suite)
    assert "token + layer gain and baseline ended with the same weights at seed 1" in text
    assert "runs/stray/seed-5 is not part of the suite" in text
    assert "different commits of the code" in text and "no commit holds in 1 of 2" in text
    assert "different package versions" not in text


def test_numbers_are_rounded_by_their_uncertainty() -> None:
    """Two significant digits of half the interval's width, and the estimate to the same place."""
    assert [shown.places(-half, half) for half in (0.0108, 0.099, 0.5, 3.2, 41.0, 0.0)] == [3, 3, 2, 1, 0, 4]
    assert shown.between(-0.0021, 0.0196) == "\u22120.002 to +0.020" and shown.places(None, None) == 4
    assert (shown.share(0.5995, 0.551, 0.648), shown.shares(0.32, 0.57)) == ("60.0 %", "32 % to 57 %")


# ---------------------------------------------------------------- untrusted text

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> {{ r.suite }} ``` \n```\n# heading"
HOSTILE += "\x00\x1b[31m\ud800\u202e"


def test_hostile_completions_are_text(tmp_path: Path) -> None:
    completions = {("both", 1): HOSTILE, ("baseline", 1): "x" * 5000}
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,), completions=completions)
    _, text, markdown = report(suite_dir, suite)
    source, page = suite_dir.report_html.read_text(), parsed(suite_dir.report_html)
    assert "<script>" not in source and html.escape("<script>alert(1)</script>") in source
    assert not [attrs for tag, attrs in page.tags if tag == "script" or "onerror" in attrs]
    assert "{{ r.suite }}" in text
    assert not re.search("[\x00\x1b\u202e]", source + markdown)
    assert "cut for this page" in text
    fences = [line for line in markdown.splitlines() if line.startswith("````")]
    assert len(fences) >= 2 and len(fences) % 2 == 0


def test_hostile_names_and_errors_are_text(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,), failed={("both", 1): 20})
    run = suite_dir.cell("both", 1)
    write_json(run.failed, {**read_json(run.failed), "error": "<b>bad</b> | a `cell` <script>"})
    suite = SuiteConfig(name="<i>$name</i>", arms=suite.arms, seeds=suite.seeds, run=suite.run, layers=suite.layers)
    _, text, markdown = report(suite_dir, suite)
    assert "<b>" not in suite_dir.report_html.read_text().split("<h2>Every cell</h2>")[1].split("<h2>")[0]
    assert "<b>bad</b> | a `cell`" in text
    assert "<script>" not in markdown and "<i>" not in markdown and r"\|" in markdown


# ---------------------------------------------------------------- speed and imports


def test_how_long_eight_cells_take(tmp_path: Path, publish) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", steps=300, log_every=10, validate_every=30)
    start = time.process_time()
    write_report(suite_dir, suite)
    publish(f"report of 8 cells: {time.process_time() - start:.1f} s of CPU time")


def test_no_torch_is_imported() -> None:
    code = (
        "import replication.report.report, replication.protocol.certificate, sys;"
        "assert not {'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT)


def test_results_hold_plain_json(whole: tuple[SuiteDir, SuiteConfig]) -> None:
    json.loads(whole[0].results.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in results.json"))


def test_a_cell_that_diverged_by_the_suites_rule_is_listed_and_stays_in_the_comparisons(tmp_path: Path) -> None:
    lost = {("layer_gain", 1): 40}
    suite_dir, suite = build_suite(tmp_path / "out", effects={"both": {"train/loss_nats": 50.0}}, failed=lost)
    rule = DivergedRule(above_nats=40.0, for_steps=10)
    record = read_json(suite_dir.cell("layer_gain", 1).failed)
    write_json(suite_dir.cell("layer_gain", 1).failed, record | {"diverged": True})
    results, page, markdown = report(suite_dir, replace(suite, diverged=rule))
    listed = {(c["arm"], c["seed"]): c["state"] for c in results["diverged"]}
    assert listed == {("both", 1): "complete", ("both", 2): "complete", ("layer_gain", 1): "failed"}
    assert "train/loss_nats above 40.000 in each of the 10 steps up to step 60" in page
    assert markdown.count("Diverged by the suite's rule:") == 3
    assert {"arm": "both", "seed": 1} in results["pairs_used"]


# ---------------------------------------------------------------- what was not alike


def test_arms_that_ran_other_code_or_were_cut_otherwise_are_told_and_refused_in_strict_mode(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), steps=20)
    edit_start(suite_dir.cell("both", 2), code_hash="beef", machine={"micro_batch_sequences": 8})
    lines = (
        f"code: code_hash is {'c0de' * 4} (baseline) and beef (both)",
        "machine: micro_batch_sequences is 16 (baseline) and 8 (both)",
    )
    results, page, markdown = report(suite_dir, suite)
    assert f"The arms of seed 2 were not run alike: {'; '.join(lines)}." in results["warnings"]
    methods = " ".join(results["methods"])
    assert (
        " alone." not in methods.split("Each was")[0] and f"at seed 2 in what ran them ({'; '.join(lines)})" in methods
    )
    assert {"arm": "both", "seed": 2} in results["pairs_used"]
    assert "| 2 | holds |" in markdown and "| differs | differs |" in markdown
    for line in lines:
        assert line in page
    results, _, markdown = report(suite_dir, replace(suite, analysis=AnalysisConfig(strict_pairs=True)))
    assert [(p["arm"], p["seed"], p["reasons"]) for p in results["pairs_refused"]] == [("both", 2, list(lines))]
    assert "| 2 | fails |" in markdown and "differ in layer_gain.enabled, token_gain.enabled alone." in markdown


def test_seeds_of_two_corpora_are_not_pooled_and_each_hash_is_named(tmp_path: Path) -> None:
    """Without a corpus in the folder itself, as with data.dir."""
    suite_dir, suite = build_suite(
        tmp_path / "out", arms=("baseline", "both"), seeds=(1, 2, 3), steps=20, data_manifest=False
    )
    for arm in suite.arms:
        edit_manifest(suite_dir.cell(arm, 3), data={"hash": "5" * 64, "dir": "c"})
    results, page, markdown = report(suite_dir, suite)
    assert results["loss"]["n"] == 2 and results["loss"]["differences"][2] is None
    assert [p["seed"] for p in results["pairs_used"]] == [1, 2]
    own = next(q for q in results["quantities"] if q["key"] == "final_val_loss")
    assert own["means"]["both"] == pytest.approx(sum(own["values"]["both"][:2]) / 2)
    (warned,) = [
        line for line in results["warnings"] if "Seed 3 is left out of every comparison and mean over seeds: " in line
    ]
    assert "555555 at seed 3 and" in warned and "at seeds 1, 2; they are not pooled" in warned
    for text in (page, markdown, " ".join(results["methods"])):
        assert "(seeds 1, 2) and data hash 5555555555… (seed 3)" in text
