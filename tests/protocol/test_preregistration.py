"""The preregistration: what it says, that it is registered once, and that every deviation from it is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_runs import Synthetic, build_suite, cell_config, edit_manifest, edit_start, rewrite_config
from vote_records import vote, write_votes

from replication.cli.preregistration import preregistration as verb
from replication.config import (
    AnalysisConfig,
    DivergedRule,
    SuiteConfig,
    config_root,
    load_suite,
    scientific_hash,
    to_dict,
    to_yaml,
)
from replication.errors import UserError
from replication.grid.cells import claim_folder, places
from replication.grid.local import report_is_current
from replication.protocol.deviations import PlanStatus, check_plan
from replication.protocol.preregistration import (
    build_plan,
    first_stamp,
    plan_hash,
    plan_stamp,
    read_plan,
    refuse_early_window,
    register,
)
from replication.runs.files import read_json, write_json, write_text
from replication.runs.journal import Journal, Line
from replication.runs.layout import RunDir, SuiteDir, name_cells
from replication.runs.ledger import append
from replication.runs.manifest import read_manifest
from replication.runs.records import to_json
from replication.runs.starts import logged_cells

ARMS, SEEDS = ("baseline", "both"), (1, 2)
NO_REASON = "No reason was registered for the margin of 0.02 nats."
CELLS = [f"{arm}/seed-{seed}" for arm in ARMS for seed in SEEDS]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteDir, SuiteConfig]:
    """A plan that is registered in an empty folder, and then the cells, each stamped as training stamps it."""
    what = Synthetic(arms=ARMS, seeds=SEEDS, steps=20, validate_every=1, samples=False, data_manifest=False)
    _, suite = build_suite(tmp_path_factory.mktemp("first") / "out", what)
    suite_dir = SuiteDir(tmp_path_factory.mktemp("suite") / "out")
    assert register(suite_dir, suite).is_new
    build_suite(suite_dir.root, what)
    for run in runs(suite_dir):
        edit_manifest(run, plan=plan_stamp(run))
    return suite_dir, suite


@pytest.fixture
def suite_dir(built: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> SuiteDir:
    """A copy that a test may change."""
    shutil.copytree(built[0].root, tmp_path / "out")
    return SuiteDir(tmp_path / "out")


def runs(suite_dir: SuiteDir) -> list[RunDir]:
    return [suite_dir.cell(arm, seed) for arm in ARMS for seed in SEEDS]


def status(suite_dir: SuiteDir, votes: dict[str, int] | None = None) -> PlanStatus:
    """Of the folder, with so many votes of each judge in its record."""
    if votes:
        pairs = [(judge, prompt) for judge, n in votes.items() for prompt in range(n)]
        write_votes(suite_dir.votes, [vote(i, 1, prompt, judge) for i, (judge, prompt) in enumerate(pairs)])
    return check_plan(suite_dir, load_suite(suite_dir.suite))


def change_suite(suite_dir: SuiteDir, **changes: object) -> SuiteConfig:
    suite = replace(load_suite(suite_dir.suite), **changes)  # type: ignore[arg-type]
    write_text(suite_dir.suite, to_yaml(suite))
    return suite


def test_cells_of_other_commits_are_noted_and_are_no_deviation(
    suite_dir: SuiteDir, capsys: pytest.CaptureFixture[str]
) -> None:
    def notes() -> list[str]:
        assert verb(["check", str(suite_dir.root)]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]

    record = read_json(suite_dir.plan)
    first, second, third, fourth = runs(suite_dir)
    for run in (first, second, third, fourth):
        edit_manifest(run, git={"commit": "a" * 40}, starts=[])
    record["plan"]["code"]["commit"] = "a" * 40
    rehash(suite_dir, record)
    assert notes() == []
    edit_manifest(second, git={"commit": "b" * 40})
    start = {"step": 0, "git": {"commit": "a" * 40}}
    edit_manifest(fourth, starts=[start, start | {"step": 8, "git": {"commit": "c" * 40}}])
    beside = "; the plan was registered at aaaaaaaaaaaa"
    assert notes() == [
        f"note: baseline/seed-2: trained at commit bbbbbbbbbbbb{beside}",
        f"note: both/seed-2: trained at commit aaaaaaaaaaaa, then cccccccccccc{beside}",
    ]
    record["plan"]["code"]["commit"] = None
    rehash(suite_dir, record)
    assert len(notes()) == 4, "of cells that differ, where the plan's is not known"
    for run in (second, fourth):
        edit_manifest(run, git={"commit": "a" * 40}, starts=[])
    assert notes() == []


def rehash(suite_dir: SuiteDir, record: dict[str, Any]) -> None:
    """Register a plan that was changed, in place, and stamp the cells with it."""
    record["sha256"] = plan_hash(record["plan"])
    write_json(suite_dir.plan, record)
    suite_dir.ledger.unlink(missing_ok=True)
    for run in runs(suite_dir):
        edit_manifest(run, plan=plan_stamp(run))


# ---------------------------------------------------------------- the section


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"treatment": "nope"}, "analysis.treatment: nope is not an arm of the suite; choose one of baseline, both"),
        ({"baseline": "both"}, "analysis.baseline: both is not the suite's first arm"),
        ({"treatment": "baseline"}, "analysis.treatment: baseline is the baseline too; name another arm"),
        ({"margin_nats": 0.0}, "analysis.margin_nats: 0.0 must be more than 0"),
        ({"margin_nats": float("nan")}, "analysis.margin_nats: nan must be a finite number"),
        ({"alpha": 0.5}, "analysis.alpha: 0.5 must lie in (0, 0.5)"),
        ({"judges": 0}, "analysis.judges: 0 must be at least 1"),
        ({"min_seeds": 1}, "analysis.min_seeds: 1 must be at least 2"),
        ({"judge_kinds": []}, "analysis.judge_kinds: names no kind"),
        ({"tie_share": 1.5}, "analysis.tie_share: 1.5 must lie in [0, 1]"),
        ({"correction": "none"}, "analysis.correction"),
        ({"margin": 0.02}, "margin"),
    ],
)
def test_a_section_that_contradicts_itself_or_the_suite_is_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "arms": list(ARMS), "seeds": [1], "analysis": change}))
    with pytest.raises(UserError) as refused:
        load_suite(path)
    assert words in str(refused.value) and "suite.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_arms_that_are_not_named_follow_from_the_suite() -> None:
    def named(*arms: str, **given: str) -> tuple[str | None, str | None]:
        resolved = AnalysisConfig(**given).resolved(arms)  # type: ignore[arg-type]
        return resolved.baseline, resolved.treatment

    assert named("baseline", "both", "layer_gain") == ("baseline", "both")
    assert named("uniform", "linear", "precision") == ("uniform", "precision")
    assert named("both", "baseline") == ("both", "baseline")
    assert named("uniform", "linear", treatment="linear") == ("uniform", "linear")
    assert named("baseline") == ("baseline", None)


def test_the_section_survives_the_folder_and_a_change_of_it_alone_does_not_block_the_grid(tmp_path: Path) -> None:
    suite = SuiteConfig("s", ARMS, SEEDS, analysis=AnalysisConfig(margin_nats=0.03, judge_kinds=("human",)))
    suite_dir = SuiteDir(tmp_path / "out")
    claim_folder(suite, suite_dir, [])
    assert load_suite(suite_dir.suite) == suite
    claim_folder(replace(suite, analysis=AnalysisConfig(margin_nats=0.05)), suite_dir, [])
    assert load_suite(suite_dir.suite).analysis.margin_nats == 0.05
    with pytest.raises(UserError, match=r"diverged\.for_steps: 100 there, 7 here"):
        claim_folder(replace(suite, diverged=DivergedRule(for_steps=7)), suite_dir, [])


# ---------------------------------------------------------------- what a plan says


def test_a_plan_says_everything_and_its_hash_is_of_the_content(built: tuple[SuiteDir, SuiteConfig]) -> None:
    suite_dir, suite = built
    record = read_plan(suite_dir)
    assert record is not None
    plan = record.plan
    assert plan.analysis.treatment == "both" and plan.seeds == SEEDS
    assert plan.cells == {
        f"{arm}/seed-{seed}": scientific_hash(cell_config(suite, arm, seed)) for seed in SEEDS for arm in ARMS
    }
    assert plan.settings.arms["both"]["token_gain.enabled"] is True
    assert plan.settings.shared["training.steps"] == 20
    written = read_json(suite_dir.plan)["plan"]
    assert record.sha256 == plan_hash(written) == plan_hash(dict(reversed(written.items())))
    assert plan_hash(written | {"seeds": [1, 3]}) != record.sha256
    page = suite_dir.plan_md.read_text()
    for text in (record.sha256, "0.02 nats", "Satterthwaite", "No cell had logged a step", *plan.exclusions):
        assert text in page


def test_the_analysis_changes_no_cell_and_a_flag_does(built: tuple[SuiteDir, SuiteConfig]) -> None:
    suite = built[1]
    plan = build_plan(suite)
    other = build_plan(replace(suite, analysis=AnalysisConfig(primary="loss", margin_nats=0.1)))
    assert other.cells == plan.cells and plan_hash(to_dict(other)) != plan_hash(to_dict(plan))
    assert build_plan(suite, ["--training.weight_decay=0.2"]).cells.keys() == plan.cells.keys()
    assert not set(build_plan(suite, ["--training.weight_decay=0.2"]).cells.values()) & set(plan.cells.values())


def test_the_questions_follow_the_arms() -> None:
    def asked(suite: SuiteConfig) -> list[tuple[str, str]]:
        plan = build_plan(suite)
        assert plan.secondary == tuple(q.id for q in plan.questions[1:])
        return [(q.role, q.id) for q in plan.questions]

    effects = [("secondary", f"{e}_loss") for e in ("main_effect_token_gain", "main_effect_layer_gain", "interaction")]
    first = [("primary", "preference"), ("secondary", "loss_equivalence")]
    assert asked(load_suite("laptop")) == [*first, *effects]
    linear = SuiteConfig("s", ("uniform", "linear", "focal"), (1,), analysis=AnalysisConfig(primary="loss"))
    first = [("primary", "loss_equivalence"), ("secondary", "preference")]
    assert asked(linear) == [*first, ("secondary", "loss_difference_linear")]
    with pytest.raises(UserError, match="has one arm"):
        build_plan(SuiteConfig("s", ("baseline",), (1,)))


# ---------------------------------------------------------------- registering


def test_a_late_window_that_begins_before_the_last_half_is_refused(tmp_path: Path) -> None:
    _, suite = build_suite(tmp_path / "cells", arms=ARMS, steps=60, validate_every=5, samples=False)
    words = "the mean of the last 10 validations begins at step 15 of 60, before the last half of training; set it to 7"
    with pytest.raises(UserError, match=words):
        register(SuiteDir(tmp_path / "out"), suite)
    assert not (tmp_path / "out").exists()
    flag = "--validation.every_steps=3"  # 33 is the first of the last ten
    assert register(SuiteDir(tmp_path / "other"), suite, [flag]).is_new
    at_half = replace(suite, analysis=AnalysisConfig(late_validations=7, margin_reason="it is a tenth of a doubling"))
    suite_dir = SuiteDir(tmp_path / "out")
    register(suite_dir, at_half)
    assert "it is a tenth of a doubling" in suite_dir.plan_md.read_text() and check_plan(suite_dir).notes == ()
    final = replace(suite, analysis=AnalysisConfig(loss="final_val_loss"))
    assert register(SuiteDir(tmp_path / "final"), final).is_new


def test_shipped_suites_can_be_registered() -> None:
    for path in sorted((config_root() / "suites").glob("*.yaml")):
        refuse_early_window(build_plan(load_suite(path)))


def test_a_plan_is_registered_once_and_amended_with_a_reason(
    tmp_path: Path, built: tuple[SuiteDir, SuiteConfig]
) -> None:
    suite, suite_dir = built[1], SuiteDir(tmp_path / "out")
    first = register(suite_dir, suite).record
    text = suite_dir.plan.read_text()
    assert not register(suite_dir, suite).is_new and suite_dir.plan.read_text() == text
    wider = replace(suite, analysis=AnalysisConfig(margin_nats=0.05))
    with pytest.raises(
        UserError, match=r"another plan is registered \(analysis\.margin_nats: 0\.02 -> 0\.05\)"
    ) as refused:
        register(suite_dir, wider)
    assert "--amend" in str(refused.value) and suite_dir.plan.read_text() == text
    with pytest.raises(UserError):
        register(suite_dir, wider, amend=" ")
    amended = register(suite_dir, wider, amend="a typing error").record
    assert (suite_dir.root / "plan-1.json").read_text() == text
    assert [entry.sha256 for entry in amended.history] == [first.sha256]
    assert "a typing error" in suite_dir.plan_md.read_text()
    found = check_plan(suite_dir)
    assert found.state == "before the data"
    assert found.deviations == found.unfinished == ("0 of 2 planned seeds are complete in every planned arm; not: 1-2",)
    assert "margin_nats: 0.02 -> 0.05" in found.notes[0] and "a typing error" in found.notes[0]
    claim_folder(suite, suite_dir, [])  # what registering wrote is ours


def test_a_stamp_is_of_the_cells_own_folder(built: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> None:
    suite_dir, _ = built
    stamp = plan_stamp(suite_dir.cell("both", 1))
    assert to_json(stamp) == {k: read_json(suite_dir.plan)[k] for k in ("sha256", "frozen_at")}
    assert plan_stamp(RunDir(suite_dir.root / "cell")) is None
    assert plan_stamp(SuiteDir(tmp_path).cell("both", 1)) is None


def test_a_registration_that_ended_between_its_files_is_finished_by_the_next(
    tmp_path: Path, built: tuple[SuiteDir, SuiteConfig]
) -> None:
    suite, suite_dir = built[1], SuiteDir(tmp_path / "out")
    suite_dir.plan_md.mkdir(parents=True)  # so that the page cannot be written
    with pytest.raises(OSError):
        register(suite_dir, suite)
    suite_dir.plan_md.rmdir()
    claim_folder(suite, suite_dir, [])  # not refused as somebody else's
    assert not register(suite_dir, suite).is_new
    assert suite_dir.plan_md.read_text() == built[0].plan_md.read_text().replace(
        read_json(built[0].plan)["frozen_at"], read_json(suite_dir.plan)["frozen_at"]
    )
    suite_dir.plan_md.write_text("the page of an earlier plan")
    register(suite_dir, suite)
    assert read_json(suite_dir.plan)["sha256"] in suite_dir.plan_md.read_text()


def test_a_cell_is_stamped_anew_until_it_has_logged_a_step(tmp_path: Path, built: tuple[SuiteDir, SuiteConfig]) -> None:
    suite, suite_dir = built[1], SuiteDir(tmp_path / "out")
    run = suite_dir.cell("both", 1)

    def start() -> Any:
        earlier = read_json(run.manifest) or {"started_at": "2020-01-01T00:00:00+0000"}
        there = read_manifest(run)
        first, logged = first_stamp(run, there and there.plan, plan_stamp(run))
        write_json(run.manifest, {**earlier, "plan": to_json(first), "logged_before": logged})
        return read_json(run.manifest)["plan"]

    assert start() is None  # and died before its first step
    assert register(suite_dir, suite).record.began_before == ()
    found = check_plan(suite_dir)
    assert found.state == "before the data" and found.deviations == found.unfinished
    first = start()
    assert first == to_json(plan_stamp(run))
    journal = Journal(run.metrics)
    journal.append(Line(1, {"tokens": 1}))
    journal.close()
    register(suite_dir, replace(suite, analysis=AnalysisConfig(alpha=0.1)), amend="why not")
    assert start() == first != to_json(plan_stamp(run))
    Journal(run.metrics).close()  # no checkpoint: the journal begins anew
    assert list(logged_cells(suite_dir.runs)) == ["both/seed-1"]
    assert start() == first


# ---------------------------------------------------------------- deviations


def test_a_plan_that_was_followed(suite_dir: SuiteDir) -> None:
    found = status(suite_dir)
    assert (found.state, found.deviations, found.followed) == ("before the data", (), True)
    assert "before the data." in found.sentences[0] and "no deviation" in found.sentences[-1]
    votes = {f"judge {i}": 32 for i in range(40)}
    assert status(suite_dir, votes).followed


def edit_plan(suite_dir: SuiteDir) -> None:
    record = read_json(suite_dir.plan)
    record["plan"]["analysis"]["margin_nats"] = 0.2
    write_json(suite_dir.plan, record)
    change_suite(suite_dir, analysis=AnalysisConfig(margin_nats=0.2))


def forge_plan(suite_dir: SuiteDir) -> None:
    """Edited with the hash in step, in a folder without a ledger: only the cells know better."""
    edit_plan(suite_dir)
    suite_dir.ledger.unlink()
    record = read_json(suite_dir.plan)
    write_json(suite_dir.plan, record | {"sha256": plan_hash(record["plan"])})


def other_config(suite_dir: SuiteDir) -> None:
    config = cell_config(load_suite(suite_dir.suite), "both", 2)
    rewrite_config(suite_dir.cell("both", 2), replace(config, training=replace(config.training, clip_norm=0.5)))


def sample_otherwise(suite_dir: SuiteDir) -> None:
    planned = read_json(suite_dir.plan)["plan"]["generation"]
    edit_manifest(suite_dir.cell("both", 1), generation=planned | {"samples_sha256": "x"})
    edit_manifest(suite_dir.cell("both", 2), generation=planned | {"temperature": 0.1, "samples_sha256": "x"})


DEVIATIONS: dict[str, tuple[Callable[[SuiteDir], object], str]] = {
    "edited plan": (edit_plan, "plan.json was edited after it was registered"),
    "forged plan": (forge_plan, f"cells that carry the hash of another plan (HASH): {name_cells(CELLS)}"),
    "new arm": (lambda d: change_suite(d, arms=(*ARMS, "layer_gain")), "arm layer_gain was added to the suite"),
    "no arm": (
        lambda d: change_suite(d, arms=("baseline", "token_gain")),
        "arm both of the plan is not in the suite",
    ),
    "new seed": (lambda d: change_suite(d, seeds=(1, 2, 3)), "seed 3 was added to the suite after the plan"),
    "no seed": (lambda d: change_suite(d, seeds=(1,)), "seed 2 of the plan is not in the suite"),
    "margin": (
        lambda d: change_suite(d, analysis=AnalysisConfig(margin_nats=0.05)),
        "analysis.margin_nats: 0.02 in the plan, 0.05 now",
    ),
    "diverged": (
        lambda d: change_suite(d, diverged=DivergedRule(above_nats=5.0)),
        "diverged.above_nats: None in the plan, 5.0 now",
    ),
    "other config": (
        other_config,
        "cells trained under another config (training.clip_norm: 1.0 -> 0.5): both/seed-2",
    ),
    "sampling": (sample_otherwise, "cells sampled in another way (temperature: 0.7 -> 0.1): both/seed-2"),
    "other code": (
        lambda d: edit_start(d.cell("both", 2), code_hash="beef"),
        f"cells ran other code: code_hash is {'c0de' * 4} ({CELLS[0]}, {CELLS[1]}, {CELLS[2]}) and beef (both/seed-2)",
    ),
    "other packages": (
        lambda d: edit_start(d.cell("both", 1), packages={"torch": "2.12.1"}),
        f"cells ran other code: torch is 2.13.0 ({CELLS[0]}, {CELLS[1]}, {CELLS[3]}) and 2.12.1 (both/seed-1)",
    ),
    "code changed at a resume": (
        lambda d: edit_manifest(
            d.cell("both", 2),
            starts=[
                *read_json(d.cell("both", 2).manifest)["starts"],
                {"step": 10, "code_hash": "beef"},
            ],
        ),
        " and beef (both/seed-2)",
    ),
    "other data": (
        lambda d: edit_manifest(d.cell("both", 2), data={"hash": "5" * 64}),
        "and 5555555555555555 (both/seed-2)",
    ),
    "foreign cell": (
        lambda d: shutil.copytree(d.cell("both", 2).root, d.cell("both", 9).root),
        "cells outside the plan: both/seed-9",
    ),
    "too early": (
        lambda d: edit_manifest(d.cell("both", 2), plan=None),
        "cells that started before the plan was registered: both/seed-2",
    ),
    "trained elsewhere": (
        lambda d: edit_manifest(d.cell("both", 2), plan=None, started_at="2999-01-01T00:00:00+0000"),
        "cells that started without a plan in their folder, though later than it was registered: both/seed-2",
    ),
    "registered again": (
        lambda d: edit_manifest(
            d.cell("both", 2), plan=to_json(plan_stamp(d.cell("both", 2))) | {"frozen_at": "2020-01-01T00:00:00+0000"}
        ),
        "cells that carry another time of registration (2020-01-01T00:00:00+0000): both/seed-2",
    ),
    "no manifest": (
        lambda d: d.cell("both", 2).manifest.write_text("{"),
        "cells whose manifest.json cannot be read: both/seed-2",
    ),
    "manifest gone": (
        lambda d: d.cell("both", 2).manifest.unlink(),
        "cells whose manifest.json cannot be read: both/seed-2",
    ),
    "seed not complete": (
        lambda d: d.cell("both", 2).complete.unlink(),
        "1 of 2 planned seeds are complete in every planned arm; not: 2",
    ),
    "plan removed": (lambda d: d.plan.unlink(), f"plan.json is gone, whose hash HASH these cells carry: {CELLS[0]}"),
    "plan damaged": (lambda d: d.plan.write_text("{}"), "is not a registered plan (plan is missing); restore it"),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_each_deviation_is_named_and_nothing_else(suite_dir: SuiteDir, name: str) -> None:
    change, words = DEVIATIONS[name]
    sha = read_json(suite_dir.plan)["sha256"]
    change(suite_dir)
    found = status(suite_dir)
    assert not found.followed
    named = [line for line in found.deviations if words.replace("HASH", sha[:16]) in line]
    others = 2 if name == "no arm" else 0  # another arm in its place, which is the treatment now
    assert len(named) == 1 and len(found.deviations) == 1 + others, found.deviations
    assert found.unfinished == (found.deviations if name == "seed not complete" else ())
    assert (found.state == "after the data") == (name == "too early")
    assert (found.state == "none") == name.startswith("plan ")


def test_what_older_files_do_not_record_is_no_deviation(suite_dir: SuiteDir) -> None:
    """Manifests without starts and hashes, a folder without a ledger; a plan that lacks a key is not another plan."""
    for run in runs(suite_dir):
        edit_manifest(run, starts=None)
    suite_dir.ledger.unlink()
    record = read_json(suite_dir.plan)
    del record["plan"]["analysis"]["strict_pairs"]
    write_json(suite_dir.plan, record | {"sha256": plan_hash(record["plan"])})
    for run in runs(suite_dir):
        edit_manifest(run, plan=plan_stamp(run))
    assert status(suite_dir).followed
    assert not register(suite_dir, load_suite(suite_dir.suite)).is_new


def test_a_cell_without_a_logged_step_is_no_data_and_one_that_lost_its_journal_is(suite_dir: SuiteDir) -> None:
    run = suite_dir.cell("both", 2)
    run.metrics.unlink()
    edit_manifest(run, plan=None)
    assert status(suite_dir).state == "after the data"
    run.complete.unlink()
    assert status(suite_dir).state == "after the data", "its manifest says that it was finished"
    edit_manifest(run, finished_at=None)
    found = status(suite_dir)
    assert found.state == "before the data"
    assert found.deviations == found.unfinished and len(found.deviations) == 1


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return change


DAMAGES: list[Callable[[dict[str, Any]], object]] = [
    without("plan", "generation"),
    without("plan", "analysis", "judges"),
    without("plan", "suite"),
    without("plan", "code"),
    without("git"),
    without("amends"),
    lambda record: record.update(history=[{}]),
    lambda record: record["plan"].update(settings={}),
    lambda record: record["plan"].update(cells={CELLS[0]: None}),
    lambda record: record["plan"]["questions"][0].pop("beside"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_plan_that_lacks_what_is_read_of_it_is_a_deviation(
    suite_dir: SuiteDir, damage: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_json(suite_dir.plan)
    damage(record)
    write_json(suite_dir.plan, record)
    assert verb(["check", str(suite_dir.root)]) == 1
    said = capsys.readouterr().out
    assert "plan.json: is not a registered plan (" in said and "; restore it" in said
    with pytest.raises(UserError, match=r"is not a registered plan \(.*; restore it"):
        verb(["show", str(suite_dir.root)])


def test_a_plan_of_a_later_format_is_refused_by_name(suite_dir: SuiteDir) -> None:
    record = read_json(suite_dir.plan)
    record["plan"]["format"] += 1
    write_json(suite_dir.plan, record)
    with pytest.raises(UserError, match=r"plan\.json: has format 2, this version reads up to 1; update it"):
        read_plan(suite_dir)


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_an_earlier_plan_that_is_lost_is_a_deviation(suite_dir: SuiteDir, text: str | None) -> None:
    register(suite_dir, change_suite(suite_dir, analysis=AnalysisConfig(alpha=0.1)), amend="we saw p = 0.07")
    n_before, kept = len(status(suite_dir).deviations), suite_dir.root / "plan-1.json"
    kept.unlink() if text is None else kept.write_text(text)
    found = status(suite_dir).deviations
    assert "plan-1.json cannot be read" in found and len(found) == n_before + 1


def test_a_report_is_current_until_what_it_is_made_from_changes(suite_dir: SuiteDir) -> None:
    suite = load_suite(suite_dir.suite)
    claim_folder(suite, suite_dir, [])
    cells = [place.run for place in places(suite, suite_dir)]
    for path in (suite_dir.report_html, suite_dir.report_md, suite_dir.votes, suite_dir.noise):
        path.touch()
    write_json(suite_dir.results, {"made_from": suite_dir.inputs_sha256(cells)})
    claim_folder(suite, suite_dir, [])
    os.utime(cells[-1].complete, (2**32, 2**32))  # of a node whose clock is ahead
    assert report_is_current(suite_dir)
    append(suite_dir, "look", question="preference")
    assert report_is_current(suite_dir), "which the report itself writes"
    suite_dir.anchor.mkdir()
    answer, now = suite_dir.anchor / "plan-1.tsr", (suite_dir.plan, suite_dir.votes, suite_dir.noise, suite_dir.ledger)
    for path in (*now, answer, cells[-1].complete, cells[-1].samples):
        whole = path.read_bytes() if path.exists() else None
        path.write_bytes((whole or b"") + b"{}\n")
        assert not report_is_current(suite_dir), path
        path.unlink() if whole is None else path.write_bytes(whole)
    assert report_is_current(suite_dir)
    claim_folder(replace(suite, analysis=AnalysisConfig(alpha=0.1)), suite_dir, [])
    assert not report_is_current(suite_dir)


def test_votes_that_are_fewer_or_more_than_planned(suite_dir: SuiteDir) -> None:
    found = status(suite_dir, {"a": 32, "b": 31})
    assert found.deviations == found.unfinished
    assert found.deviations == ("2 of 40 planned judges voted", "1 of 2 judges gave fewer than 32 votes")
    found = status(suite_dir, {f"judge {i}": 32 for i in range(41)})
    assert found.deviations == ("41 judges voted, 40 are planned",) and found.unfinished == ()


def test_a_plan_of_after_the_data_says_so(suite_dir: SuiteDir) -> None:
    suite_dir.plan.unlink()
    for run in runs(suite_dir):
        edit_manifest(run, plan=None)
    found = status(suite_dir)
    assert (found.state, found.deviations, found.followed) == ("none", (), False)
    assert "exploratory" in found.sentences[0]
    record = register(suite_dir, load_suite(suite_dir.suite)).record
    assert record.began_before == tuple(CELLS)
    found = status(suite_dir)
    assert found.state == "after the data" and "no result confirmatory" in found.sentences[0]
    assert found.deviations == (f"cells that started before the plan was registered: {name_cells(CELLS)}",)
    assert "had logged steps" in suite_dir.plan_md.read_text()


def test_an_amendment_after_the_data_is_a_deviation_with_its_reason(suite_dir: SuiteDir) -> None:
    suite = change_suite(suite_dir, analysis=AnalysisConfig(alpha=0.1))
    register(suite_dir, suite, amend="we saw p = 0.07")
    found = status(suite_dir)
    amended, cells = found.deviations
    assert found.state == "after the data"
    kept = "The verdict goes by plan-1.json, which was registered before the data, not by the later amendment."
    assert found.notes == (NO_REASON, kept) and found.withheld == ()
    assert 'analysis.alpha: 0.05 -> 0.1); reason given: "we saw p = 0.07"' in amended
    assert cells == f"cells that started under an earlier plan (plan-1.json): {name_cells(CELLS)}"


def test_a_plan_that_was_amended_back_is_no_earlier_one(
    suite_dir: SuiteDir, built: tuple[SuiteDir, SuiteConfig]
) -> None:
    """It has the first one's hash; cells that carry the stamp of today's registration follow it."""
    first = read_plan(suite_dir)
    register(suite_dir, change_suite(suite_dir, analysis=AnalysisConfig(alpha=0.1)), amend="why not")
    record = register(suite_dir, change_suite(suite_dir, analysis=built[1].analysis), amend="better not").record
    assert record.sha256 == first.sha256 == record.history[0].sha256
    for run in runs(suite_dir):
        edit_manifest(run, plan={"sha256": record.sha256, "frozen_at": record.frozen_at})
    assert not [line for line in status(suite_dir).deviations if "cells that" in line]


# ---------------------------------------------------------------- the command line


def test_the_verb_registers_shows_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["register", "laptop", "--out", str(out), "--seeds", "1,2", "--training.steps=40"]
    assert verb([*command, "--training.warmup_steps=2"]) == 0
    sha = read_json(out / "plan.json")["sha256"]
    said = capsys.readouterr().out
    assert sha in said and f"replicate grid run laptop --out {out} --seeds 1,2 --training.steps=40" in said
    assert verb([*command, "--training.warmup_steps=2"]) == 0
    assert "registered already" in capsys.readouterr().out
    assert verb(["show", str(out)]) == 0
    assert capsys.readouterr().out == (out / "plan.md").read_text()
    assert verb(["check", str(out)]) == 0
    assert "- 0 of 2 planned seeds are complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="another plan is registered"):
        verb([*command, "--training.warmup_steps=3"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no suite"):
        verb(["register", "laptop", "--out", str(tmp_path / "full")])
    with pytest.raises(UserError, match="replicate preregistration register SUITE"):
        verb(["show", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no such folder"):
        verb(["check", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"--training\.steps=3 does not act here"):
        verb(["check", str(out), "--training.steps=3"])
    assert json.loads(json.dumps(check_plan(SuiteDir(out)).to_dict()))["followed"] is False


def test_check_fails_of_a_deviation_that_nothing_to_come_would_mend(suite_dir: SuiteDir) -> None:
    assert verb(["check", str(suite_dir.root)]) == 0
    suite_dir.cell("both", 2).complete.unlink()
    assert verb(["check", str(suite_dir.root)]) == 0
    edit_plan(suite_dir)
    assert verb(["check", str(suite_dir.root)]) == 1


def test_a_script_leaves_a_folder_that_was_begun_without_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["register", "laptop", "--unless-begun", "--out"]
    assert verb([*command, str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "registered at" in said and "next:" not in said
    claim_folder(load_suite("laptop"), SuiteDir(tmp_path / "begun"), [])
    assert verb([*command, str(tmp_path / "begun")]) == 0
    assert "was begun without an analysis plan" in capsys.readouterr().out
    assert not (tmp_path / "begun" / "plan.json").exists()
    with pytest.raises(UserError, match="another plan is registered"):
        verb([*command, str(tmp_path / "new"), "--seeds", "1,2"])
