"""Cheats, one by one: an edit of a folder that was trained in earnest, and what the check of its plan says of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from run_files import read_journal
from synthetic_runs import edit_manifest
from torch.utils.tensorboard import SummaryWriter
from training_setup import fit, small_config

from replication.cli.preregistration import preregistration as verb
from replication.config import SuiteConfig, load_cell, load_suite, to_dict, to_yaml
from replication.protocol.contradictions import contradictions
from replication.protocol.deviations import PlanStatus, check_plan
from replication.protocol.preregistration import plan_stamp, register, registered_rules
from replication.runs.events import read_events
from replication.runs.failures import clear_failure
from replication.runs.files import file_sha256, read_json, write_json, write_text
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.ledger import append, read_ledger
from replication.runs.manifest import Manifest, mark_cell_complete, read_manifest
from replication.runs.records import to_json
from replication.runs.starts import LoggedCell
from replication.runs.withdrawn import withdraw

ARMS = ("baseline", "both")
RUN = {
    k: v for k, v in to_dict(small_config()).items() if isinstance(v, dict) and k not in ("token_gain", "layer_gain")
}
SUITE = SuiteConfig("small", ARMS, (1,), run=RUN)


def train(suite_dir: SuiteDir, arm: str) -> None:
    config = load_cell(SUITE, arm, 1)
    run = fit(config, suite_dir.cell(arm, 1).root)
    mark_cell_complete(config, run)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SuiteDir:
    """Registered, trained, and a seed of no cell withdrawn, so that the last line of the ledger is of no cell."""
    suite_dir = SuiteDir(tmp_path_factory.mktemp("contradictions") / "out")
    write_text(suite_dir.suite, to_yaml(SUITE))
    register(suite_dir, SUITE)
    for arm in ARMS:
        train(suite_dir, arm)
    withdraw(suite_dir, "judge", "judge-9", "was drunk")
    return suite_dir


@pytest.fixture
def suite_dir(built: SuiteDir, tmp_path: Path) -> SuiteDir:
    return SuiteDir(shutil.copytree(built.root, tmp_path / "out"))


def status(suite_dir: SuiteDir) -> PlanStatus:
    return check_plan(suite_dir, load_suite(suite_dir.suite))


def withholding(suite_dir: SuiteDir) -> list[str]:
    return [entry.why for entry in status(suite_dir).withheld]


def both(suite_dir: SuiteDir) -> RunDir:
    return suite_dir.cell("both", 1)


# ---------------------------------------------------------------- the cheats


def flatter(suite_dir: SuiteDir) -> None:
    """A lower last validation loss of the treatment."""
    lines = read_journal(both(suite_dir).metrics)
    last = max(i for i, line in enumerate(lines) if "val/loss_nats" in line)
    lines[last]["val/loss_nats"] -= 0.01
    write_text(both(suite_dir).metrics, "".join(json.dumps(line) + "\n" for line in lines))


def flatter_and_vouch(suite_dir: SuiteDir) -> None:
    flatter(suite_dir)
    run = both(suite_dir)
    write_json(run.complete, read_json(run.complete) | {"journal_sha256": file_sha256(run.metrics)})


def flatter_without_events(suite_dir: SuiteDir) -> None:
    flatter_and_vouch(suite_dir)
    shutil.rmtree(both(suite_dir).tensorboard)


def edit_line(suite_dir: SuiteDir, event: str, old: str, new: str) -> None:
    lines = suite_dir.ledger.read_text().splitlines(keepends=True)
    i = max(i for i, line in enumerate(lines) if f'"event":"{event}"' in line)
    assert old in lines[i]
    lines[i] = lines[i].replace(old, new)
    suite_dir.ledger.write_text("".join(lines))


def flatter_in_the_ledger_too(suite_dir: SuiteDir) -> None:
    was = read_json(both(suite_dir).complete)["journal_sha256"]
    flatter_without_events(suite_dir)
    edit_line(suite_dir, "complete", was, file_sha256(both(suite_dir).metrics))


def backdate(suite_dir: SuiteDir) -> None:
    record = read_json(suite_dir.plan)
    write_json(suite_dir.plan, record | {"frozen_at": "2020-01-01T00:00:00+0000"})
    for arm in ARMS:
        run = suite_dir.cell(arm, 1)
        edit_manifest(run, plan=plan_stamp(run))


def register_late(suite_dir: SuiteDir, late: bool = True) -> None:
    """After the data, with the stamps of a plan that was there before; the ledger was away meanwhile."""
    record = read_json(suite_dir.plan)
    at = datetime.fromisoformat(record["frozen_at"]) + timedelta(hours=2)
    write_json(suite_dir.plan, record | {"frozen_at": at.isoformat()})
    suite_dir.ledger.unlink()
    for arm in ARMS:
        run = suite_dir.cell(arm, 1)
        stamp = to_json(plan_stamp(run))
        starts = [start | {"plan": stamp, "ledger": None} for start in read_json(run.manifest)["starts"]]
        edit_manifest(run, plan=stamp, starts=starts)


def move_the_registration(suite_dir: SuiteDir) -> None:
    """The plan's line behind those of the cells, and the chain made anew: as a late plan would have it."""
    import hashlib

    lines = [json.loads(line) for line in suite_dir.ledger.read_text().splitlines()]
    written, before = [], ""
    for line in [*lines[1:], lines[0]]:
        text = json.dumps(line | {"before": before}, separators=(",", ":"))
        before = hashlib.sha256(text.encode()).hexdigest()
        written.append(text + "\n")
    suite_dir.ledger.write_text("".join(written))


