"""The first seconds of a run: the same world on every rank, room, and a network that adds up; and what a run needs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_store import MemoryStore
from paths import CHECKOUT
from training_setup import small_config

from replication.config import load_run
from replication.errors import UserError
from replication.model.size import GIB, activation_gib, checkpoint_gib, checkpoints_kept, state_needs
from replication.model.transformer import Block, rotary
from replication.processes.launcher import PLACE, adopt_place
from replication.runs import manifest
from replication.runs.layout import RunDir
from replication.training import checks as module
from replication.training.checks import check_room, data_sample

# ---------------------------------------------------------------- what a run needs


def needs(strategy: str, devices: int, *flags: str) -> tuple[float, float]:
    """Bytes of each parameter on (device, host)."""
    config = load_run([], [f"--cluster.strategy={strategy}", f"--cluster.devices={devices}", *flags])
    found, one = state_needs(config), checkpoint_gib(load_run([])) / 12
    return round(found.device_gib / one, 3), round(found.host_gib / one, 3)


def test_bytes_of_a_parameter_in_each_process():
    """Weight, gradient and two moments, and on the host a copy of all but the gradient, for checkpoints.

    Under ZeRO a master weight too, each part divided where it is shared.
    """
    assert needs("single", 1) == (16, 12)
    assert needs("single", 1, "--training.precision=64-true") == (32, 24)
    assert needs("single", 1, "--training.optimizer=sgd") == (12, 8)
    assert needs("ddp", 8) == (16, 12)
    assert needs("zero1", 8) == (4 + 4 + 12 / 8, 0)
    assert needs("zero2", 8) == (4 + 4 / 8 + 12 / 8, 0)
    assert needs("zero2", 8, "--training.precision=bf16-mixed") == (2 + 4 / 8 + 12 / 8, 0)
    assert needs("zero3", 8, "--training.precision=bf16-mixed", "--training.gain_group_sequences=1") == (18 / 8, 0)
    assert needs("zero2", 8, "--cluster.offload_optimizer=true") == (4 + 4 / 8, 12 / 8)


def test_a_checkpoint_on_disk_is_as_large_as_predicted(tmp_path):
    from training_setup import fit

    config = small_config()
    run = fit(config, tmp_path)
    (folder, *_) = run.checkpoints.glob("step-*")
    measured = sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".ckpt", ".pt")) / GIB
    assert checkpoint_gib(config) < measured < checkpoint_gib(config) + 200_000 / GIB  # names, generators, loop state
    assert checkpoints_kept(dataclasses.replace(config, checkpoints=load_run([]).checkpoints)) == 3


# ---------------------------------------------------------------- the same world


def test_the_sample_of_the_data_sees_another_token_behind_the_same_manifest():
    class Damaged(MemoryStore):
        def read(self, split, source_ids, indices):
            blocks = super().read(split, source_ids, indices)
            blocks[(split == "validation") * (source_ids == 1) * (indices == 7), 3] += 1
            return blocks

    assert data_sample(MemoryStore()) == data_sample(MemoryStore())  # type: ignore[arg-type]
    assert data_sample(MemoryStore()) != data_sample(Damaged())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "counts"),
    [("training/muon.py", 1), ("config/schema.py", 1), ("data/order.py", 1), ("judging/state.py", 0)],
)
def test_the_code_hash_covers_what_computes_and_not_the_judging_page(tmp_path, monkeypatch, file, counts):
    package = Path(manifest.__file__).parents[1]
    for part in (*manifest.COMPUTES, "judging"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (shutil.copytree if (package / part).is_dir() else shutil.copy)(package / part, tmp_path / part)
    before = manifest.code_hash()
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "runs" / "manifest.py"))
    assert manifest.code_hash() == before
    with open(tmp_path / file, "a") as source:
        source.write("\n")
    assert (manifest.code_hash() != before) == counts


def test_ranks_that_add_up_wrongly_are_named(tmp_path):
    """Two real ranks: the sum holds and has a bandwidth; then one rank adds something else."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, sys\nimport torch.distributed as dist\n"
        "from replication.training import checks as preflight\n"
        "dist.init_process_group('gloo')\n"
        "right = preflight.check_all_reduce()\n"
        "own = dist.get_rank()\n"
        "preflight.rank = lambda: own * 5\n"
        "try:\n    preflight.check_all_reduce()\n    wrong = ''\n"
        "except ValueError as error:\n    wrong = str(error)\n"
        f"open(f'{tmp_path}/{{own}}.json', 'w').write(json.dumps([right, wrong]))\n"
    )
    code = (
        "import sys; from replication.processes.launcher import run_ranks; "
        f"sys.exit(run_ranks([sys.executable, '{script}'], 2))"
    )
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, timeout=120, env=environment)
    for rank in (0, 1):
        bandwidth, wrong = json.loads((tmp_path / f"{rank}.json").read_text())
        assert bandwidth > 0
        assert wrong.startswith("all-reduce: 1048576 of 1048576 sums of 2 ranks are not 3; the network")


# ---------------------------------------------------------------- room


def room(config, tmp_path, monkeypatch, memory=100.0, disk=100.0, scratch=100.0) -> str:
    run = RunDir(tmp_path / "cell")
    run.root.mkdir(exist_ok=True)

    def usage(path):
        free = disk if Path(path) == run.root else scratch
        return type("Usage", (), {"free": free * GIB})

    monkeypatch.setattr(module, "free_host_gib", lambda config: memory)
    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    with pytest.raises(UserError) as error:
        check_room(config, run)
    return str(error.value)


