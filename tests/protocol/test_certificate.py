"""The pair certificate: it holds for arms that differ in declared keys alone, and fails for every other difference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import (
    Synthetic,
    build_suite,
    cell_config,
    edit_config,
    edit_journal,
    edit_manifest,
    edit_start,
    rewrite_config,
)

from replication.config import SuiteConfig, load_suite
from replication.errors import UserError
from replication.grid.cells import load_cells
from replication.protocol.certificate import Certificate, certify, logged_steps
from replication.runs.files import read_json, write_text
from replication.runs.journal import read_journal
from replication.runs.layout import SuiteDir

CHECKS = ["initial weights", "data chain", "data", "tokens", "schedule", "journal", "declared keys"]
CHECKS += ["code", "machine", "over seeds"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteDir, SuiteConfig]:
    return build_suite(tmp_path_factory.mktemp("suite") / "out", Synthetic(arms=("baseline", "both"), seeds=(1, 2)))


@pytest.fixture
def suite_dir(built: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> SuiteDir:
    """A copy that a test may change."""
    shutil.copytree(built[0].root, tmp_path / "out")
    return SuiteDir(tmp_path / "out")


def certified(suite_dir: SuiteDir) -> Certificate:
    return certify(suite_dir, ("baseline", "both"), (1, 2))


def only_failure(certificate: Certificate, check: str) -> str:
    """Seed 2 must fail in one check alone, and seed 1 hold; returns the explanation."""
    first, second = certificate.seeds
    assert first.state == "holds"
    assert second.state == "fails"
    assert not certificate.holds
    assert [c.name for c in second.checks if c.holds is False] == [check], second.reasons
    assert certificate.pair("both", 2).state == "fails"
    assert certificate.pair("both", 1).state == "holds"
    return next(c.explanation for c in second.checks if c.name == check)


def test_holds_for_arms_that_differ_in_declared_keys_alone(suite_dir: SuiteDir) -> None:
    certificate = certified(suite_dir)
    assert certificate.holds
    assert [seed.state for seed in certificate.seeds] == ["holds", "holds"]
    assert [check.name for check in certificate.seeds[0].checks] == CHECKS
    assert all(check.holds and not check.explanation for seed in certificate.seeds for check in seed.checks)
    assert certificate.seeds[0].reasons == ()
    declared = next(c for c in certificate.seeds[0].checks if c.name == "declared keys").values
    assert declared["both"] == {"arm": "both", "layer_gain.enabled": True, "token_gain.enabled": True}


def test_dict_form_is_json_and_complete(suite_dir: SuiteDir) -> None:
    plain = certified(suite_dir).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["holds"] is True
    assert [s["state"] for s in plain["seeds"]] == ["holds", "holds"]
    pair = {"arm": "both", "reference": "baseline", "seed": 1, "state": "holds", "reasons": [], "departures": []}
    assert plain["pairs"][0] == pair


def test_all_four_shipped_arms_hold(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", seeds=(1,))
    assert certify(suite_dir, suite.arms, suite.seeds).holds


def test_journals_that_the_caller_has_read_give_the_same_certificate(suite_dir: SuiteDir) -> None:
    edit_journal(suite_dir.cell("both", 2), 25, data_hash="another")
    cells = [(arm, seed) for arm in ("baseline", "both") for seed in (1, 2)]
    logged = {cell: logged_steps(read_journal(suite_dir.cell(*cell).metrics)) for cell in cells}
    for cell in cells:
        suite_dir.cell(*cell).metrics.rename(suite_dir.cell(*cell).metrics.with_suffix(".read"))
    given = certify(suite_dir, ("baseline", "both"), (1, 2), logged)
    for cell in cells:
        suite_dir.cell(*cell).metrics.with_suffix(".read").rename(suite_dir.cell(*cell).metrics)
    assert given.to_dict() == certified(suite_dir).to_dict()
    assert given.pair("both", 2).state == "fails"


def test_configs_that_differ_beyond_their_seed_are_not_taken_for_one_another(suite_dir: SuiteDir) -> None:
    """Configs are parsed once for all seeds of an arm; what is edited in one of them must still show."""
    edit_config(suite_dir.cell("both", 2), "weights_seed: null", "weights_seed: 7")
    assert certified(suite_dir).pair("both", 2).state == "fails"
    edit_config(suite_dir.cell("both", 1), "seed: 1\n", "seed: 3\n")
    assert any(
        "has seed 3 in the folder of seed 1" in reason for reason in certified(suite_dir).pair("both", 1).reasons
    )


def test_unknown_pair_is_a_key_error(suite_dir: SuiteDir) -> None:
    with pytest.raises(KeyError):
        certified(suite_dir).pair("both", 99)


# ---------------------------------------------------------------- one thing changed


def test_other_initial_weights_fail(suite_dir: SuiteDir) -> None:
    edit_manifest(suite_dir.cell("both", 2), initial_weights_sha256="f" * 64)
    explanation = only_failure(certified(suite_dir), "initial weights")
    assert explanation.startswith("both: initial_weights_sha256 is ffff")


def test_missing_initial_weights_fail(suite_dir: SuiteDir) -> None:
    for arm in ("baseline", "both"):
        edit_manifest(suite_dir.cell(arm, 2), initial_weights_sha256=None)
    explanation = only_failure(certified(suite_dir), "initial weights")
    assert explanation == "baseline: initial_weights_sha256 is missing; both: initial_weights_sha256 is missing"


def test_data_chain_names_the_first_step_that_differs(suite_dir: SuiteDir) -> None:
    for step in (25, 40):
        edit_journal(suite_dir.cell("both", 2), step, data_hash="another")
    explanation = only_failure(certified(suite_dir), "data chain")
    assert "both: data_hash differs first at step 25" in explanation
    assert "step 40" not in explanation


def test_data_chain_that_differs_only_at_the_end_fails(suite_dir: SuiteDir) -> None:
    run = suite_dir.cell("both", 2)
    edit_journal(run, 60, data_hash="another")
    edit_manifest(run, data_chain="another")
    assert "both: data_hash differs first at step 60" in only_failure(certified(suite_dir), "data chain")


def test_manifest_chain_must_be_the_journals_last(suite_dir: SuiteDir) -> None:
    for arm in ("baseline", "both"):
        edit_manifest(suite_dir.cell(arm, 2), data_chain="forged in both arms alike")
    assert "journal's last step" in only_failure(certified(suite_dir), "data chain")


def test_missing_chain_at_a_step_fails(suite_dir: SuiteDir) -> None:
    edit_journal(suite_dir.cell("baseline", 2), 10, data_hash=None)
    assert only_failure(certified(suite_dir), "data chain") == "baseline: data_hash is missing at step 10"


def test_journals_without_a_common_step_fail(suite_dir: SuiteDir) -> None:
    run = suite_dir.cell("both", 2)
    write_text(run.metrics, "")
    certificate = certified(suite_dir)
    failing = [c.name for c in certificate.seeds[1].checks if c.holds is False]
    assert failing == ["data chain", "schedule", "journal"]
    assert "shares no logged step" in certificate.pair("both", 2).reasons[0]


def test_other_log_interval_is_compared_at_common_steps(tmp_path: Path) -> None:
    suite_dir, _ = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1, 2))
    other, _ = build_suite(tmp_path / "other", arms=("both",), seeds=(2,), log_every=10)
    shutil.copy(other.cell("both", 2).metrics, suite_dir.cell("both", 2).metrics)
    assert certified(suite_dir).holds


def test_other_data_fails(suite_dir: SuiteDir) -> None:
    edit_manifest(suite_dir.cell("both", 2), data={"hash": "other", "dir": "data"})
    assert "both: data.hash is other" in only_failure(certified(suite_dir), "data")


def test_other_token_count_fails(suite_dir: SuiteDir) -> None:
    edit_manifest(suite_dir.cell("both", 2), tokens=122_879)
    assert only_failure(certified(suite_dir), "tokens") == "both: tokens is 122879, baseline has 122880"


@pytest.mark.parametrize("key", ["learning_rate", "decay_steps", "batch_tokens"])
def test_arms_may_declare_a_rate_of_their_own_and_no_other_schedule(
    suite_dir: SuiteDir, built: tuple[SuiteDir, SuiteConfig], key: str
) -> None:
    for arm in ("baseline", "both"):
        run = suite_dir.cell(arm, 2)
        training = cell_config(built[1], arm, 2).training
        other = {"learning_rate": 0.002, "decay_steps": 7, "batch_tokens": training.batch_tokens * 2}[key]
        if arm == "both":
            config = cell_config(built[1], arm, 2)
            rewrite_config(run, replace(config, training=replace(training, **{key: other})))
            edit_journal(run, 30, **{"train/learning_rate": 0.001})
        edit_manifest(run, arm_keys=["arm", "layer_gain.enabled", "token_gain.enabled", f"training.{key}"])
    if key == "batch_tokens":
        explanation = only_failure(certified(suite_dir), "schedule")
        assert f"both: training.batch_tokens is {other}, baseline has {training.batch_tokens}" in explanation
    else:
        assert only_failure(certified(suite_dir), "over seeds").startswith(f"training.{key} is {other} at seed 2")


def test_other_learning_rate_at_one_step_fails(suite_dir: SuiteDir) -> None:
    edit_journal(suite_dir.cell("both", 2), 30, **{"train/learning_rate": 0.001})
    assert "both: train/learning_rate differs first at step 30" in only_failure(certified(suite_dir), "schedule")


def test_a_run_that_stopped_short_fails(suite_dir: SuiteDir) -> None:
    edit_manifest(suite_dir.cell("both", 2), step=55)
    certificate = certified(suite_dir)
    assert certificate.seeds[1].state == "fails"
    assert any("both: reached step 55, training.steps is 60" in r for r in certificate.seeds[1].reasons)


def test_undeclared_key_fails(suite_dir: SuiteDir, built: tuple[SuiteDir, SuiteConfig]) -> None:
    config = cell_config(built[1], "both", 2)
    changed = replace(config, training=replace(config.training, weight_decay=0.2))
    rewrite_config(suite_dir.cell("both", 2), changed)
    explanation = only_failure(certified(suite_dir), "declared keys")
    assert explanation == "both: training.weight_decay is 0.2, baseline has 0.1, and no arm file declares it"


def test_arms_that_declare_different_keys_fail(suite_dir: SuiteDir) -> None:
    edit_manifest(
        suite_dir.cell("both", 2), arm_keys=["arm", "layer_gain.enabled", "token_gain.enabled", "token_gain.s"]
    )
    explanation = only_failure(certified(suite_dir), "declared keys")
    assert explanation == "baseline: does not declare token_gain.s, another arm does"


def test_arms_that_declare_nothing_fail(suite_dir: SuiteDir) -> None:
    for arm in ("baseline", "both"):
        edit_manifest(suite_dir.cell(arm, 2), arm_keys=[])
    assert "both: token_gain.enabled is True" in only_failure(certified(suite_dir), "declared keys")


def test_edited_config_fails(suite_dir: SuiteDir) -> None:
    edit_config(suite_dir.cell("both", 2), "s: 1.0", "s: 2.0")
    assert "both: config.yaml hashes to" in only_failure(certified(suite_dir), "declared keys")


def test_config_with_an_unknown_key_fails(suite_dir: SuiteDir) -> None:
    edit_config(suite_dir.cell("both", 2), "weight_decay:", "wieght_decay:")
    certificate = certified(suite_dir)
    assert any("both: config.yaml cannot be used" in reason for reason in certificate.pair("both", 2).reasons)


@pytest.mark.parametrize("name", ["config", "manifest"])
@pytest.mark.parametrize("text", [None, "", "[1, 2", "\x00\xff"])
def test_damaged_files_fail_and_do_not_raise(suite_dir: SuiteDir, name: str, text: str | None) -> None:
    path = getattr(suite_dir.cell("both", 2), name)
    path.unlink() if text is None else path.write_text(text, encoding="latin-1")
    certificate = certified(suite_dir)
    assert certificate.pair("both", 2).state == "fails"
    assert certificate.pair("both", 1).state == "holds"


def test_a_cell_in_the_folder_of_another_fails(suite_dir: SuiteDir) -> None:
    shutil.rmtree(suite_dir.cell("both", 2).root)
    shutil.copytree(suite_dir.cell("baseline", 2).root, suite_dir.cell("both", 2).root)
    explanation = only_failure(certified(suite_dir), "declared keys")
    assert "both: config.yaml has arm baseline in the folder of arm both" in explanation


def test_a_seed_in_the_folder_of_another_fails(suite_dir: SuiteDir) -> None:
    for arm in ("baseline", "both"):
        shutil.rmtree(suite_dir.cell(arm, 2).root)
        shutil.copytree(suite_dir.cell(arm, 1).root, suite_dir.cell(arm, 2).root)
    assert "seed 1 in the folder of seed 2" in only_failure(certified(suite_dir), "declared keys")


# ---------------------------------------------------------------- told, and refused in strict mode alone


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        ("code", {"code_hash": "beef"}, "code_hash is c0dec0dec0dec0de (baseline) and beef (both)"),
        ("code", {"code_hash": None}, "code_hash is c0dec0dec0dec0de (baseline) and not recorded (both)"),
        ("code", {"packages": {"torch": "2.12.1"}}, "torch is 2.13.0 (baseline) and 2.12.1 (both)"),
        ("code", {"packages": {"deepspeed": None}}, ""),  # what one does not know is not compared
        *(
            ("machine", {"machine": {key: value}}, f"{key} is {first} (baseline) and {value} (both)")
            for key, first, value in (
                ("strategy", "single", "ddp"), ("ranks", 1, 2), ("micro_batch_sequences", 16, 8),
                ("head", "logits", "chunked"), ("compile", False, True), ("attention", "auto", "math"),
                ("activation_checkpointing", False, True), ("offload_optimizer", False, True), ("threads", 2, 4),
                ("device", "Synthetic CPU", "NVIDIA H100"),
            )
        ),
    ],
)  # fmt: skip
def test_other_code_or_another_cut_is_a_departure_and_refused_in_strict_mode(
    suite_dir: SuiteDir, check: str, change: dict[str, object], words: str
) -> None:
    edit_start(suite_dir.cell("both", 2), **change)
    told, strict = certified(suite_dir), certify(suite_dir, ("baseline", "both"), (1, 2), strict=True)
    assert told.holds and not told.pair("both", 1).departures
    assert told.pair("both", 2).departures == told.seeds[1].departures == ((f"{check}: {words}",) if words else ())
    assert strict.pair("both", 2).state == ("fails" if words else "holds")
    assert strict.pair("both", 2).reasons == told.pair("both", 2).departures


def test_a_departure_at_any_start_counts_unless_none_of_its_steps_is_left(suite_dir: SuiteDir) -> None:
    run = suite_dir.cell("both", 2)
    (first,) = read_json(run.manifest)["starts"]
    other = {**first, "code_hash": "beef", "machine": {**first["machine"], "micro_batch_sequences": 8}}
    edit_manifest(run, starts=[other, {**first, "step": 40}])
    code, machine = certified(suite_dir).pair("both", 2).departures
    assert code == "code: code_hash is c0dec0dec0dec0de (baseline, both) and beef (both)"
    assert machine == "machine: micro_batch_sequences is 16 (baseline, both) and 8 (both)"
    edit_manifest(run, starts=[other, {**first, "step": 0}])  # it died before its first checkpoint
    assert not certified(suite_dir).pair("both", 2).departures
    edit_manifest(run, starts=[first], generated_by={"code_hash": "beef"})
    assert "beef" in certified(suite_dir).pair("both", 2).departures[0]


@pytest.mark.parametrize("starts", [None, [{"strategy": {"strategy": "single", "world_size": 1}}], 3, [None, "x"]])
def test_what_older_manifests_lack_is_not_recorded_and_fails_nothing(suite_dir: SuiteDir, starts: object) -> None:
    for arm in ("baseline", "both"):
        edit_manifest(suite_dir.cell(arm, 2), starts=starts)
    certificate = certify(suite_dir, ("baseline", "both"), (1, 2), strict=True)
    assert certificate.holds
    assert {c.name: c.explanation for c in certificate.seeds[1].checks if c.holds is None} == {
        "code": "not recorded",
        "machine": "not recorded",
    }
    edit_config(suite_dir.cell("both", 2), "micro_batch_sequences: null", "micro_batch_sequences: 8")
    (line,) = certified(suite_dir).pair("both", 2).departures  # what config.yaml says of the last start
    assert line == "machine: micro_batch_sequences is 16 (baseline) and 8 (both)"


# ---------------------------------------------------------------- what all seeds must share


@pytest.fixture
def three(tmp_path: Path) -> tuple[SuiteDir, SuiteConfig]:
    return build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1, 2, 3), steps=20)


@pytest.mark.parametrize("odd", [1, 3])
def test_a_seed_of_another_corpus_is_not_pooled_and_both_hashes_are_named(
    three: tuple[SuiteDir, SuiteConfig], odd: int
) -> None:
    for arm in ("baseline", "both"):
        edit_manifest(three[0].cell(arm, odd), data={"hash": "5" * 64, "dir": "c"})
    certificate = certify(three[0], ("baseline", "both"), (1, 2, 3))
    assert {s.seed: s.state for s in certificate.seeds} == {s: "fails" if s == odd else "holds" for s in (1, 2, 3)}
    (reason,) = certificate.pair("both", odd).reasons
    others = ", ".join(str(s) for s in (1, 2, 3) if s != odd)
    assert reason.startswith(f"over seeds: the data's hash is 5555555555555555 at seed {odd} and ")
    assert reason.endswith(f" at seeds {others}; they are not pooled")


def test_a_seed_of_another_config_is_not_pooled_but_seeds_of_weights_and_data_may_differ(
    three: tuple[SuiteDir, SuiteConfig],
) -> None:
    for arm in ("baseline", "both"):
        config = cell_config(three[1], arm, 3)
        rewrite_config(three[0].cell(arm, 3), replace(config, data_seed=7, weights_seed=8))
    assert certify(three[0], ("baseline", "both"), (1, 2, 3)).holds
    for arm in ("baseline", "both"):
        config = cell_config(three[1], arm, 3)
        changed = replace(config, training=replace(config.training, weight_decay=0.2))
        rewrite_config(three[0].cell(arm, 3), replace(changed, validation=replace(config.validation, sequences=64)))
    (reason,) = certify(three[0], ("baseline", "both"), (1, 2, 3)).pair("both", 3).reasons
    assert "training.weight_decay is 0.2 at seed 3 and 0.1 at seeds 1, 2" in reason
    assert "validation.sequences is 64 at seed 3 and 128 at seeds 1, 2" in reason


# ---------------------------------------------------------------- incomplete


def test_incomplete_cells_are_named_with_their_state(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(
        tmp_path / "out",
        seeds=(1,),
        failed={("token_gain", 1): 20},
        interrupted={("layer_gain", 1): 30},
        missing=[("both", 1)],
    )
    certificate = certify(suite_dir, suite.arms, suite.seeds)
    (seed,) = certificate.seeds
    assert seed.state == "incomplete"
    assert seed.missing == (
        "token_gain: the cell is not complete: failed (UserError: the loss was not finite)",
        "layer_gain: the cell is not complete: interrupted",
        "both: the cell is missing",
    )
    assert all(check.holds is None for check in seed.checks)
    assert {pair.state for pair in certificate.pairs} == {"incomplete"}


def test_a_failed_arm_does_not_spoil_the_pairs_of_the_others(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", seeds=(1,), failed={("layer_gain", 1): 20})
    certificate = certify(suite_dir, suite.arms, suite.seeds)
    assert certificate.seeds[0].state == "incomplete"
    states = {pair.arm: pair.state for pair in certificate.pairs}
    assert states == {"token_gain": "holds", "layer_gain": "incomplete", "both": "holds"}


def test_an_incomplete_baseline_spoils_all(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", seeds=(1,), missing=[("baseline", 1)])
    certificate = certify(suite_dir, suite.arms, suite.seeds)
    assert {pair.state for pair in certificate.pairs} == {"incomplete"}


def test_empty_folder_is_incomplete(tmp_path: Path) -> None:
    certificate = certify(SuiteDir(tmp_path), ("baseline", "both"), (1,))
    assert certificate.seeds[0].state == "incomplete"
    assert not certificate.holds


# ---------------------------------------------------------------- one run under two seeds


def over_seeds(suite_dir: SuiteDir) -> str:
    (reason,) = certified(suite_dir).seeds[1].reasons
    return reason.removeprefix("over seeds: ")


@pytest.mark.parametrize("key", ["initial_weights_sha256", "final_weights_sha256"])
def test_equal_weights_under_two_seeds_are_one_run(suite_dir: SuiteDir, key: str) -> None:
    """A copied cell: with initial weights in both arms, or the pair fails already."""
    for arm in ("baseline", "both"):
        edit_manifest(suite_dir.cell(arm, 2), **{key: read_json(suite_dir.cell(arm, 1).manifest)[key]})
    word = "began" if key.startswith("initial") else "ended"
    assert over_seeds(suite_dir) == f"both {word} with the weights of seed 1, so it is no other run"
    assert certified(suite_dir).seeds[0].state == "holds" and certified(suite_dir).pair("both", 2).state == "fails"


def test_fixed_seeds_of_weights_and_data_are_one_run_and_one_of_them_is_not(suite_dir: SuiteDir) -> None:
    suite = load_suite(suite_dir.suite)
    for fixed in ({"weights_seed": 7}, {"weights_seed": 7, "data_seed": 8}):
        for arm in ("baseline", "both"):
            for seed in (1, 2):
                run = suite_dir.cell(arm, seed)
                rewrite_config(run, replace(cell_config(suite, arm, seed), **fixed))
                edit_manifest(run, initial_weights_sha256="5" * 64)
        if "data_seed" not in fixed:
            assert certified(suite_dir).holds
    assert over_seeds(suite_dir) == "both has the weights_seed and data_seed of seed 1, so it is no other run"
    with pytest.raises(UserError, match="weights_seed: is fixed, and so is data_seed"):
        load_cells(suite, SuiteDir(suite_dir.root), ["--weights_seed=7", "--data_seed=8"])
