"""Rules between keys, by section: what no single key's type can refuse."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replication.config.schema import AnalysisConfig, RunConfig, SourceConfig

NAME = re.compile(r"\w([^/\\,\x00-\x1f]{0,98}[^/\\,\s\x00-\x1f])?")
"""Of an arm."""


def contradictions(c: RunConfig) -> Iterable[tuple[bool, str]]:
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


def analysis_contradictions(a: AnalysisConfig, arms: Sequence[str]) -> Iterable[tuple[bool, str]]:
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
