"""The door: help, guesses, completion; and the quickstart, which calls other verbs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from replication.cli import quickstart
from replication.cli.main import VERBS, main

Said = pytest.CaptureFixture[str]


def test_the_verbs_follow_the_terminals_width(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (60, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()[2:]
        assert width - 25 < max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines if line[2:3].strip()] == list(VERBS)


def test_help_of_a_verb_is_the_verbs_help(capsys: Said) -> None:
    told = []
    for words in (["help", "grid", "run"], ["grid", "run", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and "--jobs" in told[0]


def test_help_of_keys_is_by_section(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["help", "train"]) == 0
    overview = capsys.readouterr().out
    assert "  --training.*\n" in overview and "--seed=1337" in overview and "training.steps" not in overview
    assert main(["train", "--help", "training"]) == 0
    section = capsys.readouterr().out
    assert "--training.steps=300" in section and "--model" not in section
    assert max(map(len, section.splitlines())) <= 70
    assert main(["help", "train", "--training.steps=5"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "  --training.steps=300"
    assert main(["train", "--help", "traning"]) == 2
    assert "no key traning; did you mean training?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, meant",
    [
        ("gird run laptop", "grid"),
        ("grid stauts out", "status"),
        ("grid status out --seedz 1", "--seeds"),
        ("doctor --sute laptop", "--suite"),
    ],
)
def test_a_slip_is_told_what_may_be_meant(words: str, meant: str, capsys: Said) -> None:
    assert main(words.split()) == 2
    assert f"; did you mean {meant}?" in capsys.readouterr().err


def test_bash_completes_verbs_actions_flags_and_keys(capsys: Said) -> None:
    assert main(["completion"]) == 0
    script = capsys.readouterr().out
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def complete(line: str) -> list[str]:
        words = shlex.split(line) + [""] * line.endswith(" ")
        asked = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _replicate; echo ${{COMPREPLY[@]}}"
        command = ["bash", "-c", f"{script}\n{asked}"]
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return list(dict.fromkeys(done.stdout.split()))  # readline shows each once

    assert complete("replicate ") == ["--debug", *VERBS]
    assert {"run", "submit", "status"} <= {*complete("replicate grid ")}
    assert complete("replicate grid run laptop --jo") == ["--jobs"]
    assert complete("replicate train --training.batch") == ["--training.batch_tokens"]


# ---------------------------------------------------------------- quickstart


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the quickstart asks of other verbs, which take minutes: each is tested, and run from a wheel, elsewhere."""
    asked: list[str] = []
    for name in ("preregistration", "grid", "judge"):
        monkeypatch.setattr(
            f"replication.cli.{name}.{name}", lambda argv, name=name: asked.append(" ".join([name, *argv]))
        )
    monkeypatch.setattr(quickstart.os, "sched_getaffinity", lambda pid: {*range(16)})
    return asked


def test_quickstart_goes_from_the_plan_to_the_panel(called: list[str], capsys: Said, tmp_path: Path) -> None:
    out = tmp_path / "my results"
    assert main(["quickstart", "--out", str(out), "--training.steps=5"]) == 0
    assert called == [
        f"preregistration register ablation_2x2 --out {out} --training.steps=5",
        f"grid run ablation_2x2 --out {out} --jobs 8 --training.steps=5",
        f"judge prepare {out}",
    ]
    assert f"judge serve {shlex.quote(str(out))}" in capsys.readouterr().out


def test_quickstart_repeats_nothing(called: list[str], tmp_path: Path) -> None:
    (tmp_path / "judging").mkdir()
    (tmp_path / "judging" / "judging.sqlite").touch()
    (tmp_path / "suite.yaml").touch()  # begun without a plan, which comes before the data or not at all
    assert main(["quickstart", "--out", str(tmp_path)]) == 0
    assert called == [f"grid run ablation_2x2 --out {tmp_path} --jobs 8"]


def test_quickstart_serves_on_a_terminal(called: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    assert main(["quickstart", "--out", str(tmp_path)]) == 0 and called[-1] == f"judge serve {tmp_path}"
    assert main(["quickstart", "--out", str(tmp_path), "--no-serve"]) == 0 and called[-1] == f"judge prepare {tmp_path}"


def test_quickstart_without_the_judging_packages_says_what_brings_them(
    called: list[str], capsys: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)
    assert main(["quickstart", "--out", str(tmp_path)]) == 0
    assert "launch/install.sh judge, then the same command again" in capsys.readouterr().out
    assert not any(line.startswith("judge") for line in called)
