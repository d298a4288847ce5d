"""Time of a training step on GPUs, predicted in closed form: arithmetic and bytes of each part over assumed rates.

A roofline model (Williams et al. 2009) of parts that follow each other. Its bytes are those of the code that inductor
generates for an H100 (bench/README.md, Graphs); nothing here was fitted to a run. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from replication.config import RunConfig
from replication.model.size import (
    attention_parameters,
    muon_matrices,
    muon_parameter_count,
    padded_vocabulary,
    parameter_count,
    swiglu_parameters,
    swiglus,
)


@dataclass(frozen=True)
class Rates:
    """What one GPU and its network are assumed to reach: here an H100 SXM, in FLOP/s and bytes/s."""

    products: float = 650e12
    """Large bf16 products; the data sheet says 989."""
    single: float = 50e12
    """Products in fp32, without TF32; the data sheet says 67."""
    grouped: float = 590e12
    """Grouped products of the experts."""
    attention: float = 380e12
    """Causal attention with heads of 64, counted causal."""
    memory: float = 2.7e12
    """Fused kernels; the data sheet says 3.35."""
    launch_seconds: float = 2e-6
    """Of every kernel that has little to do."""
    node_bus: float = 330e9
    """Bus bandwidth of an all-reduce within a node (NVLink)."""
    network_bus: float = 40e9
    """What one GPU's own adapter adds to it between nodes (400 Gbit/s)."""


H100 = Rates()
GPUS = {
    "H100": H100,
    "RTX 4090": Rates(products=120e12, grouped=90e12, attention=60e12, memory=0.8e12),
    "RTX 3090": Rates(products=55e12, single=25e12, grouped=40e12, attention=30e12, memory=0.75e12),
}
"""Of the two consumer cards: like shares of NVIDIA's white papers' dense bf16 with fp32 sums (165 and 71e12 FLOP/s),
fp32 (82 and 36e12) and bytes (1.01 and 0.94e12)."""

# Of fused kernels in a compiled block, forward and backward: bytes a token for each number of the width, for each
# number of the hidden width and expert, and bytes a weight of casts and their gradients.
WIDTH_BYTES, HIDDEN_BYTES, CAST_BYTES = 140.0, 16.0, 12.0
BLOCK_KERNELS, EAGER_KERNELS = 66, 600
EAGER_FACTOR, EAGER_LAUNCH_SECONDS = 3.0, 6e-6
"""Where a block is not compiled each operation reads and writes its own: so many times the bytes, one launch each."""
ROUTING_SECONDS = 6e-5
"""Top-k, sort and scatter of one block and micro-batch."""
FIXED_SECONDS = 4e-3
"""A step's measuring, logging and schedule."""
NEWTON_SCHULZ_STEPS, GRAM_ASPECT = 5, 2
"""Of Muon; from that ratio of its sides on a matrix is orthogonalised by its Gram matrix, where the config says so."""


@dataclass(frozen=True)
class Part:
    """One part of a step on one process."""

    name: str
    flops: float = 0.0
    n_bytes: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """A predicted step."""

    parts: tuple[Part, ...]
    tokens: int
    """Of the step, over all processes."""
    processes: int

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def gpu_hours(self, steps: int) -> float:
        return steps * self.seconds * self.processes / 3600


