"""Every knob of one run: typed, frozen, one line of documentation and a unit each; load, merge, save, hash.

Layers, later ones win: defaults here, then the files given (model, arm, data, cluster, suite), then flags. `reading`
refuses unknown keys, wrong types and numbers out of a key's range. A run's *scientific* part, all that defines its
weights and reported numbers, is hashed; the rest is free to differ between machines, and changes them by rounding at
most.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import re
import string
import textwrap
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from replication.errors import UserError
from replication.reading import Layer, Range, build, check_layer, check_values, dump_yaml, flag_layers, hints, read_yaml

Count = Annotated[int, Range("[1, 2147483647]")]
Natural = Annotated[int, Range("[0, 2147483647]")]
Tokens = Annotated[int, Range("[1, 9007199254740992]")]
Seed = Annotated[int, Range("[0, 4294967295]")]
"""What every generator and database that meets a seed can hold."""
Processes = Annotated[int, Range("[1, 1024]")]
"""Of one machine."""
Positive = Annotated[float, Range("(0, inf)")]
NotNegative = Annotated[float, Range("[0, inf)")]
BelowOne = Annotated[float, Range("[0, 1)")]


NAME = re.compile(r"\w([^/\\,\x00-\x1f]{0,98}[^/\\,\s\x00-\x1f])?")
"""Of an arm."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer."""

    vocab_size: Count = 2048
    """Entries of the vocabulary; must equal the tokenizer's."""
    n_blocks: Count = 4
    """Number of transformer blocks."""
    d_model: Count = 64
    """Width of the residual stream."""
    n_heads: Count = 4
    """Query heads."""
    n_kv_heads: Count = 2
    """Key and value heads; divides n_heads (grouped-query attention)."""
    d_head: Count = 16
    """Width of one head; even, because rotary positions turn pairs."""
    feed_forward: Literal["moe", "dense"] = "moe"
    """Mixture of experts, or one dense SwiGLU."""
    d_ff: Count = 128
    """Hidden width of each SwiGLU (each expert's, the shared expert's, or the dense one's)."""
    n_experts: Count = 4
    """Routed experts in each block."""
    top_k: Count = 2
    """Routed experts that each token visits; their weights are renormalised to sum to 1."""
    shared_expert: bool = True
    """Whether every token also passes one ungated shared expert."""
    aux_coef: NotNegative = 0.01
    """Weight of the load-balancing loss in the objective (unpublished; our choice)."""
    qk_norm: Literal["after_rotary", "before_rotary", "none"] = "after_rotary"
    """Where queries and keys are RMS-normalised."""
    rotary_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: NotNegative = 1e-6
    """Epsilon of every RMSNorm."""
    tied_head: bool = False
    """Whether the output head shares the embedding's weights."""
    init_std: NotNegative = 0.02
    """Standard deviation of the normal initialisation of every matrix; norms start at 1."""
    vocab_multiple: Count = 128
    """Rows of embedding and head are allocated up to a multiple of this, for aligned matrix products; what lies beyond
    the vocabulary is zero, never read and never predicted."""


@dataclass(frozen=True)
class SourceConfig:
    """One named source of documents."""

    name: str
    """Name in reports and on disk; letters, digits, dot, dash and underscore."""
    kind: Literal[
        "text", "jsonl", "parquet", "hub", "python_topics", "python_docstrings", "python_source", "python_packages"
    ] = "text"
    """Local files, a `datasets.load_dataset` id, or text that every Python carries; python_packages is the source of
    what is installed beside it, which differs between machines."""
    path: str | None = None
    """File, folder or glob of local files (relative to the current folder), or the hub id."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set; pin it."""
    text_field: str = "text"
    """Column or key that holds the document, or with messages the list of messages."""
    template: str | None = None
    """Text of a document over several columns in braces, such as {question} {answer}; a line of it whose columns are
    all empty is left out. None: text_field alone."""
    messages: dict[str, str] | None = None
    """For conversations: what a message of each role reads as, such as {user: "User: {content}\\n"}; an empty text
    leaves the role out, and a role that is not named is an error. None: text_field holds text."""
    weight: Positive = 1.0
    """Share of training sequences drawn from this source, relative to the other weights."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""

    path: str | None = None
    """A tokenizer.json file or a hub id; none: a byte-level BPE is trained on the sources."""
    revision: str | None = None
    """Revision of a hub tokenizer; pin it."""
    vocab_size: Count = 2048
    """Entries of a tokenizer that is trained here, the end-of-text token included."""
    end_of_text: str = "<|endoftext|>"
    """Token that joins documents; must exist in a tokenizer that is loaded."""
    padded_vocab_size: Count | None = None
    """Entries that the vocabulary is raised to with unused ones, such as 100031; none: the tokenizer's own."""


