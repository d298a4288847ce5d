"""An output folder that version 0.1.0 wrote, before its records were typed, is read, reported and resumed.

tests/support/earlier.tar.xz: a registered suite of two arms and two seeds, votes under a lock, and one cell stopped at
step 4 of 8. Its results.json and the digest below are version 0.1.0's own.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import SUPPORT

from replication.cli.main import main

FINAL_WEIGHTS = "c2f548c345494ff4ac5033b1df6075e2a79131cfa8879044c163f61a19d79229"
"""Of both/seed-2, by torch 2.13.0 on AVX512: its first four steps by the fixture's code, the others since q, k, v and
gate, up are multiplied as one. Before that it was 41d84588e972..., as of a cell trained without a stop."""
LAST_VALIDATION_NATS = 5.608931325376034


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(SUPPORT / "earlier.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):  # a quantity is known by its key, whatever its place
            yield from leaves(inner, f"{path}[{inner.get('key', i) if isinstance(inner, dict) else i}]")
    else:
        yield path, value


def test_its_cells_are_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["grid", "status", "suite.yaml", "--out", "out"])
    assert "3 complete, 1 interrupted" in capsys.readouterr().out


def test_its_plan_and_its_panel_are_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", "out"]) == 0
    assert "e66cdcf63e1b06f9ba826baa63e8f80f67c403fd74d27a4368c3566b759c609b" in capsys.readouterr().out
    assert main(["judge", "status", "out"]) == 0


def test_its_report_has_the_same_numbers(folder: Path) -> None:
    before = dict(leaves(json.loads((folder / "out/results.json").read_text())))
    assert main(["report", "out"]) == 0
    after = dict(leaves(json.loads((folder / "out/results.json").read_text())))
    for path, value in before.items():
        assert path in after, path
        if isinstance(value, float):
            assert after[path] == pytest.approx(value, rel=1e-9, abs=1e-12), path
        elif isinstance(value, int | None):
            assert after[path] == value, path


def test_its_interrupted_cell_goes_on_to_the_same_weights(folder: Path) -> None:
    assert main(["grid", "run", "suite.yaml", "--out", "out", "--jobs", "1"]) == 0
    manifest = json.loads((folder / "out/runs/both/seed-2/manifest.json").read_text())
    assert [start["step"] for start in manifest["starts"]] == [0, 4]
    lines = [json.loads(line) for line in (folder / "out/runs/both/seed-2/metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss_nats"] for line in lines if "val/loss_nats" in line]
    assert len(losses) == 4
    assert losses[-1] == pytest.approx(LAST_VALIDATION_NATS, abs=1e-4)
    if torch.__version__.startswith("2.13.0") and torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert manifest["final_weights_sha256"] == FINAL_WEIGHTS
