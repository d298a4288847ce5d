"""Completions of one trained cell: samples.jsonl."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from replication.config import RunConfig, to_dict
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.model.transformer import Transformer
from replication.preemption import Preempted, told_to_stop
from replication.preference.prompts import Prompt, find_prompts, load_prompts
from replication.preference.sampling import Sampler, complete, row_key
from replication.rundir import RunDir, file_sha256, read_json, write_json, write_text
from replication.training.checkpoints import load_weights, newest_checkpoint
from replication.training.environment import prepare_torch
from replication.training.strategies import uses_gpu

ROWS_AT_ONCE = 96


def generate(config: RunConfig, run: RunDir, store: TokenStore, console: Console) -> int:
    """Sample every prompt samples_per_prompt times from the newest checkpoint; write samples.jsonl whole.

    Each completion is a function of (arm, seed, prompt id, sample) and the weights alone.

    Returns:
        The number of completions.

    Raises:
        UserError: no checkpoint, no prompts, or a prompt file that cannot be read.
        Preempted: told to stop before all were there.
    """
    assert config.generation.prompts is not None
    prompts = load_prompts(config.generation.prompts)
    model = load_model(config, run)
    tokenizer = store.tokenizer()
    prepare_torch(config)
    c = config.generation
    rows = [(prompt, sample) for prompt in prompts for sample in range(c.samples_per_prompt)]
    lines: list[dict[str, Any]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        if told_to_stop():
            raise Preempted(f"{config.arm}/seed-{config.seed}: told to stop; no completions were written")
        part = rows[start : start + ROWS_AT_ONCE]
        texts = [c.template.format(question=prompt.question) for prompt, _ in part]
        completions = complete(
            model,
            [tokenizer.encode(text) or [store.end_of_text_id] for text in texts],
            [row_key(config.arm, config.seed, prompt.id, sample) for prompt, sample in part],
            Sampler(c.temperature, c.top_k),
            c.max_new_tokens,
            store.end_of_text_id,
        )
        for (prompt, sample), tokens in zip(part, completions, strict=True):
            lines.append(_line(config, prompt, sample, tokens, tokenizer.decode(tokens)))
    write_text(run.samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    record_settings(config, run)
    console.print(f"{config.arm}/seed-{config.seed}: {len(lines)} completions of {len(prompts)} prompts")
    return len(lines)


def _line(config: RunConfig, prompt: Prompt, sample: int, tokens: list[int], text: str) -> dict[str, Any]:
    return {
        "arm": config.arm,
        "seed": config.seed,
        "prompt_id": prompt.id,
        "category": prompt.category,
        "question": prompt.question,
        "sample": sample,
        "completion": text,
        "tokens": len(tokens),
        "stopped": len(tokens) < config.generation.max_new_tokens,
    }


def record_settings(config: RunConfig, run: RunDir) -> None:
    """Put into the manifest how samples.jsonl was made, so that arms sampled differently are noticed."""
    assert config.generation.prompts is not None
    manifest = read_json(run.manifest)
    settings = {k: v for k, v in to_dict(config.generation).items() if k != "prompts"}
    manifest["generation"] = settings | {
        "prompts_sha256": file_sha256(find_prompts(config.generation.prompts)),
        "samples_sha256": file_sha256(run.samples),
        "weights_sha256": manifest.get("final_weights_sha256"),
    }
    write_json(run.manifest, manifest)


def load_model(config: RunConfig, run: RunDir) -> Transformer:
    """The weights of the last step, in evaluation mode.

    Raises:
        UserError: the checkpoint of the last step is missing or damaged: completions of an earlier one would pass for
            the trained model's.
    """
    folder, notes = newest_checkpoint(run)
    step = read_json(folder / "COMPLETE")["step"] if folder else None
    if folder is None or step != config.training.steps:
        found = f"its newest is of step {step}" if folder else "it has none"
        raise UserError(
            f"{run.checkpoints}: no undamaged checkpoint of the last step {config.training.steps} ({found}"
            f"{''.join('; ' + n for n in notes)}); train the cell again, it goes on from what there is"
        )
    model = Transformer(config.model)
    model.load_state_dict(load_weights(folder), strict=not config.model.tied_head)  # a tied head is in there once
    return model.eval().to("cuda" if uses_gpu(config) else "cpu")
