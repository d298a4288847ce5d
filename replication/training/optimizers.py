"""The optimizer, its explicit parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from replication.config import TrainingConfig
from replication.model.transformer import Transformer


def parameter_groups(model: Transformer) -> dict[str, dict[str, Parameter]]:
    """Every parameter by name, in two groups: matrices (decayed), and embeddings and norms (not decayed).

    A tied head is the embedding and counts as one.
    """
    groups: dict[str, dict[str, Parameter]] = {"matrices": {}, "embeddings_and_norms": {}}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and parameter is not model.embedding.weight
        groups["matrices" if is_matrix else "embeddings_and_norms"][name] = parameter
    return groups


def build_optimizer(config: TrainingConfig, model: Transformer) -> Optimizer:
    """AdamW with decoupled decay, or SGD with momentum whose decay is added to the gradient; on matrices alone."""
    decay = {"matrices": config.weight_decay, "embeddings_and_norms": 0.0}
    groups = [
        {"params": list(group.values()), "weight_decay": decay[name], "name": name}
        for name, group in parameter_groups(model).items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Warmup-stable-decay: the share of the peak rate at a 0-based step.

    Linear from 1/warmup to 1 over the warm-up, 1, then linear over the last decay_steps, ending at 1/decay_steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = config.steps - step
    return min(1.0, left / config.decay_steps) if config.decay_steps else 1.0


def build_schedule(config: TrainingConfig, optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))
