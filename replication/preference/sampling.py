"""Sampling completions with a KV cache; the noise is a counter-based function, never of the row in a batch.

Shapes: B rows (one prompt and sample each), V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replication.model.transformer import KVCache, Transformer

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampler:
    """Temperature and top-k sampling by the Gumbel-max trick."""

    temperature: float
    top_k: int

    def choose(self, logits_BV: Tensor, keys_B: Tensor, position: int | Tensor) -> Tensor:
        """The next token of each row, int64 [B]: argmax of logits / temperature + Gumbel noise over the top k.

        Args:
            logits_BV: any float dtype; used in fp64, so that the draw does not depend on the logits' precision.
            keys_B: int64 key of each row (see row_key).
            position: of the new token in its completion, from 0; the same for all rows or [B].
        """
        scaled_BV = logits_BV.double() / self.temperature
        k = min(self.top_k, logits_BV.shape[-1])
        lowest_B1 = scaled_BV.topk(k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < lowest_B1, float("-inf"))
        return (scaled_BV + gumbel(keys_B, position, logits_BV.shape[-1])).argmax(-1)


def row_key(*parts: object) -> int:
    """A 62-bit key from what names a completion: (arm, seed, prompt id, sample)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def gumbel(keys_B: Tensor, position: int | Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [B, V] in fp64, a pure function of (key, position, token)."""
    device = keys_B.device
    tokens_V = torch.arange(vocab, device=device, dtype=torch.int64)
    position_B = torch.as_tensor(position, device=device, dtype=torch.int64).expand(keys_B.shape)
    row_B = _mix(_mix((keys_B & _MASK32) ^ (position_B * 0x9E3779B1 & _MASK32)) ^ (keys_B >> 32))
    high_BV = _mix(row_B[:, None] ^ _mix(tokens_V + 0x632BE5AB))
    low_BV = _mix(high_BV ^ 0x5BD1E995)
    # 52 bits, centred in their cell so that neither 0 nor 1 occurs
    uniform_BV = ((high_BV << 20 | low_BV >> 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform_BV))


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (murmur3's constants) on int64 tensors holding values below 2**32."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


@torch.inference_mode()
def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampler: Sampler,
    max_new_tokens: int,
    end_of_text: int,
) -> list[list[int]]:
    """Continue every prompt, all rows in one batch, until end-of-text or max_new_tokens.

    Rows are aligned at position 0: the common prefix length is prefilled at once, after that a row is fed its own
    prompt until that ends and its own samples from there, so that no row needs padding or a mask.

    Args:
        prompts: token ids of each row, at least one each.
        keys: one key a row.
        end_of_text: stops a row; not part of its completion.

    Returns:
        Sampled token ids of each row.
    """
    device = model.embedding.weight.device
    lengths = [len(p) for p in prompts]
    prefill, total = min(lengths), max(lengths) + max_new_tokens
    tokens_BT = torch.zeros((len(prompts), total + 1), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    tokens_BT = tokens_BT.to(device)
    lengths_B = torch.tensor(lengths, device=device)
    keys_B = torch.tensor(list(keys), dtype=torch.int64, device=device)
    done_B = torch.zeros_like(lengths_B, dtype=torch.bool)
    ends_B = lengths_B + max_new_tokens
    cache = KVCache(model.config, len(prompts), total, device, model.embedding.weight.dtype)

    start = 0
    for end in range(prefill, total):
        hidden_BTD = model(tokens_BT[:, start:end], cache=cache).hidden_BTD
        choice_B = sampler.choose(model.logits(hidden_BTD[:, -1]), keys_B, end - lengths_B)
        samples = end >= lengths_B
        tokens_BT[:, end] = torch.where(samples, choice_B, tokens_BT[:, end])
        stopped_B = samples & ~done_B & (choice_B == end_of_text)
        ends_B = torch.where(stopped_B, end, ends_B)
        done_B |= stopped_B | (end + 1 >= ends_B)
        start = end
        if bool(done_B.all()):
            break
    rows = tokens_BT.tolist()
    return [row[a:b] for row, a, b in zip(rows, lengths, ends_B.tolist(), strict=True)]
