"""Needs of a run, in closed form from its config: memory of each process, disk. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from replication.config import RunConfig
from replication.model.size import muon_parameter_count, parameter_count

GIB = 2**30


def parameters(config: RunConfig) -> int:
    """Trainable parameters of the run's model."""
    return parameter_count(config.model)


@dataclass(frozen=True)
class StateNeeds:
    """Weights, gradients and optimizer of one process, in GiB; activations and buffers come on top."""

    device_gib: float  # on its GPU, or in memory where it trains on the CPU
    host_gib: float  # in memory beside that: what cluster.offload_optimizer moves there


def state_needs(config: RunConfig) -> StateNeeds:
    """Bytes of each parameter, divided by the processes that share them (Rajbhandari et al. 2020, section 3.1).

    Single and DDP keep a weight, a gradient and the optimizer's moments whole. ZeRO keeps a second, fp32 weight beside
    the moments, and shares both (zero1), the gradients too (zero2), the weights too (zero3).
    """
    t, strategy = config.training, config.cluster.strategy
    moments = _moments(config)
    n, count = config.world_size, parameters(config)
    if not strategy.startswith("zero"):
        number = 8 if t.precision == "64-true" else 4
        return StateNeeds((2 + moments) * number * count / GIB, 0.0)
    weights = 2 if t.precision == "bf16-mixed" else 4
    gradients, optimizer = 4.0, 4.0 * (1 + moments) / n
    if strategy != "zero1":
        gradients /= n
    if strategy == "zero3":
        weights /= n  # type: ignore[assignment]
    on_host = optimizer if config.cluster.offload_optimizer else 0.0
    return StateNeeds((weights + gradients + optimizer - on_host) * count / GIB, on_host * count / GIB)


def _moments(config: RunConfig) -> float:
    """Numbers of optimizer state to each parameter: AdamW keeps two, Muon and SGD one."""
    if config.training.optimizer == "muon":
        return 2 - muon_parameter_count(config.model) / parameter_count(config.model)
    return 2 if config.training.optimizer == "adamw" else 1


def checkpoint_gib(config: RunConfig) -> float:
    """One checkpoint: weights and optimizer of all processes, and the consolidated weights once more."""
    number = 8 if config.training.precision == "64-true" else 4
    moments = _moments(config)
    bf16_copy = 2 if config.cluster.strategy.startswith("zero") and config.training.precision == "bf16-mixed" else 0
    return (number * (2 + moments) + bf16_copy) * parameters(config) / GIB


def checkpoints_kept(config: RunConfig) -> int:
    """Most checkpoints of one cell on disk at once, the one being written included."""
    every = config.checkpoints.keep_every_steps
    return config.checkpoints.keep_last + 1 + (config.training.steps // every if every else 0)


def gib(amount: float) -> str:
    """An amount in GiB in words; small ones in MiB."""
    return f"{amount:,.1f} GiB" if amount >= 0.1 else f"{amount * 1024:,.0f} MiB"
