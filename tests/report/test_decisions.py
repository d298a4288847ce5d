"""One decision of each registered question: the same in headline, table, results.json and plan check; and looks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import report
from scipy.stats import norm
from synthetic_runs import Synthetic, build_suite, edit_manifest
from vote_records import vote, write_votes

from replication.cli.preregistration import preregistration as verb
from replication.config import AnalysisConfig, SuiteConfig, to_yaml
from replication.errors import UserError
from replication.protocol.deviations import PlanStatus, Withheld, check_plan
from replication.protocol.preregistration import Rules, build_plan, plan_hash, plan_stamp, register
from replication.report.decisions import Decision, Panel, decide
from replication.runs.files import file_sha256, read_json, write_json, write_text
from replication.runs.layout import SuiteDir
from replication.runs.ledger import Entry, read_ledger
from replication.runs.withdrawn import withdraw
from replication.statistics.seeds import equivalence

PAIR = ("baseline", "both")
FOLLOWED = PlanStatus("before the data", "f" * 64, "2026-01-01T00:00:00+0000", ())
PLANNED = AnalysisConfig(loss="final_val_loss", judges=4, votes_per_judge=6, min_seeds=3, margin_reason="as published")


def registered(
    root: Path,
    analysis: AnalysisConfig = PLANNED,
    arms: Sequence[str] = PAIR,
    seeds: Sequence[int] = (1, 2, 3),
    **more: Any,
) -> tuple[SuiteDir, SuiteConfig]:
    """A folder whose plan was registered first, with its cells stamped, and no votes."""
    what = Synthetic(arms=arms, seeds=seeds, steps=20, samples=False, data_manifest=False, **more)
    suite = replace(build_suite(root / "first", what)[1], analysis=analysis)
    suite_dir = SuiteDir(root / "out")
    register(suite_dir, suite)
    build_suite(suite_dir.root, what)
    write_text(suite_dir.suite, to_yaml(suite))
    for _, _, run in suite_dir.cells():
        edit_manifest(run, plan=plan_stamp(run))
    return suite_dir, suite


def cast(suite_dir: SuiteDir, judges: int, each: int, share: float = 0.8, seeds: Sequence[int] = (1, 2, 3)) -> None:
    rng = np.random.default_rng(0)
    pairs = [(judge, prompt) for judge in range(judges) for prompt in range(each)]
    votes = [
        vote(i, seeds[(judge + prompt) % len(seeds)], prompt, f"j{judge}", "left" if rng.random() < share else "right",
             suite="synthetic")
        for i, (judge, prompt) in enumerate(pairs)
    ]  # fmt: skip
    write_votes(suite_dir.votes, votes)
    note = {"locked_at": "2026-06-01T00:00:00+0000", "votes_sha256": file_sha256(suite_dir.votes)}
    write_json(suite_dir.votes_note, note)


# ---------------------------------------------------------------- one decision


def test_the_headline_and_the_table_say_the_same_after_holm(tmp_path: Path) -> None:
    """A margin at which the two one-sided tests reject before the correction, and not after it."""
    suite_dir, suite = build_suite(tmp_path / "out", seeds=(1, 2, 3, 4, 5, 6), steps=20)
    differences = report(suite_dir, suite)[0]["loss"]["differences"]
    margin = next(m for m in np.arange(0.002, 1.0, 0.0001) if equivalence(differences, m).p < 0.0295)
    results, page, markdown = report(suite_dir, replace(suite, analysis=AnalysisConfig(margin_nats=float(margin))))
    row = results["secondary"][0]
    assert row["p"] < 0.05 < row["p_holm"] == pytest.approx(4 * row["p"])
    assert row["verdict"] == "not shown to be equivalent" and results["loss"]["verdict"] == "not decided"
    said = "Validation loss of token + layer gain beside baseline: not shown to be equivalent within"
    assert said in results["verdict"]["headline"] and "after Holm's correction" in results["verdict"]["headline"]
    for text in (page, markdown):
        assert "baseline: equivalent" not in text and "**equivalent**" not in text
        assert text.count("not shown to be equivalent") >= 3, "headline, table of the loss, table of questions"
    primary = AnalysisConfig(margin_nats=float(margin), primary="loss")
    results, page, _ = report(suite_dir, replace(suite, analysis=primary))
    assert results["decisions"][0]["verdict"] == results["loss"]["verdict"] == "equivalent", "one test, uncorrected"
    said = "Validation loss of token + layer gain beside baseline: equivalent within"
    assert results["verdict"]["headline"].startswith(said)


def test_a_difference_beyond_the_margin_is_corrected_too() -> None:
    rows = [
        question("preference"),
        question("loss_equivalence", p=1 - 0.02, role="secondary"),
        question("x", p=0.9, role="secondary"),
    ]
    rules = Rules(AnalysisConfig(), tuple(range(1, 9)))
    assert [d.verdict for d in decide(rows, rules, FOLLOWED, Panel({}), [])][1] == "different beyond the margin"
    rows.append(question("y", p=0.9, role="secondary"))
    assert decide(rows, rules, FOLLOWED, Panel({}), [])[1].verdict == "not shown to be equivalent", (
        "3 x .02 is above .05"
    )


def test_what_cannot_be_decided_makes_no_other_question_easier() -> None:
    rows = [
        question("preference"),
        question("a", p=0.001, role="secondary", why="too few"),
        question("b", p=0.03, role="secondary"),
    ]
    blocked, other = decide(rows, Rules(AnalysisConfig(), tuple(range(1, 9))), FOLLOWED, Panel({}), [])[1:]
    assert (blocked.verdict, other.verdict) == ("not decided: too few", "not told from zero")
    assert other.p_holm == pytest.approx(0.06) and np.isnan(blocked.p_holm)


def test_an_estimate_margins_away_has_no_sentence_of_power(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=PAIR, seeds=(1, 2, 3), steps=20, noise=0.01,
                                   effects={"both": {"val/loss_nats": 0.45}})  # fmt: skip
    results, page, markdown = report(suite_dir, suite)
    assert "margins away from zero: equivalence is implausible" in page and results["loss"]["further"] is None
    assert "new study of" not in page + markdown


# ---------------------------------------------------------------- the plan, and what withholds a verdict


def test_plan_check_and_report_name_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_dir, suite = registered(tmp_path)
    cast(suite_dir, judges=5, each=6)
    write_json(suite_dir.votes_note, read_json(suite_dir.votes_note) | {"locked_early_because": "it was late"})
    named = report(suite_dir, suite)[0]["plan"]["departures"]
    assert named == [
        'the panel was locked before all planned votes were in; reason given: "it was late"',
        "5 judges voted, 4 are planned",
    ]
    assert verb(["check", str(suite_dir.root)]) == 1
    assert [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("- ")] == named
    write_votes(suite_dir.votes, [])
    assert "votes.csv is not the file that was written when the panel was locked" in str(
        report(suite_dir, suite)[0]["plan"]
    )
    assert verb(["check", str(suite_dir.root)]) == 1
    said = capsys.readouterr().out
    assert "votes.csv is not the file" in said
    assert "no verdict on the preference: the votes are not those that the panel was locked with" in said


def test_a_panel_that_was_closed_early_gives_no_verdict(tmp_path: Path) -> None:
    five = (1, 2, 3, 4, 5)
    analysis = replace(PLANNED, judges=8, votes_per_judge=8, min_seeds=5)
    suite_dir, suite = registered(tmp_path, analysis, seeds=five)
    cast(suite_dir, judges=8, each=8, share=0.9, seeds=five)
    assert report(suite_dir, suite)[0]["preference"]["decision"] == "preferred"
    cast(suite_dir, judges=8, each=7, share=0.9, seeds=five)
    results, page, _ = report(suite_dir, suite)
    why = "the panel was closed with 56 of 64 registered votes, by 8 of 8 judges"
    assert results["preference"]["p"] < 0.05 and results["preference"]["decision"] == "not decided"
    assert results["robustness"]["flips"] is None, "no vote that changes sides would make a verdict"
    assert f"Preference: not decided: {why}" in results["verdict"]["headline"] and why in page
    assert why not in results["decisions"][1]["verdict"], "the losses have nothing to do with it"
    fewer = replace(suite, analysis=replace(analysis, votes_per_judge=7))
    assert why in report(suite_dir, fewer)[0]["verdict"]["headline"], "by the plan, not by what the suite says now"
    register(suite_dir, fewer, amend="judges fell ill")
    assert why in report(suite_dir, fewer)[0]["verdict"]["headline"], "nor by an amendment after the data"


def test_a_rule_that_changed_after_the_data_is_not_followed(tmp_path: Path) -> None:
    suite_dir, suite = registered(tmp_path, noise=0.02)
    before = report(suite_dir, suite)[0]["loss"]
    assert before["verdict"] == "not decided"
    wide = replace(suite, analysis=replace(PLANNED, margin_nats=1.0))
    results, page, _ = report(suite_dir, wide)
    assert results["loss"] == before and results["analysis"]["margin_nats"] == 0.02
    assert (
        "The verdict goes by what was registered (analysis.margin_nats 0.02), not by what suite.yaml says now." in page
    )
    register(suite_dir, wide, amend="a typing error")
    results, page, _ = report(suite_dir, wide)
    assert results["loss"] == before
    assert "goes by plan-1.json, which was registered before the data, not by the later amendment" in page
    (suite_dir.root / "plan-1.json").unlink()
    results, _, _ = report(suite_dir, wide)
    why = "the verdict is withheld: plan-1.json, the plan of before the data, cannot be read"
    assert results["decisions"][1]["why"] == why and why in results["verdict"]["headline"]


def test_cells_of_a_config_that_came_with_a_late_amendment_give_no_verdict(tmp_path: Path) -> None:
    suite_dir, suite = registered(tmp_path)
    longer = replace(suite, run={**suite.run, "training": {**suite.run["training"], "learning_rate": 0.0001}})
    record = register(suite_dir, longer, amend="it did not learn").record
    for arm, seed, run in suite_dir.cells():
        edit_manifest(run, config_hash=record.plan.cells[f"{arm}/seed-{seed}"])
    (withheld,) = check_plan(suite_dir, longer).withheld
    assert withheld.on == "all" and withheld.why.startswith("cells trained under another config")


@pytest.mark.parametrize("name", ["edited", "forged", "gone", "damaged", "trained elsewhere"])
def test_a_plan_that_cannot_be_trusted_withholds_every_verdict(tmp_path: Path, name: str) -> None:
    suite_dir, suite = registered(tmp_path)
    record = read_json(suite_dir.plan)
    if name in ("edited", "forged"):
        record["plan"]["analysis"]["margin_nats"] = 1.0
        sha = {"sha256": "0" * 64} if name == "forged" else {}
        write_json(suite_dir.plan, record | sha)
        if name == "forged":
            write_json(suite_dir.plan, record | {"sha256": plan_hash(record["plan"])})
    elif name == "gone":
        suite_dir.plan.unlink()
    elif name == "damaged":
        suite_dir.plan.write_text("{}")
    else:
        edit_manifest(suite_dir.cell("both", 2), plan=None, started_at="2999-01-01T00:00:00+0000")
    assert check_plan(suite_dir, suite).withheld[0].on == "all"
    if name == "edited":
        results, page, _ = report(suite_dir, suite)
        assert results["decisions"][1]["why"].startswith("the verdict is withheld: ")
        assert "not decided: the verdict is withheld: " in results["verdict"]["headline"] and "withheld" in page


def test_what_is_withdrawn_after_it_could_be_seen_withholds_the_verdict(tmp_path: Path) -> None:
    suite_dir, suite = registered(tmp_path)
    cast(suite_dir, judges=5, each=6)
    withdraw(suite_dir, "judge", "j4", "voted for fun")
    decisions = report(suite_dir, suite)[0]["decisions"]
    assert decisions[0]["why"] == "the verdict is withheld: judge j4 was withdrawn when the votes had been opened"
    assert "withheld" not in decisions[1]["why"]
    note = read_json(suite_dir.votes_note)
    write_json(suite_dir.votes_note, note | {"locked_at": "2999-01-01T00:00:00+0000"})
    assert report(suite_dir, suite)[0]["decisions"][0]["why"] == "", (
        "before the lock nobody knew what the votes were for"
    )
    withdraw(suite_dir, "seed", "2", "its node had bad memory")
    why = report(suite_dir, suite)[0]["decisions"][1]["why"]
    assert "2 of the 3 seeds" in why or "seed 2 was withdrawn, whose losses were there to be seen" in why


# ---------------------------------------------------------------- looks


def question(
    name: str, n: int = 8, p: float = 0.5, role: str = "primary", mean: float = 0.6, why: str = ""
) -> Decision:
    return Decision(
        id=name, name=name, role=role, n=n, mean=mean, level=0.95, p=p, seeds=list(range(1, n + 1)), why=why
    )  # type: ignore[arg-type]


def looked(tmp_path: Path, seeds: int, **analysis: Any) -> Rules:
    suite = build_suite(
        tmp_path / "suite",
        arms=PAIR,
        seeds=tuple(range(1, seeds + 1)),
        missing=[(a, s) for a in PAIR for s in range(1, seeds + 1)],
    )[1]
    plan = build_plan(replace(suite, analysis=AnalysisConfig(judges=1, votes_per_judge=12, **analysis)))
    return Rules(plan.analysis, plan.seeds, plan)


def test_a_verdict_before_all_seeds_is_a_look_that_must_be_registered(tmp_path: Path) -> None:
    rules, panel = looked(tmp_path, 8), Panel({"j": 12})
    (five,) = decide([question("preference", 5, 0.0001)], rules, FOLLOWED, panel, [])
    assert five.verdict == "not decided: 5 of 8 seeds; no look was registered"
    (eight,) = decide([question("preference", 8, 0.0499)], rules, FOLLOWED, panel, [])
    assert eight.verdict == "preferred" and eight.looks == []
    exploratory = replace(rules, plan=None)
    assert decide([question("preference", 5, 0.0001)], exploratory, FOLLOWED, panel, [])[0].verdict == "preferred"
    withheld = replace(FOLLOWED, withheld=(Withheld("it was edited", "loss"),))
    assert decide([question("preference", 8, 0.01)], rules, withheld, panel, [])[0].verdict == "preferred"
    assert "it was edited" in decide([question("loss_equivalence", 8, 0.01)], rules, withheld, panel, [])[0].verdict


def test_each_look_has_its_level_and_the_first_that_decides_decides(tmp_path: Path) -> None:
    rules, panel = looked(tmp_path, 12, looks=(5, 8, 12)), Panel({"j": 12})

    def at(n: int, p: float, taken: Sequence[Entry] = (), name: str = "preference") -> Decision:
        return decide([question(name, n, p)], rules, FOLLOWED, panel, taken)[0]

    assert at(5, 0.0011).verdict == "not decided: p 0.0011 is not below 0.001, the level of this look"
    assert at(5, 0.0009).verdict == at(8, 0.0009).verdict == at(12, 0.0489).verdict == "preferred"
    assert at(12, 0.0491).outcome == "not decided" and at(12, 0.0489, name="loss_equivalence").outcome == "equivalent"
    assert at(6, 0.0001).verdict == "not decided: 6 of 12 seeds; the next look is with 8"
    assert at(12, 0.2).looks[0] == "Registered looks that were not taken: with 5, 8 seeds."
    facts = {"question": "preference", "seeds": [1, 2, 3, 4, 5], "p": 0.0004, "level": 0.001, "outcome": "preferred"}
    entry = Entry(event="look", at="2026-02-02T00:00:00+0000", facts=facts)
    later = at(12, 0.3, [entry])
    assert later.verdict == "preferred" and later.looks[-1] == "That look decided, for good: preferred."
    seen = replace(entry, facts={**entry.facts, "seeds": [1, 2, 3, 4, 5, 6], "level": None, "outcome": "not decided"})
    assert (
        "No look was registered there" in at(12, 0.01, [seen]).looks[0] and at(12, 0.01, [seen]).verdict == "preferred"
    )
    short = decide([question("preference", 5, 0.0001)], rules, FOLLOWED, Panel({"j": 4}), [])[0]
    assert short.why == "the panel was closed with 4 of 5 registered votes, by 1 of 1 judges"


def test_at_a_look_each_step_of_holm_has_its_own_boundary(tmp_path: Path) -> None:
    """Half of the seeds, three secondary questions: 2 - 2 Phi(z(a / 4) / sqrt(1/2)) of a = .05 / 3, .05 / 2 and .05."""
    rules, panel = looked(tmp_path, 10, looks=(5, 10), look_boundaries="obrien_fleming"), Panel({"j": 12})
    first, second, third = (2 * 2 * norm.sf(norm.isf(a / 4) / np.sqrt(0.5)) for a in (0.05 / 3, 0.05 / 2, 0.05))
    assert (first, second, third) == pytest.approx((0.000381, 0.000824, 0.003051), abs=1e-6)

    def at(*ps: float) -> list[Decision]:
        rows = [question(name, 5, p, "secondary") for name, p in zip("abc", ps, strict=True)]
        return decide([question("preference", 5), *rows], rules, FOLLOWED, panel, [])[1:]

    none = at(0.0007, 0.0008, 0.5)
    assert [d.verdict for d in none[:2]] == ["not told from zero"] * 2 and none[0].p_below == pytest.approx(first)
    assert third / 3 > 0.0007 and none[0].p_holm > 0.05, "a third of the boundary is not the boundary of a third"
    both = at(0.0003, 0.0008, 0.5)
    assert [d.outcome for d in both] == ["other than zero"] * 2 + ["not told from zero"]
    assert [d.p_below for d in both] == pytest.approx([first, second, third])
    assert max(d.p_holm for d in both[:2]) < 0.05 < both[2].p_holm
    assert "p 0.0003 is held against 0.0003814" in both[0].looks[0]


def test_looks_are_recorded_once(tmp_path: Path) -> None:
    unfinished = {(arm, seed): 10 for arm in PAIR for seed in (4, 5)}
    analysis = replace(PLANNED, looks=(3, 5), primary="loss")
    suite_dir, suite = registered(tmp_path, analysis, seeds=(1, 2, 3, 4, 5), interrupted=unfinished)
    text = suite_dir.plan_md.read_text()
    assert "looked at with 3, 5 seeds" in text and "0.001, 0.049" in text and "No look at the results" not in text
    first = report(suite_dir, suite)[0]
    again = report(suite_dir, suite)[0]
    assert first["decisions"] == again["decisions"]
    (entry,) = read_ledger(suite_dir).of("look")
    assert {"question": "loss_equivalence", "seeds": [1, 2, 3], "level": 0.001}.items() <= entry.facts.items()
    assert (
        entry.facts["plan_sha256"] == read_json(suite_dir.plan)["sha256"] and len(entry.facts["configs_sha256"]) == 64
    )
    assert "This is look 1 of 2, with 3 of 5 seeds" in first["decisions"][0]["looks"][0]
    for run in (suite_dir.cell(arm, 4) for arm in PAIR):
        build_suite(tmp_path / "more", arms=PAIR, seeds=(4,), steps=20, samples=False, data_manifest=False)
        stamp = read_json(run.manifest)["plan"]
        shutil.rmtree(run.root)
        shutil.copytree(SuiteDir(tmp_path / "more").cell(run.root.parent.name, 4).root, run.root)
        edit_manifest(run, plan=stamp)
    results, page, _ = report(suite_dir, suite)
    assert results["decisions"][0]["why"] == "4 of 5 seeds; the next look is with 5"
    assert "Look at " in page and "with 3 of 5 seeds" in page
    assert [len(e.facts["seeds"]) for e in read_ledger(suite_dir).of("look")] == [3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"looks": (8, 5)}, "analysis.looks: [8, 5] must be numbers of seeds in ascending order"),
        ({"looks": (2, 8)}, "analysis.looks: a look at 2 seeds decides nothing, as analysis.min_seeds is 5"),
        ({"looks": (5, 6)}, "analysis.looks: ends with 6 seeds, and the suite has 8; the last look is with all"),
    ],
)
def test_looks_that_cannot_be_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        looked(tmp_path, 8, **change)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_plans_without_looks_are_what_they_were(tmp_path: Path) -> None:
    suite_dir, _ = registered(tmp_path)
    assert not {"looks", "look_boundaries"} & read_json(suite_dir.plan)["plan"]["analysis"].keys()
