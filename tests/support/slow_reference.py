"""The experiment restated slowly, straight from the formulas: loops over groups and tokens, textbook optimizers, fp64.

Nothing here is shared with the product but the transformer itself (whose own reference is another test) and the order
of the data. It covers objectives/README.md: gain, divergence, scale, clipping, optimizer, and how aux enters (aux
itself is test_transformer.py's).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from replication.config import LayerGainConfig, RunConfig, TokenGainConfig
from replication.model.transformer import Transformer, initialise

COEFFICIENTS = {
    "quintic": [(3.4445, -4.7750, 2.0315)] * 5,
    "polar_express": [
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in [
            (8.287212018145, -23.595886519099, 17.300387312531),
            (4.107059111542, -2.947849917917, 0.544843108293),
            (3.948690853482, -2.908902115963, 0.551819139437),
            (3.318419657371, -2.488488024315, 0.510048940124),
            (2.300652019955, -1.668903984575, 0.418807311953),
        ]
    ],
}
"""Of Muon's steps; the second table is derived anew in tests/training/test_muon.py."""


def slow_gain(config: TokenGainConfig, losses: list[float], plain: list[float]) -> tuple[list[float], list[float]]:
    """Gains of the valid tokens of one group, before and after the clamp, one token at a time."""
    n = len(losses)
    mean = sum(losses) / n
    var = sum((x - mean) ** 2 for x in losses) / (n - 1) if n > 1 else 0.0
    before, after = [], []
    for l, nll in zip(losses, plain, strict=True):  # noqa: E741
        low, high = -math.inf, math.inf
        if config.variant == "none":
            g = 1.0
        elif config.variant == "precision":
            g, low, high = 1 + config.s * (l - mean) / (var + config.eps), config.c_min, config.c_max
        elif config.variant == "linear":
            g, low, high = l / mean, config.c_min, config.c_max
        elif config.variant == "focal":
            g, low, high = (1 - math.exp(-nll)) ** config.focal_gamma, config.focal_min, config.focal_max
        elif config.variant == "sigmoid":
            a = config.sigmoid_a
            g = 1 - a + 2 * a / (1 + math.exp(-config.sigmoid_k * (l - mean)))
        else:
            raise ValueError(config.variant)
        before.append(g)
        after.append(min(max(g, low), high))
    return before, after


def slow_scales(config: LayerGainConfig, divergence: list[float]) -> list[float]:
    """One scale a block, or of each block's attention and then of each one's feed-forward."""
    n_blocks = len(divergence) // (1 if config.parts == "block" else 2)
    included = [d for i, d in enumerate(divergence) if i % n_blocks not in config.exclude_blocks]
    mean = sum(included) / len(included)
    scales = []
    for i, d in enumerate(divergence):
        scale = min(max(1 + config.t * (d / mean - 1), config.m_min), config.m_max) if mean >= 1e-12 else 1.0
        scales.append(1.0 if i % n_blocks in config.exclude_blocks else scale)
    return scales


def slow_control(config: RunConfig, gains: list[float], step: int, group: int, places: list[int]) -> list[float]:
    """What a control arm puts in place of the clamped gains of one group's valid tokens, at their places in it."""
    control, mean = config.token_gain.control, sum(gains) / len(gains)
    if control == "shuffled":
        digest = hashlib.sha256(f"gain {config.seed} {step} {group}".encode()).digest()
        n = config.training.gain_group_sequences * config.data.block_size_tokens
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]))
        drawn = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
        return [gains[i] for i in sorted(range(len(gains)), key=lambda i: drawn[places[i]])]
    return {"renormalised": [g / mean for g in gains], "constant": [mean] * len(gains)}.get(control, gains)


Weigh = Callable[[list[float], list[torch.Tensor], torch.Tensor], list[float]]
"""(plain losses, log probabilities over the vocabulary) of a group's valid tokens, (its stored blocks) -> weights."""


