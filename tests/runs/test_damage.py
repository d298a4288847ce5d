"""Files of an output folder that are not as they were written: passed over or named; no number passes in silence."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_runs import build_suite, edit_manifest

from replication.config import AnalysisConfig, load_run, load_suite
from replication.errors import UserError
from replication.generation.completions import Appender, Completion, _read, read_samples, suite_completions
from replication.generation.export import write_export
from replication.generation.suite import cells_to_sample, trained_cells
from replication.grid.cells import places
from replication.grid.local import report_is_current
from replication.grid.status import cell_status, print_status
from replication.grid.submissions import submissions
from replication.processes.preemption import grace_seconds_needed
from replication.protocol.certificate import certify
from replication.protocol.deviations import check_plan
from replication.protocol.preregistration import register
from replication.report.load import load_cells
from replication.report.report import collect
from replication.runs.failures import record_failure
from replication.runs.files import file_sha256, mark_complete, read_json, write_json, write_text
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import mark_cell_complete
from replication.runs.starts import logged_cells
from replication.tensorboard.live import LiveJournal
from replication.tensorboard.writer import claim
from replication.training.checkpoint_files import newest_checkpoint
from replication.votes.record import COLUMNS, read_note, read_votes

ARMS = ("baseline", "both")
CELL, STOPPED = "runs/both/seed-2", "runs/baseline/seed-3"
CHECKPOINT = f"{CELL}/checkpoints/step-000020"
FILES = [
    *(f"{CELL}/{name}" for name in ("metrics.jsonl", "manifest.json", "config.yaml", "COMPLETE", "samples.jsonl")),
    *(f"{STOPPED}/{name}" for name in ("metrics.jsonl", "manifest.json", "config.yaml", "FAILED", "jobs.jsonl",
                                       "times.json", "start.json", "log.txt", "samples.part/0-of-1.jsonl")),
    f"{CHECKPOINT}/COMPLETE", f"{CHECKPOINT}/weights.pt", "suite.yaml", "plan.json", "votes.csv", "votes.json",
    "results.json", "data/manifest.json", "launch/0001-train/job.json", "launch/0001-train/submitted.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SuiteDir:
    """Two arms at three seeds, all but one complete, with every file that a run folder may hold."""
    suite_dir, suite = build_suite(
        tmp_path_factory.mktemp("damage") / "out", arms=ARMS, seeds=(1, 2, 3), steps=20, validate_every=5,
        interrupted={("baseline", 3): 10},
    )  # fmt: skip
    register(suite_dir, replace(suite, analysis=AnalysisConfig(late_validations=3)))
    for _, _, run in suite_dir.cells():
        write_json(run.times, {"save_seconds": 1.0, "step_seconds": 2.0})
        if run.complete.is_file():
            samples = {"samples_sha256": file_sha256(run.samples), "temperature": 1.0, "prompts": "p.json"}
            edit_manifest(run, generation=samples)
            mark_cell_complete(load_run([run.config]), run)
            _write_checkpoint(run, 10), _write_checkpoint(run, 20)
    stopped = RunDir(suite_dir.root / STOPPED)
    record_failure(stopped, UserError("no room"))
    write_json(stopped.start, {"start": "0", "checkpoint": None})
    write_text(stopped.jobs, '{"event":"started","restarts":1}\n{"event":"ended","code":2}\n')
    write_text(stopped.log, "step 1\nerror: no room\n")
    parts = Appender(stopped.samples_part / "0-of-1.jsonl", "binding")
    parts.append([Completion.of_line(x) for x in RunDir(suite_dir.root / CELL).samples.read_text().splitlines()])
    parts.close()
    row = "1,synthetic,1,baseline,both,1,0,0,j,human,,left,,3.5,"
    write_text(suite_dir.votes, f"{','.join(COLUMNS)}\n{row}\n")
    write_json(suite_dir.votes_note, {"n_refusals": 1, "votes_sha256": file_sha256(suite_dir.votes)})
    write_json(suite_dir.results, {"made_from": "x"})
    job = {"name": "j", "stage": "train", "cells": [CELL]}
    write_json(suite_dir.launch / "0001-train" / "job.json", job)
    write_json(suite_dir.launch / "0001-train" / "submitted.json", {"id": "7"})
    return suite_dir


def _write_checkpoint(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"step-{step:06d}"
    write_text(folder / "weights.pt", f"weights of step {step}")
    facts = {"step": step, "tokens": 1, "data_chain": "", "wall_seconds": 1.0, "weights_sha256": "", "data_hash": "",
             "layout": {}, "scientific": {}}  # fmt: skip
    mark_complete(folder, facts)


@pytest.fixture
def suite_dir(built: SuiteDir, tmp_path: Path) -> SuiteDir:
    """A copy that a test may change."""
    return SuiteDir(shutil.copytree(built.root, tmp_path / "out"))


# ---------------------------------------------------------------- one file damaged in every way

Way = Callable[[bytes], bytes]


def _values(value: bytes) -> Way:
    """Every number of the second half of a JSON text is another thing."""
    return lambda b: (
        b[: len(b) // 2] + re.sub(rb"(?<=[:\[,] )-?\d[\d.e+-]*|(?<=[:\[,])-?\d[\d.e+-]*", value, b[len(b) // 2 :])
    )


WAYS: dict[str, Way] = {
    "empty": lambda b: b"",
    "half": lambda b: b[: len(b) // 2],
    "its last bytes cut": lambda b: b[:-9],
    "no UTF-8": lambda b: b[: len(b) // 2] + b"\xff\xfe" + b[len(b) // 2 + 2 :],
    "a tail of NUL": lambda b: b[: len(b) // 3] + b"\0" * (len(b) - len(b) // 3),
    "NUL alone": lambda b: b"\0" * len(b),
    "a bit": lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
    "twice": lambda b: b + b,
    "a list": lambda b: b"[1, 2]\n",
    "null": lambda b: b"null\n",
    "a number": lambda b: b"3\n",
    "an empty object": lambda b: b"{}\n",
    "nested": lambda b: b"[" * 100_000 + b"\n",
    **{f"numbers are {v}": _values(v.encode()) for v in ('"x"', "null", "[]", "{}", "true", "1e999", "-1", "NaN",
                                                         "9" * 30, "9" * 400)},
}  # fmt: skip


def read(suite_dir: SuiteDir) -> Iterator[str]:
    """What every reader but the report's slow parts says; one that raises anything but one line for a person fails."""
    runs = [run for _, _, run in suite_dir.cells()]
    suite = load_suite(suite_dir.suite)
    out = io.StringIO()
    readers: list[Callable[[], object]] = [
        lambda: print_status(
            [cell_status(p, suite.diverged) for p in places(suite, suite_dir)], "t", Console(file=out)
        ),
        lambda: load_cells(suite_dir, suite.arms, suite.seeds),
        lambda: check_plan(suite_dir, suite),
        lambda: logged_cells(suite_dir.runs),
        lambda: suite_completions(suite_dir, ARMS),
        lambda: write_export(suite_dir.root / "ab.json", suite_dir, 2, ARMS),
        lambda: report_is_current(suite_dir),
        lambda: trained_cells(suite_dir, None, None),
        lambda: submissions(suite_dir),
        lambda: read_votes(suite_dir.votes),
        lambda: read_note(suite_dir.votes_note, suite_dir.votes),
        *(partial(read_samples, run) for run in runs),
        *(partial(grace_seconds_needed, run) for run in runs),
        *(partial(_read, path) for run in runs for path in run.samples_part.glob("*")),
        *(partial(LiveJournal(run.metrics, lambda tag: True).read) for run in runs),
    ]
    for reader in readers:
        try:
            reader()
        except UserError as error:
            assert "\n" not in str(error)
            yield str(error)
    yield out.getvalue()
    yield from (str(newest_checkpoint(run)) for run in runs)
    yield from (reason for seed in certify(suite_dir, suite.arms, suite.seeds).seeds for reason in seed.reasons)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_passed_over_or_named_and_never_a_traceback(suite_dir: SuiteDir, name: str) -> None:
    path, silent = suite_dir.root / name, []
    every = name in (f"{CELL}/metrics.jsonl", f"{CELL}/samples.jsonl") or "REPLICATION_FULL" in os.environ
    ways = list(WAYS.items()) if every else list(WAYS.items())[FILES.index(name) % 5 :: 5]
    whole = path.read_bytes()
    undamaged = list(read(suite_dir))
    for way, harm in ways:
        path.write_bytes(harm(whole))
        with suppress(UserError):  # suite.yaml, which nobody can do without
            if list(read(suite_dir)) == undamaged and path.read_bytes() != whole:
                silent.append(way)
    path.unlink()
    path.mkdir()  # a person's mistake
    with suppress(UserError):
        list(read(suite_dir))
    if path.name in ("metrics.jsonl", "samples.jsonl", "weights.pt") and name.startswith(CELL):
        assert not silent, "everything that numbers come from is vouched for"


