"""Checks that turn silent failures into messages: before a weight is moved, and at every optimizer boundary.

Before: whether all processes see the same world, and whether there is room.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from replication.config import RunConfig
from replication.data.folder import SPLITS
from replication.data.module import Batch
from replication.data.store import TokenStore
from replication.errors import Diverged, UserError
from replication.model.size import GIB, StateNeeds, activation_gib, checkpoint_gib, checkpoints_kept, gib, state_needs
from replication.runs.layout import RunDir, cells_in
from replication.runs.manifest import code_identity, find_manifest, update_manifest
from replication.training.checkpoint_files import complete_folders
from replication.training.environment import uses_gpu
from replication.training.module import LanguageModel
from replication.training.ranks import device, gather, gather_objects, is_first, rank, world_size
from replication.training.strategies import ZeroStrategy, is_zero

SCRATCH_MIB = 64  # below this, temporary files of torch and of compilers fail in ways that say nothing
SAMPLED_BLOCKS = 8
ALL_REDUCE_BYTES = {"gloo": 4 * 2**20, "nccl": 64 * 2**20}


class Checks(Callback):
    """Before all callbacks that measure, act or save: what it sees of a step holds for them."""

    def __init__(self, config: RunConfig, run: RunDir, identity: dict[str, str]) -> None:
        """`identity` is what must agree between ranks, by name (train.shared_by_ranks)."""
        self.config, self.run, self.identity = config, run, identity

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The preflight, when the process group stands; each check raises on every rank alike.

        The cell's manifest gets what it found, and what DeepSpeed made of its config.
        """
        code = code_identity()
        versions = ", ".join(f"{name} {version}" for name, version in code.packages.items())
        check_ranks(self.config, self.identity | {"code hash": str(code.code_hash), "package versions": versions})
        found = {**check_room(self.config, self.run), "all_reduce_gb_per_second": check_all_reduce()}
        if trainer.is_global_zero:
            update_manifest(self.run, preflight=found)
            self.run.start.unlink(missing_ok=True)  # every rank has read it by now, and the next start must not

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            # a resumed engine remembers what it skipped
            cast(LanguageModel, pl_module).skipped_steps = trainer.strategy.deepspeed_engine.skipped_steps
            if trainer.is_global_zero:
                update_manifest(self.run, deepspeed=trainer.strategy.resolved_config)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """At a boundary: the step counts agree, and what DeepSpeed knows of the update reaches the module."""
        module, step = cast(LanguageModel, pl_module), trainer.global_step
        if not module.at_boundary:
            return
        counts = {"Lightning": step, "the data": (batch_idx + 1) // self.config.accumulation}
        if isinstance(trainer.strategy, ZeroStrategy):
            engine, limit = trainer.strategy.deepspeed_engine, self.config.training.max_skipped_steps
            counts["DeepSpeed"] = engine.global_steps
            module.grad_norm = torch.as_tensor(engine.get_global_grad_norm(), device=module.device)
            module.step_skipped = engine.skipped_steps > module.skipped_steps
            module.skipped_steps = engine.skipped_steps
            if module.skipped_steps > limit:
                raise Diverged(
                    f"training.max_skipped_steps: DeepSpeed has skipped {module.skipped_steps} updates up to step "
                    f"{step} because a gradient was not finite, {limit} are allowed; lower training.learning_rate, or "
                    "allow more"
                )
        if len(set(counts.values())) > 1:
            raise UserError(
                f"training: the step counts differ ({counts}), so updates were lost or repeated; "
                "remove the newest checkpoint and run again"
            )


def check_neighbours(config: RunConfig, run: RunDir, initial_weights: str) -> None:
    """Raise UserError where another arm of the same seed started elsewhere, or another seed at the same place."""
    for _, _, neighbour in cells_in(run.root.parent.parent):
        other = find_manifest(neighbour)  # a neighbour's damage is the certificate's to name
        if neighbour.root == run.root or other is None or other.weights_seed is None:
            continue
        same_seed = other.weights_seed == config.effective_weights_seed
        same_start = other.initial_weights_sha256 == initial_weights
        if same_seed and not same_start:
            raise UserError(
                f"{neighbour.root}: started from other weights at the same seed {config.effective_weights_seed}; "
                "arms can be compared only from the same start: choose another --out, or remove that cell"
            )
        given = config.training.initial_weights or config.model.initial_weights
        if same_start and not same_seed and given is None:
            raise UserError(
                f"{neighbour.root}: started from the same weights at another seed ({other.weights_seed}, this cell has "
                f"{config.effective_weights_seed}); seeds would not be independent: remove that cell, or this one"
            )


def check_ranks(config: RunConfig, identity: dict[str, str]) -> None:
    """Raise UserError on every rank where the world is not what the config says, or the ranks are not alike."""
    count = int(gather(torch.ones((), device=device())).sum())
    if count != config.world_size:
        raise UserError(
            f"cluster.devices x cluster.nodes: the config asks for {config.world_size} processes, {count} answered; "
            "start as many tasks as the config says"
        )
    first, *others = gather_objects(identity)
    for r, other in enumerate(others, start=1):
        for key, value in first.items():
            if other[key] != value:
                raise UserError(
                    f"{key}: differs between ranks (rank 0 has {value}, rank {r} has {other[key]}); give every node "
                    "the same files"
                )


def data_sample(store: TokenStore) -> str:
    """Hash of a few token blocks of every source, as this node reads them: the corpus's own hash is only its word."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for source, n in enumerate(store.sizes(split)):
            indices = np.unique(np.linspace(0, n - 1, SAMPLED_BLOCKS).astype(np.int64)) if n else np.empty(0, np.int64)
            digest.update(store.read(split, np.full_like(indices, source), indices).tobytes())
    return digest.hexdigest()[:16]


def check_room(config: RunConfig, run: RunDir) -> dict[str, float]:
    """Compare what the run needs with what is free: memory of this process, disk of the cell, scratch; both in GiB.

    UserError on all ranks: what the first rank that lacks room says.
    """
    needs = state_needs(config)
    free_gib = torch.cuda.mem_get_info()[0] / GIB if uses_gpu(config) else free_host_gib(config)
    complaints = [c for c in gather_objects(_complaint(config, run, needs, free_gib)) if c]
    if complaints:
        raise UserError(complaints[0])
    return {"needs_gib": round(needs.device_gib, 3), "free_gib": round(free_gib, 3)}


def _complaint(config: RunConfig, run: RunDir, needs: StateNeeds, free_gib: float) -> str | None:
    where = f"{config.cluster.strategy} on {config.world_size} process(es)"
    host_gib = needs.host_gib if is_zero(config) or is_first() else 0.0
    device_gib = needs.device_gib + (0.0 if uses_gpu(config) else host_gib)  # where the CPU trains, one memory is both
    if not uses_gpu(config):
        host_gib = device_gib
    # of a node's memory each process has a share, but a copy for checkpoints only the first one
    shares = config.cluster.devices if uses_gpu(config) and not is_zero(config) else 1
    if host_gib > free_host_gib(config) * shares:
        return (
            f"cluster.strategy: {where} keeps {gib(host_gib)} in the CPU memory of rank {rank()}, which has "
            f"{gib(free_host_gib(config))} free; take more nodes or a higher ZeRO stage, or raise "
            "cluster.slurm.memory_gib"
        )
    if needs.device_gib > free_gib:
        return (
            f"cluster.strategy: {where} keeps {gib(needs.device_gib)} of weights, gradients and optimizer in each, and "
            f"rank {rank()} has {gib(free_gib)} free; take a higher ZeRO stage, more devices, or "
            "cluster.offload_optimizer"
        )
    room_gib, c = free_gib - device_gib, config.cluster
    if (kept_gib := activation_gib(config)) is not None and kept_gib > room_gib:
        further = [
            f"cluster.{key}"
            for key, taken in (
                ("activation_checkpointing", c.activation_checkpointing),
                ("head: chunked", c.head != "logits"),
            )
            if not taken
        ]
        return (
            f"cluster.micro_batch_sequences: {config.micro_batch_sequences} sequences keep at least {gib(kept_gib)} "
            f"for their backward, and rank {rank()} has {gib(room_gib)} free beside weights, gradients and optimizer; "
            f"take {', or '.join(['fewer', *further])}"
        )
    scratch = Path(tempfile.gettempdir())
    scratch_gib = shutil.disk_usage(scratch).free / GIB
    if scratch_gib * 1024 < SCRATCH_MIB:
        return f"{scratch}: {gib(scratch_gib)} of scratch left on rank {rank()}; make room, or point TMPDIR elsewhere"
    missing = (checkpoints_kept(config) - len(complete_folders(run))) * checkpoint_gib(config)
    disk_gib = shutil.disk_usage(run.root).free / GIB
    if is_first() and missing > disk_gib:
        return (
            f"{run.root}: checkpoints need {gib(missing)}, and {gib(disk_gib)} are free; make room, or lower "
            "checkpoints.keep_last"
        )
    return None


def free_host_gib(config: RunConfig) -> float:
    """This process's share of what is free of the node's memory, or of what the job was given of it."""
    given = os.environ.get("SLURM_MEM_PER_NODE", "")  # MiB
    limit = int(given) * 2**20 if given.isdigit() and int(given) else float("inf")
    return min(psutil.virtual_memory().available, limit) / GIB / config.cluster.devices


def check_all_reduce() -> float | None:
    """Sum a known value over all ranks, twice; UserError where the sum is wrong.

    Returns:
        Bus bandwidth in GB/s, as nccl-tests counts it: 2 (n - 1) / n x bytes / seconds; None on one process.
    """
    n = world_size()
    if n == 1:
        return None
    n_bytes = ALL_REDUCE_BYTES[dist.get_backend()]
    value = torch.full((n_bytes // 4,), float(rank() + 1), device=device())
    seconds = 0.0
    for expected in (n * (n + 1) / 2, n * n * (n + 1) / 2):  # the second is timed: the first opens connections
        gather(torch.ones((), device=device()))  # all ranks start together
        started = time.monotonic()
        dist.all_reduce(value)
        wrong = int((value != expected).sum())  # waits for the result
        seconds = time.monotonic() - started
        if wrong:
            raise UserError(
                f"all-reduce: {wrong} of {value.numel()} sums of {n} ranks are not {expected:g}; the network or its "
                "library is broken: look at the interconnect variables of the site file"
            )
    return round(2 * (n - 1) / n * n_bytes / seconds / 1e9, 3)
