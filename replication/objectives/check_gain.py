"""Checks of a gain or of scales: the harness's promises hold for a function that passes them, and only for such.

They take a Formula, so that a plugin's function and our own are asked the same. Shapes: G gain groups, N tokens in one
group, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from replication.errors import first_line
from replication.model.loss import IGNORE
from replication.objectives.plugins import Context, Function, Kind

Formula = Callable[..., Tensor]
"""(context, loss_GN, plain_GN, valid_GN) -> gains [G, N], or (context, divergence_L) -> scales [L]."""
CONTEXT = Context(seed=7, step=20, steps=100, learning_rate_fraction=0.5)
BLOCKS = 12


def tensors(kind: Kind) -> tuple[Tensor, ...]:
    """Four groups of 32 tokens, of which a quarter do not count, with label smoothing; or 12 divergences. In fp64."""
    g = torch.Generator().manual_seed(0)
    if kind == "scale":
        return (0.2 + torch.rand(BLOCKS, generator=g, dtype=torch.float64),)
    plain_GN = -torch.rand(4, 32, generator=g, dtype=torch.float64).log() * 3
    valid_GN = torch.rand(4, 32, generator=g) > 0.25
    return (0.9 * plain_GN + 0.7).masked_fill(~valid_GN, 0.0), plain_GN.masked_fill(~valid_GN, 0.0), valid_GN


def is_pure(formula: Formula, kind: Kind) -> str:
    """is pure: the same input gives the same output, and is not written to"""
    given = tensors(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = formula(CONTEXT, *given)
        torch.manual_seed(2)
        formula(replace(CONTEXT, step=21, group=3), *(t.roll(1) for t in given))  # what it may remember
        second = formula(CONTEXT, *given)
    if not all(map(torch.equal, given, tensors(kind))):
        return "writes to its arguments; work on new tensors"
    if not torch.equal(first, second):
        return "gives another result at a second call; take random numbers from context.generator, and remember nothing"
    return ""


def carries_no_gradient(formula: Formula, kind: Kind) -> str:
    """carries no gradient"""
    losses = [t.requires_grad_() if t.is_floating_point() else t for t in tensors(kind)]
    with torch.no_grad():
        found = formula(CONTEXT, *losses)
    return "returns a result that a gradient flows through; leave torch's gradients off" if found.requires_grad else ""


def ignores_invalid_tokens(formula: Formula, kind: Kind) -> str:
    """ignores tokens that do not count"""
    loss_GN, plain_GN, valid_GN = tensors(kind)
    first = formula(CONTEXT, loss_GN, plain_GN, valid_GN)
    others = (t.masked_fill(~valid_GN, 9.0) for t in (loss_GN, plain_GN))
    if not torch.equal(first[valid_GN], formula(CONTEXT, *others, valid_GN)[valid_GN]):
        return "depends on losses where `valid` is false; mask them before any sum, mean or extreme"
    return ""


def stays_within_groups(formula: Formula, kind: Kind) -> str:
    """does not depend on how the batch is cut into micro-batches and ranks"""
    given = tensors(kind)
    valid_GN = given[2]
    whole = formula(CONTEXT, *given)
    if not torch.equal(whole, formula(replace(CONTEXT, group=1), *given)):
        return ""  # each group has random numbers of its own: the harness calls it for one at a time
    for size in (1, 2):
        parts = list(zip(*(t.split(size) for t in given), strict=True))
        found = [formula(replace(CONTEXT, group=i * size), *part) for i, part in reversed([*enumerate(parts)])]
        if not torch.allclose(torch.cat(found[::-1])[valid_GN], whole[valid_GN], rtol=1e-12, atol=0):
            return "depends on other groups of the batch; take statistics along the last dimension alone"
    return ""


def is_finite(formula: Formula, kind: Kind) -> str:
    """is finite where losses, or divergences, are extreme"""
    for name, given in _extremes(kind):
        found = formula(CONTEXT, *given)
        if not (found[given[2]] if kind == "gain" else found).isfinite().all():
            return f"is not finite where {name}; add an epsilon, or clamp"
    return ""


def _extremes(kind: Kind) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    what, every = ("losses are", (1, 8)) if kind == "gain" else ("divergences are", (8,))
    some = torch.ones(every, dtype=torch.bool)
    one = torch.arange(8).view(every) == 3
    for dtype in (torch.float64, torch.float32):
        for value in (0.0, 1e-30, 2.0, 1e4):
            full = torch.full(every, value, dtype=dtype)
            mixed = torch.where(one, full, 1.0)
            yield f"all {what} {value:g}", (full, full, some)[: 3 if kind == "gain" else 1]
            yield f"one of the {what} {value:g}", (mixed, mixed, some)[: 3 if kind == "gain" else 1]
            if kind == "gain":
                yield f"one token counts, and its loss is {value:g}", (full, full, one)
                yield "no token counts", (full, full, ~some)


CHECKS: Mapping[Kind, tuple[Callable[[Formula, Kind], str], ...]] = {
    "gain": (is_pure, carries_no_gradient, ignores_invalid_tokens, stays_within_groups, is_finite),
    "scale": (is_pure, carries_no_gradient, is_finite),
}
"""Each says what is wrong, or nothing; its docstring is what holds."""


def faults(function: Function) -> Iterator[tuple[str, str]]:
    """(what a check is about, its fault or nothing), for each check of a function; what it raises is a fault."""
    for check in CHECKS[function.kind]:
        try:
            fault = check(_with_asked(function), function.kind)
        except Exception as error:
            fault = f"raises {type(error).__name__}: {first_line(error)}"
        yield str(check.__doc__), fault


def _with_asked(function: Function) -> Formula:
    """The function with what it asks for beside the losses, made of the same tokens: half of the loss as entropy, and
    two sequences of ids below 7 a group."""

    def formula(context: Context, *given: Tensor) -> Tensor:
        if function.asks:
            _, plain_GN, valid_GN = given
            ids_GN = (torch.arange(plain_GN.shape[1]) % 7).expand(plain_GN.shape)
            targets_GN = ids_GN.masked_fill(~valid_GN, IGNORE)
            inputs, targets = (ids.unflatten(1, (2, -1)) for ids in (ids_GN, targets_GN))
            context = replace(context, asked={"entropy": 0.5 * plain_GN, "inputs": inputs, "targets": targets})
        return function(context, *given)

    return formula


def spread(function: Function) -> str:
    """Mean and range over the checks' own input, in words."""
    given = tensors(function.kind)
    try:
        found = _with_asked(function)(CONTEXT, *given)
    except Exception as error:
        return f"no result ({first_line(error)})"
    found = found[given[2]] if function.kind == "gain" else found
    return f"mean {float(found.mean()):.4g}, from {float(found.min()):.4g} to {float(found.max()):.4g}"
