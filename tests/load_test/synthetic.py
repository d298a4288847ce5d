"""Synthetic completions: no model, no meaning, the length and the marks of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from random import Random

from replication.data.prompts import load_prompts
from replication.generation.completions import Completion
from replication.judging.completions import Completions

ARMS = ("baseline", "both")
SAMPLES = 3
PROMPTS = "replication_32"
# common words, then longer ones: drawn with weights that fall as 1 / rank
WORDS = (
    "the of and to a in that it is was for on as with they be at one have this from by not but what all were when we "
    "there can an your which their if will each about how up out them then many some so these would other into has "
    "more two like him see time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know get through back much before go good new "
    "write our used me man too any day same right look think also around another came come work three word must "
    "because does part even place well such here take why things help put years different away again off went old "
    "number great tell men say small every found still between name should home big give air line set own under read "
    "last never us left end along while might next sound below saw something thought both few those always looked "
    "show large often together asked house world going want school important until form food keep children feet land "
    "side without boy once animals life enough took sometimes four head above kind began almost live page got earth "
    "need far hand high year mother light parts country father let night following picture being study second eyes "
    "soon times story boys since white days ever paper hard near sentence better best across during today others "
    "however sure means knew try told young miles sun ways thing whole hear example heard several change answer room "
    "sea against top turned learn point city play toward five using himself usually"
)
OTHER_WORDS = (
    "thermometer mercury electrode measurement temperature pressure coefficient molecule catalyst orbit satellite "
    "velocity momentum equilibrium threshold amplitude frequency spectrum radiation chlorophyll photosynthesis enzyme "
    "antibody immune vaccine bacteria genome hypothesis experiment variable constant therefore consequently moreover "
    "furthermore nevertheless approximately respectively specifically essentially fundamentally particularly"
)


def completions(n_seeds: int, seed: int, alike: bool = True, n_prompts: int = 0) -> Completions:
    """Completions of two arms at seeds 0, 1, ...: of our 32 prompts, three each.

    Args:
        n_seeds: how many.
        seed: of the draws.
        alike: both arms' texts come from one generator; else one of them uses other words and writes twice as much.
        n_prompts: of the first so many prompts; 0: of all.
    """
    rng = Random(f"made up/{seed}")
    prompts = load_prompts(PROMPTS)[: n_prompts or None]
    return {
        s: {
            arm: [
                Completion(arm, s, p.id, p.category, p.question, k, text(rng, differs=not alike and arm == ARMS[1]))
                for p in prompts
                for k in range(SAMPLES)
            ]
            for arm in ARMS
        }
        for s in range(n_seeds)
    }


def text(rng: Random, differs: bool = False) -> str:
    """A text of 5 to 200 words, most of about 90, in sentences, now and then a list, a tag or a line of its own."""
    words, weights = _vocabulary(differs)
    n = min(200, max(5, round(rng.lognormvariate(4.5, 0.6) * (2 if differs else 1))))
    chosen = rng.choices(words, cum_weights=weights, k=n)
    parts: list[str] = []
    while chosen:
        length = rng.randint(4, 16)
        sentence, chosen = chosen[:length], chosen[length:]
        parts.append(_sentence(sentence, rng))
    return "".join(parts).strip()


def _sentence(words: Sequence[str], rng: Random) -> str:
    kind, line = rng.random(), " ".join(words)
    if kind < 0.06:
        return f"\n- {line}\n"
    if kind < 0.08:
        return f"<b>{line}</b> & "
    if kind < 0.10:
        return f"“{line}” — "
    return line[0].upper() + line[1:] + rng.choice((". ", ". ", ". ", "? ", "!\n\n", ".\n"))


@cache
def _vocabulary(differs: bool) -> tuple[list[str], list[float]]:
    """Words, and their weights added up."""
    words = f"{OTHER_WORDS if differs else ''} {WORDS}".split()
    return words, list(accumulate(1 / (rank + 3) for rank in range(len(words))))