def test_the_report_is_made_whatever_is_damaged(suite_dir: SuiteDir) -> None:
    for name in (*FILES[:1], *FILES[5:9], "data/manifest.json", "plan.json"):
        path = suite_dir.root / name
        path.write_bytes(_values(b'"x"')(path.read_bytes())[:-20])
    suite = load_suite(suite_dir.suite)
    _, results = collect(suite_dir, suite)
    assert {(p.seed, p.state) for p in results.pairs_refused} == {(2, "fails"), (3, "incomplete")}
    with claim(suite, suite_dir) as over_seeds:
        assert over_seeds.refresh()


# ---------------------------------------------------------------- a journal that is not whole


def reasons(suite_dir: SuiteDir) -> str:
    """Why the pair of the damaged cell does not hold, but for what the hash in COMPLETE tells."""
    path = RunDir(suite_dir.root / CELL).complete
    path.write_text(json.dumps({k: v for k, v in read_json(path).items() if k != "journal_sha256"}))
    pair = certify(suite_dir, ARMS, (2,)).pairs[0]
    assert pair.state == "fails"
    return " ".join(pair.reasons)


def test_a_journal_that_lost_its_tail_names_the_steps_that_are_gone(suite_dir: SuiteDir) -> None:
    path = RunDir(suite_dir.root / CELL).metrics
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8, "a validation and a training line at each of steps 5, 10, 15 and 20"
    path.write_bytes(b"".join(lines[:2]))
    (_, _, found), words = suite_dir.cells()[4], "both: metrics.jsonl lacks the losses of steps 6-20"
    assert found.metrics == path
    assert certify(suite_dir, ARMS, (2,)).pairs[0].reasons[-1].endswith("it was cut, damaged or edited")
    assert words in reasons(suite_dir) and "lacks the validation of steps 10, 15, 20" in reasons(suite_dir)
    path.write_bytes(b"".join(lines[:6]))
    assert "lacks the validation of step 20" in reasons(suite_dir)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    assert "lacks the losses of steps 6-10;" in reasons(suite_dir) + ";"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [(b'"step":20', b'"step":"20"', "lacks the losses of steps 16-20"),
     (b'"step":20,"val', b'"step":true,"val', "lacks the validation of step 20"),
     (b'"step":20', b'"step":25', "goes on to step 25"),
     (b'"step":15,"tok', b'"step":16,"tok', "has more than once step 16"),
     (b'{"step":20,"val/loss_nats":', b'{"step":20,"val/loss_nats":"3.9","was":', "lacks the validation of step 20"),
     (b'"per_step"', b'"per_stop"', "lacks the losses of steps 1-20")],
)  # fmt: skip
def test_values_of_another_type_or_step_are_named(suite_dir: SuiteDir, old: bytes, new: bytes, said: str) -> None:
    path = RunDir(suite_dir.root / CELL).metrics
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    assert said in reasons(suite_dir)


