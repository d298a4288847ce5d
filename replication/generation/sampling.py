"""Sampling completions with a KV cache; the noise is a counter-based function, never of the row in a batch.

Shapes: N rows (one prompt and sample each), B of them in the batch, V vocabulary, K of them kept by top-k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replication.model.foreign import Model

_MASK32 = 0xFFFFFFFF
KEPT = 0.75  # share of a batch's rows at which those that have ended leave it: moving the others costs about a step


@dataclass(frozen=True)
class Sampler:
    """Temperature, then top-k, then nucleus sampling, by the Gumbel-max trick."""

    temperature: float
    top_k: int
    top_p: float = 1.0

    def choose(self, logits_BV: Tensor, keys_B: Tensor, position: int | Tensor) -> Tensor:
        """The next token of each row, int64 [B]: argmax of logits / temperature + Gumbel noise over what is kept.

        Kept are the K largest logits, and of their distribution the likeliest tokens up to and with the one that
        brings the sum of probabilities to top_p. Noise is drawn for the K tokens alone, which changes no token's.
        In fp64, so that the draw does not depend on the logits' precision. `keys_B` are of row_key; `position`, that of
        the new token in its completion, from 0, is one for all rows or [B].
        """
        largest_BK, tokens_BK = logits_BV.topk(min(self.top_k, logits_BV.shape[-1]), dim=-1)
        scaled_BK = largest_BK.double() / self.temperature
        if self.top_p < 1:
            probs_BK = scaled_BK.softmax(-1)
            likelier_BK = probs_BK.cumsum(-1) - probs_BK  # than this one, together
            likelier_BK[:, 0] = 0  # the likeliest is always kept
            scaled_BK = scaled_BK.masked_fill(likelier_BK >= self.top_p, float("-inf"))
        best_B1 = (scaled_BK + gumbel(keys_B, position, tokens_BK)).argmax(-1, keepdim=True)
        return tokens_BK.gather(-1, best_B1).squeeze(-1)


def row_key(*parts: object) -> int:
    """A 62-bit key from what names a completion: (arm, seed, prompt id, sample)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def gumbel(keys_B: Tensor, position: int | Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise [B, K] in fp64, a pure function of (key, position, token).

    The position is one, or [B]; tokens are int64 ids, [K] for all rows or [B, K].
    """
    position_B = torch.as_tensor(position, device=keys_B.device, dtype=torch.int64).expand(keys_B.shape)
    row_B = _mix(_mix((keys_B & _MASK32) ^ (position_B * 0x9E3779B1 & _MASK32)) ^ (keys_B >> 32))
    high_BK = _mix(row_B[:, None] ^ _mix(tokens + 0x632BE5AB))
    low_BK = _mix(high_BK ^ 0x5BD1E995)
    # 52 bits, centred in their cell so that neither 0 nor 1 occurs
    uniform_BK = ((high_BK << 20 | low_BK >> 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform_BK))


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (murmur3's constants) on int64 tensors holding values below 2**32."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


@torch.inference_mode()
def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampler: Sampler,
    max_new_tokens: int,
    end_of_text: int,
    on_step: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt, all rows side by side, until end-of-text or max_new_tokens.

    Rows are aligned at position 0: the common prefix length is prefilled at once, after that a row is fed its own
    prompt until that ends and its own samples from there, so that no row needs padding or a mask. Rows that have ended
    leave the batch, some at a time.

    Args:
        prompts: token ids of each row, at least one each; of similar lengths it goes faster.
        keys: one a row, see row_key.
        end_of_text: stops a row; not part of its completion.
        on_step: told after each step how many tokens it sampled, and how many rows have ended so far.
    """
    device, n_rows = next(iter(model.parameters())).device, len(prompts)
    lengths = [len(p) for p in prompts]
    prefill, total = min(lengths), max(lengths) + max_new_tokens
    tokens_NT = torch.zeros((n_rows, total), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_NT[row, : len(prompt)] = torch.tensor(prompt)
    tokens_NT = tokens_NT.to(device)
    rows_B = torch.arange(n_rows, device=device)  # which of the N rows are in the batch
    lengths_B = torch.tensor(lengths, device=device)
    keys_B = torch.tensor(keys, dtype=torch.int64, device=device)
    ends_N = lengths_B + max_new_tokens
    cache = model.new_cache(n_rows, total)

    fed_BT = tokens_NT[:, :prefill]
    for end in range(prefill, total):
        choice_B = sampler.choose(model.logits(model(fed_BT, cache=cache).hidden_BTD[:, -1]), keys_B, end - lengths_B)
        live_B = (end >= lengths_B) & (end < ends_N[rows_B])
        next_B = torch.where(live_B, choice_B, tokens_NT[rows_B, end])
        tokens_NT[rows_B, end] = next_B
        ends_N[rows_B] = torch.where(live_B & (choice_B == end_of_text), end, ends_N[rows_B])
        left_B = end + 1 < ends_N[rows_B]
        n_sampled, n_left = torch.stack((live_B.sum(), left_B.sum())).tolist()  # the one wait for the device
        if on_step is not None:
            on_step(n_sampled, n_rows - n_left)
        if n_left == 0:
            break
        if n_left <= KEPT * len(rows_B):
            stay_R = left_B.nonzero().squeeze(1)
            rows_B, lengths_B, keys_B, next_B = (x[stay_R] for x in (rows_B, lengths_B, keys_B, next_B))
            cache.keep(stay_R)
        fed_BT = next_B[:, None]
    rows = tokens_NT.tolist()
    return [row[a:b] for row, a, b in zip(rows, lengths, ends_N.tolist(), strict=True)]