@dataclass(frozen=True)
class DataConfig:
    """The corpus."""

    dir: str | None = None
    """Folder that `replicate prepare` wrote (not scientific: the data's own hash is)."""
    block_size_tokens: Count = 128
    """Predicted positions in one sequence."""
    sources: tuple[SourceConfig, ...] = ()
    """The sources and their weights."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    validation_fraction: Annotated[float, Range("(0, 1)")] = 0.02
    """Share of each source that goes to validation, by hash of a document's text. Without a token budget: the documents
    of smallest hash that hold this share of the bytes. With one: those below a threshold, this share of them on
    average, up to 2,097,152 tokens a source."""
    token_budget: Tokens | None = None
    """Predicted training tokens in all, shared among the sources by their weights, each share rounded up to whole
    sequences; every source is streamed until it has its share. None: all that the sources hold."""
    num_proc: Processes = 2
    """Processes that tokenise (not scientific)."""


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation, identical in every arm."""

    steps: Count = 300
    """Optimizer steps."""
    batch_tokens: Tokens = 2048
    """Predicted tokens in one global batch, whatever the number of processes."""
    gain_group_sequences: Count | None = 2
    """Consecutive sequences of the global batch over which gain, divergence and load balance are taken; none: the
    whole micro-batch, as published, so that the objective changes with the machine."""
    initial_weights: str | None = None
    """A consolidated weights.pt to start from, of any strategy; none: the seed's own."""
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """AdamW; Muon on the blocks' matrices beside AdamW on the rest; or SGD with momentum (which a constant scale of the
    gradients does change)."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    muon_learning_rate: Positive | None = None
    """Peak rate of what Muon trains; its updates have the size of AdamW's, so none means learning_rate."""
    muon_momentum: BelowOne = 0.95
    """Muon's momentum (Nesterov's)."""
    weight_decay: NotNegative = 0.1
    """Decay of block matrices and an untied head (decoupled in adamw and muon, added to the gradient in sgd);
    embeddings and norms have none."""
    momentum: BelowOne = 0.9
    """SGD's momentum (undamped, not Nesterov's)."""
    beta1: BelowOne = 0.9
    """AdamW's first decay rate."""
    beta2: BelowOne = 0.95
    """AdamW's second decay rate."""
    adam_eps: NotNegative = 1e-8
    """AdamW's epsilon."""
    warmup_steps: Natural = 30
    """Steps of linear warm-up (warmup-stable-decay)."""
    decay_steps: Natural = 0
    """Final steps of linear decay to zero (published: none)."""
    clip_norm: NotNegative = 1.0
    """Largest global gradient norm, measured after the layer scale; 0 does not clip."""
    label_smoothing: BelowOne = 0.1
    """Smoothing of the cross-entropy; enters the per-token loss before the gain."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Lightning's precision of parameters and arithmetic."""
    deterministic: bool = True
    """Whether only deterministic kernels are allowed."""
    max_skipped_steps: Natural = 0
    """Updates that ZeRO may skip because a gradient was not finite before the run is stopped; single and DDP stop at
    the first."""


@dataclass(frozen=True)
class TokenGainConfig:
    """Per-token gain on the loss, before backward. Measured in every arm, applied where enabled."""

    enabled: bool = False
    """Whether the gain weights the loss."""
    variant: Literal["none", "precision", "linear", "focal", "sigmoid"] = "precision"
    """Formula of the gain."""
    s: float = 1.0
    """Slope of the precision variant."""
    eps: NotNegative = 1e-6
    """Added to the variance in the precision variant."""
    c_min: float = 0.1
    """Lower clamp of the precision and linear variants."""
    c_max: NotNegative = 5.0
    """Upper clamp of the precision and linear variants."""
    focal_gamma: NotNegative = 2.0
    """Exponent of the focal variant."""
    focal_min: NotNegative = 1e-4
    """Lower clamp of the focal variant."""
    focal_max: NotNegative = 10.0
    """Upper clamp of the focal variant."""
    sigmoid_k: float = 5.0
    """Steepness of the sigmoid variant, per nat."""
    sigmoid_a: float = 0.5
    """Half-range of the sigmoid variant around 1."""


@dataclass(frozen=True)
class LayerGainConfig:
    """Per-block scale on gradients, before clipping. Measured in every arm, applied where enabled."""

    enabled: bool = False
    """Whether the scale multiplies the gradients."""
    t: float = 0.5
    """Strength."""
    m_min: float = 0.1
    """Lower clamp of a scale."""
    m_max: NotNegative = 3.0
    """Upper clamp of a scale."""
    exclude_blocks: tuple[Natural, ...] = ()
    """Blocks that keep scale 1 and leave the mean (published as exclude_layers; default none)."""
    divergence: Literal["step_mean", "last_group"] = "step_mean"
    """Mean over the groups of the step, or the last group in global order (as published)."""
    apply: Literal["step", "micro_batch"] = "step"
    """On the accumulated gradient at the step boundary, or on each micro-batch's gradient in backward."""


@dataclass(frozen=True)
class ValidationConfig:
    """Validation on a fixed set, the same for every seed and arm."""

    every_steps: Count = 50
    """Optimizer steps between validations; the last step is always validated."""
    sequences: Count = 128
    """Sequences of the fixed validation set."""


