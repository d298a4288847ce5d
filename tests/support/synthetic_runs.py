"""Synthetic suite folders in exactly the contract of rundir.py, with planted differences and failures. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from run_files import read_journal

from replication.config import RunConfig, SuiteConfig, arm_keys, load_cell, machine_cut, scientific_hash, to_yaml
from replication.runs.files import read_json, write_json, write_text
from replication.runs.journal import Journal, Line
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.records import to_json

ARMS = ("baseline", "token_gain", "layer_gain", "both")
CATEGORIES = (
    "factual",
    "reasoning",
    "creative",
    "conversational",
    "structured_output",
    "instruction_following",
    "world_knowledge",
)
PACKAGES = {"torch": "2.13.0", "numpy": "2.4.6", "python": "3.11.2"}


@dataclass(frozen=True)
class Synthetic:
    """What to build."""

    arms: Sequence[str] = ARMS
    """Names of files in configs/arms."""
    seeds: Sequence[int] = (1, 2)
    steps: int = 60
    log_every: int = 5
    validate_every: int = 3
    model: str = "model/tiny.yaml"
    """The layer that says how many blocks and experts there are."""
    effects: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """arm -> tag -> constant that is added to every value of the tag (per-step values too)."""
    noise: float = 0.01
    """Standard deviation of a constant offset of each cell's losses, in nats; 0 makes seeds differ by nothing."""
    failed: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """(arm, seed) -> step at which the cell failed."""
    interrupted: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """(arm, seed) -> step at which the cell stopped without a word."""
    missing: Sequence[tuple[str, int]] = ()
    """Cells without a folder."""
    completions: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """(arm, seed) -> text of every completion of the cell."""
    samples: bool = True
    data_manifest: bool = True


def build_suite(root: Path, what: Synthetic | None = None, **changes: Any) -> tuple[SuiteDir, SuiteConfig]:
    """Write a whole suite folder.

    Args:
        root: DIR; made here.
        what: the plan; fields of Synthetic may also be given by name.

    Returns:
        The folder and the suite that it holds.
    """
    what = replace(what or Synthetic(), **changes)
    suite = _suite(tuple(what.arms), tuple(what.seeds), what.steps, what.log_every, what.validate_every, what.model)
    suite_dir = SuiteDir(root)
    write_text(suite_dir.suite, to_yaml(suite))
    if what.data_manifest:
        write_json(suite_dir.data / "manifest.json", _data_manifest())
    for seed in suite.seeds:
        for arm in suite.arms:
            if (arm, seed) not in what.missing:
                _build_cell(suite_dir.cell(arm, seed), suite, arm, seed, what)
    return suite_dir, suite


def edit_manifest(run: RunDir, **changes: Any) -> None:
    """Change top-level values of a cell's manifest; a value of None removes the key."""
    manifest = {**read_json(run.manifest), **to_json(changes)}
    write_json(run.manifest, {k: v for k, v in manifest.items() if v is not None})


def edit_journal(run: RunDir, step: int, **changes: Any) -> None:
    """Change values of the training line at a step; tags with a slash go in a dict: **{"train/loss_nats": None}."""
    lines = read_journal(run.metrics)
    for line in lines:
        if line["step"] == step and "tokens" in line:
            line.update(changes)
    write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))


def edit_config(run: RunDir, old: str, new: str) -> None:
    """Replace text in a cell's config.yaml."""
    text = run.config.read_text()
    assert old in text, f"{old!r} is not in {run.config}"
    write_text(run.config, text.replace(old, new))


def rewrite_config(run: RunDir, config: RunConfig) -> None:
    """Give a cell another config, with the manifest's hash in step: as if it had been trained so."""
    write_text(run.config, to_yaml(config))
    edit_manifest(run, config_hash=scientific_hash(config))


# ---------------------------------------------------------------- one cell


@lru_cache
def _suite(
    arms: tuple[str, ...], seeds: tuple[int, ...], steps: int, log_every: int, validate_every: int, model: str
) -> SuiteConfig:
    run = {
        "training": {"steps": steps, "warmup_steps": min(10, steps)},
        "logging": {"log_every_steps": log_every},
        "validation": {"every_steps": validate_every},
        "cluster": {"accelerator": "cpu"},
    }
    return SuiteConfig(name="synthetic", arms=arms, seeds=seeds, layers=(model, "data/python.yaml"), run=run)