def train_again(suite_dir: SuiteDir) -> None:
    shutil.rmtree(both(suite_dir).root)
    train(suite_dir, "both")


def give_up(suite_dir: SuiteDir) -> None:
    """A cell that was removed before it was complete."""
    run = both(suite_dir)
    run.complete.unlink()
    lines = suite_dir.ledger.read_text().splitlines(keepends=True)
    suite_dir.ledger.write_text("".join(line for line in lines[:4]))
    shutil.rmtree(run.root)
    suite_dir.withdrawn.unlink()


def try_until_it_holds(suite_dir: SuiteDir) -> None:
    """A diverged cell that is tried again, and then is complete."""
    run = both(suite_dir)
    write_json(run.failed, {"error": "training: the loss was not finite", "diverged": True, "step": 4})
    clear_failure(run)


CHEATS: dict[str, tuple[Callable[[SuiteDir], None], list[str]]] = {
    "a better journal": (
        flatter,
        [
            "metrics.jsonl is not the file that COMPLETE was written for: it was cut, damaged or edited: both/seed-1",
            "metrics.jsonl has another val/loss_nats than TensorBoard's event files, at step 6: both/seed-1",
            "metrics.jsonl is not the file that was complete, by ledger.jsonl: both/seed-1",
        ],
    ),
    "and its hash": (
        flatter_and_vouch,
        [
            "metrics.jsonl has another val/loss_nats than TensorBoard's event files, at step 6: both/seed-1",
            "metrics.jsonl is not the file that was complete, by ledger.jsonl: both/seed-1",
        ],
    ),
    "and no event files": (
        flatter_without_events,
        ["metrics.jsonl is not the file that was complete, by ledger.jsonl: both/seed-1"],
    ),
    "and the ledger's line": (
        flatter_in_the_ledger_too,
        ["the chain of ledger.jsonl is broken: line 6 (withdrawal, AT) does not follow from the line before it"],
    ),
    "no ledger": (
        lambda d: d.ledger.unlink(),
        ["ledger.jsonl is gone, which has the starts of these cells: baseline/seed-1, both/seed-1"],
    ),
    "an earlier registration": (
        backdate,
        ["plan.json says it was registered at 2020-01-01T00:00:00+0000, ledger.jsonl at FROZEN"],
    ),
    "a late registration": (
        register_late,
        [
            "cells that began before the plan that they carry was registered, by their own clocks: baseline/seed-1, "
            "both/seed-1"
        ],
    ),
    "another order": (
        move_the_registration,
        [
            "ledger.jsonl is not the one that these cells began under: baseline/seed-1, both/seed-1; where copies of "
            "the folder were merged, the other's belongs beside it as ledger-2.jsonl",
            "cells that started before the plan that they carry was registered, by ledger.jsonl: baseline/seed-1, "
            "both/seed-1",
        ],
    ),
    "a cell trained again": (
        train_again,
        ["cells that were removed after they were complete and trained again: both/seed-1"],
    ),
    "a cell removed": (
        lambda d: shutil.rmtree(both(d).root),
        ["cells that were removed after they were complete: both/seed-1"],
    ),
    "diverged and tried again": (
        try_until_it_holds,
        ["cells that diverged, and were tried again until they did not: both/seed-1"],
    ),
    "a withdrawal taken back": (
        lambda d: d.withdrawn.unlink(),
        ["judge judge-9 was withdrawn at AT, by ledger.jsonl, and withdrawn.json has that no more"],
    ),
}