def test_a_manifest_that_is_not_the_one_that_complete_was_written_for_is_named(suite_dir: SuiteDir) -> None:
    for arm in ARMS:
        edit_manifest(suite_dir.cell(arm, 2), tokens=1)
    assert "manifest.json has tokens 1, COMPLETE has" in reasons(suite_dir)


def test_a_manifest_that_lost_all_its_values_is_not_taken_for_one_that_is_missing(suite_dir: SuiteDir) -> None:
    (suite_dir.root / CELL / "manifest.json").write_text('{"step": null}')
    assert "manifest.json has step None, COMPLETE has 20" in reasons(suite_dir)


# ---------------------------------------------------------------- neighbours


def test_what_a_person_or_a_file_system_leaves_beside_our_files_is_none_of_them(suite_dir: SuiteDir) -> None:
    before = list(read(suite_dir))
    run = RunDir(suite_dir.root / CELL)
    for copied in (run.root, run.checkpoints / "step-000020", run.checkpoints / "step-000010"):
        shutil.copytree(copied, copied.with_name(f"{copied.name} (copy)"))
    shutil.copytree(run.root, run.root.with_name("seed-02"))
    (run.checkpoints / "step-000040").write_text("a file")
    (run.checkpoints / "old").mkdir()
    for folder in (suite_dir.root, suite_dir.runs, run.root, run.root.parent, run.checkpoints, suite_dir.launch):
        for name in (".DS_Store", ".nfs0000", "metrics (copy).jsonl", "seed-x"):
            (folder / name).write_text("x")
    shutil.copytree(suite_dir.launch / "0001-train", suite_dir.launch / "0001-train (copy)")
    assert list(read(suite_dir)) == before
    assert [run.checkpoints / "step-000010", run.checkpoints / "step-000020"] == run.checkpoint_folders()


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(suite_dir: SuiteDir) -> None:
    run = RunDir(suite_dir.root / CELL)
    shutil.copytree(run.checkpoints / "step-000010", run.checkpoints / "step-000030")
    folder, (note,) = newest_checkpoint(run)
    assert folder == run.checkpoints / "step-000020" and "the checkpoint of step 10 by its marker" in note


def test_a_copied_cell_is_not_generated_into_the_one_it_was_copied_from(suite_dir: SuiteDir) -> None:
    shutil.copytree(suite_dir.root / CELL, suite_dir.root / "runs" / "both (copy)" / "seed-2")
    trained, _ = trained_cells(suite_dir, "both (copy)", None)
    assert [run.root.parent.name for run in trained] == ["both (copy)"]
    assert cells_to_sample(trained, lambda _: [], True, suite_dir, Console(file=io.StringIO())) == ([], 0)
