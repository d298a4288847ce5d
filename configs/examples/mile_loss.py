"""MiLe loss (Su et al. 2024, Findings of NAACL, 250-262): a token counts by how unsure the model is at its place.

    gain = (1 + H) ** gamma / mean((1 + H) ** gamma),   H = -sum_v p_v log p_v in nats

Unlike the focal loss it reads the whole predictive distribution, not the right token's probability alone. The mean
keeps the objective in the size of the plain loss, as in the authors' code; here it is taken over the gain group.
"""

from __future__ import annotations

import torch

from replication import gain


@gain
def mile(losses, plain, valid, *, entropy, gamma: float = 1.0):
    """Gain of mean 1 over the group's valid tokens; gamma 1 is the paper's own."""
    raw = (1 + entropy) ** gamma
    mean = raw.masked_fill(~valid, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    return torch.where(valid, raw / mean, 1.0)