def test_an_untouched_folder_contradicts_nothing(suite_dir: SuiteDir) -> None:
    found = status(suite_dir)
    assert found.withheld == () and [line.partition(" was ")[0] for line in found.deviations] == ["judge judge-9"]


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_named_by_the_check_and_withholds_the_verdict(
    suite_dir: SuiteDir, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cheat, words = CHEATS[name]
    at, frozen_at = read_ledger(suite_dir).entries[-1].at, read_json(suite_dir.plan)["frozen_at"]
    cheat(suite_dir)
    expected = [
        line.replace("AT)", f"{at})").replace("at AT", f"at {at}").replace("FROZEN", frozen_at) for line in words
    ]
    assert withholding(suite_dir) == expected
    assert verb(["check", str(suite_dir.root)]) == 1
    said = capsys.readouterr().out
    assert all(f"- {line}\n" in said for line in expected)


def test_a_cell_that_was_removed_before_its_result_was_there_is_told_and_withholds_nothing(suite_dir: SuiteDir) -> None:
    give_up(suite_dir)
    found = status(suite_dir)
    assert found.withheld == ()
    assert "cells that were removed before they were complete: both/seed-1" in found.deviations


def test_copies_of_a_folder_that_two_clusters_filled_are_merged_with_both_ledgers(suite_dir: SuiteDir) -> None:
    """As if the folder had been copied once its plan was registered, and each cell trained in another copy."""
    lines = suite_dir.ledger.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines]
    ours = [line for line, entry in zip(lines, entries, strict=True) if entry["cell"] != "both/seed-1"]
    (last,) = [i for i, line in enumerate(ours) if '"withdrawal"' in line]
    ours[last] = ours[last].replace(entries[-1]["before"], hashlib.sha256(ours[last - 1].rstrip().encode()).hexdigest())
    suite_dir.ledger.write_text("".join(ours))
    assert "the other's belongs beside it as ledger-2.jsonl" in withholding(suite_dir)[0]
    (suite_dir.root / "ledger-2.jsonl").write_text("".join(lines[:-1]))
    assert (
        withholding(suite_dir) == []
        and read_ledger(suite_dir).head == hashlib.sha256(ours[-1].rstrip().encode()).hexdigest()
    )
    assert len(read_ledger(suite_dir).entries) == len(lines)
    (suite_dir.root / "ledger-2.jsonl").write_text("".join(lines[:2] + lines[3:-1]))
    assert any("of ledger-2.jsonl" in line and "does not follow" in line for line in withholding(suite_dir))


