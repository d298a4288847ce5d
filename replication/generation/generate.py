"""Completions of one trained cell.

Weights are fp32, and sampling computes with them in fp64 unless `generation.precision` says otherwise. In lower
precision a matrix product depends on how many rows it has and on the device, by about 1e-6 of a logit in fp32 and 1e-2
in bf16; where the two best candidates are nearer than that, the completion goes another way from there. In fp64 that
does not happen in practice. It takes about twice the time and memory of fp32: eight bytes a weight, and a cache of 16
bytes for each block, key/value head, head dimension, position and row (1.2B: 10 GB, and 3 GB for 96 rows of 200).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from rich.console import Console

from replication.config import RunConfig
from replication.data.prompts import prompt_tokens
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.generation.completions import Completion, Samples, Shard
from replication.generation.sampling import Sampler, complete, row_key
from replication.model.foreign import Model, parameters_in, unset_model
from replication.objectives.plugins import functions_of
from replication.processes.preemption import Preempted, stop_requested
from replication.runs.layout import RunDir, SuiteDir, step_of
from replication.runs.manifest import Manifest, read_manifest
from replication.training.checkpoint_files import load_weights, newest_checkpoint
from replication.training.environment import prepare_torch, uses_gpu

DTYPES = {"64-true": torch.float64, "32-true": torch.float32}


def generate(config: RunConfig, run: RunDir, store: TokenStore, console: Console) -> None:
    """Make samples.jsonl of one cell, in this process; where it is there already, with these settings, leave it.

    Each completion is a function of (arm, seed, prompt id, sample) and the weights alone. Preempted where told to stop
    before all were there: those of whole batches are kept.
    """
    samples = Samples.of(config, run)
    if samples.are_there():
        console.print(f"{samples.name}: {len(samples.rows)} completions are there already")
        return
    samples.begin()
    sample_shard(samples, Shard(), store)
    count = samples.finish()
    console.print(f"{samples.name}: {count} completions of {len(samples.prompts)} prompts")


def sample_shard(
    samples: Samples, shard: Shard, store: TokenStore, on_step: Callable[[int, int], None] | None = None
) -> None:
    """Sample what is missing of one shard, batch by batch; each is on the disk before the next begins.

    `on_step` is told after each step how many tokens it sampled, and how many completions ended with it.
    """
    config, c = samples.config, samples.config.generation
    there = samples.parts()
    todo = [row for row in samples.rows[shard.i :: shard.n] if (row[0].id, row[1]) not in there]
    if not todo:
        return
    trained_on = (read_manifest(samples.run) or Manifest()).data.hash
    if trained_on not in (None, store.hash):
        raise UserError(
            f"data.dir: {samples.run.root} was trained on another corpus ({trained_on:.16} then, {store.hash:.16} "
            "now), so its tokenizer may be another; restore the corpus, or name its folder in the cell's config.yaml"
        )
    prepare_torch(config)
    model, tokenizer = load_model(config, samples.run), store.tokenizer
    sampler = Sampler(c.temperature, c.top_k, c.top_p)
    tokens = prompt_tokens(c.template, samples.prompts, tokenizer, store.end_of_text_id)
    todo.sort(key=lambda row: len(tokens[row[0].id]))  # a batch goes on until its longest has ended
    ended = 0  # of the batch in work

    def watch(n_tokens: int, n_ended: int) -> None:
        """Between two steps of a batch: hears the request to stop, and passes progress on."""
        nonlocal ended
        if stop_requested():
            kept = f"{len(samples.parts())} of {len(samples.rows)} completions are kept"
            raise Preempted(f"{samples.name}: told to stop; {kept}")
        if on_step is not None:
            on_step(n_tokens, n_ended - ended)
        ended = n_ended

    with closing(samples.appender(shard)) as appender:
        for start in range(0, len(todo), c.rows_at_once):
            batch, ended = todo[start : start + c.rows_at_once], 0
            prompts = [tokens[prompt.id] for prompt, _ in batch]
            keys = [row_key(config.arm, config.seed, prompt.id, sample) for prompt, sample in batch]
            try:
                found = complete(model, prompts, keys, sampler, c.max_new_tokens, store.end_of_text_id, watch)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"generation.rows_at_once: {len(batch)} completions side by side do not fit the GPU's memory; "
                    "lower it, or set generation.precision=32-true"
                ) from None
            done = []
            for (p, sample), ids in zip(batch, found, strict=True):
                text, stopped = tokenizer.decode(ids), len(ids) < c.max_new_tokens
                asked = (config.arm, config.seed, p.id, p.category, p.question, sample)
                done.append(Completion(*asked, text, len(ids), stopped))
            appender.append(done)


def load_model(config: RunConfig, run: RunDir) -> Model:
    """The weights of the last step, in evaluation mode, in the precision and on the device of sampling.

    UserError where their checkpoint is missing or damaged: completions of an earlier one would pass for its own.
    """
    folder, notes = newest_checkpoint(run)
    if folder is None or step_of(folder) != config.training.steps:
        found = f"its newest is of step {step_of(folder)}" if folder else "it has none"
        raise UserError(
            f"{run.checkpoints}: no undamaged checkpoint of the last step {config.training.steps} ({found}"
            f"{''.join('; ' + n for n in notes)}); train the cell again, it goes on from what there is"
        )
    functions_of(config, SuiteDir.of(run).plugins.glob("*"))  # and where a plugin's class is
    model = unset_model(config.model, config.effective_weights_seed)
    net = parameters_in(model)
    net.load_state_dict(load_weights(folder))
    net.eval().to("cuda" if uses_gpu(config) else "cpu", DTYPES[config.generation.precision])
    return model
