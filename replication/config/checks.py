"""Rules between keys, by section: what no single key's type can refuse.

Each rule yields one line that names its keys and the remedy, and none relies on another having held.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replication.config.schema import AnalysisConfig, LayerGainConfig, RunConfig, SourceConfig, TokenGainConfig

OF_OTHERS = ("vocab_size", "class_path", "init_args", "blocks", "origin", "weights_sha256")
"""Keys of `model` that are part of a run's identity where another model than ours is trained."""
NAME = re.compile(r"\w([^/\\,\x00-\x1f]{0,98}[^/\\,\s\x00-\x1f])?")
"""Of an arm."""


def contradictions(c: RunConfig) -> Iterator[str]:
    """Every rule that a run's config breaks."""
    for section in (_model, _training, _functions, _machine, _kernels, _batch, _texts):
        yield from section(c)


def _model(c: RunConfig) -> Iterator[str]:
    m = c.model
    if m.initial_weights is not None and c.training.initial_weights is not None:
        yield "model.initial_weights: training.initial_weights names a start too; remove one"
    if m.class_path is not None or m.init_args or m.blocks is not None:
        yield from _of_others(c)
    if not NAME.fullmatch(c.arm):
        yield (
            f"arm: {c.arm!r} names folders and stands in votes; begin with a letter, digit or underscore, without "
            "commas, slashes and blanks around it, at most 100 characters"
        )
    if m.n_heads % m.n_kv_heads:
        yield f"model.n_kv_heads: {m.n_kv_heads} does not divide model.n_heads {m.n_heads}"
    if m.d_head % 2:
        yield f"model.d_head: {m.d_head} must be even for rotary positions"
    if m.feed_forward == "moe" and m.top_k > m.n_experts:
        yield f"model.top_k: {m.top_k} must lie in 1..model.n_experts ({m.n_experts})"


def _of_others(c: RunConfig) -> Iterator[str]:
    """What a model of a class_path lacks, and what only our own has."""
    m, o = c.model, c.cluster
    if m.class_path is None or "." not in m.class_path:
        yield f"model.class_path: {m.class_path} names no class; write MODULE.CLASS, or remove init_args and blocks"
    if m.blocks is None:
        yield "model.blocks: is not set; give the path of the residual blocks, such as model.layers or transformer.h"
    for f in dataclasses.fields(m):
        if f.name not in OF_OTHERS and f.name != "initial_weights" and getattr(m, f.name) != f.default:
            yield f"model.{f.name}: is a key of our own model; remove it, model.init_args has those of {m.class_path}"
    for key, value, known, why in (
        ("training.optimizer", c.training.optimizer, ("adamw", "sgd"), "Muon knows the matrices of our own model"),
        ("layer_gain.parts", c.layer_gain.parts, ("block",), "only our own blocks show their parts"),
        ("cluster.compile", str(o.compile).lower(), ("false",), "only our own blocks are compiled"),
        ("cluster.head", o.head, ("logits",), "only our own head computes losses from hidden states"),
        ("cluster.attention", o.attention, ("auto",), "the class chooses, of transformers' by attn_implementation"),
        ("cluster.strategy", o.strategy, ("single", "ddp", "zero1", "zero2"), "weights are cut within our own blocks"),
    ):
        if value not in known:
            yield f"{key}: {value} does not go with model.class_path: {why}; choose {' or '.join(known)}"