@dataclass(frozen=True)
class LoggingConfig:
    """The journal and TensorBoard (not scientific)."""

    log_every_steps: Count = 10
    """Optimizer steps between journal lines; loss and gradient norm are kept for every step."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints (not scientific)."""

    every_steps: Count = 100
    """Optimizer steps between checkpoints; the last step always has one."""
    keep_last: Count = 2
    """How many of the newest complete checkpoints stay on disk."""
    keep_every_steps: Count | None = None
    """Checkpoints at multiples of this many steps stay for good; none: only the newest do."""


@dataclass(frozen=True)
class GenerationConfig:
    """Completions of the trained model (not part of training)."""

    prompts: str | None = "prompts/replication_32.json"
    """Prompt file; none: no completions are generated after training."""
    template: str = "{question}\n"
    """Text that the model continues; {question} is the prompt."""
    samples_per_prompt: Count = 3
    """Completions of each prompt."""
    temperature: Annotated[float, Range("[0.000001, inf)")] = 0.7
    """Sampling temperature."""
    top_k: Count = 40
    """Largest logits kept in sampling."""
    top_p: Annotated[float, Range("(0, 1]")] = 1.0
    """Of those, the likeliest that together have at least this probability (nucleus sampling); 1 keeps all."""
    max_new_tokens: Count = 200
    """Longest completion, in tokens."""
    precision: Literal["64-true", "32-true"] = "64-true"
    """Arithmetic of sampling. In fp64 completions depend on the weights alone: not on the device, nor on what is
    sampled beside them. In fp32, half the memory, near ties may fall the other way."""
    rows_at_once: Count = 96
    """Completions that are sampled side by side; changes time and memory, no completion (not part of the settings)."""


@dataclass(frozen=True)
class SlurmConfig:
    """What a SLURM job of one cell asks for. Account, partition and the like are the site's: launch/site.env."""

    time_limit_minutes: Count = 1440
    """Longest time of one job; a cell that needs more goes on in the next one."""
    cpus_per_task: Count | None = None
    """CPU cores of each process; none: what the site gives."""
    memory_gib: Count | None = None
    """Memory of each node, in GiB; none: what the site gives."""
    concurrent_cells: Count = 4
    """Most cells of a suite that run at once."""
    lead_seconds: Count = 300
    """How long before the time limit a job is told to save and stop; must exceed a step and a save."""
    signal_to: Literal["batch", "ranks"] = "batch"
    """Who gets the stop signal from SLURM: the batch shell, which passes it on, or every process itself."""
    max_requeues: Natural = 100
    """How often a job that was told to stop goes on by itself."""


@dataclass(frozen=True)
class ClusterConfig:
    """The machine: free to differ, changes time and rounding, never the objective (not scientific). In fp32 and bf16
    rounding grows over the steps, so the report names arms of a seed that were cut or placed differently."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train."""
    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3"] = "single"
    """One process; one process a device with averaged gradients (ddp); or DeepSpeed ZeRO, which shards the optimizer's
    state (zero1), the gradients too (zero2), the weights too (zero3)."""
    offload_optimizer: bool = False
    """Whether ZeRO keeps the optimizer's state and fp32 weights in CPU memory."""
    devices: Processes = 1
    """Processes on each node: one a GPU, or one a share of the cores."""
    nodes: Count = 1
    """Nodes of one run."""
    micro_batch_sequences: Count | None = None
    """Sequences in one forward pass of one process; none: its whole share. A multiple of the gain group."""
    threads: Processes | None = None
    """CPU threads of each process; none: torch's own choice."""
    loader_workers: Annotated[int, Range("[0, 1024]")] = 0
    """Processes that read batches ahead."""
    compile: bool = False
    """Whether torch.compile fuses each block and the head's losses (on a CPU that takes a C++ compiler; the first step
    takes a minute)."""
    activation_checkpointing: bool = False
    """Whether the blocks' activations are computed again in backward instead of kept; divergences are not."""
    head: Literal["logits", "chunked", "liger"] = "logits"
    """How the loss is taken from the hidden states: all logits at once; a few tokens at a time, computed again in
    backward (a fraction of the memory, 4 % more arithmetic); or by liger-kernel (a GPU, and the package)."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of the attention; auto: torch's own choice."""
    stop_signal: Literal["USR1", "USR2"] = "USR2"
    """Signal to any one process at which all of them save at the next optimizer boundary and stop with exit code 75
    (NCCL is said to catch USR1). To a process that srun started SIGTERM, which SLURM itself sends, means the same."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """The job of one cell on a SLURM cluster."""


@dataclass(frozen=True)
class RunConfig:
    """One run: one arm at one seed."""

    arm: str = "baseline"
    """Name of the arm."""
    seed: Seed = 1337
    """Sets initial weights and data order together."""
    weights_seed: Seed | None = None
    """Seed of the initial weights alone; none: seed."""
    data_seed: Seed | None = None
    """Seed of the data order alone; none: seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The optimisation."""
    token_gain: TokenGainConfig = field(default_factory=TokenGainConfig)
    """Per-token gain on the loss."""
    layer_gain: LayerGainConfig = field(default_factory=LayerGainConfig)
    """Per-block scale on gradients."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Journal and TensorBoard."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Completions."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machine."""

    @property
    def effective_weights_seed(self) -> int:
        return self.seed if self.weights_seed is None else self.weights_seed

    @property
    def effective_data_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def batch_sequences(self) -> int:
        """Sequences in one global batch."""
        return self.training.batch_tokens // self.data.block_size_tokens

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences in one forward pass of one process."""
        return self.cluster.micro_batch_sequences or self.batch_sequences // self.world_size

    @property
    def gain_group_sequences(self) -> int:
        """Consecutive sequences of one gain group: the key's, or the whole micro-batch."""
        return self.training.gain_group_sequences or self.micro_batch_sequences

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.cluster.devices * self.cluster.nodes

    @property
    def accumulation(self) -> int:
        """Micro-batches in one optimizer step of one process."""
        return self.batch_sequences // (self.micro_batch_sequences * self.world_size)

    def check(self) -> RunConfig:
        """Raise UserError where a value is out of its range or values contradict one another; return self."""
        check_values(self)
        for broken, message in _contradictions(self):
            if broken:
                raise UserError(message)
        return self


