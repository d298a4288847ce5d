"""Arms of a suite that are no files of configs/arms: written out, or files beside it; and what all of them declare."""

from __future__ import annotations

from pathlib import Path

import pytest

from replication.cli.main import main
from replication.config import declared_keys, inlined, load_cell, load_suite, scientific_hash, to_dict, to_yaml
from replication.errors import UserError
from replication.grid.cells import claim_folder, load_cells
from replication.runs.layout import SuiteDir

HEAD = "name: mine\nseeds: [1, 2]\nlayers: [cluster/cpu.yaml]\nrun: {token_gain: {s: 2}}\n"


def suite_of(folder: Path, arms: str) -> Path:
    (folder / "mine.yaml").write_text(f"{HEAD}arms: {arms}\n")
    return folder / "mine.yaml"


def test_an_arm_may_stand_in_the_suite_or_in_a_file_beside_it(tmp_path):
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms" / "half.yaml").write_text("layer_gain: {enabled: true, t: 0.25}\n")
    (tmp_path / "called.yml").write_text("arm: other\ntoken_gain: {enabled: true, variant: linear}\n")
    wide = "{name: wide, token_gain: {enabled: true, c_max: 9}}"
    suite = load_suite(suite_of(tmp_path, f"[baseline, {wide}, arms/half.yaml, called.yml, both.yaml]"))
    assert suite.arms == ("baseline", "wide", "half", "other", "both")
    configs = {arm: load_cell(suite, arm, 1) for arm in suite.arms}
    assert [config.arm for config in configs.values()] == list(suite.arms)
    assert (configs["wide"].token_gain.c_max, configs["baseline"].token_gain.c_max) == (9.0, 5.0)
    assert (configs["half"].layer_gain.enabled, configs["half"].layer_gain.t) == (True, 0.25)
    assert configs["other"].token_gain.variant == "linear"
    assert declared_keys(suite) == {
        *("arm", "token_gain.enabled", "token_gain.c_max", "token_gain.variant"),
        *("layer_gain.enabled", "layer_gain.t"),
    }


def test_an_own_arm_with_a_shipped_one_s_keys_is_that_arm(tmp_path):
    own = load_suite(
        suite_of(tmp_path, "[baseline, {name: both, token_gain.enabled: yes, layer_gain: {enabled: true}}]")
    )
    shipped = load_suite(suite_of(tmp_path, "[baseline, both]"))
    for arm in own.arms:
        assert scientific_hash(load_cell(own, arm, 1)) == scientific_hash(load_cell(shipped, arm, 1))


def test_the_saved_suite_needs_none_of_its_files(tmp_path):
    (tmp_path / "half.yaml").write_text("layer_gain: {enabled: true, t: 1e-1, exclude_blocks: [0]}\n")
    suite = load_suite(suite_of(tmp_path, "[baseline, half.yaml, {name: '007', token_gain: {enabled: on}}]"))
    suite_dir = SuiteDir(tmp_path / "out")
    cells = load_cells(suite, suite_dir)
    claim_folder(suite, suite_dir, cells)
    (tmp_path / "half.yaml").unlink()
    saved = load_suite(suite_dir.suite)
    assert to_dict(saved) == to_dict(inlined(suite))
    assert [cell.hash for cell in load_cells(saved, suite_dir)] == [cell.hash for cell in cells]
    written = suite_dir.suite.stat().st_mtime_ns
    claim_folder(suite, suite_dir, cells)
    assert suite_dir.suite.stat().st_mtime_ns == written


def test_a_folder_from_before_own_arms_is_not_written_to(tmp_path):
    suite, suite_dir = load_suite(suite_of(tmp_path, "[baseline, both]")), SuiteDir(tmp_path / "out")
    lines = to_yaml(suite).splitlines(keepends=True)
    suite_dir.root.mkdir()
    suite_dir.suite.write_text("".join(line for line in lines if not line.startswith(("own_arms", "plugins"))))
    before = suite_dir.suite.read_text()
    claim_folder(suite, suite_dir, load_cells(suite, suite_dir))
    assert suite_dir.suite.read_text() == before