def _training(c: RunConfig) -> Iterator[str]:
    t = c.training
    if t.warmup_steps + t.decay_steps > t.steps:
        yield (
            f"training.warmup_steps: warm-up {t.warmup_steps} and decay {t.decay_steps} together exceed training.steps "
            f"{t.steps}; shorten one"
        )
    for key, value, unset, word in (
        ("muon_learning_rate", t.muon_learning_rate, None, "null"),
        ("muon_coefficients", t.muon_coefficients, "quintic", "quintic"),
        ("muon_gram", t.muon_gram, False, "false"),
    ):
        if value != unset and t.optimizer != "muon":
            yield f"training.{key}: {t.optimizer} does not use it; set it to {word}, or training.optimizer=muon"
    n_blocks = c.model.n_blocks if c.model.class_path is None else 2**31  # asked again when the blocks are there
    yield from gain_contradictions(c.token_gain, c.layer_gain, n_blocks)
    if t.batch_tokens % c.data.block_size_tokens:
        yield (
            f"training.batch_tokens: {t.batch_tokens} is not a whole number of sequences of "
            f"data.block_size_tokens ({c.data.block_size_tokens}); make it a multiple"
        )


def gain_contradictions(token: TokenGainConfig, layer: LayerGainConfig, n_blocks: int) -> Iterator[str]:
    """Every rule that the constants of the two interventions break."""
    for low_key, low, high_key, high in (
        ("token_gain.c_min", token.c_min, "token_gain.c_max", token.c_max),
        ("token_gain.focal_min", token.focal_min, "token_gain.focal_max", token.focal_max),
        ("layer_gain.m_min", layer.m_min, "layer_gain.m_max", layer.m_max),
    ):
        if low > high:
            yield f"{low_key}: {low} exceeds {high_key} {high}; swap them"
    outside = [b for b in layer.exclude_blocks if b >= n_blocks]
    if outside:
        yield f"layer_gain.exclude_blocks: {outside} are not blocks 0..{n_blocks - 1}"
    if len(set(layer.exclude_blocks)) >= n_blocks:
        yield "layer_gain.exclude_blocks: names every block; leave at least one"
    if layer.control != "none" and n_blocks - len(set(layer.exclude_blocks)) < 2:
        yield f"layer_gain.control: {layer.control} needs two included blocks; include more, or leave it out"
    if layer.parts != "block" and (layer.control != "none" or layer.function is not None):
        yield "layer_gain.parts: control and function give scales of blocks; remove them, or choose block"


def _functions(c: RunConfig) -> Iterator[str]:
    for name, section in (("token_gain", c.token_gain), ("layer_gain", c.layer_gain)):
        if section.function is not None and not c.plugins:
            yield (
                f"{name}.function: {section.function} is a function of a plugin, and none is named; list its file "
                "under the suite's `plugins`, or give --plugins FILE"
            )
        if section.parameters and section.function is None:
            yield f"{name}.parameters: are those of {name}.function, which is not set; set it, or remove them"


def _machine(c: RunConfig) -> Iterator[str]:
    """Processes; and settings that DeepSpeed ZeRO lacks, or applies to something else than the gradient."""
    slurm, strategy, offload = c.cluster.slurm, c.cluster.strategy, c.cluster.offload_optimizer
    precision, zero = c.training.precision, strategy.startswith("zero")
    if slurm.lead_seconds >= 60 * slurm.time_limit_minutes:
        yield (
            f"cluster.slurm.lead_seconds: {slurm.lead_seconds} seconds are all of cluster.slurm.time_limit_minutes "
            f"({slurm.time_limit_minutes}), so a job would be told to stop at its start; lower it"
        )
    if strategy == "single" and c.world_size > 1:
        yield (
            f"cluster.strategy: single is one process, but cluster.devices x cluster.nodes is {c.world_size}; choose "
            "ddp or zero2"
        )
    if offload and not zero:
        yield f"cluster.offload_optimizer: {strategy} keeps the optimizer where the weights are; choose zero2 or zero3"
    if zero and precision == "64-true":
        yield f"training.precision: DeepSpeed has no fp64, so {strategy} cannot train in 64-true; choose single or ddp"
    if strategy == "zero1" and precision == "bf16-mixed":
        yield (
            "cluster.strategy: zero1 with bf16-mixed makes DeepSpeed take another optimizer, which keeps the gradients "
            "elsewhere; choose zero2 (the same memory for the optimizer), or training.precision=32-true"
        )
    if offload and strategy == "zero1":
        yield "cluster.offload_optimizer: not tested with zero1; choose zero2, which keeps less on the GPU"
    if offload and c.training.optimizer == "muon":
        yield (
            "cluster.offload_optimizer: Muon would orthogonalise its matrices on the CPU, minutes a step for a large "
            "model; choose zero2 or zero3 on more GPUs without offload, or training.optimizer=adamw"
        )
    if zero and c.layer_gain.enabled and c.layer_gain.apply == "update":
        yield (
            f"layer_gain.apply: with {strategy} DeepSpeed updates shards of the weights out of reach; choose single or "
            "ddp, or layer_gain.apply=step"
        )
    if strategy == "zero3" and c.validation.sequences % c.world_size:
        yield (
            f"validation.sequences: {c.validation.sequences} is no multiple of {c.world_size} processes, and with "
            "zero3 all must run the same number of forward passes; choose a multiple"
        )


