"""Every knob of a run and a suite: typed and frozen, each with a line of documentation, a unit and a range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from replication.config.checks import analysis_contradictions, contradictions
from replication.config.reading import Keys, Range, check_values
from replication.errors import UserError

Count = Annotated[int, Range("[1, 2147483647]")]
Natural = Annotated[int, Range("[0, 2147483647]")]
Tokens = Annotated[int, Range("[1, 9007199254740992]")]
Seed = Annotated[int, Range("[0, 4294967295]")]
"""The range that every generator and database that meets a seed can hold."""
Processes = Annotated[int, Range("[1, 1024]")]
"""Of one machine."""
Positive = Annotated[float, Range("(0, inf)")]
NotNegative = Annotated[float, Range("[0, inf)")]
BelowOne = Annotated[float, Range("[0, 1)")]
NEUTRAL_SINCE = "neutral_since"
"""Metadata of a field: the first version that has the key. Its default is what earlier versions did, so a key with this
value is left out of hashes and comparisons (identity.py)."""
FOUND = "found"
"""Metadata of a field that is no key, and neither hashed nor written: `folder`, where a relative path means that of the
file that says it; none: the current one."""


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
    """Place of the RMS norm of queries and keys."""
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
    class_path: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Class of another model in place of this one: of a package, such as transformers.Qwen3ForCausalLM, or of a plugin
    my_model.py, my_model.Net. It takes tokens [B, T] and gives logits [B, T, vocab_size], alone or as `.logits`."""
    init_args: Keys = field(default_factory=dict)
    """Arguments of its constructor, by name; one with a class_path and init_args of its own is an object."""
    blocks: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Path of its residual blocks, such as model.layers or transformer.h."""
    origin: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Version of the package, or hash of the plugin, that the class is of; none: what is there, which is recorded."""
    initial_weights: str | None = None
    """Weights to start from: a .safetensors file or a folder of them, with our names or as transformers and `replicate
    export` write it (not scientific: its hash is); none: the seed's own."""
    weights_sha256: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Hash of these files; none: what they have, which is recorded."""


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
    """File, folder or glob of local files, or the hub id. A relative path means beside the file that says it, or where
    nothing is there, in the current folder."""
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
    split_on: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Text between the documents of a text file, such as "<|endoftext|>" or "\\n\\n"; none: a file is one."""
    weight: Positive = 1.0
    """Share of training sequences drawn from this source, relative to the other weights."""
    folder: str | None = field(default=None, compare=False, metadata={FOUND: True})
    """Folder in which the relative path is looked up; see FOUND."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""

    path: str | None = None
    """A tokenizer.json file (as a source's path) or a hub id; none: a byte-level BPE is trained on the sources."""
    revision: str | None = None
    """Revision of a hub tokenizer; pin it."""
    vocab_size: Count = 2048
    """Entries of a tokenizer that is trained here, the end-of-text token included."""
    end_of_text: str = "<|endoftext|>"
    """Token that joins documents; must exist in a tokenizer that is loaded."""
    padded_vocab_size: Count | None = None
    """Entries that the vocabulary is raised to with unused ones, such as 100031; none: the tokenizer's own."""
    folder: str | None = field(default=None, compare=False, metadata={FOUND: True})
    """Folder in which the relative path is looked up; see FOUND."""


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
    muon_coefficients: Literal["quintic", "polar_express"] = field(default="quintic", metadata={NEUTRAL_SINCE: "0.2.0"})
    """Polynomials of Muon's five Newton-Schulz steps: the same one five times (Jordan et al. 2024), or the best one for
    each step (Amsel et al. 2025), which brings small singular values nearer to 1."""
    muon_gram: bool = field(default=False, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Whether Muon iterates on the Gram matrix of a matrix's smaller side where the other is at least twice as long:
    the same function with fewer operations, all of them in at least fp32."""
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
    """Lower clamp of the precision and linear variants, and of a function with `clamp=True`."""
    c_max: NotNegative = 5.0
    """Upper clamp of the precision and linear variants, and of a function with `clamp=True`."""
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
    control: Literal["none", "shuffled", "renormalised", "constant", "rate"] = field(
        default="none", metadata={NEUTRAL_SINCE: "0.2.0"}
    )
    """What acts in place of the clamped gain: it on random tokens of its group, it over its mean, its mean on every
    token, or its mean as a factor of the step's learning rate."""
    function: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Function of a plugin that gives the gain in place of the variant."""
    parameters: Keys = field(default_factory=dict)
    """Parameters of the function, by name; those that are not set have its defaults."""


@dataclass(frozen=True)
class LayerGainConfig:
    """Per-block scale on gradients, before clipping. Measured in every arm, applied where enabled."""

    enabled: bool = False
    """Whether the scale multiplies the gradients."""
    t: float = 0.5
    """Strength."""
    m_min: float = 0.1
    """Lower clamp of a scale; of a function's with `clamp=True`."""
    m_max: NotNegative = 3.0
    """Upper clamp of a scale; of a function's with `clamp=True`."""
    exclude_blocks: tuple[Natural, ...] = ()
    """Blocks that keep scale 1 and leave the mean (published as exclude_layers; default none)."""
    divergence: Literal["step_mean", "last_group"] = "step_mean"
    """Mean over the groups of the step, or the last group in global order (as published)."""
    apply: Literal["step", "micro_batch", "update"] = "step"
    """On the accumulated gradient at the step boundary, on each micro-batch's gradient in backward, or on what the
    optimizer made of it: the update of the block's weights, decay included."""
    parts: Literal["block", "attention_and_feed_forward"] = field(default="block", metadata={NEUTRAL_SINCE: "0.2.0"})
    """What has a divergence and a scale of its own: a block, or its attention and its feed-forward, norms included."""
    control: Literal["none", "permuted"] = field(default="none", metadata={NEUTRAL_SINCE: "0.2.0"})
    """What acts in place of the scales: the same scales, each on another included block, which the seed chooses."""
    function: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Function of a plugin that gives the scales in place of the formula."""
    parameters: Keys = field(default_factory=dict)
    """Parameters of the function, by name; those that are not set have its defaults."""


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
    """Number of the newest complete checkpoints that stay on disk."""
    keep_every_steps: Count | None = None
    """Checkpoints at multiples of this many steps stay for good; none: only the newest do."""


@dataclass(frozen=True)
class GenerationConfig:
    """Completions of the trained model (not part of training)."""

    prompts: str | None = "prompts/replication_32.json"
    """Prompt file (as a source's path, or a shipped one's name); none: no completions after training."""
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
    folder: str | None = field(default=None, compare=False, metadata={FOUND: True})
    """Folder in which the relative path is looked up; see FOUND."""


@dataclass(frozen=True)
class SlurmConfig:
    """The requests of a SLURM job of one cell. Account, partition and the like are the site's: launch/site.env."""

    time_limit_minutes: Count = 1440
    """Longest time of one job; a cell that needs more goes on in the next one."""
    cpus_per_task: Count | None = None
    """CPU cores of each process; none: what the site gives."""
    memory_gib: Count | None = None
    """Memory of each node, in GiB; none: what the site gives."""
    concurrent_cells: Count = 4
    """Most cells of a suite that run at once."""
    lead_seconds: Count = 300
    """Grace period: time before the limit at which a job is told to save and stop; must exceed a step and a save."""
    signal_to: Literal["batch", "ranks"] = "batch"
    """Who gets the stop signal from SLURM: the batch shell, which passes it on, or every process itself."""
    max_requeues: Natural = 100
    """Most times that a job that was told to stop goes on by itself."""


@dataclass(frozen=True)
class ClusterConfig:
    """The machine: free to differ, changes time and rounding, never the objective (not scientific). In fp32 and bf16
    rounding grows over the steps, so the report names arms of a seed that were cut or placed differently."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device to train on."""
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
    """Way from the hidden states to the loss: all logits at once; a few tokens at a time, computed again in
    backward (a fraction of the memory, 4 % more arithmetic); or by liger-kernel (a GPU, and the package)."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of the attention; auto: torch's own choice, and from Hopper GPUs on cuDNN's where it can."""
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
    plugins: dict[str, str] = field(default_factory=dict)
    """Files with gains, scales or a model of your own: name and SHA-256, of what --plugins or a suite's `plugins`
    lists."""
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
    def is_control(self) -> bool:
        """Whether something stands in place of a gain or of the scales: no arm of a 2x2."""
        return self.token_gain.control != "none" or self.layer_gain.control != "none"

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
        for message in contradictions(self):
            raise UserError(message)
        return self


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
    """Questions to a suite's results, and their tests; registered before the data, with the suite."""

    baseline: str | None = None
    """Arm that the treatment is compared with: the suite's first, as in every other comparison; none: the same."""
    treatment: str | None = None
    """Arm that the primary question is about; none: `both` where the suite has it, else its last."""
    primary: Literal["preference", "loss"] = "preference"
    """The one primary question: is the treatment's text preferred, or is its validation loss equivalent. The others
    are secondary."""
    loss: Literal["late_val_loss", "final_val_loss"] = "late_val_loss"
    """Loss that the arms are compared in: the mean of the last validations, or the last one alone."""
    late_validations: Count = 10
    """Validations in the mean of late_val_loss, counted from the end."""
    margin_nats: Positive = 0.02
    """Margin of equivalence of the loss, in nats, on either side of zero."""
    margin_reason: str | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Why a difference of the margin does not matter, and a larger one would; the report quotes it."""
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
    looks: tuple[Count, ...] = field(default=(), metadata={NEUTRAL_SINCE: "0.2.0"})
    """Numbers of seeds at which the registered questions are decided, the last with all seeds; none: with all alone."""
    look_boundaries: Literal["haybittle_peto", "obrien_fleming"] = field(
        default="haybittle_peto", metadata={NEUTRAL_SINCE: "0.2.0"}
    )
    """What p is held against at each look: a fiftieth of alpha until the last one, or O'Brien and Fleming's by alpha
    spending."""
    sweeps: dict[str, tuple[str, ...]] | None = field(default=None, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Names of what is swept over learning rates, and the arms of each, which differ in training.learning_rate alone:
    the first is compared with every other one, each at its best rate; none: no arm is part of a sweep."""
    preference_factorial: bool = field(default=False, metadata={NEUTRAL_SINCE: "0.2.0"})
    """Whether both main effects and the interaction of the 2x2 on the preference are secondary questions, which votes
    between any two of its four arms answer."""
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
        for message in analysis_contradictions(self, arms):
            raise UserError(message)
        return self


@dataclass(frozen=True)
class SuiteConfig:
    """A grid: arms x seeds over shared layers."""

    name: str
    """Name of the suite."""
    arms: tuple[str, ...]
    """Names of files in configs/arms, files beside the suite, or an arm's keys with its name; the first is the one that
    others are compared with."""
    seeds: tuple[Seed, ...]
    """Training seeds; the unit of the statistics."""
    layers: tuple[str, ...] = ()
    """Config files under every cell, in order (model, data, cluster)."""
    run: Keys = field(default_factory=dict)
    """Keys of a run that hold for every cell; they win over the layers."""
    diverged: DivergedRule = field(default_factory=DivergedRule)
    """When a cell counts as diverged; frozen with the suite."""
    plugins: tuple[str, ...] = ()
    """Python files with gains, scales or a model, beside the suite; or names under which a package registers them."""
    own_arms: Keys = field(default_factory=dict)
    """The keys of arms that are no files of configs/arms, by name."""
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    """The questions and tests; acts on no cell."""
