"""Muon: orthogonalised momentum for matrices, and AdamW in the same optimizer for everything else.

Jordan et al. 2024 (momentum, Nesterov, five Newton-Schulz steps); Liu et al. 2025, eq. 4 (updates of the size of
AdamW's, so that both share a learning rate and a weight decay). Momentum and the update act elementwise, so they run on
whatever piece of a matrix a strategy keeps; orthogonalising takes whole matrices, which a `Placement` brings together.

Unlike DeepSpeed's own Muon, which orthogonalises while gradients are reduced, this one does it in `step`: the gradient
has been scaled and clipped before, as in one process, at every ZeRO stage.

Shapes: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from replication.training.ranks import gather, rank, sum_over_ranks, world_size

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at zero, values end in about 0.7..1.2
STEPS = 5
BATCH_ELEMENTS = 1 << 26  # of matrices that are brought together at a time: 256 MB in fp32


@torch.no_grad()
def orthogonalise(matrices: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Matrices of one shape, with all singular values brought near 1: [M, R, C] in the dtype of the arithmetic.

    0 gives 0. `dtype` none: theirs. Each matrix is divided by its norm into the arithmetic's dtype in one pass.
    """
    rows, columns = matrices[0].shape
    x = torch.empty(len(matrices), rows, columns, dtype=dtype or matrices[0].dtype, device=matrices[0].device)
    norms = torch._foreach_norm(list(matrices))
    torch._foreach_clamp_min_(norms, 1e-12)
    for out, matrix, norm in zip(x, matrices, norms, strict=True):
        torch.div(matrix, norm, out=out)
    x = x.mT if rows > columns else x  # the smaller side's products
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if rows > columns else x


def update_size(shape: torch.Size) -> float:
    """Factor that gives an orthogonal matrix about the size of AdamW's update (Liu et al. 2025, eq. 4)."""
    return 0.2 * math.sqrt(max(shape))


Placement = Callable[[list[Tensor], list[Tensor], torch.dtype | None, float], None]
"""(params, updates, dtype, rate): subtract rate x update_size x the orthogonal matrices of the updates from the params,
or from the pieces of matrices that the strategy keeps of both. Called on all ranks together."""


