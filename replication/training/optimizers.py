"""The optimizer, its explicit parameter groups, and the learning-rate schedule; and `replicate train --dry-run`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from replication.config import RunConfig, TrainingConfig, scientific_hash
from replication.console import say, table
from replication.model.foreign import without_memory
from replication.model.moe import MixtureOfExperts
from replication.model.size import activation_gib, checkpoint_gib, gib, state_needs
from replication.model.transformer import Transformer
from replication.training.muon import COEFFICIENTS, Muon, NewtonSchulz


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one rule trains."""

    algorithm: str  # adamw, muon or sgd
    learning_rate: float  # the peak
    weight_decay: float
    parameters: dict[str, Parameter]  # by name


def parameter_groups(config: TrainingConfig, model: nn.Module) -> dict[str, ParameterGroup]:
    """Every parameter by name, in groups that are never empty; a tied head is the embedding and counts as one.

    matrices              decayed: with adamw and sgd the blocks' matrices and an untied head; with muon what is left of
                          them: routers, whose rows are class scores and no map between hidden states, and the head
    embeddings_and_norms  not decayed
    muon                  decayed: the blocks' matrices without routers
    """
    rest = "sgd" if config.optimizer == "sgd" else "adamw"
    rate, decay = config.learning_rate, config.weight_decay
    groups = {
        "matrices": ParameterGroup(rest, rate, decay, {}),
        "embeddings_and_norms": ParameterGroup(rest, rate, 0.0, {}),
        "muon": ParameterGroup("muon", config.muon_learning_rate or rate, decay, {}),
    }
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.head.weight if isinstance(model, Transformer) else None
    routers = {id(m.router.weight) for m in model.modules() if isinstance(m, MixtureOfExperts)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in embeddings:
            group = "embeddings_and_norms"
        elif config.optimizer == "muon" and parameter is not head and id(parameter) not in routers:
            group = "muon"
        else:
            group = "matrices"
        groups[group].parameters[name] = parameter
    return {name: group for name, group in groups.items() if group.parameters}


def build_optimizer(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """AdamW, Muon beside AdamW (decay decoupled in both), or SGD with momentum (decay added to the gradient).

    With bf16-mixed Muon's matrix products are in bf16 (by Gram matrices: fp32), else in the gradients' dtype. Before a
    strategy cuts the model.
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
        how = NewtonSchulz(dtype, COEFFICIENTS[config.muon_coefficients], config.muon_gram)
        return Muon(groups, config.muon_momentum, betas, config.adam_eps, how)
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


def dry_run(config: RunConfig, console: Console) -> None:
    """Print what would be trained, by which rule, and what it takes, of a model that is built without memory."""
    model = without_memory(config.model)
    rows = []
    for name, group in parameter_groups(config.training, model).items():
        rule = f"{name}\n{group.algorithm}\nrate {group.learning_rate:g}\ndecay {group.weight_decay:g}"
        count = sum(p.numel() for p in group.parameters.values())
        names = [f"{n:>4} {pattern}" for pattern, n in folded(group.parameters).items()]
        rows.append((rule, "\n".join([f"{count:,} in {len(group.parameters)} tensors", *names])))
    console.print(table("parameter groups", ["group and rule", "parameters"], rows, lines=True))
    t, needs = config.training, state_needs(config)
    offloaded = f", and {gib(needs.host_gib)} of memory beside it" if needs.host_gib else ""
    facts = {
        "cell": f"{config.arm}/seed-{config.seed}, config hash {scientific_hash(config)}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tokens": f"{t.steps:,} steps of {t.batch_tokens:,}: {t.steps * t.batch_tokens:,}",
        "a step": f"{config.batch_sequences} sequences: {config.accumulation} micro-batch(es) of "
        f"{config.micro_batch_sequences} on each of {config.world_size} process(es), {config.cluster.strategy}",
        "state": f"{gib(needs.device_gib)} a process{offloaded}",
        "backward": f"a micro-batch keeps for it, at least: {gib(activation_gib(config))}",
        "checkpoint": gib(checkpoint_gib(config)),
    }
    for name, value in facts.items():
        say(console, f"{name + ':':<12}{value}")


def folded(names: Iterable[str]) -> dict[str, int]:
    """{blocks.*.attention.q.weight: 20, ...}: names with their numbers as *, and how many fall together."""
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
