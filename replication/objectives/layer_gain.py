"""Layer gain: one scale for all gradients of a block, from the blocks' divergences (README.md, Layer gain).

Shapes: L blocks, S gain groups of one step, in global order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from replication.config import LayerGainConfig
from replication.objectives.plugins import Context, Function


def step_divergence(config: LayerGainConfig, divergence_LS: Tensor) -> Tensor:
    """One divergence a block for the step: [L].

    Args:
        config: `divergence` says mean over the groups of the step, or the last group in global order (published).
        divergence_LS: d of each block and group, at least fp32.
    """
    return divergence_LS.mean(1) if config.divergence == "step_mean" else divergence_LS[:, -1]


def included_blocks(config: LayerGainConfig, n_blocks: int) -> Tensor:
    """Bool [L]: False for excluded blocks, which keep scale 1 and leave the mean."""
    included = torch.ones(n_blocks, dtype=torch.bool)
    included[list(config.exclude_blocks)] = False
    return included


@torch.no_grad()
def layer_scales(
    config: LayerGainConfig,
    divergence_L: Tensor,
    included_L: Tensor,
    function: Function | None = None,
    context: Context | None = None,
) -> Tensor:
    """scale_i = clamp(1 + t * (d_i / mean(d) - 1), m_min, m_max): [L], whatever `config.enabled` says.

    Args:
        config: constants.
        divergence_L: of the whole step, equal on every rank.
        included_L: bool, on the same device; the mean is over included blocks.
        function: a plugin's, which `config.function` names; it acts in place of the formula.
        context: of the step, or of the micro-batch whose divergences these are; a function needs one.

    Returns:
        Scales in the dtype of divergence_L; all 1 where the mean is below 1e-12, 1 for excluded blocks.
    """
    if config.function is not None:
        assert function is not None and context is not None, f"{config.function} was not loaded"
        kept = [i for i in range(len(divergence_L)) if i not in config.exclude_blocks]
        found = function(context, torch.stack([divergence_L[i] for i in kept])).detach()
        scale_L = torch.ones_like(divergence_L)
        for i, value in zip(kept, found.clamp(config.m_min, config.m_max) if function.clamp else found, strict=True):
            scale_L[i] = value  # block by block: an index of several would be read by the host
        return scale_L
    mean = divergence_L.masked_fill(~included_L, 0.0).sum() / included_L.sum()
    scale_L = (1 + config.t * (divergence_L / mean.clamp(min=1e-12) - 1)).clamp(config.m_min, config.m_max)
    return torch.where(included_L & (mean >= 1e-12), scale_L, torch.ones_like(scale_L))


def permuted_scales(scale_L: Tensor, exclude_blocks: Sequence[int], seed: int) -> Tensor:
    """The same scales, each on another block than its own: [L]. Excluded blocks keep theirs.

    The included blocks are a cycle that the seed turns, by the same for every step: a scale acts by how it varies over
    the steps, and that stays as it is.
    """
    kept = [i for i in range(len(scale_L)) if i not in exclude_blocks]
    turned, order = 1 + seed % (len(kept) - 1), list(range(len(scale_L)))
    for place, block in enumerate(kept):
        order[block] = kept[place - turned]
    return torch.stack([scale_L[i] for i in order])  # block by block: an index of several would be read by the host


def multiply_whole(blocks: Sequence[Sequence[Parameter]], scale_L: Tensor) -> None:
    """Multiply what `.grad` holds of each block's parameters on this rank: all of it, or FSDP2's shard.

    Under ZeRO it is None, and this would do nothing.
    """
    for block, scale in zip(blocks, scale_L, strict=True):
        multiply([p.grad for p in block if p.grad is not None], scale)


@torch.no_grad()
def multiply(gradients: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply gradients in place by one scale; of a DTensor this rank's shard."""
    if gradients:
        here = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        torch._foreach_mul_(here, scale.to(here[0]))


def in_global_order(micro_batches: Sequence[Tensor]) -> Tensor:
    """Divergences [L, S] of the step's groups from those [L, G] of this rank's micro-batches: one all-gather.

    Slices of the global batch go to (micro-batch, rank) in order. Micro-batches may differ in G, ranks may not.
    """
    everyone_RLS = gather(torch.cat(list(micro_batches), dim=1))
    parts_RLG = everyone_RLS.split([part_LG.shape[1] for part_LG in micro_batches], dim=2)
    return torch.cat([part_RLG.transpose(0, 1).flatten(1) for part_RLG in parts_RLG], dim=1)


def gather(local: Tensor) -> Tensor:
    """Every rank's tensor of one shape, stacked in rank order: [world, ...], the same on every rank."""
    if not dist.is_initialized():
        return local[None]
    out = local.new_empty(dist.get_world_size() * local.numel())
    dist.all_gather_into_tensor(out, local.reshape(-1))
    return out.view(-1, *local.shape)
