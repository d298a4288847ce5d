"""Our weights under the names and shapes of the transformers class that computes the same function.

The place of the QK-norm, and what stands beside routed experts, decide the class. Imports no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replication.config import ModelConfig
from replication.errors import UserError


@dataclass(frozen=True)
class Layout:
    """What one class of transformers calls otherwise than the rest."""

    model_type: str  # as AutoConfig knows it
    norms: tuple[str, str] = ("q_norm", "k_norm")
    router: str = "gate"


HUNYUAN = ("query_layernorm", "key_layernorm")
LAYOUTS = {
    ("dense", "after_rotary"): Layout("hunyuan_v1_dense", HUNYUAN),
    ("dense", "before_rotary"): Layout("qwen3"),
    ("dense", "none"): Layout("llama"),
    ("moe with a shared expert", "after_rotary"): Layout("hunyuan_v1_moe", HUNYUAN, "gate.wg"),
    ("moe", "before_rotary"): Layout("qwen3_moe"),
    ("moe", "none"): Layout("mixtral"),
}
"""(feed-forward layer, place of the QK-norm) -> the class."""


def layout_of(config: ModelConfig) -> Layout:
    """The layout of a model; UserError where no class of transformers computes its function, or it is one already."""
    if config.class_path is not None:
        raise UserError(
            f"model.class_path: only our own model is exported; {config.class_path} loads the cell's "
            "checkpoints/step-*/weights.pt by name, and may have a save_pretrained of its own"
        )
    shared = config.feed_forward == "moe" and config.shared_expert
    kind = "moe with a shared expert" if shared else config.feed_forward
    layout = LAYOUTS.get((kind, config.qk_norm))
    if layout is None:
        known = " and ".join(norm for of, norm in LAYOUTS if of == kind)
        why = ": the shared expert of Qwen's classes is gated, this one is not" if shared else ""
        raise UserError(
            f"model.qk_norm: no class of transformers computes {kind} with {config.qk_norm}{why}; those of {kind} have "
            f"{known}"
        )
    if layout.model_type == "llama" and config.d_model % config.n_heads:
        raise UserError(f"model.d_model: {config.d_model} is no multiple of {config.n_heads} heads, which Llama asks")
    return layout


def config_of(config: ModelConfig, max_positions: int, end_of_text: int) -> dict[str, Any]:
    """Keyword arguments of the configuration class of the model's layout."""
    layout, experts = layout_of(config), dict[str, Any]()
    if config.feed_forward == "moe":
        number = "num_local_experts" if layout.model_type == "mixtral" else "num_experts"
        chosen = "moe_topk" if layout.model_type == "hunyuan_v1_moe" else "num_experts_per_tok"
        experts = {number: config.n_experts, chosen: config.top_k}
    if layout.model_type == "qwen3_moe":
        experts |= {"moe_intermediate_size": config.d_ff, "norm_topk_prob": True}
    return experts | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_blocks,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "initializer_range": config.init_std,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        **({"eod_token_id": end_of_text} if layout.model_type.startswith("hunyuan") else {}),
    }


def weights_of(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by our names under those of the class; a tied head may be in there once, and comes out twice.

    Rows that pad the vocabulary are left out. Experts are stacked: gate_up_proj [E, 2F, D] (gate above up) and
    down_proj [E, D, F].
    """
    layout, head = layout_of(config), state.get("head.weight", state["embedding.weight"])
    out = {
        "model.embed_tokens.weight": state["embedding.weight"][: config.vocab_size],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": head[: config.vocab_size],
    }
    names = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    names |= {f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    if config.qk_norm != "none":
        names |= {f"attention.{x}_norm": f"self_attn.{name}" for x, name in zip("qk", layout.norms, strict=True)}
    if config.feed_forward == "moe":
        names["feed_forward.router"] = f"mlp.{layout.router}"
        swiglu = {"feed_forward.shared": "mlp.shared_mlp"} if config.shared_expert else {}
    else:
        swiglu = {"feed_forward": "mlp"}
    names |= {f"{ours}.{x}": f"{its}.{x}_proj" for ours, its in swiglu.items() for x in ("gate", "up", "down")}
    for i in range(config.n_blocks):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        out |= {f"{theirs}{its}.weight": state[f"{ours}{name}.weight"] for name, its in names.items()}
        if config.feed_forward == "moe":
            gate, up, down = (
                [state[f"{ours}feed_forward.{x}.{e}"] for e in range(config.n_experts)] for x in ("gate", "up", "down")
            )
            gate_up = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            out[f"{theirs}mlp.experts.gate_up_proj"] = torch.stack(gate_up)
            out[f"{theirs}mlp.experts.down_proj"] = torch.stack(down)
    return out


def own_weights_of(config: ModelConfig, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of weights_of: weights by the class's names, a tied head once, under ours; padding is 0.

    weights_of moves numbers and changes none, so its transpose moves them back. `ours` gives names and shapes.
    """

    def moved(own: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in weights_of(config, own).items() if name in theirs}

    zeros = {name: torch.zeros(value.shape, dtype=torch.float32) for name, value in ours.items()}
    back: dict[str, Tensor] = torch.func.vjp(moved, zeros)[1](dict(theirs))[0]
    return back