def test_other_keys_of_an_arm_are_another_suite(tmp_path, capsys):
    out = str(tmp_path / "out")
    suite = load_suite(suite_of(tmp_path, "[baseline, {name: wide, token_gain: {c_max: 9}}]"))
    claim_folder(suite, SuiteDir(Path(out)), load_cells(suite, SuiteDir(Path(out))))
    path = suite_of(tmp_path, "[baseline, {name: wide, token_gain: {c_max: 8}}]")
    assert main(["grid", "run", str(path), "--out", out]) == 2
    assert "holds another suite (own_arms.wide.token_gain.c_max: 9.0 there, 8.0 here)" in capsys.readouterr().err


def test_plan_diff_and_registration_show_such_arms(tmp_path, capsys):
    arms = "[baseline, {name: wide, token_gain: {enabled: true, c_max: 9}}]\nanalysis: {late_validations: 4}"
    path = str(suite_of(tmp_path, arms))
    assert main(["grid", "plan", path]) == 0
    assert "wide/seed-2" in capsys.readouterr().out
    assert main(["grid", "diff", path, "baseline", "wide"]) == 0
    assert "token_gain.c_max" in capsys.readouterr().out
    assert main(["preregistration", "register", path, "--out", str(tmp_path / "out")]) == 0
    assert "wide" in SuiteDir(tmp_path / "out").plan_md.read_text()


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ("[baseline, {token_gain: {enabled: true}}]", "mine.yaml line 5: arms[1]: the arm has no name; add one"),
        (
            "[baseline, {name: a, token_gain: {enabeld: true}}]",
            "mine.yaml line 5: token_gain.enabeld: no such key; did",
        ),
        ("[baseline, missing.yaml]", "missing.yaml: no such config file"),
        ("[baseline, {name: a/b}]", "arm: 'a/b' names folders"),
        ("[baseline, {name: baseline}]", "key 'arms' names something twice"),
        ("[baseline, {name: a, token_gain: {s: 3}}]", "token_gain.s: the arm a is defined by 3.0 (mine: arm a), but"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arms, said):
    assert main(["grid", "plan", str(suite_of(tmp_path, arms))]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_a_mapping_that_a_later_layer_replaces_is_replaced_in_the_saved_suite_too(tmp_path):
    (tmp_path / "plugin.py").write_text("")
    (tmp_path / "layer.yaml").write_text("token_gain: {function: hard, parameters: {power: 0.25}}\n")
    own = "{name: mine, token_gain: {enabled: true, function: hard, parameters: {k: 3.0}}}"
    path = suite_of(tmp_path, f"[baseline, {own}]\nplugins: [plugin.py]")
    path.write_text(path.read_text().replace("cluster/cpu.yaml]", f"cluster/cpu.yaml, {tmp_path}/layer.yaml]"))
    suite = load_suite(path)
    for whole in (suite, inlined(suite)):
        assert load_cell(whole, "mine", 1).token_gain.parameters == {"k": 3.0}
        assert load_cell(whole, "baseline", 1).token_gain.parameters == {"power": 0.25}


def test_prompts_that_were_edited_since_are_refused(tmp_path):
    prompts = tmp_path / "mine.json"
    prompts.write_text('[{"id": "a", "category": "b", "prompt": "c"}]')
    suite = load_suite(suite_of(tmp_path, "[baseline, both]"))
    suite_dir = SuiteDir(tmp_path / "out")
    cells = load_cells(suite, suite_dir, [f"--generation.prompts={prompts}"])
    claim_folder(suite, suite_dir, cells)
    claim_folder(suite, suite_dir, cells)
    prompts.write_text('[{"id": "a", "category": "b", "prompt": "another"}]')
    with pytest.raises(UserError, match=r"mine\.json: is not what .*prompts/mine\.json holds"):
        claim_folder(suite, suite_dir, cells)