def _contradictions(c: RunConfig) -> Iterable[tuple[bool, str]]:
    """Yield (is broken, one line that names the keys and the remedy), cheapest checks first."""
    m, t, d = c.model, c.training, c.data
    yield (
        not NAME.fullmatch(c.arm),
        f"arm: {c.arm!r} names folders and stands in votes; begin with a letter, digit or underscore, without commas, "
        "slashes and blanks around it, at most 100 characters",
    )
    yield (
        m.n_heads % m.n_kv_heads != 0,
        f"model.n_kv_heads: {m.n_kv_heads} does not divide model.n_heads {m.n_heads}",
    )
    yield m.d_head % 2 != 0, f"model.d_head: {m.d_head} must be even for rotary positions"
    yield (
        m.feed_forward == "moe" and not 1 <= m.top_k <= m.n_experts,
        f"model.top_k: {m.top_k} must lie in 1..model.n_experts ({m.n_experts})",
    )
    yield (
        t.warmup_steps + t.decay_steps > t.steps,
        f"training.warmup_steps: warm-up {t.warmup_steps} and decay {t.decay_steps} together exceed "
        f"training.steps {t.steps}; shorten one",
    )
    yield (
        t.muon_learning_rate is not None and t.optimizer != "muon",
        f"training.muon_learning_rate: {t.optimizer} does not use it; set it to null, or training.optimizer=muon",
    )
    for low_key, low, high_key, high in (
        ("token_gain.c_min", c.token_gain.c_min, "token_gain.c_max", c.token_gain.c_max),
        ("token_gain.focal_min", c.token_gain.focal_min, "token_gain.focal_max", c.token_gain.focal_max),
        ("layer_gain.m_min", c.layer_gain.m_min, "layer_gain.m_max", c.layer_gain.m_max),
    ):
        yield low > high, f"{low_key}: {low} exceeds {high_key} {high}; swap them"
    yield (
        t.batch_tokens % d.block_size_tokens != 0,
        f"training.batch_tokens: {t.batch_tokens} is not a whole number of sequences of "
        f"data.block_size_tokens ({d.block_size_tokens}); make it a multiple",
    )
    slurm = c.cluster.slurm
    yield (
        slurm.lead_seconds >= 60 * slurm.time_limit_minutes,
        f"cluster.slurm.lead_seconds: {slurm.lead_seconds} seconds are all of cluster.slurm.time_limit_minutes "
        f"({slurm.time_limit_minutes}), so a job would be told to stop at its start; lower it",
    )
    yield (
        c.cluster.strategy == "single" and c.world_size > 1,
        f"cluster.strategy: single is one process, but cluster.devices x cluster.nodes is {c.world_size}; choose ddp "
        "or zero2",
    )
    yield from _zero_contradictions(c)
    yield from _kernel_contradictions(c)
    yield (
        c.batch_sequences % c.world_size != 0,
        f"cluster.devices: {c.world_size} processes do not divide the global batch of {c.batch_sequences} sequences; "
        "choose a divisor",
    )
    yield c.micro_batch_sequences == 0, f"cluster.devices: {c.world_size} processes are more than there are sequences"
    yield (
        c.batch_sequences % (c.micro_batch_sequences * c.world_size) != 0,
        f"cluster.micro_batch_sequences: {c.micro_batch_sequences} on {c.world_size} process(es) does not divide the "
        f"global batch of {c.batch_sequences} sequences; choose a divisor",
    )
    group = c.gain_group_sequences
    yield (
        c.micro_batch_sequences % group != 0,
        f"cluster.micro_batch_sequences: {c.micro_batch_sequences} holds no whole number of gain groups of "
        f"training.gain_group_sequences ({group}); choose a multiple of {group}",
    )
    outside = [b for b in c.layer_gain.exclude_blocks if not 0 <= b < m.n_blocks]
    yield bool(outside), f"layer_gain.exclude_blocks: {outside} are not blocks 0..{m.n_blocks - 1}"
    yield (
        len(set(c.layer_gain.exclude_blocks)) >= m.n_blocks,
        "layer_gain.exclude_blocks: names every block; leave at least one",
    )
    names = [s.name for s in d.sources]
    yield len(set(names)) != len(names), f"data.sources: names must differ, got {names}"
    for s in d.sources:
        yield (
            s.kind in ("text", "jsonl", "parquet", "hub") and not s.path,
            f"data.sources: source '{s.name}' of kind '{s.kind}' needs a path",
        )
        yield from _rendering_contradictions(s)
    yield (
        _template_fields(c.generation.template) != {"question"},
        "generation.template: must contain {question} and no other field in braces (write {{ for a brace)",
    )


