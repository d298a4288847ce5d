"""Seeds and judges that are withdrawn: kept, listed in report and certificate, and in no statistic."""

from __future__ import annotations

from pathlib import Path

import pytest
from reported import PLANTED, report
from synthetic_runs import build_suite

from replication import Study
from replication.cli.main import main
from replication.config import SuiteConfig
from replication.runs.files import read_json
from replication.runs.layout import SuiteDir
from replication.simulation.power import fit
from replication.votes.record import Vote, votes_text


@pytest.fixture
def built(tmp_path: Path) -> tuple[SuiteDir, SuiteConfig]:
    return build_suite(tmp_path / "out", seeds=(1, 2, 3), effects=PLANTED)


def test_a_withdrawn_seed_is_in_no_statistic_and_on_the_page(
    built: tuple[SuiteDir, SuiteConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    suite_dir, suite = built
    before, _, _ = report(suite_dir, suite)
    assert before["suite"]["n_paired"] == 3
    assert main(["grid", "withdraw", str(suite_dir.root), "--seed", "2", "--why", "its node had bad memory"]) == 0
    assert "seed 2 is withdrawn" in capsys.readouterr().out
    told, page, _ = report(suite_dir, suite)
    for after, earlier in zip(told["quantities"], before["quantities"], strict=True):
        for pair, old in zip(after["pairs"], earlier["pairs"], strict=True):
            assert pair["differences"] == [old["differences"][0], None, old["differences"][2]]
            assert pair["n"] == 2
        kept = [after["values"]["both"][i] for i in (0, 2)]
        assert after["means"]["both"] == pytest.approx(sum(kept) / 2)
    assert told["loss"]["n"] == told["factorial"]["n"] == 2
    assert {(cell["arm"], cell["seed"]) for cell in told["cells"]} >= {("both", 2)}, "its cells are listed"
    assert "Seed 2 is left out of every comparison and mean over seeds: withdrawn at" in page
    assert "its node had bad memory" in page
    certificate = read_json(suite_dir.certificate)
    assert [entry["why"] for entry in certificate["withdrawn"]] == ["its node had bad memory"]
    states = {seed["seed"]: seed["state"] for seed in certificate["seeds"]}
    assert states == {1: "holds", 2: "fails", 3: "holds"}


def test_a_withdrawn_judge_votes_no_more(
    built: tuple[SuiteDir, SuiteConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite_dir, suite = built
    votes = [
        Vote(f"{judge}{p}", "synthetic", seed, "baseline", "both", p, 0, 0, judge, "human", "", choice, "", 9.0, "")
        for judge, choice in (("anna", "right"), ("bob", "left"))
        for seed in (1, 2, 3)
        for p in (seed * 10 + 1, seed * 10 + 2)
    ]
    suite_dir.votes.write_text(votes_text(votes))
    assert report(suite_dir, suite)[0]["preference"]["n_votes"] == 12
    assert main(["judge", "withdraw", str(suite_dir.root), "bob", "--why", "saw the key"]) == 0
    told, page, _ = report(suite_dir, suite)
    assert told["preference"]["n_votes"] == told["preference"]["n_treatment"] == 6
    assert "The votes of judge bob are kept and enter no statistic: withdrawn at" in page and "saw the key" in page
    frame = Study(suite_dir.root).votes()
    assert len(frame) == 12 and set(frame[frame.withdrawn].judge_id) == {"bob"}
    assert read_json(suite_dir.certificate)["withdrawn"][0]["name"] == "bob"
    assert fit(suite_dir.root).source == str(suite_dir.votes)
    for seed in (1, 2):
        assert main(["grid", "withdraw", str(suite_dir.root), "--seed", str(seed), "--why", "why"]) == 0
    monkeypatch.setattr("replication.simulation.power.fit_ballots", lambda ballots, source: len(ballots))
    assert fit(suite_dir.root) == 2, "nor is it in what a power calculation learns from a pilot"
    capsys.readouterr()
    assert main(["judge", "withdraw", str(suite_dir.root), "bob", "--why", "again"]) == 2
    assert "judge bob is withdrawn at" in capsys.readouterr().err


def test_a_withdrawal_deviates_from_the_plan(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", seeds=(1, 2))
    assert main(["preregistration", "register", str(suite_dir.suite), "--out", str(suite_dir.root)]) == 0
    assert main(["grid", "withdraw", str(suite_dir.root), "--seed", "1", "--why", "power cut"]) == 0
    told, page, _ = report(suite_dir, suite)
    assert any(line.startswith("seed 1 was withdrawn at") for line in told["plan"]["departures"])
    assert "power cut" in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("grid", "withdraw", "{out}", "--seed", "7", "--why", "x"), "--seed: 7 is no seed of the suite, which has 1"),
        (("grid", "withdraw", "{out}", "--seed", "1", "--why", "  "), "--why: is empty; the report quotes the reason"),
        (("grid", "withdraw", "{out}", "--seed", "1"), "--why"),
        (("judge", "withdraw", "{out}", "eve", "--why", "x"), "no panel there; `replicate judge prepare"),
    ],
)
def test_mistakes_are_one_line(
    built: tuple[SuiteDir, SuiteConfig], words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(out=built[0].root) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
