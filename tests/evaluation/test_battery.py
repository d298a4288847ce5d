"""Figures of completions, on texts whose figures can be counted by hand."""

from __future__ import annotations

import pytest

from replication.evaluation.battery import battery, bleu
from replication.generation.completions import Completion


def completions(*texts: str, prompts: int = 1) -> list[Completion]:
    return [
        Completion("both", 1, i % prompts, "any", "?", i // prompts, text, len(text)) for i, text in enumerate(texts)
    ]


def test_figures_by_hand() -> None:
    found = battery(completions("a b a b a b", "c d!"))
    assert found["length in tokens"] == (11 + 4) / 2
    assert found["distinct-1"] == 5 / 9  # a b c d !
    assert found["distinct-2"] == 4 / 7  # ab ba cd d!
    assert found["distinct-3"] == 3 / 5  # aba bab cd!
    assert found["repeated 4-grams"] == pytest.approx(1 / 3)  # abab baba abab; the other has none
    assert found["share that ends by itself"] is None
    assert found["self-BLEU"] == 0  # not a word in common


def test_texts_that_are_alike_have_self_bleu_one() -> None:
    same = completions(*["The sea is far away from here."] * 3)
    assert battery(same)["self-BLEU"] == pytest.approx(1)
    assert battery(same)["distinct-1"] == 8 / 24
    assert battery(completions("The sea is far away.", "A boat lay there."))["self-BLEU"] < 0.5


def test_only_completions_of_the_same_prompt_are_references() -> None:
    assert battery(completions("a b c d", "a b c d", prompts=2))["self-BLEU"] is None


def test_bleu_by_hand() -> None:
    words, reference = list("abcd"), list("abxcde")
    precisions = (
        (4 / 4) * (3 / 4) * (1 / 3) * (1 / 2)
    )  # matched n-grams 4, 2, 0, 0 of 4, 3, 2, 1; all but the first + 1
    assert bleu(words, [reference]) == pytest.approx(precisions ** (1 / 4) * 2.718281828459045 ** (1 - 6 / 4))
    assert bleu(words, [reference, words]) == pytest.approx(1)


def test_what_cannot_be_counted_is_missing() -> None:
    assert set(battery([]).values()) == {None}
    assert battery(completions("", ""))["self-BLEU"] is None


def test_what_ends_by_itself_and_what_compresses() -> None:
    ended = [Completion("both", 1, 1, "any", "?", i, "a text", 2, i < 3) for i in range(4)]
    assert battery(ended)["share that ends by itself"] == 0.75
    looped, varied = completions("the sea " * 50), completions(" ".join(map(str, range(100))))
    assert battery(looped)["compression"] > 10 > 3 > battery(varied)["compression"] > 1
