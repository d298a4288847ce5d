"""Figures of a cell's completions that need no judge: how long they are, and how much they repeat. Imports no torch.

Words are runs of letters and digits, or single other characters, so that arms with other tokenizers compare.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

WORD = re.compile(r"\w+|[^\w\s]")
REPEATED = 4  # words of the n-grams whose repetition is counted


class Completion(Protocol):
    @property
    def prompt_id(self) -> object: ...
    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def stopped(self) -> bool | None: ...


def battery(completions: Sequence[Completion]) -> dict[str, float | None]:
    """Score -> value over all completions of a cell; None where there is nothing to count.

    distinct-n: different n-grams over n-grams, of all completions together (Li et al. 2016). Repeated 4-grams: share of
    a completion's 4-grams that it had before, mean over completions (seq-rep-4, Welleck et al. 2020). Compression: all
    bytes over those that zlib makes of them (Shaib et al. 2024); it rises with what is said again. Self-BLEU: BLEU-4 of
    a completion with the others of its prompt as references, mean (Zhu et al. 2018); it falls with variety.
    """
    texts = [WORD.findall(c.text) for c in completions]
    lengths = [c.tokens for c in completions if c.tokens is not None]
    stopped = [float(c.stopped) for c in completions if c.stopped is not None]
    joined = "\n".join(c.text for c in completions).encode(errors="replace")
    scores = {"share that ends by itself": _mean(stopped), "length in tokens": _mean(lengths)}
    for n in (1, 2, 3):
        grams = [gram for words in texts for gram in _grams(words, n)]
        scores[f"distinct-{n}"] = len(set(grams)) / len(grams) if grams else None
    repeated = [share for words in texts if (share := repetition(words)) is not None]
    of_prompt = defaultdict[str, list[list[str]]](list)
    for c, words in zip(completions, texts, strict=True):
        of_prompt[f"{c.prompt_id}"].append(words)
    groups = [group for group in of_prompt.values() if len(group) > 1]
    bleus = [bleu(g[i], g[:i] + g[i + 1 :]) for g in groups for i in range(len(g)) if g[i]]
    compression = len(joined) / len(zlib.compress(joined, 9)) if joined.strip() else None
    scores |= {f"repeated {REPEATED}-grams": _mean(repeated), "compression": compression, "self-BLEU": _mean(bleus)}
    return scores


def repetition(words: Sequence[str]) -> float | None:
    """Share of a text's 4-grams that it had before; None where it has none."""
    count = Counter(_grams(words, REPEATED))
    return 1 - len(count) / count.total() if count else None


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
