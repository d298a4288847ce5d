"""The output head, and three ways to take the loss of every token from the hidden states.

All three compute the function of `loss.token_losses` on the logits of the real vocabulary, with gradients for any
weight on any token: at once, a few tokens at a time, or by liger-kernel. Padded rows of the weight take no part.

Shapes: N tokens, D width, V vocabulary, P padded vocabulary (rows of the weight), R tokens of one chunk.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replication.config import ModelConfig
from replication.errors import UserError
from replication.model.loss import IGNORE, EntropySums, TokenLosses, entropy_sums, log_probabilities, losses_of
from replication.model.size import padded_vocabulary

CHUNK_LOGITS = 1 << 26  # that the chunked head holds at a time: 256 MiB in fp32, and about four times that a moment
FUSED_CHUNK_LOGITS = 1 << 29  # compiled on a GPU: in bf16 alone, 1 GiB; each chunk costs the weight's gradient
CACHED_LOGITS = 1 << 18  # whose slopes a CPU takes at a time
ENTROPY_LOGITS = 1 << 17  # whose probabilities are held at a time when entropies are measured: a cache's worth ...
ENTROPY_TOKENS = 64  # ... but of no fewer tokens: a large vocabulary's would come one by one
LIGER_AT_LEAST = (0, 8, 2)  # earlier ones gave wrong gradients for weights on tokens


class HeadOutput(NamedTuple):
    losses: TokenLosses
    entropies: EntropySums | None  # where they were asked for; no gradient


Losses = Callable[[Tensor, Tensor, Tensor, float, int, bool], HeadOutput]
"""(hidden_ND, weight_PD, targets_N, label_smoothing, V, whether entropies are wanted) -> the losses of every token."""


class Head(nn.Module):
    """Logits, or losses of targets without the caller ever holding the logits.

    A module, not functions over a weight: strategies that shard weights gather them around a module's forward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.weight = nn.Parameter(torch.empty(padded_vocabulary(config), config.d_model))
        self._losses: Losses = losses_from_logits

    def configure(self, kind: str, compile: bool) -> None:
        """Choose the way to the losses (ClusterConfig.head), compiled or not. UserError without liger-kernel."""
        if kind == "liger":
            _require_liger()
        self._losses = {"logits": losses_from_logits, "chunked": losses_in_chunks, "liger": losses_by_liger}[kind]
        if compile and kind == "logits":
            self._losses = torch.compile(losses_from_logits, dynamic=False)
        if compile and kind == "chunked":
            self._losses = functools.partial(losses_in_chunks, compiled=True)

    def forward(
        self, hidden: Tensor, targets_N: Tensor | None = None, label_smoothing: float = 0.0, entropies: bool = False
    ) -> Any:
        """Logits [..., V] of hidden states [..., D]; or, with targets, the HeadOutput of hidden_ND.

        Args:
            hidden: any float dtype; losses are computed in at least fp32.
            targets_N: int64 in 0..V-1, or IGNORE.
            label_smoothing: in [0, 1).
            entropies: whether to add up the token entropies over the valid tokens.
        """
        if targets_N is None:
            return logits_of(hidden, self.weight, self.vocab_size)
        return self._losses(hidden, self.weight, targets_N, label_smoothing, self.vocab_size, entropies)


def logits_of(hidden: Tensor, weight_PD: Tensor, vocab_size: int) -> Tensor:
    """Logits of the real vocabulary: [..., D] -> [..., V], a view of the padded product."""
    return F.linear(hidden, weight_PD)[..., :vocab_size]


def losses_from_logits(
    hidden_ND: Tensor, weight_PD: Tensor, targets_N: Tensor, label_smoothing: float, vocab_size: int, entropies: bool
) -> HeadOutput:
    """All logits at once: the plain way, and the fastest where they fit and the function is compiled."""
    logits_NV = logits_of(hidden_ND, weight_PD, vocab_size)
    return losses_of_logits(logits_NV, targets_N, label_smoothing, entropies)


