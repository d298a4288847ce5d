"""Size of a model, in closed form from its config. Imports no torch."""

from __future__ import annotations

from replication.config import ModelConfig


def padded_vocabulary(model: ModelConfig) -> int:
    """Rows of embedding and head: the vocabulary, up to a multiple of vocab_multiple."""
    return -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple


def parameter_count(model: ModelConfig) -> int:
    """Trainable parameters, padded rows included; a tied head counts once, and every expert counts, chosen or not."""
    embeddings = padded_vocabulary(model) * model.d_model * (1 if model.tied_head else 2)
    return embeddings + model.n_blocks * _block(model) + model.d_model  # the last: the final norm


def muon_parameter_count(model: ModelConfig) -> int:
    """Parameters that Muon trains: the blocks' matrices without routers."""
    router = model.n_experts * model.d_model if model.feed_forward == "moe" else 0
    qk_norm = 0 if model.qk_norm == "none" else 2 * model.d_head
    return model.n_blocks * (_attention(model) - qk_norm + _feed_forward(model) - router)


def _block(model: ModelConfig) -> int:
    norms = 2 * model.d_model
    return norms + _attention(model) + _feed_forward(model)


def _attention(model: ModelConfig) -> int:
    query_and_output = 2 * model.d_model * model.n_heads * model.d_head
    key_and_value = 2 * model.d_model * model.n_kv_heads * model.d_head
    qk_norm = 0 if model.qk_norm == "none" else 2 * model.d_head
    return query_and_output + key_and_value + qk_norm


def _feed_forward(model: ModelConfig) -> int:
    swiglu = 3 * model.d_model * model.d_ff  # gate, up, down
    if model.feed_forward == "dense":
        return swiglu
    router = model.n_experts * model.d_model
    return router + swiglu * (model.n_experts + int(model.shared_expert))


def active_matrix_parameters(model: ModelConfig) -> int:
    """Parameters that enter a matrix product for one token: the chosen experts, and the head, tied or not.

    The embedding is a look-up and norms are no products. Rows that only pad the vocabulary do not count.
    """
    width, heads = model.d_model, 2 * (model.n_heads + model.n_kv_heads) * model.d_head
    experts, router = 1, 0
    if model.feed_forward == "moe":
        experts, router = model.top_k + int(model.shared_expert), model.n_experts * width
    block = width * heads + 3 * width * model.d_ff * experts + router
    return model.vocab_size * width + model.n_blocks * block


def flops_per_token(model: ModelConfig, block_size_tokens: int, causal: bool) -> float:
    """Floating-point operations of forward and backward for one token of a training step.

    6 for each active matrix parameter (2 forward, 4 backward; Kaplan et al. 2020, section 2.1), and the two products
    of attention, 12 * blocks * positions * heads * width of a head (Chowdhery et al. 2022, appendix B). What
    checkpointing or a chunked head computes twice counts once, as in every published utilisation.

    Args:
        model: its sizes.
        block_size_tokens: positions that a token may attend to.
        causal: count only the half of the attention that the causal mask leaves; False counts all of it, as most
            published figures do.
    """
    attention = 12 * model.n_blocks * block_size_tokens * model.n_heads * model.d_head
    return 6 * active_matrix_parameters(model) + attention / (2 if causal else 1)
