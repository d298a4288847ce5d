"""The identity of a run: its scientific keys, all that may change a weight or a reported number, and their hash.

Other keys are free to differ between machines, and change results by rounding at most. A key that declares
`neutral_since` is part of an identity only where its value is another than its default: what an earlier version wrote,
which did not know the key, is then the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from replication.config.checks import OF_OTHERS
from replication.config.reading import Keys, dump_yaml, hints
from replication.config.schema import FOUND, NEUTRAL_SINCE, GenerationConfig, RunConfig
from replication.errors import UserError

NOT_SCIENTIFIC = (
    "data.dir",
    "data.num_proc",
    "model.initial_weights",
    *(f"{s}." for s in ("logging", "checkpoints", "generation", "cluster")),
)
MACHINE_KEYS = ("cluster.", "logging.", "checkpoints.", "data.dir", "data.num_proc", "model.initial_weights")
"""Of those, what only says where and how a cell runs."""
SEED_KEYS = ("seed", "weights_seed", "data_seed")


def to_dict(config: Any, neutral: bool = True) -> Keys:
    """A config as plain dicts and lists, in field order, without what reading it found out (FOUND)."""

    def own(part: Any) -> Keys:
        values = ((f, getattr(part, f.name)) for f in dataclasses.fields(part) if FOUND not in f.metadata)
        return {f.name: v for f, v in values if neutral or NEUTRAL_SINCE not in f.metadata or v != f.default}

    return json.loads(json.dumps(config, default=own))


def without_neutral(config: Any) -> Keys:
    """As to_dict, without keys of `neutral_since` that have their neutral value, also those in lists."""
    return to_dict(config, neutral=False)


@functools.cache
def neutral_values(cls: type = RunConfig, prefix: str = "") -> Keys:
    """{dotted key: neutral value} of the keys that declare one."""
    found = Keys()
    for entry in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hint := hints(cls)[entry.name]):
            found |= neutral_values(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        elif NEUTRAL_SINCE in entry.metadata:
            found[f"{prefix}{entry.name}"] = entry.default
    return found


def to_yaml(config: Any) -> str:
    """A config as text; of a run without the keys of our own model where it trains another."""
    tree = to_dict(config)
    if isinstance(config, RunConfig) and config.model.class_path is not None:
        tree["model"] = {k: v for k, v in tree["model"].items() if k in (*OF_OTHERS, "initial_weights")}
    return dump_yaml(tree)


def sampling_settings(generation: GenerationConfig) -> Keys:
    """The keys on which completions depend, the prompts aside: a name is not a text, so their hash stands for them."""
    return {k: v for k, v in without_neutral(generation).items() if k not in ("prompts", "rows_at_once")}


def flatten(tree: Keys, prefix: str = "") -> Keys:
    """Nested dicts as {dotted key: leaf}; lists are leaves."""
    flat = Keys()
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def scientific(config: RunConfig) -> Keys:
    """Dotted keys that may change a weight or a reported number, with their values.

    Beside a model.class_path the keys of our own model are left out: they describe nothing.
    With `layer_gain.apply: micro_batch`, or gain groups that are whole micro-batches, the update depends on how the
    global batch is cut, so that enters too (objectives/README.md, Several processes).
    """
    keys = {k: v for k, v in flatten(without_neutral(config)).items() if not k.startswith(NOT_SCIENTIFIC)}
    if config.model.class_path is not None:
        keys = {k: v for k, v in keys.items() if not k.startswith("model.") or k.split(".")[1] in OF_OTHERS}
    keys |= {"weights_seed": config.effective_weights_seed, "data_seed": config.effective_data_seed}
    if config.layer_gain.apply == "micro_batch" or config.training.gain_group_sequences is None:
        keys["cluster.micro_batch_sequences"] = config.micro_batch_sequences
        keys["cluster.world_size"] = config.world_size
    return keys


def without_seeds(keys: Keys) -> Keys:
    """Of scientific keys, what all seeds of an arm share."""
    return {k: v for k, v in keys.items() if k not in SEED_KEYS}


def machine_cut(config: RunConfig) -> Keys:
    """The part of a config's machine that may change how sums are rounded, which in fp32 grows over the steps."""
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


def differences(a: Keys, b: Keys) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as {key: (in a, in b)}; one that is lacking counts as neutral, or else None."""
    neutral = neutral_values()
    pairs = {k: (a.get(k, neutral.get(k)), b.get(k, neutral.get(k))) for k in sorted({*a, *b})}
    return {k: (here, there) for k, (here, there) in pairs.items() if here != there}


def refuse_differences(what: str, there: Keys, here: Keys, remedy: str) -> None:
    """Raise UserError that names the first keys in which two flat configs differ; nothing where they are equal."""
    if different := differences(there, here):
        listed = "; ".join(f"{k}: {a} there, {b} here" for k, (a, b) in list(different.items())[:5])
        raise UserError(f"{what} ({listed}); {remedy}")