def losses_of_logits(logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, entropies: bool) -> HeadOutput:
    """What losses_from_logits makes of them."""
    if torch.compiler.is_compiling():
        log_probs_NV = log_probabilities(logits_NV)
        losses = losses_of(log_probs_NV, targets_N, label_smoothing)
    else:
        smoothed_N, plain_N, log_probs_NV = _LossesOfLogits.apply(logits_NV, targets_N, label_smoothing)
        losses = TokenLosses(smoothed_N, plain_N if label_smoothing else smoothed_N)
    return HeadOutput(losses, entropies_in_chunks(log_probs_NV.detach(), targets_N != IGNORE) if entropies else None)


class _LossesOfLogits(torch.autograd.Function):
    """loss.token_losses and the log probabilities; backward is autograd's, bit for bit, a few tokens at a time.

    Autograd by itself holds three [N, V], none of which stays in a CPU's cache, and so takes twice the time.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
        log_probs_NV = log_probabilities(logits_NV)
        smoothed_N, plain_N = losses_of(log_probs_NV, targets_N, label_smoothing)
        ctx.save_for_backward(log_probs_NV, targets_N)
        ctx.label_smoothing, ctx.dtype = label_smoothing, logits_NV.dtype
        ctx.mark_non_differentiable(log_probs_NV)
        ctx.set_materialize_grads(False)  # the log probabilities would get a [N, V] of zeros
        return smoothed_N, plain_N if label_smoothing else plain_N.clone(), log_probs_NV

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs_NV, targets_N = ctx.saved_tensors
        zero_N = log_probs_NV.new_zeros(len(targets_N))
        smoothed_N, plain_N = (zero_N if g is None else g * (targets_N != IGNORE) for g in gradients[:2])
        at_target_N = smoothed_N * (1 - ctx.label_smoothing) + plain_N
        everywhere_N = smoothed_N * (ctx.label_smoothing / log_probs_NV.shape[1])
        slope_NV, rows = torch.empty_like(log_probs_NV), max(1, CACHED_LOGITS // log_probs_NV.shape[1])
        tensors = (slope_NV, log_probs_NV, targets_N.clamp(min=0)[:, None], at_target_N[:, None], everywhere_N[:, None])
        for slope_RV, log_probs_RV, target_R1, at_target_R1, everywhere_R1 in zip(
            *(t.split(len(t) if t.is_cuda else rows) for t in tensors), strict=True
        ):
            incoming_RV = (-everywhere_R1).repeat(1, log_probs_RV.shape[1]).scatter_add_(1, target_R1, -at_target_R1)
            arguments = incoming_RV, log_probs_RV, -1, log_probs_RV.dtype
            torch.ops.aten._log_softmax_backward_data.out(*arguments, out=slope_RV)
        return slope_NV.to(ctx.dtype), None, None


def losses_in_chunks(
    hidden_ND: Tensor,
    weight_PD: Tensor,
    targets_N: Tensor,
    label_smoothing: float,
    vocab_size: int,
    entropies: bool,
    compiled: bool = False,
) -> HeadOutput:
    """A few tokens' logits at a time, computed again in backward: memory that does not grow with N * V."""
    dtype = _product_dtype(hidden_ND)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        smoothed_N, plain_N, *sums = _ChunkedLosses.apply(
            hidden_ND, weight_PD, targets_N, label_smoothing, vocab_size, dtype, entropies, compiled
        )
    losses = TokenLosses(smoothed_N, plain_N if label_smoothing else smoothed_N)
    return HeadOutput(losses, EntropySums(*sums) if entropies else None)


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The dtype that autocast would multiply in; that of the hidden states where it is off."""
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


class _ChunkedLosses(torch.autograd.Function):
    """Per-token losses whose backward multiplies by each token's own incoming gradient before both products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_PD: Tensor,
        targets_N: Tensor,
        label_smoothing: float,
        vocab_size: int,
        dtype: torch.dtype,
        entropies: bool,
        compiled: bool,
    ) -> tuple[Tensor, ...]:
        weight, of_chunk = weight_PD.to(dtype), _compiled(_chunk_losses) if compiled else _chunk_losses
        found = [
            of_chunk(hidden_RD.to(dtype), weight, targets_R, vocab_size, entropies)
            for hidden_RD, targets_R in _chunks(compiled, vocab_size, hidden_ND, targets_N)
        ]
        losses, sums = zip(*found, strict=True)
        plain_N, uniform_N, log_sums_N = (torch.cat(column) for column in zip(*losses, strict=True))
        ctx.save_for_backward(hidden_ND, weight_PD, targets_N, log_sums_N)
        ctx.label_smoothing, ctx.vocab_size, ctx.dtype, ctx.compiled = label_smoothing, vocab_size, dtype, compiled
        added = _added(sums) if entropies else ()
        ctx.mark_non_differentiable(*added)
        return torch.lerp(plain_N, uniform_N, label_smoothing), plain_N, *added

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_PD, targets_N, log_sums_N = ctx.saved_tensors
        smoothed_N, plain_N = (g * (targets_N != IGNORE) for g in gradients[:2])
        weight, n_words = weight_PD.to(ctx.dtype), ctx.vocab_size
        of_chunk: Callable[..., Tensor] = _compiled(_chunk_slopes) if ctx.compiled else _chunk_slopes
        to_hidden = []
        to_weight = torch.zeros(weight_PD.shape, dtype=log_sums_N.dtype, device=weight_PD.device)
        for hidden_RD, *of_tokens in _chunks(
            ctx.compiled, n_words, hidden_ND, targets_N, log_sums_N, smoothed_N, plain_N
        ):
            hidden_RD = hidden_RD.to(ctx.dtype)
            slope_RP = of_chunk(hidden_RD, weight, *of_tokens, ctx.label_smoothing, n_words)
            to_hidden.append(slope_RP @ weight)
            to_weight += slope_RP.T @ hidden_RD
        return torch.cat(to_hidden).to(hidden_ND.dtype), to_weight.to(weight_PD.dtype), *[None] * 6


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def _chunk_losses(
    hidden_RD: Tensor, weight_PD: Tensor, targets_R: Tensor, vocab_size: int, entropies: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], EntropySums | None]:
    """Of each token: -log p(target), the mean of -log p over the vocabulary, log sum exp; and the chunk's entropies."""
    logits_RV = logits_of(hidden_RD, weight_PD, vocab_size)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    log_sum_R = logits_RV.logsumexp(-1)
    target_R = logits_RV.gather(1, targets_R.clamp(min=0)[:, None])[:, 0]
    valid_R = targets_R != IGNORE
    losses = (log_sum_R - target_R) * valid_R, (log_sum_R - logits_RV.mean(-1)) * valid_R, log_sum_R
    return losses, entropy_sums(logits_RV - log_sum_R[:, None], valid_R) if entropies else None


