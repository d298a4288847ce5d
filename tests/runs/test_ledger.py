"""The ledger: appended to by many at once, each line with the hash of the one before, nothing taken back unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from synthetic_runs import Synthetic, build_suite
from training_setup import fit, small_config

from replication.protocol.preregistration import register
from replication.runs.failures import clear_failure
from replication.runs.files import read_json
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.ledger import append, append_of_cell, read_ledger
from replication.runs.manifest import read_manifest
from replication.runs.withdrawn import withdraw

WRITER = """
import sys
from pathlib import Path
from replication.runs.layout import SuiteDir
from replication.runs.ledger import append
for n in range(25):
    append(SuiteDir(Path(sys.argv[1])), "start", f"arm/seed-{sys.argv[2]}", step=n)
"""


@pytest.fixture
def suite_dir(tmp_path: Path) -> SuiteDir:
    suite_dir = SuiteDir(tmp_path / "out")
    for n in range(4):
        append(suite_dir, "start", f"both/seed-{n}", step=0)
    return suite_dir


def test_lines_of_many_processes_form_one_chain(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(seed)]) for seed in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    ledger = read_ledger(SuiteDir(out))
    assert not ledger.faults and len(ledger.entries) == len(ledger.hashes) == 100
    assert Counter(entry.cell for entry in ledger.entries) == {f"arm/seed-{seed}": 25 for seed in range(4)}
    for seed in range(4):
        of_one = [e.facts["step"] for e in ledger.entries if e.cell == f"arm/seed-{seed}"]
        assert of_one == list(range(25))


def test_what_append_returns_is_the_hash_of_the_last_line(suite_dir: SuiteDir) -> None:
    hash = append(suite_dir, "look", seeds=5)
    ledger = read_ledger(suite_dir)
    assert hash == ledger.head and ledger.of("look")[0].facts == {"seeds": 5}
    append(suite_dir, "look", seeds=8)
    assert read_ledger(suite_dir).entries[-1].before == hash


def change(lines: list[str]) -> None:
    lines[1] = lines[1].replace("seed-1", "seed-9")


def take_out(lines: list[str]) -> None:
    del lines[1]


def put_in(lines: list[str]) -> None:
    lines.insert(2, lines[1].replace("seed-1", "seed-9"))


def swap(lines: list[str]) -> None:
    lines[1], lines[2] = lines[2], lines[1]


def garble(lines: list[str]) -> None:
    lines[2] = "no line of ours"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change, "line 3 (start, "),
        (take_out, "line 2 (start, "),
        (put_in, "line 3 (start, "),
        (swap, "line 2 (start, "),
        (garble, "line 3 cannot be read (no JSON)"),
    ],
)
def test_a_line_that_was_changed_breaks_the_chain(suite_dir: SuiteDir, edit, words: str) -> None:
    lines = suite_dir.ledger.read_text().splitlines()
    edit(lines)
    suite_dir.ledger.write_text("\n".join(lines) + "\n")
    assert read_ledger(suite_dir).faults[0].startswith(words)


def test_a_line_that_a_killed_writer_tore_is_cut_off(suite_dir: SuiteDir) -> None:
    with open(suite_dir.ledger, "ab") as file:
        file.write(b'{"event":"start","at":"2026')
    assert len(read_ledger(suite_dir).entries) == 4 and not read_ledger(suite_dir).faults
    append(suite_dir, "lock")
    ledger = read_ledger(suite_dir)
    assert not ledger.faults and [e.event for e in ledger.entries[3:]] == ["start", "lock"]


def test_a_cell_outside_an_output_folder_has_no_ledger(tmp_path: Path) -> None:
    append_of_cell(RunDir(tmp_path / "a" / "b" / "cell"), "start")
    assert list(tmp_path.rglob("*")) == []


def test_what_is_done_to_a_folder_is_in_its_ledger(tmp_path: Path) -> None:
    """Trained in earnest, removed and trained again; failed and tried again; withdrawn."""
    suite_dir, configs = SuiteDir(tmp_path / "out"), [small_config(arm) for arm in ("baseline", "both")]
    for config in configs:
        fit(config, suite_dir.cell(config.arm, 1).root)
    before = read_ledger(suite_dir)
    assert [(e.event, e.cell) for e in before.entries] == [("start", "baseline/seed-1"), ("start", "both/seed-1")]
    run = suite_dir.cell("both", 1)
    run.root.rename(tmp_path / "removed")
    manifest = read_manifest(fit(configs[1], run.root))
    assert manifest is not None and manifest.starts[0].ledger == before.head
    run.failed.write_text(json.dumps({"error": "out of memory", "step": 1}))
    clear_failure(run)
    clear_failure(run)
    withdraw(suite_dir, "seed", "1", "its node was broken")
    found = read_ledger(suite_dir)
    assert not found.faults
    assert [(e.event, e.cell) for e in found.entries[2:]] == [
        *((event, "both/seed-1") for event in ("removal", "start", "retry")),
        ("withdrawal", None),
    ]
    assert found.of("retry")[0].facts == {"error": "out of memory", "diverged": False, "step": 1}
    assert found.of("start")[2].facts == {"started_at": manifest.starts[0].at, "step": 0}


def test_a_registration_is_in_the_ledger_before_it_is_in_the_folder(tmp_path: Path) -> None:
    _, suite = build_suite(tmp_path / "other", Synthetic(arms=("baseline", "both"), seeds=(1,), steps=60))
    suite_dir = SuiteDir(tmp_path / "out")
    record = register(suite_dir, suite).record
    (entry,) = read_ledger(suite_dir).entries
    assert entry.event == "registration" and entry.facts["sha256"] == record.sha256
    assert entry.facts["frozen_at"] == read_json(suite_dir.plan)["frozen_at"]
