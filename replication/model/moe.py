"""SwiGLU feed-forward layers: one dense, and a mixture of routed experts beside an ungated shared one.

Shapes: B sequences, T positions, N = B*T tokens, D width of the stream, F hidden width, E experts, K = top_k,
S = N*K slots (one slot is one token at one of its experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replication.config import ModelConfig


class Routing(NamedTuple):
    """The router's decision for N tokens."""

    probs_NE: Tensor  # softmax over all experts, at least fp32
    weights_NK: Tensor  # probabilities of the chosen experts, renormalised to sum to 1
    experts_NK: Tensor  # int64 indices of the chosen experts


def together(x_BTD: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """Outputs of layers that read the same input, from one product of their weights.

    Of one position, as a completion grows, from a product each: copying the weights together would cost more.
    """
    if x_BTD.shape[1] == 1:
        return [layer(x_BTD) for layer in layers]
    y_BTF = F.linear(x_BTD, torch.cat([layer.weight for layer in layers]))
    return y_BTF.split([layer.out_features for layer in layers], dim=-1)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = together(x_BTD, self.gate, self.up)
        return self.down(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """Routed top-k experts (softmax, then top-k, weights renormalised) plus one ungated shared expert.

    The experts' weights are 2-D parameters, one matrix each, stacked in forward: optimizers that act on matrices, and
    sharding that refuses 3-D ones, then need no special case.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k = config.n_experts, config.top_k
        self.router = nn.Linear(config.d_model, config.n_experts, bias=False)
        shape = (config.d_ff, config.d_model)
        self.gate = nn.ParameterList(torch.empty(shape) for _ in range(config.n_experts))
        self.up = nn.ParameterList(torch.empty(shape) for _ in range(config.n_experts))
        self.down = nn.ParameterList(torch.empty(shape[::-1]) for _ in range(config.n_experts))
        self.shared = SwiGLU(config.d_model, config.d_ff) if config.shared_expert else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """Return the layer's output [B, T, D] and the routing of its B*T tokens."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.route(x_ND)
        # grouped_mm has no fp64 kernel; the loop computes the same function and serves as its oracle in tests.
        compute = self.loop if x_ND.dtype == torch.float64 else self.grouped
        y_BTD = compute(x_ND, routing).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, routing

    def route(self, x_ND: Tensor) -> Routing:
        """Choose experts; in at least fp32 whatever the precision of the model, because top-k is discontinuous."""
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(wide), self.router.weight.to(wide))
            probs_NE = logits_NE.softmax(-1)
            top_NK, experts_NK = probs_NE.topk(self.top_k, dim=-1)
            return Routing(probs_NE, top_NK / top_NK.sum(-1, keepdim=True), experts_NK)

    def grouped(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """All experts by three grouped matrix products over slots sorted by expert; no host synchronisation."""
        if torch.is_autocast_enabled(x_ND.device.type):
            x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
        # a GPU sorts bytes in an eighth of the passes
        slots_S = routing.experts_NK.flatten().to(torch.uint8 if self.n_experts <= 256 else torch.int64)
        order_S = slots_S.argsort(stable=True)
        inverse_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=x_ND.device))
        arange_E = torch.arange(self.n_experts, device=x_ND.device)
        ends_E = (slots_S[:, None] == arange_E).sum(0).cumsum(0).to(torch.int32)

        gate_up = [w.to(x_ND.dtype) for pair in zip(self.gate, self.up, strict=True) for w in pair]
        gate_up_EHD = torch.cat(gate_up).view(self.n_experts, -1, x_ND.shape[-1])
        down_EDF = torch.stack([w.to(x_ND.dtype) for w in self.down])
        x_SD = Dispatch.apply(x_ND, order_S, inverse_S, self.top_k)
        hidden_SH = F.grouped_mm(x_SD, gate_up_EHD.transpose(1, 2), offs=ends_E)
        gate_SF, up_SF = hidden_SH.chunk(2, dim=-1)
        out_SD = F.grouped_mm(F.silu(gate_SF) * up_SF, down_EDF.transpose(1, 2), offs=ends_E)
        out_SD = out_SD * routing.weights_NK.flatten().index_select(0, order_S)[:, None].to(out_SD.dtype)
        return Combine.apply(out_SD, order_S, inverse_S, self.top_k)

    def loop(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """The plain loop over experts, any dtype; it reads the number of rows on the host.

        An expert without tokens takes part with zero rows, so that every parameter is in the graph on every rank.
        """
        y_ND = torch.zeros_like(x_ND)
        for e in range(self.n_experts):
            token, k = (routing.experts_NK == e).nonzero(as_tuple=True)
            x = x_ND[token]
            h = F.silu(F.linear(x, self.gate[e])) * F.linear(x, self.up[e])
            out = F.linear(h, self.down[e]) * routing.weights_NK[token, k, None].to(x.dtype)
            y_ND = y_ND.index_add(0, token, out)
        return y_ND


class Dispatch(torch.autograd.Function):
    """x_ND -> x_SD: the token of each slot, slots in expert order. Its backward is Combine.

    Rows are moved by permutations alone; autograd's own backward of a gather would add them up one by one.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_S: Tensor, inverse_S: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_S, inverse_S)
        ctx.top_k = top_k
        return x_ND.index_select(0, order_S // top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        order_S, inverse_S = ctx.saved_tensors
        return Combine.apply(gradients[0], order_S, inverse_S, ctx.top_k), None, None, None


class Combine(torch.autograd.Function):
    """x_SD -> x_ND: the sum over each token's slots. Its backward is Dispatch."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, order_S: Tensor, inverse_S: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_S, inverse_S)
        ctx.top_k = top_k
        return x_SD.index_select(0, inverse_S).view(-1, top_k, x_SD.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        order_S, inverse_S = ctx.saved_tensors
        return Dispatch.apply(gradients[0], order_S, inverse_S, ctx.top_k), None, None, None


def load_balance(routing: Routing, n_groups: int) -> tuple[Tensor, Tensor]:
    """Load-balancing loss of each group, and each expert's tokens (Switch Transformer, eq. 4, with shares of slots).

    aux_g = E * sum_e share_e * mean_e, share = share of the group's slots that went to e (a count, no gradient),
    mean = mean router probability of e over the group's tokens. Balanced routing gives 1. All positions count.

    Args:
        routing: of N tokens, N a multiple of n_groups; groups are consecutive tokens.
        n_groups: G.

    Returns:
        aux_G (dtype of the probabilities) and tokens_per_expert_GE (same dtype, counts).
    """
    n_experts = routing.probs_NE.shape[-1]
    probs_GNE = routing.probs_NE.view(n_groups, -1, n_experts)
    experts_GS = routing.experts_NK.view(n_groups, -1)
    arange_E = torch.arange(n_experts, device=experts_GS.device)
    tokens_per_expert_GE = (experts_GS[..., None] == arange_E).sum(1).to(probs_GNE.dtype)
    aux_G = n_experts * (tokens_per_expert_GE / experts_GS.shape[1] * probs_GNE.mean(1)).sum(-1)
    return aux_G, tokens_per_expert_GE
