"""Next-token distributions of a trained cell on the validation set: loss by frequency, KL to other cells, entropies.

Shapes: B sequences, T positions, N valid tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replication.config import RunConfig
from replication.console import Reporter
from replication.data.order import MixtureOrder
from replication.data.store import TokenStore, validation_set
from replication.model.foreign import Model
from replication.model.loss import IGNORE, inputs_and_targets, log_probabilities

QUARTERS = ("most frequent", "second", "third", "rarest")
"""Of the running tokens of training, by how frequent the entry of the vocabulary is."""
COUNTED_TOKENS = 1 << 22
"""Training tokens that are counted."""
TEMPERATURES = tuple(2 ** (k / 8) for k in range(-32, 17))
LOGITS_AT_ONCE = 1 << 24


@torch.inference_mode()
def compare_distributions(
    model: Model, others: Mapping[str, Model | None], config: RunConfig, store: TokenStore, told: Reporter
) -> tuple[dict[str, float | None], dict[str, float]]:
    """(scores, mean entropy by temperature), in nats a valid token of the fixed validation set.

    Scores are the loss without smoothing in each quarter of the tokens, and KL(other || model) by the other's name,
    None where there is no such model.
    """
    quarter_V = torch.from_numpy(frequency_quarters(config, store)).to(next(iter(model.parameters())).device)
    n_Q, loss_Q = torch.zeros(2, len(QUARTERS), dtype=torch.float64, device=quarter_V.device)
    entropy_K = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=quarter_V.device)
    apart = {name: torch.zeros_like(n_Q[0]) for name, other in others.items() if other is not None}
    models = [model, *(other for other in others.values() if other is not None)]
    for targets_N, (logits_NV, *of_others) in _batches(models, config, store, told):
        log_probs_NV = log_probabilities(logits_NV)
        of_N = quarter_V[targets_N]
        n_Q += torch.bincount(of_N, minlength=len(QUARTERS))
        plain_N = -log_probs_NV.gather(1, targets_N[:, None]).squeeze(1).double()
        loss_Q += torch.bincount(of_N, weights=plain_N, minlength=len(QUARTERS))
        for i, temperature in enumerate(TEMPERATURES):
            at_NV = log_probabilities(logits_NV / temperature)
            entropy_K[i] -= torch.linalg.vecdot(at_NV.exp(), at_NV).double().sum()
        for name, other_NV in zip(apart, map(log_probabilities, of_others), strict=True):
            apart[name] += torch.linalg.vecdot(other_NV.exp(), other_NV - log_probs_NV).double().sum()
    n = float(n_Q.sum())
    scores: dict[str, float | None]
    scores = {f"loss, {q} quarter of tokens": float(loss_Q[i] / n_Q[i]) for i, q in enumerate(QUARTERS) if n_Q[i]}
    scores |= {name: float(apart[name]) / n if name in apart else None for name in others}
    return scores, {f"{t:.6f}": float(nats) / n for t, nats in zip(TEMPERATURES, entropy_K, strict=True)}


def frequency_quarters(config: RunConfig, store: TokenStore) -> NDArray[np.int64]:
    """Of each entry of the vocabulary, int64 [V], the quarter of the training tokens that it is among.

    Counted in a sample of training by the sources' weights, the same for every cell; what it lacks is rarest.
    """
    order = MixtureOrder(store.sizes("train"), [source.weight for source in config.data.sources], 0)
    n = min(sum(store.sizes("train")), math.ceil(COUNTED_TOKENS / store.block_size_tokens))
    tokens = store.read("train", *order.global_batch(0, n)).ravel()
    counts_V = np.bincount(tokens[tokens >= 0], minlength=config.model.vocab_size)
    ranked = np.argsort(-counts_V, kind="stable")
    before = np.cumsum(counts_V[ranked]) - counts_V[ranked]  # tokens of more frequent entries
    quarters_V = np.empty(len(counts_V), dtype=np.int64)
    quarters_V[ranked] = np.minimum(len(QUARTERS) * before // max(1, counts_V.sum()), len(QUARTERS) - 1)
    return quarters_V


def _batches(
    models: list[Model], config: RunConfig, store: TokenStore, told: Reporter
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(targets [N], each model's logits [N, V]) of valid positions, some sequences at a time."""
    sources, indices = validation_set(config, store)
    device, size = next(iter(models[0].parameters())).device, store.block_size_tokens
    rows = max(1, LOGITS_AT_ONCE // (size * config.model.vocab_size))
    with told.bar("validation sequences", len(indices)) as done:
        for start in range(0, len(indices), rows):
            part = slice(start, start + rows)
            tokens_BS = torch.from_numpy(store.read("validation", sources[part], indices[part])).to(device)
            inputs_BT, targets_BT = inputs_and_targets(tokens_BS, store.end_of_text_id)
            valid_BT = targets_BT != IGNORE
            hidden = (model(inputs_BT).hidden_BTD[valid_BT] for model in models)
            logits = [model.logits(h_ND) for model, h_ND in zip(models, hidden, strict=True)]
            yield targets_BT[valid_BT], logits
            done(start + len(tokens_BS))
