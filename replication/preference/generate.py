"""Completions of one trained cell: samples.jsonl."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.console import Console

from replication.config import RunConfig
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.model.transformer import Transformer
from replication.preference.prompts import Prompt, load_prompts
from replication.preference.sampling import Sampler, complete, row_key
from replication.rundir import RunDir, write_text
from replication.training.checkpoints import STATE, newest_checkpoint

ROWS_AT_ONCE = 96


def generate(config: RunConfig, run: RunDir, store: TokenStore, console: Console) -> int:
    """Sample every prompt samples_per_prompt times from the newest checkpoint; write samples.jsonl whole.

    Each completion is a function of (arm, seed, prompt id, sample) and the weights alone.

    Returns:
        The number of completions.

    Raises:
        UserError: no checkpoint, no prompts, or a prompt file that cannot be read.
    """
    assert config.generation.prompts is not None
    prompts = load_prompts(config.generation.prompts)
    model = load_model(config, run)
    tokenizer = store.tokenizer()
    c = config.generation
    rows = [(prompt, sample) for prompt in prompts for sample in range(c.samples_per_prompt)]
    lines: list[dict[str, Any]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
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


def load_model(config: RunConfig, run: RunDir) -> Transformer:
    """The weights of the newest undamaged checkpoint, in evaluation mode.

    Raises:
        UserError: the cell has no complete checkpoint.
    """
    folder, _ = newest_checkpoint(run)
    if folder is None:
        raise UserError(f"{run.checkpoints}: no complete checkpoint; train the cell first")
    state = torch.load(folder / STATE, map_location="cpu", weights_only=False)["state_dict"]
    model = Transformer(config.model)
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    use_gpu = config.cluster.accelerator != "cpu" and torch.cuda.is_available()
    return model.eval().to("cuda" if use_gpu else "cpu")
