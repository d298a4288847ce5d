"""Save and stop when told to: one rank's flag, agreed by all at an optimizer boundary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from replication.config import RunConfig
from replication.data.module import Batch
from replication.processes.preemption import Preempted, stop_requested
from replication.training.checkpoints import Checkpoints
from replication.training.ranks import barrier


class GracefulStop(Callback):
    """Asks at the start of each step whether any rank was told to stop; then all save, and all raise Preempted.

    The question is one integer, max-reduced over gloo: it reads nothing from a device, and a rank that died breaks it
    at once, where NCCL would wait for its watchdog. Saving at the start of a step is where Checkpoints saves too.
    """

    def __init__(self, config: RunConfig, checkpoints: Checkpoints) -> None:
        self.config, self.checkpoints = config, checkpoints
        self._group: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.config.accumulation or not self._is_any_rank_to_stop():
            return
        step, what = trainer.global_step, "before its first step; nothing was to be saved"
        if step:
            self.checkpoints.save(trainer)
            self.checkpoints.finish()
            barrier()
            what = f"and saved at step {step}"
        raise Preempted(f"{self.config.arm}/seed-{self.config.seed}: told to stop {what}")

    def _is_any_rank_to_stop(self) -> bool:
        if not dist.is_initialized():
            return stop_requested()
        flag = torch.tensor(int(stop_requested()))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)
