"""A panel that version 0.1.0 made (tests/support/earlier_panel.tar.xz) is opened, locked and counted as it was then."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from paths import SUPPORT

from replication.cli.main import main
from replication.judging.folder import find_panel
from replication.judging.page.server import create_app
from replication.judging.progress import judge_progress
from replication.judging.store import Store
from replication.runs.files import read_json
from replication.votes.record import read_note


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(SUPPORT / "earlier_panel.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "panel"


def test_a_panel_of_an_earlier_version_is_locked_and_counted_as_it_was_then(earlier: Path) -> None:
    database = find_panel(earlier).open()
    assert [judge.votes.part for judge in judge_progress(database)] == [9, 9, 9, 9, 3, 0]
    assert Store(database).show("judge-006") is not None, "further votes are taken"
    assert create_app(Store(database)) is not None
    assert main(["judge", "lock", str(earlier), "--early", "enough", "--yes"]) == 0
    assert (earlier / "votes.csv").read_text() == (earlier / "expected-votes.csv").read_text()
    then, now = read_json(earlier / "expected-marginals.json"), read_json(earlier / "judging" / "marginals.json")
    for found in (then, now):
        del found["snapshot_date"]
        for row in found["sensitivity_filters"]:
            del row["label"]  # worded as in the report since
    assert now == then
    note = read_note(earlier / "votes.json", earlier / "votes.csv")
    assert note is not None and note.warning == "" and note.note.n_votes == 26