class Muon(Optimizer):
    """One optimizer over groups of two kinds: those with `muon` True, and AdamW's."""

    def __init__(
        self, groups: ParamsT, momentum: float, betas: tuple[float, float], eps: float, dtype: torch.dtype | None = None
    ) -> None:
        """`groups` are dicts of `params`, `muon`, `lr`, `weight_decay`, `name`. The momentum is Nesterov's, betas and
        eps are AdamW's, and the Newton-Schulz arithmetic is in `dtype` (none: the gradients')."""
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "momentum": momentum, "betas": betas, "eps": eps})
        self.dtype = dtype
        self.placement: Placement = whole_matrices  # a strategy that cuts matrices sets its own

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the closure, where given, computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in params]  # whole, or this rank's flat piece of the group
            if params:
                (self._muon if group["muon"] else self._adamw)(group, params, gradients)
        return loss

    @torch.no_grad()
    def _muon(self, group: Mapping[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        buffers = [self._state(p, "momentum_buffer") for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        updates = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        self.placement(params, updates, self.dtype, group["lr"])

    @torch.no_grad()
    def _adamw(self, group: Mapping[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        first, second = ([self._state(p, name) for p in params] for name in ("exp_avg", "exp_avg_sq"))
        for p in params:  # a state that was loaded has its counts on the CPU
            count = self.state[p].get("step")
            if count is None or count.device != p.device:
                count = torch.zeros((), dtype=torch.float32) if count is None else count
                self.state[p]["step"] = count.to(p.device)
        steps, (beta1, beta2) = [self.state[p]["step"] for p in params], group["betas"]
        rule = {key: group[key] for key in ("lr", "weight_decay", "eps")} | {"beta1": beta1, "beta2": beta2}
        adamw(params, gradients, first, second, [], steps, **rule, fused=True, amsgrad=False, maximize=False)

    def _state(self, param: Tensor, name: str) -> Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param)
        return state[name]


@torch.no_grad()
def whole_matrices(params: list[Tensor], updates: list[Tensor], dtype: torch.dtype | None, rate: float) -> None:
    """Single and DDP: every rank holds every matrix, and orthogonalises its share of each batch."""
    for i, matrix_RC in _shared_batches(updates, dtype):
        params[i].add_(matrix_RC, alpha=-rate * update_size(matrix_RC.shape))


def _shared_batches(matrices: Sequence[Tensor], dtype: torch.dtype | None) -> Iterator[tuple[int, Tensor]]:
    """As _in_batches, on all ranks together: each orthogonalises an equal part, all get the whole."""
    n = world_size()
    if n == 1:
        yield from _in_batches(matrices, dtype)
        return
    for batch in _batches([m.shape for m in matrices], n):
        share = -(-len(batch) // n)
        mine = [matrices[i] for i in batch[rank() * share : (rank() + 1) * share]]
        padded_SRC = matrices[batch[0]].new_zeros(share, *matrices[batch[0]].shape, dtype=dtype)
        if mine:
            padded_SRC[: len(mine)] = orthogonalise(mine, dtype)
        yield from zip(batch, gather(padded_SRC).flatten(0, 1), strict=False)  # padding at the end


def _in_batches(matrices: Sequence[Tensor], dtype: torch.dtype | None) -> Iterator[tuple[int, Tensor]]:
    """Each matrix's number and its orthogonal matrix, of which one batch is held at a time."""
    for batch in _batches([m.shape for m in matrices]):
        yield from zip(batch, orthogonalise([matrices[i] for i in batch], dtype), strict=True)


def _batches(shapes: Sequence[torch.Size], ranks: int = 1) -> Iterator[list[int]]:
    """Numbers of matrices of one shape, at most BATCH_ELEMENTS elements or one matrix a rank at a time."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    for shape, numbers in by_shape.items():
        size = max(ranks, BATCH_ELEMENTS // shape.numel())
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


class Piece(NamedTuple):
    """Place of a matrix in its group's flat buffer (ZeRO 1 and 2), or of its shards in every rank's (ZeRO 3)."""

    shape: torch.Size
    start: int
    length: int  # elements there, padding included

    @property
    def end(self) -> int:
        return self.start + self.length


class Partitions:
    """ZeRO 1 and 2: matrices one after another in a flat buffer, of which each rank keeps an equal, contiguous part.

    A matrix inside one part is orthogonalised there. Those that lie across a border, fewer than there are ranks, are
    added up from their pieces on all ranks first.
    """

    def __init__(self, pieces: dict[Tensor, list[Piece]]) -> None:
        """`pieces`: for this rank's flat part of each group, where every matrix lies in the whole buffer."""
        self.pieces = {id(flat): of_flat for flat, of_flat in pieces.items()}

    @torch.no_grad()
    def __call__(self, params: list[Tensor], updates: list[Tensor], dtype: torch.dtype | None, rate: float) -> None:
        for param, update in zip(params, updates, strict=True):
            first = rank() * update.numel()  # where this rank's part begins
            last = first + update.numel()
            mine: dict[Piece, Tensor] = {}
            for piece in self.pieces[id(param)]:
                if first <= piece.start and piece.end <= last:
                    mine[piece] = update[piece.start - first :][: piece.length].view(piece.shape)
            mine |= self._across(self.pieces[id(param)], update, first)
            owned = list(mine)
            for i, matrix_RC in _in_batches(list(mine.values()), dtype):
                piece = owned[i]
                begin, end = max(piece.start, first), min(piece.end, last)
                part = matrix_RC.flatten()[begin - piece.start : end - piece.start]
                param[begin - first : end - first].add_(part, alpha=-rate * update_size(piece.shape))

    @staticmethod
    def _across(pieces: list[Piece], update: Tensor, first: int) -> dict[Piece, Tensor]:
        """The matrices that lie across a border of parts, whole, of which this rank keeps a piece."""
        part = update.numel()
        across = [p for p in pieces if p.start // part != (p.end - 1) // part]
        if not across:
            return {}
        whole = update.new_zeros(sum(p.length for p in across))
        cut = dict(zip(across, whole.split([p.length for p in across]), strict=True))
        mine = {}
        for piece, flat in cut.items():
            begin, end = max(piece.start, first), min(piece.end, first + part)
            if begin < end:
                flat[begin - piece.start : end - piece.start] = update[begin - first : end - first]
                mine[piece] = flat.view(piece.shape)
        sum_over_ranks(whole)
        return mine


class Shards:
    """ZeRO 3: every rank keeps an equal shard of every matrix, one after another in a flat buffer.

    A few matrices at a time are brought together on all ranks, and their orthogonalisation is shared among them.
    """

    def __init__(self, pieces: dict[Tensor, list[Piece]]) -> None:
        """`pieces`: for this rank's flat buffer of each (sub-)group, where its shard of every matrix lies."""
        self.pieces = {id(flat): of_flat for flat, of_flat in pieces.items()}

    @torch.no_grad()
    def __call__(self, params: list[Tensor], updates: list[Tensor], dtype: torch.dtype | None, rate: float) -> None:
        for param, update in zip(params, updates, strict=True):
            pieces = self.pieces[id(param)]
            for batch in _batches([p.shape for p in pieces], world_size()):
                chosen = [pieces[i] for i in batch]
                shards_WF = gather(torch.cat([update[p.start :][: p.length] for p in chosen]))
                matrices = [
                    shards_WS.flatten()[: p.shape.numel()].view(p.shape)
                    for p, shards_WS in zip(chosen, shards_WF.split([p.length for p in chosen], dim=1), strict=True)
                ]
                for i, matrix_RC in _shared_batches(matrices, dtype):
                    p = chosen[i]
                    shard = matrix_RC.flatten()[rank() * p.length :][: p.length]
                    param[p.start : p.start + len(shard)].add_(shard, alpha=-rate * update_size(p.shape))
