"""Our weights in the layout of transformers' `HunYuanMoEV1ForCausalLM`, which computes the same function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from replication.config import ModelConfig
from replication.errors import UserError


def hunyuan_config(config: ModelConfig, max_positions: int, end_of_text: int) -> dict[str, Any]:
    """Keyword arguments of transformers' HunYuanMoEV1Config for a model of ours.

    Raises:
        UserError: the model is not of that family (dense, QK-norm elsewhere, no shared expert).
    """
    for ok, key in (
        (config.feed_forward == "moe", "model.feed_forward: must be moe"),
        (config.qk_norm == "after_rotary", "model.qk_norm: must be after_rotary"),
        (config.shared_expert, "model.shared_expert: must be true"),
    ):
        if not ok:
            raise UserError(f"{key} for the HunYuanMoEV1 layout")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_blocks,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "num_experts": config.n_experts,
        "moe_topk": config.top_k,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "initializer_range": config.init_std,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "eod_token_id": end_of_text,
    }


def to_hunyuan(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Transformer's state dict under the names and shapes of HunYuanMoEV1ForCausalLM.

    Experts are stacked there: gate_up_proj [E, 2F, D] (gate above up) and down_proj [E, D, F].
    """
    out = {
        "model.embed_tokens.weight": state["embedding.weight"][: config.vocab_size],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"][: config.vocab_size],
    }
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "attention.q_norm.weight": "self_attn.query_layernorm.weight",
        "attention.k_norm.weight": "self_attn.key_layernorm.weight",
        "feed_forward.router.weight": "mlp.gate.wg.weight",
        **{f"attention.{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"feed_forward.shared.{x}.weight": f"mlp.shared_mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    }
    for i in range(config.n_blocks):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        out |= {theirs + b: state[ours + a] for a, b in names.items()}
        gate, up, down = (
            [state[f"{ours}feed_forward.{x}.{e}"] for e in range(config.n_experts)] for x in ("gate", "up", "down")
        )
        gate_up = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        out[f"{theirs}mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{theirs}mlp.experts.down_proj"] = torch.stack(down)
    return out
