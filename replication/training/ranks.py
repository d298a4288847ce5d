"""Collectives over the processes of one run; with one process each is the identity and touches no network."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    out = local.new_empty(dist.get_world_size() * local.numel())
    dist.all_gather_into_tensor(out, local.reshape(-1))
    return out.view(-1, *local.shape)


def sum_over_ranks(local: Tensor) -> None:
    """Replace a contiguous tensor by its sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(local)


def gather_objects(local: Any) -> list[Any]:
    """Every rank's picklable object, in rank order."""
    if not dist.is_initialized():
        return [local]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, local)
    return out


def device() -> str:
    """Device of the tensors of collectives."""
    return f"cuda:{torch.cuda.current_device()}" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
