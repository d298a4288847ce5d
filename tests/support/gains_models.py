"""Small models of transformers with random weights, and plain loops over Gains, for the tests of the library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from replication import Gains

VOCAB, LENGTH = 40, 10
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "qwen3_moe": "model.layers"}


def small_model(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    """One of BLOCKS in fp32, in training mode, without dropout."""
    torch.manual_seed(seed)
    heads = {"num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZE, **heads)).train()
    if kind == "gpt2":
        size = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**size, **NO_DROPOUT, initializer_range=0.2)).train()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "output_router_logits": True}
    experts |= {"experts_implementation": "eager"}  # the grouped one knows no fp64
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **heads, **experts)).train()


def random_tokens(sequences: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


def masked(tokens: Tensor) -> Tensor:
    """Labels of the tokens: a prompt of differing length in each sequence has none."""
    prompt = torch.arange(len(tokens))[:, None] % 4 + 1
    return tokens.masked_fill(torch.arange(tokens.shape[1]) < prompt, -100)


def plain_loop(
    model: nn.Module, gains: Gains, steps: list[list[Tensor]], clip: float, rate: float = 0.1
) -> dict[str, Tensor]:
    """SGD over the steps' micro-batches of tokens; the model's weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for micro_batches in steps:
        for tokens in micro_batches:
            (gains.loss(model(tokens).logits, masked(tokens)) / len(micro_batches)).backward()
        gains.scale()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}
