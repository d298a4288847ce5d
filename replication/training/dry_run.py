"""`replicate train --dry-run`: what would be trained, by which rule, and what it takes; nothing is read or written."""

from __future__ import annotations

import re
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table

from replication.config import RunConfig, scientific_hash
from replication.console import say, table
from replication.model.size import checkpoint_gib, gib, state_needs
from replication.model.transformer import Transformer
from replication.training.optimizers import ParameterGroup, parameter_groups


def dry_run(config: RunConfig, console: Console) -> None:
    """Print the parameter groups by name, and the run's size, of a model that is built without memory."""
    with torch.device("meta"):
        model = Transformer(config.model)
    console.print(group_table(parameter_groups(config.training, model)))
    t, needs = config.training, state_needs(config)
    offloaded = f", and {gib(needs.host_gib)} of memory beside it" if needs.host_gib else ""
    facts = {
        "cell": f"{config.arm}/seed-{config.seed}, config hash {scientific_hash(config)}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tokens": f"{t.steps:,} steps of {t.batch_tokens:,}: {t.steps * t.batch_tokens:,}",
        "a step": f"{config.batch_sequences} sequences: {config.accumulation} micro-batch(es) of "
        f"{config.micro_batch_sequences} on each of {config.world_size} process(es), {config.cluster.strategy}",
        "state": f"{gib(needs.device_gib)} a process{offloaded}; activations come on top",
        "checkpoint": gib(checkpoint_gib(config)),
    }
    for name, value in facts.items():
        say(console, f"{name + ':':<12}{value}")


def group_table(groups: dict[str, ParameterGroup]) -> Table:
    """One row a group: its rule, and its parameters with the numbers of blocks and experts folded to *."""
    rows = []
    for name, group in groups.items():
        rule = f"{name}\n{group.algorithm}\nrate {group.learning_rate:g}\ndecay {group.weight_decay:g}"
        names = [f"{n:>4} {pattern}" for pattern, n in folded(list(group.parameters)).items()]
        count = sum(p.numel() for p in group.parameters.values())
        rows.append((rule, "\n".join([f"{count:,} in {len(group.parameters)} tensors", *names])))
    return table("parameter groups", ["group and rule", "parameters"], rows, lines=True)


def folded(names: list[str]) -> dict[str, int]:
    """{blocks.*.attention.q.weight: 20, ...}: names with their numbers as *, and how many fall together."""
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