def _zero_contradictions(c: RunConfig) -> Iterable[tuple[bool, str]]:
    """What DeepSpeed ZeRO cannot do, or does with something else than the gradient; refused by name."""
    strategy, precision = c.cluster.strategy, c.training.precision
    zero = strategy.startswith("zero")
    yield (
        c.cluster.offload_optimizer and not zero,
        f"cluster.offload_optimizer: {strategy} keeps the optimizer where the weights are; choose zero2 or zero3",
    )
    yield (
        zero and precision == "64-true",
        f"training.precision: DeepSpeed has no fp64, so {strategy} cannot train in 64-true; choose single or ddp",
    )
    yield (
        strategy == "zero1" and precision == "bf16-mixed",
        "cluster.strategy: zero1 with bf16-mixed makes DeepSpeed take another optimizer, which keeps the gradients "
        "elsewhere; choose zero2 (the same memory for the optimizer), or training.precision=32-true",
    )
    yield (
        c.cluster.offload_optimizer and strategy == "zero1",
        "cluster.offload_optimizer: not tested with zero1; choose zero2, which keeps less on the GPU",
    )
    yield (
        c.cluster.offload_optimizer and c.training.optimizer == "muon",
        "cluster.offload_optimizer: Muon would orthogonalise its matrices on the CPU, minutes a step for a large "
        "model; choose zero2 or zero3 on more GPUs without offload, or training.optimizer=adamw",
    )
    uneven = c.validation.sequences % c.world_size != 0
    yield (
        strategy == "zero3" and uneven,
        f"validation.sequences: {c.validation.sequences} is no multiple of {c.world_size} processes, and with zero3 "
        "all must run the same number of forward passes; choose a multiple",
    )


def _kernel_contradictions(c: RunConfig) -> Iterable[tuple[bool, str]]:
    """What the chosen kernels cannot compute."""
    bf16 = c.training.precision == "bf16-mixed"
    yield (
        c.cluster.compile and c.model.feed_forward == "moe" and not bf16,
        f"cluster.compile: torch compiles the experts' grouped products in bf16 only, and training.precision is "
        f"{c.training.precision}; choose bf16-mixed, or cluster.compile=false",
    )
    yield (
        c.cluster.compile and c.cluster.strategy == "zero3",
        "cluster.compile: zero3 gathers weights inside the blocks, where nothing can be fused; choose zero2, or "
        "cluster.compile=false",
    )
    yield (
        c.cluster.attention in ("cudnn", "efficient") and c.cluster.accelerator == "cpu",
        f"cluster.attention: {c.cluster.attention} runs on a GPU, and cluster.accelerator is cpu; choose auto",
    )
    for key, width in (("model.d_model", c.model.d_model), ("model.d_ff", c.model.d_ff)):
        yield (
            c.model.feed_forward == "moe" and c.training.precision != "64-true" and width % 8 != 0,
            f"{key}: {width} is no multiple of 8, and the experts' grouped products need rows of whole 16 bytes; "
            f"take {-(-width // 8) * 8}",
        )
    yield (
        c.cluster.head == "liger" and (c.cluster.accelerator == "cpu" or c.training.precision == "64-true"),
        "cluster.head: liger-kernel computes on a GPU, in at most fp32; choose chunked, the same function",
    )
    yield (
        c.cluster.attention in ("flash", "cudnn") and not bf16,
        f"cluster.attention: {c.cluster.attention} computes in bf16, and training.precision is "
        f"{c.training.precision}; choose bf16-mixed, or auto",
    )


def _rendering_contradictions(s: SourceConfig) -> Iterable[tuple[bool, str]]:
    """Keys that say what a row reads as, where they contradict one another or the kind of source."""
    rows = s.kind in ("jsonl", "parquet", "hub")
    for key, value in (("template", s.template), ("messages", s.messages)):
        yield (
            value is not None and not rows,
            f"data.sources: {key} of '{s.name}' needs rows with columns, and kind '{s.kind}' has none; remove it",
        )
    yield (
        s.template is not None and s.messages is not None,
        f"data.sources: source '{s.name}' sets template and messages; a row is rendered by one of them, remove one",
    )
    fields = _template_fields(s.template) if s.template is not None else {"text"}
    yield (
        not fields or not fields <= {f for f in fields if f and re.fullmatch(r"\w+", f)},
        f"data.sources: template of '{s.name}' must name columns in braces, such as {{question}}, and nothing else in "
        "them (write {{ for a brace)",
    )
    for role, text in (s.messages or {}).items():
        yield (
            not _template_fields(text) <= {"content"},
            f"data.sources: messages of '{s.name}': the text of role '{role}' may have {{content}} in braces and no "
            "other field (write {{ for a brace)",
        )


