"""Small real training runs for the tests: the product's own `train` on a store in memory."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import torch
from memory_store import MemoryStore
from rich.console import Console

from replication.config import DataConfig, ModelConfig, RunConfig, SourceConfig, load_run
from replication.runs.layout import RunDir
from replication.training.checkpoint_files import load_weights, newest_checkpoint
from replication.training.train import train

ARMS = ("baseline", "token_gain", "layer_gain", "both")
MODEL = ModelConfig(vocab_size=64, n_blocks=3, d_model=32, n_heads=4, n_kv_heads=2, d_head=8, d_ff=24, init_std=0.05)
DATA = DataConfig(
    block_size_tokens=16,
    sources=(
        SourceConfig("source_0", path="in memory"),
        SourceConfig("source_1", path="in memory", weight=0.5),
    ),
)


def small_config(arm: str = "baseline", *flags: str, model: ModelConfig = MODEL) -> RunConfig:
    """Eight sequences of 16 tokens a step in groups of two, six steps."""
    defaults = (
        "--seed=1", "--data.block_size_tokens=16", "--training.batch_tokens=128", "--training.steps=6",
        "--training.warmup_steps=2", "--validation.every_steps=3", "--validation.sequences=4",
        "--logging.log_every_steps=2", "--checkpoints.every_steps=2", "--cluster.accelerator=cpu",
        "--cluster.threads=1", "--generation.prompts=null",
    )  # fmt: skip
    config = load_run([f"arms/{arm}.yaml"], [*defaults, *flags])
    return dataclasses.replace(config, data=DATA, model=dataclasses.replace(model)).check()


def fit(config: RunConfig, root: Path, store: MemoryStore | None = None) -> RunDir:
    """Train the cell in `root`, or go on with it."""
    run = RunDir(root)
    train(config, run, store or MemoryStore(), Console(file=io.StringIO()))  # type: ignore[arg-type]
    return run


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint, in the precision in which they were trained."""
    folder, _ = newest_checkpoint(run)
    assert folder is not None
    return load_weights(folder)


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest ||a - b|| / ||b|| over the tensors."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in a)


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