def predict_step(config: RunConfig, rates: Rates = H100) -> StepTime:
    """The parts of a training step of one process, the largest first."""
    m, c, t = config.model, config.cluster, config.training
    n, micro_batches = t.batch_tokens // config.world_size, config.accumulation
    _, passed = swiglus(m)
    chosen = m.top_k if m.feed_forward == "moe" else 0
    swiglu, attention, head = swiglu_parameters(m), attention_parameters(m), padded_vocabulary(m) * m.d_model

    def part(name: str, rate: float, flops: float, n_bytes: float = 0.0, more_seconds: float = 0.0) -> Part:
        return Part(name, flops, n_bytes, flops / rate + n_bytes / rates.memory + more_seconds)

    chunked = c.head != "logits"
    logits_bytes = n * padded_vocabulary(m) * (6.0 if chunked else 12.0)
    head_bytes = logits_bytes + (10.0 * head * micro_batches * max(1, n // micro_batches // 4096) if chunked else 0.0)
    fused = n * m.n_blocks * (WIDTH_BYTES * m.d_model + HIDDEN_BYTES * m.d_ff * passed)
    fused += micro_batches * CAST_BYTES * muon_parameter_count(m)  # the blocks' matrices
    of_block = BLOCK_KERNELS * rates.launch_seconds if c.compile else EAGER_KERNELS * EAGER_LAUNCH_SECONDS
    launches = micro_batches * m.n_blocks * of_block
    count, again = parameter_count(m), 4 / 3 if c.activation_checkpointing else 1.0
    causal = 4 * n * config.data.block_size_tokens * m.n_heads * m.d_head / 2 * m.n_blocks * (3.5 + again - 1)
    parts = [
        part("head", rates.products, (8.0 if chunked else 6.0) * n * head, head_bytes),
        part("experts' grouped products", rates.grouped, 6 * again * n * m.n_blocks * swiglu * chosen),
        part(
            "other products of blocks",
            rates.products,
            6 * again * n * m.n_blocks * (attention + (passed - chosen) * swiglu),
        ),
        part("fused kernels of blocks", 1.0, 0.0, fused * (1.0 if c.compile else EAGER_FACTOR), launches),
        part("attention", rates.attention, causal),
        part("routing", 1.0, 0.0, 0.0, (ROUTING_SECONDS if chosen else 0.0) * micro_batches * m.n_blocks),
        part("gradient accumulation", 1.0, 0.0, 12.0 * count * (micro_batches - 1)),
        _optimizer(config, rates),
        _communication(config, rates),
        Part("rest", seconds=FIXED_SECONDS),
    ]
    found = sorted((p for p in parts if p.seconds), key=lambda p: -p.seconds)
    return StepTime(tuple(found), t.batch_tokens, config.world_size)


def takes_gram(rows: int, columns: int) -> bool:
    """Whether training.muon_gram acts on matrices of this shape."""
    return max(rows, columns) >= GRAM_ASPECT * min(rows, columns)


def newton_schulz_flops(rows: int, columns: int, gram: bool = False) -> float:
    """Of orthogonalising one matrix: a step is two products with its larger side, and one of squares of its smaller.

    By the Gram matrix two products with the larger side are left; each step has one of squares, and each but one three
    more: of the steps so far, and two to carry the Gram matrix on.
    """
    small, large = sorted((rows, columns))
    if gram and takes_gram(rows, columns):
        return 4.0 * small**2 * large + (NEWTON_SCHULZ_STEPS * 4 - 3) * 2.0 * small**3
    return NEWTON_SCHULZ_STEPS * (4.0 * small**2 * large + 2.0 * small**3)


def _optimizer(config: RunConfig, rates: Rates) -> Part:
    """Norm, clipping and the update: AdamW reads and writes 28 bytes a weight; Muon 60, and its products."""
    count, gram, share = parameter_count(config.model), config.training.muon_gram, 1 / config.world_size
    matrices = muon_matrices(config.model) if config.training.optimizer == "muon" else []
    on_muon = sum(n * rows * columns for n, rows, columns in matrices)
    flops = seconds = 0.0
    for n, rows, columns in matrices:
        work = share * n * newton_schulz_flops(rows, columns, gram)
        flops += work
        seconds += work / (rates.single if gram and takes_gram(rows, columns) else rates.products)
    shards = share if config.cluster.strategy.startswith("zero") else 1.0
    n_bytes = 12.0 * count + (28.0 * (count - on_muon) + 60.0 * on_muon) * shards
    return Part("optimizer", flops, n_bytes, seconds + n_bytes / rates.memory)


def _communication(config: RunConfig, rates: Rates) -> Part:
    """What is not hidden behind arithmetic, at the bus bandwidth of the slowest link.

    DDP reduces fp32 gradients in the last backward and hides about half. ZeRO (overlap_comm: false) hides nothing: it
    reduces them in every micro-batch and gathers updated weights; ZeRO 3 gathers all weights twice a micro-batch.
    """
    n, strategy = config.world_size, config.cluster.strategy
    if n == 1:
        return Part("communication")
    count, ring = parameter_count(config.model), (n - 1) / n
    width = 2.0 if config.training.precision == "bf16-mixed" else 4.0
    if strategy == "ddp":
        n_bytes = 2 * ring * 4 * count / 2
        if config.training.optimizer == "muon":  # each rank's share of the orthogonal matrices goes to all
            n_bytes += ring * width * muon_parameter_count(config.model)
    else:
        n_bytes = ring * 4 * count * config.accumulation * (2 if strategy == "zero1" else 1) + ring * width * count
        if strategy == "zero3":
            n_bytes += 2 * ring * width * count * config.accumulation
    between = rates.network_bus * config.cluster.devices if config.cluster.nodes > 1 else rates.node_bus
    bus = min(rates.node_bus, between)
    return Part("communication", 0.0, n_bytes, n_bytes / bus)