class SlowRun:
    """Trains in fp64, one gain group after another, with AdamW written out."""

    def __init__(self, config: RunConfig, end_of_text: int = 0, weigh: Weigh | None = None) -> None:
        """`weigh` stands in place of the gain."""
        self.config, self.end_of_text, self.weigh = config, end_of_text, weigh
        self.model = Transformer(config.model)
        initialise(self.model, config.effective_weights_seed)
        self.model.double()
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self.model.named_parameters()}
        self.step_count, self.rate_factor = 0, 1.0
        self.records: list[dict[str, object]] = []

    def step(self, blocks: torch.Tensor) -> None:
        """One update from the global batch of stored blocks [B, T + 1] (-1 pads)."""
        t = self.config.training
        self.model.zero_grad()
        groups = blocks.split(t.gain_group_sequences)
        objectives, divergences, means = [], [], []
        for number, group in enumerate(groups):
            outcome = self._group(group, number)
            divergences.append(outcome["divergence"])
            if outcome["objective"] is not None:
                objectives.append(outcome["objective"])
                means.append(outcome["gain_means"])
        objective = sum(objectives) / len(objectives)
        objective.backward()
        if self.config.layer_gain.divergence == "step_mean":
            divergence = [sum(d[i] for d in divergences) / len(divergences) for i in range(len(divergences[0]))]
        else:
            divergence = divergences[-1]
        scales = slow_scales(self.config.layer_gain, divergence)
        if self.config.layer_gain.control == "permuted":
            n = len(scales)
            scales = [scales[(i - 1 - self.config.seed % (n - 1)) % n] for i in range(n)]
        if self.config.token_gain.control == "rate":
            self.rate_factor = sum(after for _, after in means) / len(means)
        layer, blocks = self.config.layer_gain, [[*block.parameters()] for block in self.model.blocks]
        if layer.parts != "block":
            blocks = [[*b.attention_norm.parameters(), *b.attention.parameters()] for b in self.model.blocks]
            blocks += [[*b.feed_forward_norm.parameters(), *b.feed_forward.parameters()] for b in self.model.blocks]
        start = [[p.detach().clone() for p in block] for block in blocks]
        if layer.enabled and layer.apply != "update":
            for block, scale in zip(blocks, scales, strict=True):
                for p in block:
                    p.grad = p.grad * scale
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self.model.parameters()))
        if t.clip_norm and norm > t.clip_norm:
            for p in self.model.parameters():
                p.grad = p.grad * t.clip_norm / (norm + 1e-6)
        self.records.append(
            {"objective": float(objective.detach()), "scales": scales, "norm": norm, "gain_means": means}
        )
        {"sgd": self._sgd, "adamw": self._adamw, "muon": self._muon}[t.optimizer]()
        if layer.enabled and layer.apply == "update":
            with torch.no_grad():
                for block, before, scale in zip(blocks, start, scales, strict=True):
                    for p, old in zip(block, before, strict=True):
                        p.copy_(old + scale * (p - old))

    def _group(self, group: torch.Tensor, number: int) -> dict:
        c = self.config
        tokens = torch.where(group < 0, self.end_of_text, group.long())
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        hooks = [
            b.register_forward_hook(lambda _m, a, out: seen.append((a[0].detach(), out[0].detach())))
            for b in self.model.blocks
        ]
        attended: list[torch.Tensor] = []
        hooks += [b.attention.register_forward_hook(lambda _m, a, out: attended.append(out.detach()))
                  for b in self.model.blocks]  # fmt: skip
        out = self.model(tokens[:, :-1], n_groups=1)
        for hook in hooks:
            hook.remove()
        if c.layer_gain.parts != "block":
            middles = [x + of for (x, _), of in zip(seen, attended, strict=True)]
            seen = [*zip([x for x, _ in seen], middles, strict=True), *zip(middles, [y for _, y in seen], strict=True)]
        divergence = [float((y - x).norm() / (x.norm() + 1e-8)) for x, y in seen]
        log_probs = F.log_softmax(self.model.logits(out.hidden_BTD), dim=-1)
        vocab, smooth = c.model.vocab_size, c.training.label_smoothing
        losses, plain, places, log_probs_of = [], [], [], []
        for b in range(group.shape[0]):
            for position in range(group.shape[1] - 1):
                target = int(group[b, position + 1])
                if target < 0:
                    continue
                nll = -log_probs[b, position, target]
                losses.append((1 - smooth) * nll + smooth * -log_probs[b, position].sum() / vocab)
                plain.append(float(nll.detach()))
                log_probs_of.append(log_probs[b, position].detach())
                places.append(b * (group.shape[1] - 1) + position)
        if not losses:
            return {"objective": None, "divergence": divergence}
        before, after = slow_gain(c.token_gain, [float(x.detach()) for x in losses], plain)
        weights = slow_control(c, after, self.step_count, number, places)
        if self.weigh:
            weights = self.weigh(plain, log_probs_of, group)
        if not c.token_gain.enabled or c.token_gain.control == "rate":
            weights = [1.0] * len(losses)
        objective = sum(w * x for w, x in zip(weights, losses, strict=True)) / len(losses)
        return {
            "objective": objective + c.model.aux_coef * out.aux_G[0],
            "divergence": divergence,
            "gain_means": (sum(before) / len(before), sum(after) / len(after)),
        }

    def _next_rate(self) -> tuple[int, float]:
        """The 0-based step and its learning rate, with the schedule written out again."""
        t = self.config.training
        k, self.step_count = self.step_count, self.step_count + 1
        rate = t.learning_rate * min(1.0, (k + 1) / t.warmup_steps if t.warmup_steps else 1.0)
        if t.decay_steps:
            rate *= min(1.0, (t.steps - k) / t.decay_steps)
        return k, rate * self.rate_factor

    def _sgd(self) -> None:
        """Polyak's heavy ball, the decay added to the gradient of matrices."""
        t = self.config.training
        _, rate = self._next_rate()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                is_matrix = p.ndim == 2 and name != "embedding.weight"
                velocity = self.moments[name][0]
                velocity.mul_(t.momentum).add_(p.grad + (t.weight_decay * p if is_matrix else 0.0))
                p.sub_(rate * velocity)

    def _muon(self) -> None:
        """Jordan's Muon in Liu's size on the blocks' matrices, AdamW on the rest.

        The five Newton-Schulz steps act on each singular value alone, so here they are five scalar polynomials.
        """
        t = self.config.training
        mine = {n for n, p in self.model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
        mine -= {n for n in mine if n.endswith("router.weight")}
        _, rate = self._next_rate()
        self.step_count -= 1
        self._adamw(without=mine)
        rate *= (t.muon_learning_rate or t.learning_rate) / t.learning_rate
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name not in mine:
                    continue
                velocity = self.moments[name][0]
                velocity.mul_(t.muon_momentum).add_(p.grad)
                u, values, v = torch.linalg.svd(p.grad + t.muon_momentum * velocity, full_matrices=False)
                values = values / values.square().sum().sqrt()
                for a, b, c in COEFFICIENTS[t.muon_coefficients]:
                    values = a * values + b * values**3 + c * values**5
                p.mul_(1 - rate * t.weight_decay)
                p.sub_(rate * 0.2 * math.sqrt(max(p.shape)) * (u * values) @ v)

    def _adamw(self, without: set[str] = frozenset()) -> None:
        """Loshchilov and Hutter, Algorithm 2."""
        t = self.config.training
        k, rate = self._next_rate()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in without:
                    continue
                m, v = self.moments[name]
                m.mul_(t.beta1).add_((1 - t.beta1) * p.grad)
                v.mul_(t.beta2).add_((1 - t.beta2) * p.grad**2)
                if p.ndim == 2 and name != "embedding.weight":
                    p.mul_(1 - rate * t.weight_decay)
                m_hat, v_hat = m / (1 - t.beta1 ** (k + 1)), v / (1 - t.beta2 ** (k + 1))
                p.sub_(rate * m_hat / (v_hat.sqrt() + t.adam_eps))
