"""Per-token cross-entropy, and the two token entropies.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position that has no loss."""


class TokenLosses(NamedTuple):
    """Losses of N tokens in nats; 0 where the target is IGNORE. At least fp32."""

    smoothed_N: Tensor  # with label smoothing: what is trained
    plain_N: Tensor  # without: -log p(target)


def token_losses(logits_NV: Tensor, targets_N: Tensor, label_smoothing: float) -> TokenLosses:
    """Cross-entropy of each token, with and without label smoothing; nothing is reduced.

    smoothed = (1 - a) * plain + a * mean over the vocabulary of -log p, as torch's own cross_entropy, and bit-equal to
    it. Both carry gradients; only the smoothed one is normally used for them.

    Args:
        logits_NV: any float dtype; computed in at least fp32.
        targets_N: int64 in 0..V-1, or IGNORE.
        label_smoothing: a in [0, 1).
    """
    return losses_of(log_probabilities(logits_NV), targets_N, label_smoothing)


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """log softmax over the vocabulary [N, V], in at least fp32."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)


def losses_of(log_probs_NV: Tensor, targets_N: Tensor, label_smoothing: float) -> TokenLosses:
    """token_losses, where the log probabilities are at hand."""
    plain_N = F.nll_loss(log_probs_NV, targets_N, ignore_index=IGNORE, reduction="none")
    if label_smoothing == 0.0:
        return TokenLosses(plain_N, plain_N)
    uniform_N = -log_probs_NV.sum(-1)
    uniform_N = uniform_N.masked_fill(targets_N == IGNORE, 0.0)
    spread = label_smoothing / log_probs_NV.shape[-1]
    return TokenLosses(plain_N * (1 - label_smoothing) + uniform_N * spread, plain_N)


class EntropySums(NamedTuple):
    """Sums over valid tokens, to be added up over micro-batches and ranks."""

    predictive: Tensor  # [] sum of the entropies of the predictive distributions, nats
    predicted_V: Tensor  # how often each entry is the most likely next token


@torch.no_grad()
def entropy_sums(log_probs_NV: Tensor, valid_N: Tensor) -> EntropySums:
    """Both candidates for the paper's undefined 'token entropy', as sums over the valid tokens (objectives/README.md).

    Args:
        log_probs_NV: finite log probabilities, as the loss has them at hand.
        valid_N: bool.
    """
    weight_N = valid_N.to(log_probs_NV.dtype)
    predictive = -(torch.linalg.vecdot(log_probs_NV.exp(), log_probs_NV) * weight_N).sum()
    counts_V = log_probs_NV.new_zeros(log_probs_NV.shape[1])
    return EntropySums(predictive, counts_V.index_add_(0, _most_likely(log_probs_NV), weight_N))


def _most_likely(log_probs_NV: Tensor) -> Tensor:
    """argmax over the vocabulary [N]: of 64 entries first, which torch vectorises on a CPU, where its argmax is not."""
    if log_probs_NV.shape[1] % 64:
        return log_probs_NV.argmax(-1)
    parts_NPC = log_probs_NV.unflatten(1, (-1, 64))
    part_N = parts_NPC.amax(-1).argmax(-1)
    return 64 * part_N + parts_NPC[torch.arange(len(part_N), device=part_N.device), part_N].argmax(-1)


@torch.no_grad()
def token_entropies(chunks: Iterable[Tensor]) -> Tensor:
    """Entropies of the predictive distributions, in nats [N], at least fp32, of a few tokens' logits at a time."""
    log_probs = (log_probabilities(logits_RV) for logits_RV in chunks)
    return torch.cat([-torch.linalg.vecdot(log_probs_RV.exp(), log_probs_RV) for log_probs_RV in log_probs])


def histogram_entropy(counts_V: Tensor) -> Tensor:
    """Entropy in nats of a histogram of counts; 0 for an empty one."""
    share_V = counts_V / counts_V.sum().clamp(min=1)
    return torch.special.entr(share_V).sum()


def inputs_and_targets(tokens_BS: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Split stored blocks into inputs [B, T] (padding fed as end-of-text) and targets [B, T] (padding IGNOREd)."""
    tokens_BS = tokens_BS.long()
    padding_BS = tokens_BS < 0
    inputs_BS, targets_BS = tokens_BS.masked_fill(padding_BS, end_of_text), tokens_BS.masked_fill(padding_BS, IGNORE)
    return inputs_BS[:, :-1].contiguous(), targets_BS[:, 1:].contiguous()
