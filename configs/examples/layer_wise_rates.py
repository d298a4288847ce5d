"""Discriminative learning rates (Howard and Ruder 2018, ACL, section 3.2): each block learns slower than the one above.

    rate_l = rate / factor ** (L - 1 - l)

A learning rate, so an arm needs `layer_gain.apply: update`: of a gradient AdamW and Muon cancel a constant scale. The
embedding, the final norm and the head keep the rate of the last block.
"""

from __future__ import annotations

import torch

from replication import scale


@scale
def layer_wise_rates(divergence, *, factor: float = 2.6):
    """1 for the last block; the paper's 2.6 is for fine-tuning, a model that learns from nothing takes less."""
    depth = torch.arange(len(divergence) - 1, -1, -1, device=divergence.device, dtype=divergence.dtype)
    return factor**-depth
