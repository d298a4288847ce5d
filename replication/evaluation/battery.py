"""Figures of a cell's completions that need no judge: how long they are, and how much they repeat. Imports no torch.

Words are runs of letters and digits, or single other characters, so that arms with other tokenizers compare.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from replication.generation.completions import Completion

WORD = re.compile(r"\w+|[^\w\s]")
REPEATED = 4  # words of the n-grams whose repetition is counted


def battery(completions: Sequence[Completion]) -> dict[str, float | None]:
    """Score -> value over all completions of a cell; None where there is nothing to count.

    distinct-n: different n-grams over n-grams, of all completions together (Li et al. 2016). Repeated 4-grams: share of
    a completion's 4-grams that it had before, mean over completions (seq-rep-4, Welleck et al. 2020). Self-BLEU: BLEU-4
    of a completion with the others of its prompt as references, mean (Zhu et al. 2018); it falls with variety.
    """
    texts = [WORD.findall(c.text) for c in completions]
    lengths = [c.tokens for c in completions if c.tokens is not None]
    scores = {"length in tokens": _mean(lengths)}
    for n in (1, 2, 3):
        grams = [gram for words in texts for gram in _grams(words, n)]
        scores[f"distinct-{n}"] = len(set(grams)) / len(grams) if grams else None
    counts = [Counter(_grams(words, REPEATED)) for words in texts]
    repeated = [1 - len(count) / count.total() for count in counts if count]
    of_prompt = groupby(sorted(zip((c.prompt_id for c in completions), texts, strict=True)), key=lambda pair: pair[0])
    groups = [[words for _, words in group] for _, group in of_prompt]
    bleus = [bleu(g[i], g[:i] + g[i + 1 :]) for g in groups if len(g) > 1 for i in range(len(g)) if g[i]]
    return scores | {f"repeated {REPEATED}-grams": _mean(repeated), "self-BLEU": _mean(bleus)}


def bleu(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a sentence (Papineni et al. 2002); beyond single words either count gets 1 more (Lin & Och 2004)."""
    total = 0.0
    for n in range(1, 5):
        count, most = Counter(_grams(words, n)), Counter[tuple[str, ...]]()
        for reference in references:
            most |= Counter(_grams(reference, n))
        extra = int(n > 1)
        matched = (count & most).total() + extra
        if not matched:
            return 0.0
        total += math.log(matched / (count.total() + extra)) / 4
    nearest = min((abs(len(r) - len(words)), len(r)) for r in references)[1]
    return math.exp(total + min(0.0, 1 - nearest / len(words)))


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