def test_too_little_room_is_one_line_before_the_first_step(tmp_path, monkeypatch):
    config = small_config()
    line = room(config, tmp_path, monkeypatch, memory=0.0001)
    assert line.startswith("cluster.strategy: single on 1 process(es) keeps ")
    assert line.endswith("take more nodes or a higher ZeRO stage, or raise cluster.slurm.memory_gib")
    assert room(config, tmp_path, monkeypatch, disk=0.0001).startswith(f"{tmp_path}/cell: checkpoints need ")
    assert "of scratch left on rank 0; make room, or point TMPDIR" in room(config, tmp_path, monkeypatch, scratch=0.01)


def test_what_a_micro_batch_keeps_for_its_backward_must_fit(tmp_path, monkeypatch):
    config = small_config()
    state, kept = state_needs(config).device_gib, activation_gib(config)
    line = room(config, tmp_path, monkeypatch, memory=state_needs(config).host_gib + state + kept / 2)
    assert line.startswith("cluster.micro_batch_sequences: 8 sequences keep at least ")
    assert line.endswith("take fewer, or cluster.activation_checkpointing, or cluster.head: chunked")
    half, least = (replace(config, cluster=replace(config.cluster, **c)) for c in (
        {"micro_batch_sequences": 4}, {"activation_checkpointing": True, "head": "chunked"}))  # fmt: skip
    assert activation_gib(half) == kept / 2
    assert activation_gib(least) < kept


@pytest.mark.parametrize("precision, dtype", [("bf16-mixed", torch.float32), ("32-true", torch.float32),
                                              ("64-true", torch.float64)])  # fmt: skip
@pytest.mark.parametrize("feed_forward", ["dense", "moe"])
def test_a_block_never_keeps_less_than_the_preflight_says(precision, dtype, feed_forward):
    """Counted as autograd saves it: a run that fits is not refused."""
    config = small_config("baseline", f"--training.precision={precision}", "--cluster.head=chunked")
    m = replace(config.model, feed_forward=feed_forward, d_model=64, d_ff=96)
    config = replace(config, model=m)
    batch, length = config.micro_batch_sequences, config.data.block_size_tokens
    block = Block(m).to(dtype)
    x_BTD = torch.randn(batch, length, m.d_model, dtype=dtype, requires_grad=True)
    angles = rotary(m.rotary_base, m.d_head, 0, length, x_BTD.device, dtype)
    own = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *angles)}
    kept = {}

    def keep(value):
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage
        return value

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast:
        out = block(x_BTD, angles, 2)
    found = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    assert out[0].shape == x_BTD.shape
    assert 0.5 < activation_gib(config) * GIB / m.n_blocks / found < 1.0


def test_the_published_model_keeps_what_was_counted_of_its_compiled_graphs():
    """1,364 MiB and an input of 64 in each of 20 blocks: read off inductor's code for an H100 (bench/README.md)."""
    config = load_run(["model/1b2.yaml", "training/phase3.yaml", "cluster/one_gpu.yaml"])
    weights = 96 / 1024  # cast copies, which stand beside the micro-batch's own
    assert activation_gib(config) / 20 == pytest.approx(1428 / 1024 - weights, rel=0.02)
    with_logits = replace(config, cluster=replace(config.cluster, head="logits"))
    assert activation_gib(with_logits) - activation_gib(config) == pytest.approx(11.7, rel=0.25)


def test_the_memory_of_a_job_is_what_it_was_given(monkeypatch):
    config = small_config()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    assert module.free_host_gib(config) == 0.5
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node's
    assert module.free_host_gib(config) > 0.5


# ---------------------------------------------------------------- places that others give


STEP = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SITE_MASTER_ADDR": "10.0.0.1",
}  # fmt: skip


def placed(monkeypatch, *flags: str, **changes: str) -> bool:
    for name in PLACE:
        monkeypatch.setenv(name, "7")  # a login shell's own; what is set below is undone
    for name, value in (STEP | changes).items():
        monkeypatch.setenv(name, value)
    keys = ("--cluster.strategy=ddp", "--training.batch_tokens=4096", "--cluster.nodes=2", "--cluster.devices=8")
    return adopt_place(load_run([], [*keys, *flags]))


def test_a_rank_that_srun_started_takes_its_place_from_the_step(monkeypatch):
    assert placed(monkeypatch)
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["11", "3", "1", "16", "8", "10.0.0.1"]
    assert "MASTER_PORT" not in os.environ, "the first rank says where all meet"


def test_another_number_of_tasks_than_the_config_says_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"asks for 8 processes on each of 2 node\(s\), srun started 4\(x2\); start it"):
        placed(monkeypatch, SLURM_STEP_NUM_TASKS="8", SLURM_STEP_TASKS_PER_NODE="4(x2)")
    with pytest.raises(UserError, match=r"asks for 8 processes on each of 2 node\(s\), srun started 8,7"):
        placed(monkeypatch, SLURM_STEP_NUM_TASKS="15", SLURM_STEP_TASKS_PER_NODE="8,7")
    with pytest.raises(UserError, match=r"the config asks for 8 x 2 processes, the launcher started 4; start as many"):
        placed(monkeypatch, RANK="0", WORLD_SIZE="4", TORCHELASTIC_RUN_ID="x")


def test_a_single_task_is_no_rank(monkeypatch):
    assert not placed(monkeypatch, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1")
    assert "RANK" not in os.environ