def _chunk_slopes(
    hidden_RD: Tensor,
    weight_PD: Tensor,
    targets_R: Tensor,
    log_sum_R: Tensor,
    smoothed_R: Tensor,
    plain_R: Tensor,
    smoothing: float,
    vocab_size: int,
) -> Tensor:
    """d loss / d logits [R, P]: p - (1 - a) [target] - a / V, times each token's incoming gradient; 0 in the padding,
    which the products that follow keep, as rows of odd length take a slow way on a GPU."""
    logits_RP = F.linear(hidden_RD, weight_PD)
    slope_RP = logits_RP.to(torch.promote_types(logits_RP.dtype, torch.float32)).sub_(log_sum_R[:, None]).exp_()
    slope_RP.mul_((smoothed_R + plain_R)[:, None]).sub_((smoothed_R * (smoothing / vocab_size))[:, None])
    target_R1, at_target_R1 = targets_R.clamp(min=0)[:, None], (smoothed_R * (1 - smoothing) + plain_R)[:, None]
    if torch.compiler.is_compiling():  # one kernel, which holds nothing of this size but the result
        column_P = torch.arange(len(weight_PD), device=weight_PD.device)
        slope_RP = torch.where(column_P == target_R1, slope_RP - at_target_R1, slope_RP)
        return torch.where(column_P < vocab_size, slope_RP, 0.0).to(hidden_RD.dtype)
    slope_RP.scatter_add_(1, target_R1, -at_target_R1)
    slope_RP[:, vocab_size:] = 0.0
    return slope_RP.to(hidden_RD.dtype)


