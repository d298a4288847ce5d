"""The report with votes: the verdict on preference with its interval, and records that are short of something."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from reported import report
from synthetic_runs import build_suite, edit_manifest
from vote_records import record, vote, write_votes

from replication.errors import UserError
from replication.runs.files import file_sha256, write_json
from replication.runs.layout import SuiteDir
from replication.statistics.format import shares

SEEDS = (1, 2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return build_suite(tmp_path_factory.mktemp("votes") / "out", arms=("baseline", "both"), seeds=SEEDS)


def with_votes(folder, votes, figures: bool = False):
    suite_dir, suite = folder
    write_votes(suite_dir.votes, [v if v.suite != "s" else _of(v, suite.name) for v in votes])
    return report(suite_dir, suite, figures)


def _of(v, name):
    return type(v)(**(vars(v) | {"suite": name}))


def test_a_preference_is_the_first_sentence(folder):
    results, text, markdown = with_votes(folder, record(n_judges=40), figures=True)
    assert results["preference"]["decision"] == "preferred"
    headline = results["verdict"]["headline"]
    assert headline.startswith("Preference: token + layer gain is preferred to baseline (")
    bounds = shares(*(results["preference"][key] for key in ("low", "high")))
    assert f"95 % interval {bounds} over seeds, prompts and judges" in headline
    assert f"Win. {headline.partition('). ')[0]}" in text
    assert "conditional on these prompts and judges" in text and "conditional on" in markdown
    assert "not to be believed" in text
    for page in (text, unescape(markdown)):
        assert "decisive votes of people, " in page and "that chance gives in 95 of 100 records" in page
    assert ".The" not in text
    drawn = {figure["file"].partition(".")[0] for figure in results["figures"]}
    assert {"answer", "votes", "preference", "prompts_and_judges"} <= drawn
    assert "crossed random effects" in " ".join(results["methods"]) or "crossed random effects" in str(
        results["methods"]
    )


@pytest.mark.parametrize(
    ("votes", "said"),
    [
        ([], "Preference: no votes yet."),
        (
            record(ties=1.0),
            "not decided: no seed has decisive votes, and at least 5 are asked for (analysis.min_seeds)",
        ),
        (
            record(seeds=(1,)),
            "not decided: one seed has decisive votes, and at least 5 are asked for (analysis.min_seeds)",
        ),
        ([vote()], "not decided: one seed has decisive votes"),
        (record(share=0.5), "not decided: the interval holds one half, no preference"),
        ([vote(suite="another")], "not decided: there are no usable votes on this pair"),
        ([*record(), vote(999, 2, 3, "once")], "is preferred to baseline"),
    ],
    ids=["none", "ties", "seed", "single", "null", "elsewhere", "once"],
)
def test_a_record_that_is_short_says_so(folder, votes, said):
    results, text, markdown = with_votes(folder, votes)
    assert said in results["verdict"]["headline"]
    assert said.replace("not decided: ", "") in text and "nan" not in text.lower().split() and "None" not in markdown


def test_ties_are_counted_by_seed_and_the_clearest_pairs_are_shown_with_their_texts(tmp_path: Path):
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1, 2))
    pair = ("both", "baseline")
    choices = {(1, 3): ["left"] * 3 + ["right", "tie"], (2, 4): ["right"] * 3, (2, 5): ["left"], (1, 6): ["both_bad"]}
    votes = [
        vote(n, seed, prompt, f"j{n}", choice, *pair, suite=suite.name)
        for (seed, prompt), of in choices.items()
        for n, choice in enumerate(of)
    ]
    results, text, markdown = with_votes((suite_dir, suite), [replace(v, vote_id=f"v{n}") for n, v in enumerate(votes)])
    of_seeds = [tuple(row.values()) for row in results["preference"]["outcomes"]["seed"]]
    assert of_seeds == [("1", 3, 1, 1, 1), ("2", 1, 0, 0, 3)], "name, wins, ties, both bad, losses"
    assert [row["wins"] - row["losses"] for row in results["preference"]["outcomes"]["prompt_id"]] == [2, -3, 1, 0]
    assert [(row["seed"], row["votes"]["wins"], row["votes"]["losses"]) for row in results["clearest"]] == [
        (2, 0, 3),
        (1, 3, 1),
    ], "one vote decides no pair"
    assert "The 2 most clearly decided pairs" in text
    shown = markdown.split("most clearly decided pairs")[1].split("</details>")[0]
    assert shown.index("0 votes for token + layer gain, 3 for baseline") < shown.index("3 votes for token + layer gain")
    texts = suite_dir.cell("both", 2).samples.read_text().splitlines()
    said = next(line for line in map(json.loads, texts) if (line["prompt_id"], line["sample"]) == (4, 0))
    assert said["completion"].split("\n")[0] in shown and said["question"] in shown.replace("\\", "")


def test_the_report_says_how_the_panel_was_locked_and_whether_its_votes_were_changed(tmp_path: Path):
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=SEEDS)
    results, text, markdown = with_votes((suite_dir, suite), record())
    assert results["votes_note"] is None and "locked" not in text + markdown
    why = "two judges fell ill | & left"
    note = {"locked_at": "2030-01-02T03:04:05+00:00", "locked_early_because": why, "n_refusals": 1, "n_garbage": 0}
    write_json(suite_dir.votes_note, note | {"votes_sha256": file_sha256(suite_dir.votes), "key_sha256": "ab" * 32})
    results, text, markdown = report(suite_dir, suite)
    assert results["votes_note"]["locked_early_because"] == why and results["votes_note"]["changed"] is False
    for page in (text, unescape(markdown.replace("\\", ""))):
        assert f"before all planned votes were in. The reason given: {why}" in page and "ab" * 32 in page
        assert "1 answer of a model was no choice" in page and "was locked (votes.json" not in page
    with open(suite_dir.votes, "a") as file:
        file.write("\n")
    results, text, markdown = report(suite_dir, suite)
    assert results["votes_note"]["changed"] is True
    assert all("votes.csv is not the file that was written when the panel was locked" in x for x in (text, markdown))


def test_votes_of_a_pair_that_the_certificate_refuses_are_not_used(tmp_path: Path):
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=SEEDS)
    edit_manifest(suite_dir.cell("both", 2), initial_weights_sha256="0" * 64)
    votes = [_of(v, suite.name) for v in record()]
    write_votes(suite_dir.votes, votes)
    results, text, _ = report(suite_dir, suite)
    lost = sum(v.seed == 2 for v in votes)
    assert results["preference"]["n_votes"] == len(votes) - lost
    assert f"{lost} votes on a seed whose pair does not pass the certificate: not used" in text


def test_a_damaged_record_is_one_clear_line(folder):
    suite_dir, suite = folder
    suite_dir.votes.write_text("vote_id\n")
    with pytest.raises(UserError, match="lacks the column suite"):
        report(SuiteDir(suite_dir.root), suite)
    suite_dir.votes.unlink()
