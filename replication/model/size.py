"""Size and needs of a model in closed form from its config: parameters, operations, memory, disk. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from replication.config import ModelConfig, RunConfig

GIB = 2**30


def padded_vocabulary(model: ModelConfig) -> int:
    """Rows of embedding and head: the vocabulary, up to a multiple of vocab_multiple."""
    return -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple


def parameter_count(model: ModelConfig) -> int:
    """Trainable parameters, padded rows included; a tied head counts once, and every expert counts, chosen or not.

    A model of a class_path is built without memory, which takes torch; UserError where it cannot be.
    """
    if model.class_path is not None:
        from replication.model.foreign import without_memory

        return sum(p.numel() for p in without_memory(model).parameters())
    embeddings = padded_vocabulary(model) * model.d_model * (1 if model.tied_head else 2)
    router = model.n_experts * model.d_model if model.feed_forward == "moe" else 0
    norms = 2 * model.d_model + (0 if model.qk_norm == "none" else 2 * model.d_head)
    return embeddings + muon_parameter_count(model) + model.n_blocks * (router + norms) + model.d_model  # final norm


def muon_matrices(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of the matrices that Muon trains: the blocks' without routers."""
    width, queries, keys = model.d_model, model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    experts, _ = swiglus(model)
    of_block = [(1, queries, width), (2, keys, width), (1, width, queries)]
    of_block += [(2 * experts, model.d_ff, width), (experts, width, model.d_ff)]
    return [(model.n_blocks * n, rows, columns) for n, rows, columns in of_block]


def muon_parameter_count(model: ModelConfig) -> int:
    """Parameters that Muon trains."""
    return sum(n * rows * columns for n, rows, columns in muon_matrices(model))


def attention_parameters(model: ModelConfig) -> int:
    """Weights of one block's attention products."""
    return 2 * model.d_model * (model.n_heads + model.n_kv_heads) * model.d_head


def swiglus(model: ModelConfig) -> tuple[int, int]:
    """SwiGLU layers that a block has, and of these how many a token passes: experts, the shared one among them."""
    if model.feed_forward == "dense":
        return 1, 1
    return model.n_experts + int(model.shared_expert), model.top_k + int(model.shared_expert)


def swiglu_parameters(model: ModelConfig) -> int:
    """Weights of one expert, or of a dense block's feed-forward layer: gate, up, down."""
    return 3 * model.d_model * model.d_ff


def active_matrix_parameters(model: ModelConfig) -> int:
    """Parameters that enter a matrix product for one token: the chosen experts, and the head, tied or not.

    The embedding is a look-up and norms are no products. Rows that only pad the vocabulary do not count.
    """
    _, passed = swiglus(model)
    router = model.n_experts * model.d_model if model.feed_forward == "moe" else 0
    block = attention_parameters(model) + passed * swiglu_parameters(model) + router
    return model.vocab_size * model.d_model + model.n_blocks * block


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


@dataclass(frozen=True)
class StateNeeds:
    """Weights, gradients and optimizer of one process, in GiB; activations and buffers come on top."""

    device_gib: float  # on its GPU, or in memory where it trains on the CPU
    host_gib: float  # in memory beside that: the copy that a checkpoint is written from, what offload_optimizer moves


def state_needs(config: RunConfig) -> StateNeeds:
    """Bytes of each parameter, divided by the processes that share them (Rajbhandari et al. 2020, section 3.1).

    Single and DDP keep a weight, a gradient and the optimizer's moments whole, and the first process a copy of weights
    and moments beside them (training/host_copy.py). ZeRO keeps a second, fp32 weight beside
    the moments, and shares both (zero1), the gradients too (zero2), the weights too (zero3).
    """
    precision, strategy = config.training.precision, config.cluster.strategy
    moments, n, each = _moments(config), config.world_size, parameter_count(config.model) / GIB
    if not strategy.startswith("zero"):
        number = (8 if precision == "64-true" else 4) * each
        return StateNeeds((2 + moments) * number, (1 + moments) * number)
    weights = (2 if precision == "bf16-mixed" else 4) / (n if strategy == "zero3" else 1)
    gradients = 4 / (1 if strategy == "zero1" else n)
    optimizer = 4 * (1 + moments) / n
    on_host = optimizer if config.cluster.offload_optimizer else 0.0
    return StateNeeds((weights + gradients + optimizer - on_host) * each, on_host * each)


# Bytes kept from forward to backward, of a token for each number of the width, of a token and expert for each number
# of the hidden width: eager what autograd saves for a dense block, less a tenth; compiled bench graphs' count in bf16.
SAVED_EAGER = {"bf16-mixed": (37.0, 7.0), "32-true": (49.0, 14.0), "64-true": (98.0, 28.0)}
SAVED_COMPILED = (30.0, 6.0)
SAVED_LOGITS = 6.0  # bytes for each logit, where all are held at once


def activation_gib(config: RunConfig) -> float | None:
    """What one micro-batch keeps for its backward, at least: of the blocks, and of the head's logits; None: unknown."""
    m, c = config.model, config.cluster
    if m.class_path is not None:
        return None
    tokens = config.micro_batch_sequences * config.data.block_size_tokens
    _, passed = swiglus(m)
    width, hidden = SAVED_COMPILED if c.compile else SAVED_EAGER[config.training.precision]
    block = tokens * (width * m.d_model + hidden * m.d_ff * passed)
    blocks = block + m.n_blocks * tokens * 4 * m.d_model if c.activation_checkpointing else m.n_blocks * block
    head = tokens * padded_vocabulary(m) * SAVED_LOGITS if c.head == "logits" else 0.0
    return (blocks + head) / GIB


def _moments(config: RunConfig) -> float:
    """Numbers of optimizer state to each parameter: AdamW keeps two, Muon and SGD one."""
    if config.training.optimizer == "muon":
        return 2 - muon_parameter_count(config.model) / parameter_count(config.model)
    return 2 if config.training.optimizer == "adamw" else 1


def checkpoint_gib(config: RunConfig) -> float:
    """One checkpoint: weights and optimizer; under ZeRO the consolidated weights beside those of the shards."""
    number, is_zero = 8 if config.training.precision == "64-true" else 4, config.cluster.strategy.startswith("zero")
    weights = 1 + is_zero * (1.5 if config.training.precision == "bf16-mixed" else 1)
    return number * (weights + _moments(config)) * parameter_count(config.model) / GIB


def checkpoints_kept(config: RunConfig) -> int:
    """Most checkpoints of one cell on disk at once, the one being written included."""
    every = config.checkpoints.keep_every_steps
    return config.checkpoints.keep_last + 1 + (config.training.steps // every if every else 0)


def gib(amount: float | None) -> str:
    """An amount in GiB in words; small ones in MiB."""
    if amount is None:
        return "unknown"
    return f"{amount:,.1f} GiB" if amount >= 0.1 else f"{amount * 1024:,.0f} MiB"