def _chunks(compiled: bool, vocab_size: int, *tensors: Tensor) -> Any:
    rows = chunk_rows(len(tensors[0]), vocab_size, compiled and tensors[0].is_cuda)
    return zip(*(t.split(rows) for t in tensors), strict=True)


def chunk_rows(n_tokens: int, vocab_size: int, fused: bool) -> int:
    """Tokens of a chunk: as equal as can be, because each size is compiled for itself."""
    n_chunks = -(-n_tokens // max(1, (FUSED_CHUNK_LOGITS if fused else CHUNK_LOGITS) // vocab_size))
    return max(1, -(-n_tokens // max(1, n_chunks)))


def losses_by_liger(
    hidden_ND: Tensor, weight_PD: Tensor, targets_N: Tensor, label_smoothing: float, vocab_size: int, entropies: bool
) -> HeadOutput:
    """liger-kernel's fused linear cross-entropy, per token; it reads the number of valid tokens on the host.

    The kernels return the smoothed loss alone. What it differs in from the plain one is a * (h . (W[y] - mean_v W[v])),
    which takes one row of the weight a token, and no gradient. Entropies take a product of their own.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    dtype = _product_dtype(hidden_ND)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_PD[:vocab_size].to(dtype)
        smoothed_N = liger_fused_linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, ignore_index=IGNORE, label_smoothing=label_smoothing, reduction="none",
            accum_dtype=torch.float32,
        )  # fmt: skip
        with torch.no_grad():
            direction_ND = weight_VD[targets_N.clamp(min=0)].float() - weight_VD.mean(0, dtype=torch.float32)
            change_N = label_smoothing * torch.linalg.vecdot(hidden_ND.float(), direction_ND)
            plain_N = (smoothed_N - change_N).masked_fill(targets_N == IGNORE, 0.0)
            chunks = _chunks(False, vocab_size, hidden_ND, targets_N != IGNORE) if entropies else ()
            sums = [entropy_sums(log_probabilities(F.linear(h_RD, weight_VD)), valid_R) for h_RD, valid_R in chunks]
    losses = TokenLosses(smoothed_N, plain_N if label_smoothing else smoothed_N)
    return HeadOutput(losses, _added(sums) if entropies else None)


def _require_liger() -> None:
    """Refuse where liger-kernel or what it runs on is missing, or where its gradients were wrong."""
    problem = "" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else "torch sees no GPU"
    try:
        import liger_kernel.transformers.functional  # noqa: F401

        found = metadata.version("liger-kernel")
        if tuple(int(part) for part in found.split(".")[:3]) < LIGER_AT_LEAST:
            problem = f"version {found} is too old"
    except ImportError as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"cluster.head: liger needs a GPU and liger-kernel 0.8.2 or newer ({problem}); install replication[liger], "
            "or choose chunked, the same function"
        )


@torch.no_grad()
def entropies_in_chunks(log_probs_NV: Tensor, valid_N: Tensor) -> EntropySums:
    """loss.entropy_sums, a few tokens' probabilities at a time; whole where it is compiled, which holds none."""
    if torch.compiler.is_compiling():
        return entropy_sums(log_probs_NV, valid_N)
    size = max(ENTROPY_TOKENS, ENTROPY_LOGITS // log_probs_NV.shape[1])
    chunks = zip(log_probs_NV.split(size), valid_N.split(size), strict=True)
    return _added([entropy_sums(log_probs_RV, valid_R) for log_probs_RV, valid_R in chunks])


def _added(sums: Sequence[EntropySums]) -> EntropySums:
    """The entropies of all chunks, of which there is one at least."""
    return EntropySums(*(torch.stack(column).sum(0) for column in zip(*sums, strict=True)))
