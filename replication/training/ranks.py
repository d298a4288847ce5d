"""Collectives over the processes of one run; with one process each is the identity and touches no network."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from replication.config import RunConfig
from replication.errors import UserError


def launched_rank() -> int:
    """This process's rank as its launcher set it, before any process group exists; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave_group() -> None:
    """End the process group after a success, when all have arrived; after a failure it is left to the launcher."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(local: Tensor) -> Tensor:
    """Every rank's tensor of one shape, stacked in rank order: [world, ...], the same on every rank."""
    if not dist.is_initialized():
        return local[None]
    out = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(out, local.contiguous())
    return torch.stack(out)


def gather_objects(local: Any) -> list[Any]:
    """Every rank's picklable object, in rank order."""
    if not dist.is_initialized():
        return [local]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, local)
    return out


def check_ranks(config: RunConfig, identity: dict[str, str]) -> None:
    """Raise UserError on every rank where the world is not what the config says, or the ranks are not alike.

    Args:
        config: the run's.
        identity: hashes that must agree: config, data, weights at start.
    """
    count = int(gather(torch.ones((), device=_device())).sum())
    if count != config.world_size:
        raise UserError(
            f"cluster.devices x cluster.nodes: the config asks for {config.world_size} processes, {count} answered; "
            "start as many tasks as the config says"
        )
    everyone = gather_objects(identity)
    for key in identity:
        values = [other[key] for other in everyone]
        if len(set(values)) > 1:
            raise UserError(f"{key}: differs between ranks ({dict(enumerate(values))}); give every node the same files")


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
