"""Two real processes over gloo give the update of one: the objective is a function of the global batch alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from memory_store import MemoryStore
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_setup import ARMS, fit, furthest, small_config, weights

from replication.rundir import RunDir, read_journal, read_json

HERE = Path(__file__).parent
FP64 = "--training.precision=64-true"
TWO = ("--cluster.strategy=ddp", "--cluster.devices=2")
TABLE = [
    {"name": f"{arm}-{accumulation}-{divergence}", "arm": arm, "micro": 4 // accumulation,
     "flags": [FP64, f"--layer_gain.divergence={divergence}", "--checkpoints.every_steps=6"]}
    for arm in ARMS for accumulation in (1, 2) for divergence in ("step_mean", "last_group")
    if divergence == "step_mean" or arm == "both"
]  # fmt: skip


def on_ranks(script: str, root: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Start processes as a user would, with torchrun's module."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
         str(HERE / script), str(root)],
        capture_output=True, text=True, timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ddp")
    cells = [c | {"flags": [*c["flags"], *TWO, f"--cluster.micro_batch_sequences={c['micro']}"]} for c in TABLE]
    (root / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    done = on_ranks("ddp_cells.py", root)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("cell", TABLE, ids=lambda c: c["name"])
def test_two_processes_equal_one(two_processes, tmp_path, cell):
    one = fit(small_config(cell["arm"], *cell["flags"]), tmp_path, MemoryStore(blocks=(6, 5)))
    two = RunDir(two_processes / cell["name"])
    assert furthest(weights(two), weights(one)) < 1e-10
    a, b = read_json(two.manifest), read_json(one.manifest)
    for key in ("data_chain", "tokens", "step", "config_hash", "initial_weights_sha256"):
        assert a[key] == b[key], key
    assert (a["world_size"], b["world_size"]) == (2, 1)
    timing = ("step", "wall_seconds", "train/tokens_per_second", "data_hash", "per_step")
    for x, y in zip(read_journal(two.metrics), read_journal(one.metrics), strict=True):
        assert x["step"] == y["step"]
        for key in x.keys() - set(timing):
            assert x[key] == pytest.approx(y[key], rel=1e-8, abs=1e-12), key
        for key, values in x.get("per_step", {}).items():
            assert values == pytest.approx(y["per_step"][key], rel=1e-10)


def test_one_rank_alone_writes_the_files(two_processes):
    run = RunDir(two_processes / "both-1-step_mean")
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [e.step for e in board.Scalars("train/loss_nats")] == [2, 4, 6]
    assert len(list(run.tensorboard.glob("events.*"))) == 1
