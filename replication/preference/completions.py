"""placeholder until the reader of samples.jsonl is merged."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    arm: str
    seed: int
    prompt_id: int
    category: str
    question: str
    sample: int
    text: str