def _kernels(c: RunConfig) -> Iterator[str]:
    """Settings that the chosen kernels cannot compute."""
    cluster, precision, moe = c.cluster, c.training.precision, c.model.feed_forward == "moe"
    if cluster.compile and moe and precision != "bf16-mixed":
        yield (
            f"cluster.compile: torch compiles the experts' grouped products in bf16 only, and training.precision is "
            f"{precision}; choose bf16-mixed, or cluster.compile=false"
        )
    if cluster.compile and cluster.strategy == "zero3":
        yield (
            "cluster.compile: zero3 gathers weights inside the blocks, where nothing can be fused; choose zero2, or "
            "cluster.compile=false"
        )
    if cluster.attention in ("cudnn", "efficient") and cluster.accelerator == "cpu":
        yield f"cluster.attention: {cluster.attention} runs on a GPU, and cluster.accelerator is cpu; choose auto"
    for key, width in (("model.d_model", c.model.d_model), ("model.d_ff", c.model.d_ff)):
        if moe and precision != "64-true" and width % 8:
            yield (
                f"{key}: {width} is no multiple of 8, and the experts' grouped products need rows of whole 16 bytes; "
                f"take {-(-width // 8) * 8}"
            )
    if cluster.head == "liger" and (cluster.accelerator == "cpu" or precision == "64-true"):
        yield "cluster.head: liger-kernel computes on a GPU, in at most fp32; choose chunked, the same function"
    if cluster.attention in ("flash", "cudnn") and precision != "bf16-mixed":
        yield (
            f"cluster.attention: {cluster.attention} computes in bf16, and training.precision is {precision}; choose "
            "bf16-mixed, or auto"
        )


def _batch(c: RunConfig) -> Iterator[str]:
    """The global batch over processes and micro-batches; of several rules that fail together, the first."""
    micro, group = c.micro_batch_sequences, c.gain_group_sequences
    if c.batch_sequences % c.world_size:
        yield (
            f"cluster.devices: {c.world_size} processes do not divide the global batch of {c.batch_sequences} "
            "sequences; choose a divisor"
        )
    elif not micro:
        yield f"cluster.devices: {c.world_size} processes are more than there are sequences"
    elif c.batch_sequences % (micro * c.world_size):
        yield (
            f"cluster.micro_batch_sequences: {micro} on {c.world_size} process(es) does not divide the global batch of "
            f"{c.batch_sequences} sequences; choose a divisor"
        )
    elif micro % group:
        yield (
            f"cluster.micro_batch_sequences: {micro} holds no whole number of gain groups of "
            f"training.gain_group_sequences ({group}); choose a multiple of {group}"
        )


def _texts(c: RunConfig) -> Iterator[str]:
    names = [source.name for source in c.data.sources]
    if len(set(names)) != len(names):
        yield f"data.sources: names must differ, got {names}"
    for source in c.data.sources:
        if source.kind in ("text", "jsonl", "parquet", "hub") and not source.path:
            yield f"data.sources: source '{source.name}' of kind '{source.kind}' needs a path"
        yield from _rendering(source)
    if _template_fields(c.generation.template) != {"question"}:
        yield "generation.template: must contain {question} and no other field in braces (write {{ for a brace)"


