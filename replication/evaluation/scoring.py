"""Log-likelihoods of texts by our own model, in batches.

Shapes: B rows, T positions, N positions that are scored, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from replication.console import Reporter
from replication.errors import UserError
from replication.model.foreign import Model

BATCH_TOKENS = 1 << 14  # of one forward pass
Pair = tuple[list[int], list[int]]
"""Tokens of a context, at least one, and of what comes after it."""


@dataclass
class Scorer:
    """A model in evaluation mode, with the most positions that it was trained on."""

    model: Model
    length: int
    end_of_text: int
    reporter: Reporter

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation after its context, and whether greedy decoding gives it.

        What is too long loses its beginning; UserError for a continuation that alone is longer than the model knows.
        """
        device = next(iter(self.model.parameters())).device
        fed = [(context + after)[-self.length - 1 :] for context, after in pairs]
        if (longest := max((len(after) for _, after in pairs), default=0)) > self.length:
            raise UserError(f"a continuation of {longest} tokens is to be scored, and the model knows {self.length}")
        order, found = sorted(range(len(fed)), key=lambda i: -len(fed[i])), [(0.0, True)] * len(fed)
        with self.reporter.bar("likelihoods", len(fed)) as done:
            start = 0
            while start < len(order):
                width = len(fed[order[start]]) - 1
                batch = order[start : start + max(1, BATCH_TOKENS // width)]
                tokens_BT = torch.zeros((len(batch), width), dtype=torch.int64)
                for row, i in enumerate(batch):
                    tokens_BT[row, : len(fed[i]) - 1] = torch.tensor(fed[i][:-1])
                hidden_BTD = self.model(tokens_BT.to(device)).hidden_BTD
                sums, greedy = [], []
                for row, i in enumerate(batch):
                    n, end = len(pairs[i][1]), len(fed[i]) - 1
                    logits_NV = self.model.logits(hidden_BTD[row, end - n : end]).float()
                    after_N = torch.tensor(fed[i][-n:], device=device)
                    chosen_N = logits_NV.gather(-1, after_N[:, None]).squeeze(-1)
                    sums.append((chosen_N - logits_NV.logsumexp(-1)).double().sum())
                    greedy.append((logits_NV.argmax(-1) == after_N).all())
                values = zip(torch.stack(sums).tolist(), torch.stack(greedy).tolist(), strict=True)
                for i, value in zip(batch, values, strict=True):
                    found[i] = value
                start += len(batch)
                done(start)
        return found

    def rolling(self, documents: Sequence[list[int]]) -> list[float]:
        """Log-likelihood in nats of each document, every token once, with as much context as the model knows."""
        windows = [list(self.windows(tokens)) for tokens in documents]
        scored = iter(self.score([pair for of_document in windows for pair in of_document]))
        return [sum(next(scored)[0] for _ in of_document) for of_document in windows]

    def windows(self, tokens: list[int]) -> Iterator[Pair]:
        """A document in pieces of the model's length, the first after an end of text; the last has a full context."""
        if tokens:
            yield [self.end_of_text], tokens[: self.length]
        for start in range(self.length, len(tokens), self.length):
            end = min(start + self.length, len(tokens))
            yield tokens[end - self.length - 1 : start], tokens[start:end]
