"""Generation: noise is a function of what names a completion; cached, batched and one-by-one sampling agree."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats
from training_setup import MODEL, fit, small_config

from replication.model.transformer import Transformer, initialise
from replication.preference.sampling import Sampler, complete, gumbel, row_key

TOKENS = torch.arange(500)
SAMPLER = Sampler(temperature=0.7, top_k=40)


@pytest.fixture(scope="module")
def model() -> Transformer:
    import dataclasses

    model = Transformer(dataclasses.replace(MODEL, init_std=0.3))
    initialise(model, 1)
    return model.double().eval()


PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8], [9], [30, 31]]
KEYS = [row_key("both", 1, i, 0) for i in range(len(PROMPTS))]


def one_by_one(model, prompt, key, n) -> list[int]:
    """No cache, no batch: the whole sequence again for every token."""
    tokens = list(prompt)
    for position in range(n):
        logits = model.logits(model(torch.tensor([tokens])).hidden_BTD[:, -1])
        choice = int(SAMPLER.choose(logits, torch.tensor([key]), position))
        if choice == 0:
            break
        tokens.append(choice)
    return tokens[len(prompt) :]


def test_cached_batched_and_one_by_one_give_the_same_tokens_in_fp64(model):
    batched = complete(model, PROMPTS, KEYS, SAMPLER, 30, end_of_text=0)
    for row, (prompt, key) in enumerate(zip(PROMPTS, KEYS, strict=True)):
        assert batched[row] == complete(model, [prompt], [key], SAMPLER, 30, end_of_text=0)[0]
        with torch.no_grad():
            assert batched[row] == one_by_one(model, prompt, key, 30)
    order = [3, 0, 4, 2, 1]
    shuffled = complete(model, [PROMPTS[i] for i in order], [KEYS[i] for i in order], SAMPLER, 30, end_of_text=0)
    assert shuffled == [batched[i] for i in order]
    assert batched[1] != batched[3], "two samples of one prompt differ"


def test_end_of_text_stops_a_row_and_is_not_part_of_it(model):
    free = complete(model, PROMPTS, KEYS, SAMPLER, 30, end_of_text=-1)
    stop = free[2][4]
    stopped = complete(model, PROMPTS, KEYS, SAMPLER, 30, end_of_text=stop)
    assert stopped[2] == free[2][: free[2].index(stop)]
    assert all(len(row) <= 30 for row in stopped)


def test_top_k_and_temperature():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    keys = torch.tensor([row_key(i) for i in range(4000)])
    drawn = Sampler(temperature=0.5, top_k=2).choose(logits, keys, 0)
    assert set(drawn.tolist()) == {0, 1}
    share = float((drawn == 0).double().mean())
    assert share == pytest.approx(1 / (1 + 2.718281828 ** (-1 / 0.5)), abs=0.02)
    assert Sampler(temperature=1.0, top_k=1).choose(logits, keys, 0).unique().tolist() == [0]


def test_noise_is_standard_gumbel_and_independent_of_the_row():
    keys = torch.tensor([row_key("cell", i) for i in range(200)])
    noise = gumbel(keys, 3, TOKENS)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001
    assert torch.equal(noise[7], gumbel(keys[7:8], 3, TOKENS)[0])
    assert not torch.equal(noise, gumbel(keys, 4, TOKENS))
    neighbours = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.01
    positions = torch.corrcoef(torch.stack([noise.flatten(), gumbel(keys, 4, TOKENS).flatten()]))[0, 1]
    assert abs(float(positions)) < 0.01


def test_samples_are_written_for_every_prompt_and_can_be_made_again(tmp_path):
    """The product's generate on a trained cell, with a tokenizer that is the identity on numbers."""
    import io

    from memory_store import MemoryStore
    from rich.console import Console

    from replication.preference.generate import generate

    class Numbers:
        def encode(self, text: str) -> list[int]:
            return [1 + len(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    store = MemoryStore()
    store.tokenizer = Numbers  # type: ignore[attr-defined]
    config = small_config("both", "--generation.prompts=replication_32", "--generation.max_new_tokens=8")
    run = fit(config, tmp_path, store)
    assert generate(config, run, store, Console(file=io.StringIO())) == 96
    lines = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert {(x["prompt_id"], x["sample"]) for x in lines} == {(p, s) for p in range(1, 33) for s in range(3)}
    assert all(0 <= x["tokens"] <= 8 and x["arm"] == "both" and x["seed"] == 1 for x in lines)
    first = run.samples.read_text()
    generate(config, run, store, Console(file=io.StringIO()))
    assert run.samples.read_text() == first
