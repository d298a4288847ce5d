"""`replicate train --dry-run`: the parameter groups by name, the sizes, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from replication.cli.main import main
from replication.training.optimizers import folded


def test_numbers_of_blocks_and_experts_are_folded():
    names = ["blocks.0.gate.0", "blocks.0.gate.1", "blocks.11.gate.0", "head.weight", "blocks.0.w2.weight"]
    assert folded(names) == {"blocks.*.gate.*": 3, "head.weight": 1, "blocks.*.w2.weight": 1}


def test_the_published_size_is_described_without_memory_or_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"vocab_size": 100_031, "n_blocks": 20, "d_model": 1024, "n_heads": 16, "n_kv_heads": 8, "d_head": 64}
    flags = [f"--model.{key}={value}" for key, value in (model | {"d_ff": 3072}).items()]
    assert main(["train", "--dry-run", "--training.optimizer=muon", "--training.learning_rate=3e-4", *flags]) == 0
    text = capsys.readouterr().out
    for words in ("1,006,632,960 in 380 tensors", "80 blocks.*.feed_forward.gate.*", "rate 0.0003",
                  "20 blocks.*.feed_forward.router.weight", "parameters: 1,211,756,032", "614,400"):  # fmt: skip
        assert words in text
    assert list(tmp_path.iterdir()) == []
