"""Two real processes over gloo, under torchrun, give the update, the journal and the hash chain of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import CHECKOUT, SUPPORT
from rank_cells import run_cell
from run_files import read_journal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_setup import ARMS, furthest, weights

from replication.runs.files import read_json
from replication.runs.layout import RunDir

FP64 = "--training.precision=64-true"
SGD = ("--training.optimizer=sgd", "--training.learning_rate=0.01")  # Adam's rounding is not what is tested here
TABLE = [
    {"name": f"ddp-{arm}-{accumulation}-{divergence}", "arm": arm, "micro": 4 // accumulation, "strategy": "ddp",
     "flags": [FP64, f"--layer_gain.divergence={divergence}", "--checkpoints.every_steps=6"]}
    for arm in ARMS for accumulation in (1, 2) for divergence in ("step_mean", "last_group")
    if divergence == "step_mean" or arm == "both"
] + [
    {"name": f"{strategy}-both-2", "arm": "both", "micro": 2, "strategy": strategy, "flags": SGD}
    for strategy in ("zero1", "zero2", "zero3")
]  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two")
    lines = []
    for c in TABLE:
        flags = [f"--cluster.strategy={c['strategy']}", "--cluster.devices=2"]
        lines.append(c | {"flags": [*c["flags"], *flags, f"--cluster.micro_batch_sequences={c['micro']}"]})
    (root / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(SUPPORT / "rank_cells.py"), str(root)],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{CHECKOUT}:{SUPPORT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("cell", TABLE, ids=lambda c: c["name"])
def test_two_processes_equal_one(two_processes, tmp_path, cell):
    run_cell(cell, tmp_path)
    one, two = RunDir(tmp_path / cell["name"]), RunDir(two_processes / cell["name"])
    tolerance = 1e-10 if FP64 in cell["flags"] else 1e-5
    assert furthest(weights(two), weights(one)) < tolerance
    a, b = read_json(two.manifest), read_json(one.manifest)
    for key in ("data_chain", "tokens", "step", "config_hash", "initial_weights_sha256"):
        assert a[key] == b[key], key
    assert (a["world_size"], b["world_size"]) == (2, 1)
    timing = ("step", "wall_seconds", "train/tokens_per_second", "data_hash", "per_step")
    for x, y in zip(read_journal(two.metrics), read_journal(one.metrics), strict=True):
        assert x["step"] == y["step"]
        for key in x.keys() - set(timing):
            assert x[key] == pytest.approx(y[key], rel=100 * tolerance, abs=tolerance / 100), key
        for key, values in x.get("per_step", {}).items():
            assert values == pytest.approx(y["per_step"][key], rel=tolerance)


def test_one_rank_alone_writes_the_files(two_processes):
    run = RunDir(two_processes / "ddp-both-1-step_mean")
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [e.step for e in board.Scalars("train/loss_nats")] == [2, 4, 6]
    assert len(list(run.tensorboard.glob("events.*"))) == 1