def _template_fields(template: str) -> set[str | None]:
    """Names in braces; {None} where the braces do not match, or hold more than a name."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        return {None if form or conversion else name for _, name, form, conversion in parts}
    except ValueError:
        return {None}


@dataclass(frozen=True)
class DivergedRule:
    """When a cell counts as diverged: an outcome that is reported, not a failure that is tried again.

    A loss that is not finite always does. So does a training loss that stays above a limit after the warm-up.
    """

    above_nats: Positive | None = None
    """Limit of train/loss_nats; none: what guessing uniformly costs, log(vocab_size)."""
    for_steps: Count = 100
    """Steps in a row, counted back from the last logged one and all after the warm-up, that lie above the limit."""


@dataclass(frozen=True)
class AnalysisConfig:
    """What will be asked of a suite's results, and how; `replicate plan freeze` writes it down before the data."""

    baseline: str | None = None
    """Arm that the treatment is compared with: the suite's first, as in every other comparison; none: the same."""
    treatment: str | None = None
    """Arm that the primary question is about; none: `both` where the suite has it, else its last."""
    primary: Literal["preference", "loss"] = "preference"
    """The one primary question: is the treatment's text preferred, or is its validation loss equivalent. The others
    are secondary."""
    loss: Literal["late_val_loss", "final_val_loss"] = "late_val_loss"
    """Which loss the arms are compared in: the mean of the last validations, or the last one alone."""
    late_validations: Count = 10
    """Validations in the mean of late_val_loss, counted from the end."""
    margin_nats: Positive = 0.02
    """Margin of equivalence of the loss, in nats, on either side of zero."""
    alpha: Annotated[float, Range("(0, 0.5)")] = 0.05
    """Level of each test: two-sided for differences, and of each of the two one-sided tests of equivalence (so their
    interval is one of 1 - 2 alpha)."""
    judges: Count = 40
    """Judges who are to vote, people and models together."""
    votes_per_judge: Count = 32
    """Votes of each judge in a full set."""
    judge_kinds: tuple[Literal["human", "model"], ...] = ("human", "model")
    """Kinds of judges whose votes count."""
    min_seeds: Annotated[int, Range("[2, 2147483647]")] = 5
    """Fewest certified seeds with which a question is answered; with fewer the report gives the estimate alone."""
    strict_pairs: bool = False
    """Whether a pair is refused, and not only named, whose cells at any start ran other code or packages, or on a
    machine that rounds otherwise: strategy, processes, micro-batch, head, kernels, device."""
    correction: Literal["holm"] = "holm"
    """Correction for several comparisons, over the secondary questions; the primary one is a single test."""
    fast_seconds: NotNegative = 15.0
    """Sensitivity only: a person whose median time to a vote lies below this many seconds is left out."""
    tie_share: Annotated[float, Range("[0, 1]")] = 0.8
    """Sensitivity only: a judge with a larger share of ties than this is left out."""
    experimenters: tuple[str, ...] = ()
    """Sensitivity only: judge ids of those who run the experiment, left out in a row of its own."""
    bootstrap_resamples: Count = 10000
    """Resamples of each bootstrap."""
    bootstrap_seed: Seed = 0
    """Seed of every bootstrap."""

    def resolved(self, arms: Sequence[str]) -> AnalysisConfig:
        """This section with its two arms named; the treatment of a suite of one arm stays none."""
        baseline = self.baseline or arms[0]
        others = [arm for arm in arms if arm != baseline]
        last = "both" if "both" in others else others[-1] if others else None
        return replace(self, baseline=baseline, treatment=self.treatment or last)

    def check(self, arms: Sequence[str]) -> AnalysisConfig:
        """Raise UserError where a value is out of its range or names no arm of the suite; return self."""
        check_values(self, "analysis.")
        for broken, message in _analysis_contradictions(self, arms):
            if broken:
                raise UserError(message)
        return self


def _analysis_contradictions(a: AnalysisConfig, arms: Sequence[str]) -> Iterable[tuple[bool, str]]:
    """Yield (is broken, one line that names the key and the remedy)."""
    for key, arm in (("baseline", a.baseline), ("treatment", a.treatment)):
        yield (
            arm is not None and arm not in arms,
            f"analysis.{key}: {arm} is no arm of the suite; choose one of {', '.join(arms)}",
        )
    yield (
        a.baseline in arms[1:],
        f"analysis.baseline: {a.baseline} is not the suite's first arm, with which all are compared; list it first",
    )
    resolved = a.resolved(arms)
    yield (
        resolved.baseline == resolved.treatment,
        f"analysis.treatment: {resolved.treatment} is the baseline too; name another arm",
    )
    yield not a.judge_kinds, "analysis.judge_kinds: names no kind; give human, model or both"
    yield (
        len(set(a.judge_kinds)) != len(a.judge_kinds),
        f"analysis.judge_kinds: names a kind twice: {list(a.judge_kinds)}",
    )


