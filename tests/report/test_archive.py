"""A folder's life after its run: whole in itself, one file that proves its report, and run again from what it holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from paths import CHECKOUT
from reported import PLANTED
from synthetic_runs import build_suite, edit_journal
from trained_suite import write_trained_suite

from replication.cli.main import main
from replication.config import SuiteConfig, config_root, inlined, load_cell, load_suite
from replication.report.archive import check
from replication.report.report import collect
from replication.report.results import write_results
from replication.report.study import leaves
from replication.runs.files import damage, read_json
from replication.runs.layout import WEIGHTS, SuiteDir

SUITES = sorted(path.stem for path in (config_root() / "suites").glob("*.yaml"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> SuiteDir:
    root = tmp_path_factory.mktemp("archive") / "out"
    what = {"arms": ("baseline", "both"), "seeds": (1, 2, 3), "steps": 20, "effects": PLANTED}
    suite_dir, suite = build_suite(root, failed={("both", 3): 10}, **what)
    (suite_dir.cell("both", 1).root / "tensorboard").mkdir()
    (suite_dir.cell("both", 1).root / "tensorboard/events").write_text("the journal again")
    suite_dir.sealed.mkdir()
    (suite_dir.sealed / "key.json").write_text("{}")
    report_numbers(suite_dir, suite)
    return suite_dir


def report_numbers(suite_dir: SuiteDir, suite: SuiteConfig) -> None:
    """results.json and certificate.json as `replicate report` writes them, but for the figures, which take seconds."""
    made_from = suite_dir.inputs_sha256(suite_dir.cell(arm, seed) for seed in suite.seeds for arm in suite.arms)
    write_results(suite_dir.results, replace(collect(suite_dir, suite)[1], made_from=made_from))


AS_ANOTHER = """
import os, sys
from replication.cli.main import main
assert main(sys.argv[1:]) == 0  # as ourselves, so that all is loaded: another may not read where Python lies
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