def test_an_amendment_after_the_removal_of_all_cells_is_one_after_the_data(suite_dir: SuiteDir) -> None:
    shutil.rmtree(suite_dir.runs)
    longer = replace(SUITE, run={**RUN, "training": {**RUN["training"], "learning_rate": 1e-4}})
    record = register(suite_dir, longer, amend="it did not learn").record
    assert record.began_before == ("baseline/seed-1", "both/seed-1")
    assert "or been removed since they started**: baseline/seed-1, both/seed-1" in suite_dir.plan_md.read_text()
    assert registered_rules(suite_dir, longer).file == "plan-1.json"
    found = status(suite_dir)
    assert found.state == "after the data" and found.deviations[0].startswith("the plan was amended at")
    assert not any("before the plan was registered" in line for line in found.deviations)
    assert [entry.why.partition(":")[0] for entry in found.withheld] == [
        "cells that were removed after they were complete"
    ]


def test_a_panel_that_was_made_again_is_told(suite_dir: SuiteDir) -> None:
    for panel_id in ("first", "second"):
        assert not any("panels" in line for line in status(suite_dir).deviations)
        append(suite_dir, "panel", panel_id=panel_id)
    found = status(suite_dir)
    assert "2 panels were prepared, one after another: the votes are of one of them" in found.deviations
    assert found.withheld == ()


def test_event_files_of_a_resumed_run_agree_with_its_journal(suite_dir: SuiteDir) -> None:
    """Its last checkpoint is lost, so that it goes on from the one before and logs the last steps again."""
    run = both(suite_dir)
    run.complete.unlink()
    shutil.rmtree(run.checkpoint_folders()[-1])
    edit_manifest(run, finished_at=None, step=None)
    train(suite_dir, "both")
    assert len(list(run.tensorboard.glob("events.*"))) == 2
    events = read_events(run)
    lines = {line["step"]: line for line in read_journal(run.metrics) if "val/loss_nats" in line}
    assert {step for tag, step in events.losses if tag == "val/loss_nats"} == lines.keys() == {3, 6}
    for step, line in lines.items():
        assert np.float32(line["val/loss_nats"]) in events.losses["val/loss_nats", step]
    assert events.began is not None and withholding(suite_dir) == []


def test_without_event_files_a_cell_began_when_it_started(suite_dir: SuiteDir) -> None:
    cells = {"both": LoggedCell(both(suite_dir), read_manifest(both(suite_dir)) or Manifest())}
    (logged,) = contradictions(suite_dir, cells, None).began
    shutil.rmtree(both(suite_dir).tensorboard)
    (started,) = contradictions(suite_dir, cells, None).began
    assert 0 < logged - started < 60


def test_losses_that_a_start_logged_on_a_node_whose_clock_is_behind_are_no_contradiction(suite_dir: SuiteDir) -> None:
    """The journal has those of the last start, whichever file comes last by its name."""
    run = both(suite_dir)
    (path,) = run.tensorboard.glob("events.*")
    for number, name in ((1, "0000000001"), (2, "9999999999")):
        own = SummaryWriter(str(run.root / f"w{number}"))
        own.add_scalar("val/loss_nats", 9.0, 3)
        own.close()
        (written,) = (run.root / f"w{number}").glob("events.*")
        written.rename(run.tensorboard / f"events.out.tfevents.{name}.node.{number}.0")
        assert withholding(suite_dir) == []
    path.unlink()
    assert "another val/loss_nats than TensorBoard's event files" in withholding(suite_dir)[0]


def test_torn_and_damaged_event_files_are_read_up_to_the_damage(suite_dir: SuiteDir) -> None:
    run = both(suite_dir)
    (path,) = run.tensorboard.glob("events.*")
    whole, content = read_events(run).losses, path.read_bytes()
    path.write_bytes(content[: content.rindex(b"val/loss_nats")])
    half = read_events(run).losses
    assert 0 < len(half) < len(whole) and half.items() <= whole.items()
    path.write_bytes(b"\xff" * 40 + content)
    assert read_events(run).losses == {}