_CONFIGS: dict[str, RunConfig] = {}


def cell_config(suite: SuiteConfig, arm: str, seed: int) -> RunConfig:
    """The cell's config; parsed once for each arm and suite, because parsing takes longer than all the rest."""
    key = f"{arm} {suite.layers} {suite.run}"
    if key not in _CONFIGS:
        _CONFIGS[key] = load_cell(suite, arm, seed)
    return replace(_CONFIGS[key], seed=seed)


def _build_cell(run: RunDir, suite: SuiteConfig, arm: str, seed: int, what: Synthetic) -> None:
    config = cell_config(suite, arm, seed)
    stopped = what.failed.get((arm, seed), what.interrupted.get((arm, seed)))
    last = config.training.steps if stopped is None else stopped
    write_text(run.config, to_yaml(config))
    lines = _journal(config, what, last)
    journal = Journal(run.metrics)
    for line in lines:
        journal.append(Line(line.pop("step"), line, line.pop("per_step", {})))
    journal.close()
    manifest = _manifest(config)
    if stopped is None:
        manifest |= {
            "step": last,
            "tokens": last * config.training.batch_tokens,
            "data_chain": _chain(seed, last),
            "wall_seconds": 0.1 * last,
            "final_weights_sha256": _sha("final", arm, seed),
            "finished_at": "2026-05-01T10:05:00+0000",
        }
    write_json(run.manifest, manifest)
    if (arm, seed) in what.failed:
        error = "UserError: the loss was not finite\nsecond line that no table shows"
        write_json(run.failed, {"error": error, "log": str(run.log), "step": last, "time": "2026-05-01T10:03:00+0000"})
    if stopped is None:
        if what.samples:
            write_text(run.samples, _samples(arm, seed, what))
        write_json(run.complete, {"config_hash": manifest["config_hash"], "step": last})