def test_another_user_elsewhere_without_git_gets_the_same_numbers(
    reported: SuiteDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.tar.zst"
    assert main(["archive", str(reported.root), "-o", str(file)]) == 0
    assert f"wrote {file}: " in capsys.readouterr().out
    home = tmp_path / "home"
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    environment = {"HOME": str(home), "TMPDIR": str(home), "PATH": str(home), "MPLCONFIGDIR": str(home)}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-c", AS_ANOTHER, "archive", "--check", str(file)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal: every number of results.json" in done.stdout.replace("\n", " ")


def test_an_archive_names_nobody_and_holds_no_secret(reported: SuiteDir, tmp_path: Path) -> None:
    file = tmp_path / "study.tar.xz"
    assert main(["archive", str(reported.root), "-o", str(file)]) == 0
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
    names = {m.name for m in members}
    assert {"study/suite.yaml", "study/results.json", "study/data/manifest.json"} <= names
    assert "study/runs/both/seed-1/metrics.jsonl" in names
    assert not [name for name in names if "sealed" in name or "tensorboard" in name or "/." in name]


def test_a_number_that_does_not_follow_is_named(
    reported: SuiteDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = SuiteDir(tmp_path / "out")
    shutil.copytree(reported.root, copy.root)
    told = read_json(copy.results)
    told["loss"]["mean"] += 1e-6
    copy.results.write_text(json.dumps(told))
    assert main(["archive", str(copy.root), "-o", str(tmp_path / "x.tar")]) == 0
    capsys.readouterr()
    assert main(["archive", "--check", str(tmp_path / "x.tar")]) == 1
    said = capsys.readouterr().out
    assert "differs: loss.mean: " in said and "1 value not equal" in said

    told["loss"]["mean"] *= 1 + 1e-12  # what another machine's rounding may do
    shutil.copytree(reported.root, tmp_path / "two")
    edit_journal(SuiteDir(tmp_path / "two").cell("both", 1), 5, **{"gain/mean": 9.0})
    assert main(["archive", str(tmp_path / "two"), "-o", str(tmp_path / "y.tar")]) == 0
    lines = check(tmp_path / "y.tar")
    assert any(line.startswith("gain[1].largest_mean: ") and "9.0 from its files" in line for line in lines), lines


def test_names_that_need_quoting_change_nothing(
    reported: SuiteDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / 'it\'s "é" $x `y` [1]* 数\udcff'
    shutil.copytree(reported.root, odd / "out 1")
    (odd / "out 1/prompts").mkdir(exist_ok=True)
    (odd / 'out 1/prompts/what\'s "é".json').write_text("[]")
    monkeypatch.chdir(odd)
    assert main(["archive", "out 1", "-o", "my 'é' study.tar.zst"]) == 0
    assert main(["archive", "--check", "my 'é' study.tar.zst"]) == 0


def test_no_archive_is_made_while_cells_run(
    reported: SuiteDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_dir, file = SuiteDir(tmp_path / "out"), tmp_path / "x.tar"
    shutil.copytree(reported.root, suite_dir.root)
    run = suite_dir.cell("both", 3)
    with run.lock():
        assert main(["archive", str(suite_dir.root), "-o", str(file)]) == 2
        assert "both/seed-3 run now" in capsys.readouterr().err
        report_numbers(suite_dir, load_suite(suite_dir.suite))
    assert main(["archive", str(suite_dir.root), "-o", str(file)]) == 2
    assert "is of a time when cells ran; run `replicate report`" in capsys.readouterr().err and not file.exists()
    report_numbers(suite_dir, load_suite(suite_dir.suite))
    assert main(["archive", str(suite_dir.root), "-o", str(file)]) == 0 and check(file) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("{out}",), "give OUT -o FILE to make an archive, or --check FILE"),
        (("{out}", "-o", "x.zip"), "x.zip: its name must end in one of .tar.zst, .tar.xz"),
        (("--check", "nothing.tar"), "nothing.tar: no such file; name one that"),
        (("--check", "{here}/torn.tar.gz"), "torn.tar.gz: cannot be unpacked"),
        (("--check", "{here}/torn.tar.zst"), "torn.tar.zst: cannot be unpacked"),
        (("{here}/stale", "-o", "x.tar"), "results.json: is not of what the folder holds now; run `replicate report`"),
        (("{here}", "-o", "x.tar"), "suite.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(
    reported: SuiteDir, tmp_path: Path, words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torn.tar.gz", "torn.tar.zst"):
        (tmp_path / name).write_bytes(b"\x1f\x8b not all of it")
    stale = SuiteDir(tmp_path / "stale")
    shutil.copytree(reported.root, stale.root)
    stale.cell("both", 1).complete.write_text("{}")
    assert main(["archive", *(word.format(out=reported.root, here=tmp_path) for word in words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


# ---------------------------------------------------------------- a folder that is whole


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_without_its_layers_has_the_same_cells(name: str) -> None:
    suite = load_suite(name)
    whole = inlined(suite)
    assert whole.layers == () and whole.run
    assert all(load_cell(whole, arm, 1) == load_cell(suite, arm, 1) for arm in suite.arms)


@pytest.mark.slow
def test_how_to_reproduce_works_as_printed_from_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers, texts and prompts are gone, and the folder lies elsewhere: corpus, prompts and keys are in it."""
    first = write_trained_suite(tmp_path / "first", arms=("baseline",), seeds=(1,), untrained="")
    for samples in (["generate", str(first.root)], ["report", str(first.root)]):
        assert main(samples) == 0
    assert load_suite(first.suite).layers == ()
    assert main(["archive", str(first.root), "-o", str(tmp_path / "study.tar.zst"), "--weights", "last"]) == 0
    assert check(tmp_path / "study.tar.zst") == []
    (tmp_path / "other").mkdir()
    shutil.move(first.root, tmp_path / "other/study")
    shutil.rmtree(tmp_path / "first")
    told = read_json(tmp_path / "other/study/results.json")
    (line,) = [line for line in told["reproduce"] if line.startswith("replicate ")]
    assert str(tmp_path) not in line
    replicate = f"{sys.executable} -P -m replication"
    done = subprocess.run(
        ["bash", "-c", line.replace("replicate", replicate, 1)],
        cwd=tmp_path / "other/study",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    again = leaves(read_json(tmp_path / "other/again/results.json"))
    equal = [key for key, value in leaves(told).items() if again.get(key) == value]
    assert "cells[0].final_weights_sha256" in equal
    assert {f"quantities[{i}].values.baseline[0]" for i in range(5)} <= set(equal)
    assert [key for key in leaves(told) if key.startswith("samples") and key not in equal] == []


def test_changes_that_no_commit_holds_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from replication.runs import manifest

    checkout = tmp_path / "checkout"
    (checkout / "replication/runs").mkdir(parents=True)
    (checkout / "configs").mkdir()
    (checkout / "replication/a.py").write_text("x = 1\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(manifest, "CHECKOUT", checkout)
    assert manifest.code_patch() == b"" and manifest.git_state().dirty is False

    (checkout / "replication/a.py").write_text("x = 2\n")
    (checkout / "configs/new arm.yaml").write_text("arm: new\n")
    (checkout / "notes.txt").write_text("not the code's")
    for setting in (["diff.external", "echo"], ["color.ui", "always"], ["diff.noprefix", "true"]):  # a user's taste
        subprocess.run([*git, "config", *setting], check=True)
    patch = manifest.code_patch()
    assert manifest.git_state().dirty is True and b"notes.txt" not in patch
    subprocess.run([*git, "stash", "-q", "-u"], check=True)
    (tmp_path / "code.patch").write_bytes(patch)
    subprocess.run([*git, "apply", str(tmp_path / "code.patch")], check=True)
    assert (checkout / "replication/a.py").read_text() == "x = 2\n"
    assert (checkout / "configs/new arm.yaml").read_text() == "arm: new\n"


def test_an_archive_can_hold_the_last_weights(tmp_path: Path) -> None:
    suite_dir = write_trained_suite(tmp_path, arms=("baseline",), seeds=(1,), untrained="")
    report_numbers(suite_dir, load_suite(suite_dir.suite))
    assert main(["archive", str(suite_dir.root), "-o", str(tmp_path / "w.tar"), "--weights", "last"]) == 0
    with tarfile.open(tmp_path / "w.tar") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    folder = tmp_path / "there/w/runs/baseline/seed-1/checkpoints/step-000002"
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE", WEIGHTS]
    assert damage(folder) is None
    (folder / WEIGHTS).write_bytes(b"other")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.add(tmp_path / "there/w", "w")
    assert any("weights.pt" in line for line in check(tmp_path / "bad.tar"))


def test_a_foreign_configs_package_beside_an_installed_one_hides_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    shutil.copytree(CHECKOUT / "replication", site / "replication", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "configs", site / "replication/configs")
    (site / "configs/suites").mkdir(parents=True)
    (site / "configs/__init__.py").touch()
    (site / "configs/suites/laptop.yaml").write_text("name: foreign\n")
    code = "from replication.config import find_config, load_suite; print(load_suite('laptop').name)"
    code += "; print(find_config('arms/both.yaml'))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    name, path = done.stdout.split()
    assert name == "laptop" and Path(path) == site / "replication/configs/arms/both.yaml"
