"""Completions of one trained cell.

Weights are fp32, and sampling computes with them in fp64 unless `generation.precision` says otherwise, on a GPU as on a
CPU and without autocast. In lower precision a matrix product depends on how many rows it has and on the device, by
about 1e-6 of a logit in fp32 and 1e-2 in bf16; where the two best candidates are nearer than that, the completion
goes another way from there. In fp64 that does not happen in practice: the same text comes from any batch, device and
number of workers, and after any interruption. Sampling is bound by reading the weights, so this costs about twice the
time of fp32, and its memory: eight bytes a weight, and a cache of 16 bytes for each block, key/value head, head
dimension, position and row (1.2B: 10 GB, and 3 GB for 96 rows of 200 tokens).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console

from replication.config import RunConfig
from replication.data.prompts import prompt_tokens
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.generation.completions import Completion
from replication.generation.samples import Samples, Shard
from replication.generation.sampling import Sampler, complete, row_key
from replication.model.transformer import Transformer
from replication.processes.preemption import Preempted, stop_requested
from replication.runs.files import read_object
from replication.runs.layout import RunDir
from replication.runs.manifest import Manifest, read_manifest
from replication.training.checkpoints import load_weights, newest_checkpoint
from replication.training.environment import prepare_torch
from replication.training.strategies import uses_gpu

DTYPES = {"64-true": torch.float64, "32-true": torch.float32}

OnStep = Callable[[int, int], None]
"""Told after each step how many tokens it sampled, and how many completions ended with it."""


def generate(config: RunConfig, run: RunDir, store: TokenStore, console: Console) -> int:
    """Make samples.jsonl of one cell, in this process; where it is there already, with these settings, leave it.

    Each completion is a function of (arm, seed, prompt id, sample) and the weights alone.

    Returns:
        The number of completions.

    Raises:
        UserError: no checkpoint, no prompts, or a prompt file that cannot be read.
        Preempted: told to stop before all were there; those of whole batches are kept.
    """
    samples = Samples.of(config, run)
    if samples.are_there():
        console.print(f"{samples.name}: {len(samples.rows)} completions are there already")
        return len(samples.rows)
    samples.begin()
    sample_shard(samples, Shard(), store)
    count = samples.finish()
    console.print(f"{samples.name}: {count} completions of {len(samples.prompts)} prompts")
    return count


def sample_shard(samples: Samples, shard: Shard, store: TokenStore, on_step: OnStep | None = None) -> None:
    """Sample what is missing of one shard, batch by batch; each is on the disk before the next begins.

    Prompts of similar lengths go together: a batch goes on until its longest has ended.

    Raises:
        UserError: no checkpoint of the last step, or a corpus of other data, whose tokenizer would be another.
        Preempted: told to stop; the batch in work is lost.
    """
    config, c = samples.config, samples.config.generation
    there = samples.parts()
    todo = [row for row in samples.rows[shard.i :: shard.n] if (row[0].id, row[1]) not in there]
    if not todo:
        return
    refuse_other_tokenizer(samples.run, store)
    prepare_torch(config)
    model, tokenizer = load_model(config, samples.run), store.tokenizer
    sampler = Sampler(c.temperature, c.top_k, c.top_p)
    tokens = prompt_tokens(c.template, samples.prompts, tokenizer, store.end_of_text_id)
    todo.sort(key=lambda row: len(tokens[row[0].id]))
    appender = samples.appender(shard)
    try:
        for start in range(0, len(todo), c.rows_at_once):
            batch = todo[start : start + c.rows_at_once]
            try:
                completions = complete(
                    model,
                    [tokens[prompt.id] for prompt, _ in batch],
                    [row_key(config.arm, config.seed, prompt.id, sample) for prompt, sample in batch],
                    sampler,
                    c.max_new_tokens,
                    store.end_of_text_id,
                    _Watch(samples, on_step).step,
                )
            except torch.OutOfMemoryError:
                raise UserError(
                    f"generation.rows_at_once: {len(batch)} completions side by side do not fit the GPU's memory; "
                    "lower it, or set generation.precision=32-true"
                ) from None
            appender.append([
                Completion(
                    config.arm, config.seed, prompt.id, prompt.category, prompt.question, sample,
                    tokenizer.decode(ids), len(ids), len(ids) < c.max_new_tokens,
                )
                for (prompt, sample), ids in zip(batch, completions, strict=True)
            ])  # fmt: skip
    finally:
        appender.close()


class _Watch:
    """Between two steps of a batch: passes progress on, and hears the request to stop."""

    def __init__(self, samples: Samples, on_step: OnStep | None) -> None:
        self.samples, self.on_step, self.ended = samples, on_step, 0

    def step(self, n_tokens: int, n_ended: int) -> None:
        if stop_requested():
            kept = f"{len(self.samples.parts())} of {len(self.samples.rows)} completions are kept"
            raise Preempted(f"{self.samples.name}: told to stop; {kept}")
        if self.on_step is not None:
            self.on_step(n_tokens, n_ended - self.ended)
        self.ended = n_ended


def refuse_other_tokenizer(run: RunDir, store: TokenStore) -> None:
    """Raise UserError where a cell was trained on other data than the corpus that is there now."""
    trained = (read_manifest(run) or Manifest()).data.hash
    if trained is not None and trained != store.hash:
        raise UserError(
            f"data.dir: {run.root} was trained on another corpus ({trained:.16} then, {store.hash:.16} now), so its "
            "tokenizer may be another; restore the corpus, or name its folder in the cell's config.yaml"
        )


def load_model(config: RunConfig, run: RunDir) -> Transformer:
    """The weights of the last step, in evaluation mode, in the precision and on the device of sampling.

    Raises:
        UserError: the checkpoint of the last step is missing or damaged: completions of an earlier one would pass for
            the trained model's.
    """
    folder, notes = newest_checkpoint(run)
    step = read_object(folder / "COMPLETE")["step"] if folder else None
    if folder is None or step != config.training.steps:
        found = f"its newest is of step {step}" if folder else "it has none"
        raise UserError(
            f"{run.checkpoints}: no undamaged checkpoint of the last step {config.training.steps} ({found}"
            f"{''.join('; ' + n for n in notes)}); train the cell again, it goes on from what there is"
        )
    model = Transformer(config.model)
    model.load_state_dict(load_weights(folder), strict=not config.model.tied_head)  # a tied head is in there once
    return model.eval().to("cuda" if uses_gpu(config) else "cpu", DTYPES[config.generation.precision])