def _sha(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _chain(seed: int, step: int) -> str:
    return _sha("data", seed, step)[:32]


def _ways(config: RunConfig) -> dict[str, Any]:
    """What a start records of its code and machine."""
    machine = machine_cut(config) | {"threads": 2, "device": "Synthetic CPU"}
    return {"code_hash": "c0de" * 4, "packages": PACKAGES, "machine": machine}


def edit_start(run: RunDir, **changes: Any) -> None:
    """Change values of a cell's first start; a value of None removes the key, a dict is merged into what is there."""
    start = read_json(run.manifest)["starts"][0]
    start |= {k: {**start[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    edit_manifest(run, starts=[{k: v for k, v in start.items() if v is not None}])


def _manifest(config: RunConfig) -> dict[str, Any]:
    return {
        "arm": config.arm,
        "seed": config.seed,
        "config_hash": scientific_hash(config),
        "arm_keys": sorted(arm_keys(config.arm)),
        "data": {"hash": _sha("corpus"), "dir": "data"},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "packages": PACKAGES,
        "hardware": {"cpu": "Synthetic CPU", "cores": 2, "gpus": [], "memory_gib": 8.0},
        "starts": [{"at": "2026-05-01T10:00:00+0000", "step": 0, **_ways(config)}],
        "world_size": 1,
        "parameters": 1_000_000,
        "initial_weights_sha256": _sha("initial", config.seed),
        "started_at": "2026-05-01T10:00:00+0000",
    }


def _journal(config: RunConfig, what: Synthetic, last: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([zlib.crc32(config.arm.encode()), config.seed])
    offset = what.noise * float(rng.standard_normal())
    effects = what.effects.get(config.arm, {})
    step_loss = [_loss(k, config) + offset + what.noise * float(rng.standard_normal()) for k in range(1, last + 1)]
    step_norm = [1.5 + 2 * math.exp(-k / 10) + 0.1 * float(rng.standard_normal()) for k in range(1, last + 1)]
    step_loss = [x + effects.get("train/loss_nats", 0.0) for x in step_loss]
    step_norm = [x + effects.get("train/grad_norm", 0.0) for x in step_norm]
    lines = []
    for step in range(1, last + 1):
        if step % what.validate_every == 0 or step == config.training.steps:
            lines.append(_planted(_validation_line(step, config, offset), effects))
        if step % what.log_every == 0 or step == config.training.steps:
            since = step - (step % what.log_every or what.log_every)
            per_step = {
                "train/loss_nats": step_loss[since:step],
                "train/grad_norm": step_norm[since:step],
            }
            lines.append({**_planted(_training_line(step, config, offset), effects), "per_step": per_step})
    return lines


def _planted(line: dict[str, Any], effects: Mapping[str, float]) -> dict[str, Any]:
    return {k: v + effects[k] if k in effects else v for k, v in line.items()}


def _loss(step: float, config: RunConfig) -> float:
    return 4.0 + 3.6 * math.exp(-5 * step / config.training.steps)


def _validation_line(step: int, config: RunConfig, offset: float) -> dict[str, Any]:
    loss = _loss(step, config) + offset
    return {
        "step": step,
        "val/loss_nats": loss,
        "val/loss_unsmoothed_nats": loss - 0.4,
        "val/entropy_predicted_tokens_nats": 3.0 + 1.5 * step / config.training.steps + offset,
        "val/entropy_predictive_nats": loss - 0.1,
    }


def _training_line(step: int, config: RunConfig, offset: float) -> dict[str, Any]:
    loss, t = _loss(step, config) + offset, config.training
    early = math.exp(-6 * step / t.steps)
    divergences = [0.5 + 0.3 * i + early for i in range(config.model.n_blocks)]
    mean = sum(divergences) / len(divergences)
    scales = [1 + 0.5 * (d / mean - 1) for d in divergences]
    line: dict[str, Any] = {
        "step": step,
        "tokens": step * t.batch_tokens,
        "wall_seconds": 0.1 * step,
        "data_hash": _chain(config.seed, step),
        "train/loss_nats": loss,
        "train/loss_unsmoothed_nats": loss - 0.4,
        "train/objective": loss + 0.9,
        "train/aux_loss": 1.0,
        "train/grad_norm": 1.5,
        "train/learning_rate": t.learning_rate * min(1.0, step / max(1, t.warmup_steps)),
        "train/tokens_per_second": t.batch_tokens / 0.1,
        "gain/mean": 1 + early,
        "gain/std": 0.47 + early,
        "gain/min": 0.1,
        "gain/max": 5.0 - 2 * (1 - early),
        "gain/mean_before_clamp": 1.0,
        "gain/share_at_min": 0.05 + 0.3 * early,
        "gain/share_at_max": 0.2 * early,
        "entropy/predicted_tokens_nats": 3.0,
        "entropy/predictive_nats": loss - 0.1,
    }
    for i, (divergence, scale) in enumerate(zip(divergences, scales, strict=True)):
        line[f"divergence/block_{i:02d}"] = divergence
        line[f"scale/block_{i:02d}"] = scale
        for e in range(config.model.n_experts):
            line[f"experts/block_{i:02d}_expert_{e}"] = (1 + 0.1 * math.sin(step + e)) / config.model.n_experts
    return line


def _samples(arm: str, seed: int, what: Synthetic) -> str:
    lines = []
    for i, category in enumerate(CATEGORIES, 1):
        for sample in range(2):
            text = what.completions.get(
                (arm, seed), f"Completion of {arm} at seed {seed}, sample {sample}.\nSecond line."
            )
            lines.append({
                "arm": arm,
                "seed": seed,
                "prompt_id": i,
                "category": category,
                "question": f"A {category} question?",
                "sample": sample,
                "completion": text,
                "tokens": 12,
                "stopped": True,
            })  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def _data_manifest() -> dict[str, Any]:
    def split(documents: int, tokens: int) -> dict[str, Any]:
        return {
            "documents": documents,
            "text_bytes": tokens * 4,
            "tokens": tokens,
            "blocks": tokens // 128,
            "sha256": "x",
        }

    sources = {
        name: {
            "kind": name,
            "documents": 100,
            "empty": 1,
            "undecodable": 0,
            "text_bytes": 4 * tokens,
            "train": split(98, tokens),
            "validation": split(2, tokens // 50),
        }
        for name, tokens in (("topics", 100_000), ("docstrings", 500_000))
    }
    return {"format": 1, "hash": _sha("corpus"), "vocab_size": 2048, "block_size_tokens": 128, "sources": sources}
