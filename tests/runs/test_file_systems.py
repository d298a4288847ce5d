"""File systems without locks or links, full ones, folders that were copied or moved: supported, or told in a line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from synthetic_runs import build_suite

from replication.cli import grid as grid_cli
from replication.cli import main as cli
from replication.cli.main import main
from replication.config import SuiteConfig
from replication.errors import UserError
from replication.grid import local
from replication.grid.cells import claim_folder
from replication.grid.submit import one_at_a_time
from replication.processes.preemption import Times, record_times
from replication.runs.files import remove_temporaries, write_text
from replication.runs.layout import RunDir, SuiteDir


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteDir, SuiteConfig]:
    """Two arms at one seed, one of them interrupted."""
    folder = tmp_path_factory.mktemp("file_systems") / "out"
    return build_suite(
        folder, arms=("baseline", "both"), seeds=(1,), steps=10, validate_every=5, interrupted={("both", 1): 5}
    )


@pytest.fixture
def suite_dir(built: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> SuiteDir:
    return SuiteDir(shutil.copytree(built[0].root, tmp_path / "out"))


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.name not in (".lock", ".submit.lock", ".ledger.lock")]


def fail(code: int):
    def fails(*args: object, **named: object) -> None:
        raise OSError(code, os.strerror(code))

    return fails


# ---------------------------------------------------------------- locks


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_nobody_counts_as_running(suite_dir, monkeypatch, code):
    run = suite_dir.cell("both", 1)
    with run.lock():
        assert run.is_locked() and run.state() == "running"
    monkeypatch.setattr(fcntl, "flock", fail(code))
    for held in (run.lock(), one_at_a_time(suite_dir)):
        with pytest.raises(UserError, match=r"this file system has no locks \(.*\).* or choose another --out"), held:
            pass
    assert not run.is_locked() and run.state() == "interrupted"


def test_cells_that_another_process_runs_are_not_told_to_be_complete(built, suite_dir, monkeypatch, capsys):
    monkeypatch.setattr(grid_cli, "make_ready", lambda *args: None)
    monkeypatch.setattr(local, "report_is_current", lambda *args: True)
    claim_folder(built[1], suite_dir, [])
    with suite_dir.cell("both", 1).lock():
        assert main(["grid", "run", str(suite_dir.suite), "--out", str(suite_dir.root)]) == 2
    said = capsys.readouterr()
    assert "every cell was complete" not in said.out
    assert "1 of 2 cells are run by another process (both/seed-1); run again when it has ended" in said.err


# ---------------------------------------------------------------- links, copies, names


def test_a_link_to_the_curves_stands_for_a_copy_of_them_and_moves_with_the_folder(suite_dir, tmp_path, monkeypatch):
    run, link = suite_dir.cell("both", 1), suite_dir.tensorboard / "both" / "seed-1"
    write_text(run.tensorboard / "events", "of now")
    write_text(link / "events", "of then")
    assert suite_dir.link_tensorboard("both", 1) == "" and (link / "events").read_text() == "of now"
    moved = SuiteDir(suite_dir.root.rename(tmp_path / "moved"))
    assert (moved.tensorboard / "both" / "seed-1" / "events").read_text() == "of now"
    link = moved.tensorboard / "both" / "seed-1"
    link.unlink()
    link.symlink_to("/nowhere")
    assert moved.link_tensorboard("both", 1) == "" and (link / "events").read_text() == "of now"
    link.unlink()
    monkeypatch.setattr(os, "symlink", fail(errno.EPERM))
    assert "no link to the cell's curves (Operation not permitted)" in moved.link_tensorboard("both", 1)
    write_text(link / "mine", "a person's")
    assert "File exists" in moved.link_tensorboard("both", 1) or (link / "mine").exists()
    assert (link / "mine").read_text() == "a person's"


def test_arms_that_differ_in_case_alone_are_refused(built, tmp_path):
    suite = SuiteConfig(**(vars(built[1]) | {"arms": ("both", "Both")}))
    with pytest.raises(UserError, match="both and Both differ in case alone"):
        claim_folder(suite, SuiteDir(tmp_path / "new"), [])


# ---------------------------------------------------------------- a full disk, and others that cannot be written


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "make room there"), (errno.EDQUOT, "make room there"), (errno.EFBIG, "make room there"),
     (errno.EROFS, "a file system that can be written"), (errno.EIO, "is failing"), (errno.EACCES, "another path")],
)  # fmt: skip
def test_what_cannot_be_written_is_named_with_the_remedy_and_leaves_no_temporary(
    suite_dir, monkeypatch, capsys, code, remedy
):
    monkeypatch.setattr(os, "fsync", fail(code))
    assert main(["report", str(suite_dir.root)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {suite_dir.certificate}: {os.strerror(code)}; ") and remedy in said
    assert "\n" not in said and not hidden(suite_dir.root)


@pytest.mark.parametrize("verb", ["plan freeze", "tensorboard", "generate"])
def test_every_verb_tells_a_full_disk_in_one_line(suite_dir, tmp_path, monkeypatch, capsys, verb):
    out = str(suite_dir.root)
    args = {
        "plan freeze": ["plan", "freeze", str(suite_dir.suite), "--out", str(tmp_path / "new")],
        "tensorboard": ["tensorboard", out, "--once"],
        "generate": ["generate", out, "--export", str(tmp_path / "ab.json"), "--seed=1", "--pair=baseline,both"],
    }  # fmt: skip
    both = suite_dir.cell("both", 1)
    shutil.copy(suite_dir.cell("baseline", 1).samples, both.samples)
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    code = main(args[verb])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "No space left on device; make room there" in said and "\n" not in said, said
    assert not hidden(tmp_path)


def test_what_a_library_says_of_a_full_disk_is_one_line_too(monkeypatch, capsys):
    def fails(argv: list[str]) -> int:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setitem(cli.VERBS, "doctor", fails)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("error: no room on the disk ([enforce fail")


def test_temporaries_of_the_dead_go_with_the_next_start_of_their_owner(suite_dir):
    run = suite_dir.cell("both", 1)
    for folder in (run.root, suite_dir.root):
        for pid in (2**22 + 1, os.getpid()):
            (folder / f".FAILED.{pid}").touch()
        (folder / ".DS_Store").touch()
    with run.lock():
        assert sorted(hidden(run.root)) == [".DS_Store"], "nobody else writes in a cell that is held"
    remove_temporaries(suite_dir.root)
    assert set(hidden(suite_dir.root)) == {".DS_Store", f".FAILED.{os.getpid()}"}, "a live process may be writing"


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    write_text(tmp_path / "x.json", json.dumps("a\ud800b", ensure_ascii=False))
    assert json.loads((tmp_path / "x.json").read_bytes()) == "a\ud800b"


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    (tmp_path / "out").symlink_to("/dev/null")
    write_text(tmp_path / "out", "text")
    assert (tmp_path / "out").is_char_device()


def test_a_convenience_that_cannot_be_written_or_read_fails_nothing(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.times.write_text("{")
    record_times(run, Times(1.0, 2.0))
    assert json.loads(run.times.read_text()) == {"save_seconds": 1.0, "step_seconds": 2.0, "stall_seconds": 0.0}
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    record_times(run, Times(3.0, 4.0))
    assert json.loads(run.times.read_text()) == {"save_seconds": 1.0, "step_seconds": 2.0, "stall_seconds": 0.0}