def _rendering(s: SourceConfig) -> Iterator[str]:
    """Keys that say what a row reads as, where they contradict one another or the kind of source."""
    for key, value in (("template", s.template), ("messages", s.messages)):
        if value is not None and s.kind not in ("jsonl", "parquet", "hub"):
            yield f"data.sources: {key} of '{s.name}' needs rows with columns, and kind '{s.kind}' has none; remove it"
    if s.split_on is not None and (s.kind != "text" or not s.split_on):
        yield f"data.sources: split_on of '{s.name}' is a text between documents, and of kind 'text'; remove it"
    if s.template is not None and s.messages is not None:
        yield (
            f"data.sources: source '{s.name}' sets template and messages; a row is rendered by one of them, remove one"
        )
    fields = _template_fields(s.template) if s.template is not None else {"text"}
    if not fields or not all(name and re.fullmatch(r"\w+", name) for name in fields):
        yield (
            f"data.sources: template of '{s.name}' must name columns in braces, such as {{question}}, and nothing else "
            "in them (write {{ for a brace)"
        )
    for role, text in (s.messages or {}).items():
        if not _template_fields(text) <= {"content"}:
            yield (
                f"data.sources: messages of '{s.name}': the text of role '{role}' may have {{content}} in braces and "
                "no other field (write {{ for a brace)"
            )


def _template_fields(template: str) -> set[str | None]:
    """Names in braces; {None} where the braces do not match, or hold more than a name."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        return {None if form or conversion else name for _, name, form, conversion in parts}
    except ValueError:
        return {None}


def analysis_contradictions(a: AnalysisConfig, arms: Sequence[str]) -> Iterator[str]:
    """Every rule that a suite's analysis section breaks."""
    for key, arm in (("baseline", a.baseline), ("treatment", a.treatment)):
        if arm is not None and arm not in arms:
            yield f"analysis.{key}: {arm} is not an arm of the suite; choose one of {', '.join(arms)}"
    if a.baseline in arms[1:]:
        yield (
            f"analysis.baseline: {a.baseline} is not the suite's first arm, with which all are compared; list it first"
        )
    resolved = a.resolved(arms)
    if resolved.baseline == resolved.treatment:
        yield f"analysis.treatment: {resolved.treatment} is the baseline too; name another arm"
    yield from _sweeps(a.sweeps or {}, arms)
    if not a.judge_kinds:
        yield "analysis.judge_kinds: names no kind; give human, model or both"
    if len(set(a.judge_kinds)) != len(a.judge_kinds):
        yield f"analysis.judge_kinds: names a kind twice: {list(a.judge_kinds)}"
    if list(a.looks) != sorted(set(a.looks)):
        yield f"analysis.looks: {list(a.looks)} must be numbers of seeds in ascending order, each once"
    elif a.looks and a.looks[0] < a.min_seeds:
        yield (
            f"analysis.looks: a look at {a.looks[0]} seeds decides nothing, as analysis.min_seeds is {a.min_seeds}; "
            "begin later, or lower that"
        )


def _sweeps(sweeps: Mapping[str, Sequence[str]], arms: Sequence[str]) -> Iterator[str]:
    named = [arm for of_sweep in sweeps.values() for arm in of_sweep]
    for arm in dict.fromkeys(named):
        if arm not in arms:
            yield f"analysis.sweeps: {arm} is not an arm of the suite; choose from {', '.join(arms)}"
        if named.count(arm) > 1:
            yield f"analysis.sweeps: names {arm} twice; an arm is part of one sweep"
    sizes = {len(of_sweep) for of_sweep in sweeps.values()}
    if sweeps and (len(sweeps) < 2 or len(sizes) > 1 or min(sizes) < 2):
        yield (
            "analysis.sweeps: needs two sweeps or more of as many arms each, at least two: who tries more rates finds "
            "the better best; list as many for each"
        )
