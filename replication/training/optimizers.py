"""The optimizer, its explicit parameter groups, and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from replication.config import TrainingConfig
from replication.model.moe import MixtureOfExperts
from replication.model.transformer import Transformer
from replication.training.muon import Muon


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one rule trains."""

    algorithm: str
    """adamw, muon or sgd."""
    learning_rate: float
    """Peak rate."""
    weight_decay: float
    parameters: dict[str, Parameter]
    """By name."""


def parameter_groups(config: TrainingConfig, model: Transformer) -> dict[str, ParameterGroup]:
    """Every parameter by name, in groups that are never empty; a tied head is the embedding and counts as one.

    matrices              decayed: with adamw and sgd the blocks' matrices and an untied head; with muon what is left of
                          them: routers, whose rows are class scores and no map between hidden states, and the head
    embeddings_and_norms  not decayed
    muon                  decayed: the blocks' matrices without routers
    """
    routers = {id(m.router.weight) for m in model.modules() if isinstance(m, MixtureOfExperts)}
    names: dict[str, dict[str, Parameter]] = {"matrices": {}, "embeddings_and_norms": {}, "muon": {}}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter is model.embedding.weight:
            group = "embeddings_and_norms"
        elif config.optimizer == "muon" and parameter is not model.head.weight and id(parameter) not in routers:
            group = "muon"
        else:
            group = "matrices"
        names[group][name] = parameter
    rest = "sgd" if config.optimizer == "sgd" else "adamw"
    rules = {
        "matrices": (rest, config.learning_rate, config.weight_decay),
        "embeddings_and_norms": (rest, config.learning_rate, 0.0),
        "muon": ("muon", config.muon_learning_rate or config.learning_rate, config.weight_decay),
    }
    return {name: ParameterGroup(*rules[name], found) for name, found in names.items() if found}


def build_optimizer(config: TrainingConfig, model: Transformer) -> Optimizer:
    """AdamW, Muon beside AdamW (decay decoupled in both), or SGD with momentum (decay added to the gradient).

    With bf16-mixed Muon's matrix products are in bf16, else in the gradients' dtype. Before a strategy cuts the model.
    """
    groups = [
        {"params": list(g.parameters.values()), "lr": g.learning_rate, "weight_decay": g.weight_decay, "name": name}
        for name, g in parameter_groups(config, model).items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    betas = (config.beta1, config.beta2)
    if config.optimizer == "muon":
        groups = [g | {"muon": g["name"] == "muon"} for g in groups]
        dtype = torch.bfloat16 if config.precision == "bf16-mixed" else None
        return Muon(groups, config.muon_momentum, betas, config.adam_eps, dtype)
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