@dataclass(frozen=True)
class SuiteConfig:
    """A grid: arms x seeds over shared layers."""

    name: str
    """Name of the suite."""
    arms: tuple[str, ...]
    """Names of files in configs/arms; the first is the one that others are compared with."""
    seeds: tuple[Seed, ...]
    """Training seeds; the unit of the statistics."""
    layers: tuple[str, ...] = ()
    """Config files under every cell, in order (model, data, cluster)."""
    run: dict[str, Any] = field(default_factory=dict)
    """Keys of a run that hold for every cell; they win over the layers."""
    diverged: DivergedRule = field(default_factory=DivergedRule)
    """When a cell counts as diverged; frozen with the suite."""
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    """The questions and tests; acts on no cell."""


# ---------------------------------------------------------------- finding files


def config_root() -> Path:
    """The shipped configs: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    inside = package / "configs"  # first: beside an installed package may lie another one of this name
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str | Path, folder: str = "") -> Path:
    """A config file by path, by path under configs/, or (with folder) by bare name.

    Raises:
        UserError: no such file; the message lists what stands in the folder.
    """
    text = str(name)
    root = config_root()
    candidates = [Path(text), root / text.removeprefix("configs/")]
    if folder:
        candidates += [root / folder / text, root / folder / f"{text}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted(p.stem for p in (root / folder).glob("*.yaml")) if folder else []
    hint = f"; configs/{folder} has: {', '.join(shipped)}" if shipped else "; give a path, or a file under configs/"
    raise UserError(f"{text}: no such config file{hint}")


# ---------------------------------------------------------------- loading


def help_of_keys() -> str:
    """Every key of a run: its type, its default and its line of documentation."""
    lines: list[str] = []

    def add(cls: type, prefix: str) -> None:
        for node, after in itertools.pairwise(ast.parse(inspect.getsource(cls)).body[0].body):  # type: ignore[attr-defined]
            if not isinstance(node, ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            name, words = ast.unparse(node.target), " ".join(ast.literal_eval(after.value).split())
            hint = hints(cls)[name]
            if dataclasses.is_dataclass(hint):
                lines.append(f"\n{words}")
                add(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
                continue
            default = cls.__dataclass_fields__[name].default  # type: ignore[attr-defined]
            lines.append(f"  --{prefix}{name}={_spelt(default)}")
            choices = [str(c) for c in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
            said = f"{words} One of {', '.join(choices)}." if choices else words
            lines.extend(textwrap.wrap(said, 110, initial_indent="      ", subsequent_indent="      "))

    add(RunConfig, "")
    return "\n".join(lines)


def _spelt(default: Any) -> str:
    if isinstance(default, bool | None):
        return json.dumps(default)
    return str(list(default) if isinstance(default, tuple) else default).replace("\n", "\\n")


def load_run(layers: Sequence[str | Path | Layer] = (), flags: Sequence[str] = ()) -> RunConfig:
    """Merge config files and flags into one checked RunConfig.

    Args:
        layers: config files, or what was read from elsewhere; later ones win.
        flags: command-line flags such as `--training.steps=20`; they win over the files.

    Raises:
        UserError: an unknown key, a wrong type, a number out of range or a contradiction, named with its file and line.
    """
    read = [layer if isinstance(layer, Layer) else read_config(layer) for layer in layers]
    return build(RunConfig, [*read, *flag_layers(flags, read_config)]).check()


def read_config(name: str | Path) -> Layer:
    """A config file of some run's keys, as it is written; raises as find_config and read_yaml do."""
    return read_yaml(find_config(name))


def load_suite(name: str | Path) -> SuiteConfig:
    """Read a suite file.

    Raises:
        UserError: unknown keys, wrong types, or no arm or seed.
    """
    path = find_config(name, "suites")
    layer = read_yaml(path)
    suite = build(SuiteConfig, [layer])
    start = "run."
    lines = {key.removeprefix(start): line for key, line in layer.lines.items() if key.startswith(start)}
    check_layer(RunConfig, Layer(suite.run, str(path), lines))  # here, where the lines are known
    beside = [path.resolve().parent / layer for layer in suite.layers]  # a suite's own files may lie beside it
    layers = [str(b) if b.is_file() else layer for b, layer in zip(beside, suite.layers, strict=True)]
    suite = replace(suite, layers=tuple(layers))
    if not suite.arms or not suite.seeds:
        raise UserError(f"{path}: key 'arms' and key 'seeds' need at least one entry each")
    for key, values in (("arms", suite.arms), ("seeds", suite.seeds)):
        if len(set(values)) != len(values):
            raise UserError(f"{path}: key '{key}' names something twice: {list(values)}")
    try:
        suite.analysis.check(suite.arms)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return suite


