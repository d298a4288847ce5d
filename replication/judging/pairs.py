"""The items of a panel: every pair of completions of one prompt and seed, in an order drawn at random."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from replication.errors import UserError
from replication.generation.completions import Completion
from replication.judging.seal import Behind
from replication.votes.record import check_number

Completions = Mapping[int, Mapping[str, Sequence[Completion]]]
"""seed -> arm -> completions"""


@dataclass(frozen=True)
class Found:
    """Completions by name, and what there is of each."""

    prompts: list[int]
    seeds: list[int]
    samples: tuple[list[int], list[int]]
    by_name: dict[tuple[int, str, int, int], Completion]  # (seed, arm, prompt, sample)


def matched(completions: Completions, arms: tuple[str, str]) -> Found:
    """The completions by name, after a look that every seed and arm has the same prompts and samples."""
    if not completions:
        raise UserError(f"no seed has completions of both {arms[0]} and {arms[1]}; run `replicate generate` first")
    by_name, shapes = {}, {}
    for seed, of_arm in completions.items():
        check_number(seed, "seed")
        for arm in arms:
            for one in of_arm.get(arm, ()):
                check_number(one.prompt_id, f"{arm}/seed-{seed}: prompt_id")
                check_number(one.sample, f"{arm}/seed-{seed}: sample")
                by_name[seed, arm, one.prompt_id, one.sample] = one
            shapes[seed, arm] = {(one.prompt_id, one.sample): one.question for one in of_arm.get(arm, ())}
    seeds = sorted(completions)
    for i, arm in enumerate(arms):
        for seed in seeds:
            if shapes[seed, arm] != shapes[seeds[0], arm] or not shapes[seed, arm]:
                raise UserError(
                    f"{arm}/seed-{seed}: has completions of other prompts, or other numbers of them, than "
                    f"{arms[0]}/seed-{seeds[0]}; generate all cells with the same settings"
                )
        prompts = {prompt for prompt, _ in shapes[seeds[0], arm]}
        if i and prompts != {prompt for prompt, _ in shapes[seeds[0], arms[0]]}:
            raise UserError(
                f"{arm}: has completions of other prompts than {arms[0]}; generate both with one prompt file"
            )
    samples = tuple(sorted({sample for _, sample in shapes[seeds[0], arm]}) for arm in arms)
    for arm, numbers in zip(arms, samples, strict=True):
        for prompt in prompts:
            if any((prompt, sample) not in shapes[seeds[0], arm] for sample in numbers):
                raise UserError(f"{arm}: prompt {prompt} lacks some of the samples {numbers}; generate the cells again")
    return Found(sorted(prompts), seeds, (samples[0], samples[1]), by_name)


def draw_items(found: Found, arms: tuple[str, str]) -> list[tuple[dict[str, Any], Behind]]:
    """Every pair of completions of one prompt and seed: its row, in an order drawn at random, and what is behind it."""
    drawn = []
    for seed in found.seeds:
        for prompt in found.prompts:
            for a in found.samples[0]:
                for b in found.samples[1]:
                    both = [(arms[0], a), (arms[1], b)]
                    if secrets.randbits(1):
                        both.reverse()
                    texts = [found.by_name[seed, arm, prompt, sample] for arm, sample in both]
                    row = {
                        "item_id": secrets.token_hex(8),
                        "prompt_id": prompt,
                        "category": texts[0].category,
                        "question": texts[0].question,
                        "first": texts[0].text,
                        "second": texts[1].text,
                    }
                    drawn.append((row, Behind(seed, both[0][0], both[1][0], both[0][1], both[1][1])))
    return drawn