def load_cell(
    suite: SuiteConfig, arm: str, seed: int, flags: Sequence[str] = (), cluster: Path | None = None
) -> RunConfig:
    """The RunConfig of one cell: the suite's layers, the arm, the suite's run keys, a cluster file, the seed, flags."""
    arm_file = find_config(arm, "arms")
    shared: list[Path | Layer] = [Layer(suite.run, "the suite's run section")]
    if cluster is not None:
        shared.append(cluster)
    config = load_run([*suite.layers, arm_file, *shared], [f"--seed={seed}", *flags])
    values = flatten(to_dict(config))
    for key, declared in _arm_values(arm_file).items():
        if values[key] != declared:
            raise UserError(
                f"{key}: the arm {arm} is defined by {declared} ({arm_file}), but the suite's run keys or a flag set "
                f"{values[key]}; remove that, or write another arm file"
            )
    return config


def find_cluster(name: str) -> Path:
    """A cluster file, by path or by its name in configs/cluster.

    Raises:
        UserError: no such file, or one that sets other keys than the machine's.
    """
    path = find_config(name, "cluster")
    keys = {key.partition(".")[0] for key in check_layer(RunConfig, read_yaml(path))}
    if not keys <= {"cluster", "checkpoints", "logging"}:
        others = ", ".join(sorted(keys - {"cluster", "checkpoints", "logging"}))
        raise UserError(
            f"{path}: sets {others}; a cluster file says where cells run, not what they are: put it into the suite"
        )
    return path


def arm_keys(arm: str) -> set[str]:
    """Dotted keys that an arm's file sets: what this arm declares to differ in."""
    return set(_arm_values(find_config(arm, "arms")))


def _arm_values(path: Path) -> dict[str, Any]:
    """What an arm's file sets, as to_dict has it."""
    return flatten({key: to_dict(value) for key, value in check_layer(RunConfig, read_yaml(path)).items()})


# ---------------------------------------------------------------- saving, hashing, comparing


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, in field order."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=dataclasses.asdict))
    return plain


def to_yaml(config: Any) -> str:
    return dump_yaml(to_dict(config))


def sampling_settings(generation: GenerationConfig) -> dict[str, Any]:
    """The keys on which completions depend, the prompts aside: a name is not a text, so their hash stands for them."""
    return {k: v for k, v in to_dict(generation).items() if k not in ("prompts", "rows_at_once")}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {dotted key: leaf}; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, dotted + ".")
        else:
            flat[dotted] = value
    return flat


NOT_SCIENTIFIC = ("data.dir", "data.num_proc", "logging.", "checkpoints.", "generation.", "cluster.")


def scientific(config: RunConfig) -> dict[str, Any]:
    """Dotted keys that may change a weight or a reported number, with their values.

    With `layer_gain.apply: micro_batch`, or gain groups that are whole micro-batches, the update depends on how the
    global batch is cut (METHOD 3.1-3.2), so that enters too.
    """
    keys = {k: v for k, v in flatten(to_dict(config)).items() if not k.startswith(NOT_SCIENTIFIC)}
    for seed in ("weights_seed", "data_seed"):
        keys[seed] = getattr(config, f"effective_{seed}")
    if config.layer_gain.apply == "micro_batch" or config.training.gain_group_sequences is None:
        keys["cluster.micro_batch_sequences"] = config.micro_batch_sequences
        keys["cluster.world_size"] = config.world_size
    return keys


SEED_KEYS = ("seed", "weights_seed", "data_seed")


def without_seeds(keys: dict[str, Any]) -> dict[str, Any]:
    """Of scientific keys, what all seeds of an arm share."""
    return {k: v for k, v in keys.items() if k not in SEED_KEYS}


def machine_cut(config: RunConfig) -> dict[str, Any]:
    """What a config says of the machine that may change how sums are rounded, which in fp32 grows over the steps."""
    c = config.cluster
    return {
        "strategy": c.strategy,
        "ranks": config.world_size,
        "micro_batch_sequences": config.micro_batch_sequences,
        "head": c.head,
        "compile": c.compile,
        "attention": c.attention,
        "activation_checkpointing": c.activation_checkpointing,
        "offload_optimizer": c.offload_optimizer,
    }


def scientific_hash(config: RunConfig) -> str:
    """SHA-256 of the scientific part's canonical JSON, first 16 hex digits."""
    text = json.dumps(scientific(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as {key: (in a, in b)}; a key that one lacks counts as None there."""
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def refuse_differences(what: str, there: dict[str, Any], here: dict[str, Any], remedy: str) -> None:
    """Raise UserError that names the first keys in which two flat configs differ; nothing where they are equal."""
    different = differences(there, here)
    if different:
        listed = "; ".join(f"{k}: {a} there, {b} here" for k, (a, b) in list(different.items())[:5])
        raise UserError(f"{what} ({listed}); {remedy}")


def refuse_other_config(config: RunConfig, path: Path) -> None:
    """Raise UserError where a cell's config.yaml is of another scientific config; nothing where there is none."""
    if path.is_file() and path.read_text(encoding="utf-8") != to_yaml(config):
        what, remedy = f"{path.parent}: holds a cell of another config", "choose another --out, or remove it"
        refuse_differences(what, scientific(load_run([path])), scientific(config), remedy)
