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

from replication.model.cost import NEWTON_SCHULZ_STEPS, takes_gram
from replication.training.ranks import gather, rank, sum_over_ranks, world_size

Coefficients = tuple[tuple[float, float, float], ...]
"""(a, b, c) of each step: x becomes a x + b x^3 + c x^5 in every singular value x."""
QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * NEWTON_SCHULZ_STEPS
"""Jordan et al. 2024: steepest at zero, values end in about 0.7..1.2."""
SAFETY = 1.01
POLAR_EXPRESS: Coefficients = tuple((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in (
    (8.287212018145, -23.595886519099, 17.300387312531),
    (4.107059111542, -2.947849917917, 0.544843108293),
    (3.948690853482, -2.908902115963, 0.551819139437),
    (3.318419657371, -2.488488024315, 0.510048940124),
    (2.300652019955, -1.668903984575, 0.418807311953),
))  # fmt: skip
"""Amsel et al. 2025 (arXiv 2505.16932): each step's is the best approximation of 1 on the values that the steps before
leave of [0.001, 1]; the first one's on [0.024, 1], centred on 1 anew. The paper's factor of safety shrinks the
argument, so that a value which rounding raises over the interval's end does not grow."""
COEFFICIENTS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}
BATCH_ELEMENTS = 1 << 26  # of matrices that are brought together at a time: 256 MB in fp32


class NewtonSchulz(NamedTuple):
    """How matrices are orthogonalised."""

    dtype: torch.dtype | None = None  # of the result and, without Gram matrices, of the arithmetic; none: the matrices'
    coefficients: Coefficients = QUINTIC
    gram: bool = False  # whether by the Gram matrix, where one side is GRAM_ASPECT times the other


PUBLISHED = NewtonSchulz()


@torch.no_grad()
def orthogonalise(matrices: Sequence[Tensor], how: NewtonSchulz = PUBLISHED) -> Tensor:
    """Matrices of one shape, with all singular values brought near 1: [M, R, C] in the dtype of `how`.

    0 gives 0. Each matrix is divided by its norm into the arithmetic's dtype in one pass.
    """
    rows, columns = matrices[0].shape
    dtype, gram = how.dtype or matrices[0].dtype, how.gram and takes_gram(rows, columns)
    inner = torch.promote_types(dtype, torch.float32) if gram else dtype
    x = torch.empty(len(matrices), rows, columns, dtype=inner, device=matrices[0].device)
    norms = torch._foreach_norm(list(matrices))
    torch._foreach_clamp_min_(norms, 1e-12)
    for out, matrix, norm in zip(x, matrices, norms, strict=True):
        torch.div(matrix, norm, out=out)
    x = x.mT if rows > columns else x  # the smaller side's products
    if gram:
        x = (_all_steps(x @ x.mT, how.coefficients) @ x).to(dtype)
    else:
        for a, b, c in how.coefficients:
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if rows > columns else x


def _all_steps(gram_MRR: Tensor, coefficients: Coefficients) -> Tensor:
    """The matrix by which all steps together multiply x, of x's Gram matrix: [M, R, R].

    Every factor is a polynomial in the Gram matrix, so they commute: a step p makes p G p of it. Its eigenvalues are
    the squares of x's singular values. In bf16 rounding would make small ones negative, and the steps blow these up.
    """
    total = step = gram_MRR
    for k, (a, b, c) in enumerate(coefficients):
        gram_MRR = step @ gram_MRR @ step if k else gram_MRR
        step = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        total = step @ total if k else step
    return total


def update_size(shape: torch.Size) -> float:
    """Factor that gives an orthogonal matrix about the size of AdamW's update (Liu et al. 2025, eq. 4)."""
    return 0.2 * math.sqrt(max(shape))


Placement = Callable[[list[Tensor], list[Tensor], NewtonSchulz, float], None]
"""(params, updates, how, rate): subtract rate x update_size x the orthogonal matrices of the updates from the params,
or from the pieces of matrices that the strategy keeps of both. Called on all ranks together."""


class Muon(Optimizer):
    """One optimizer over groups of two kinds: those with `muon` True, and AdamW's."""

    def __init__(
        self, groups: ParamsT, momentum: float, betas: tuple[float, float], eps: float, how: NewtonSchulz = PUBLISHED
    ) -> None:
        """`groups` are dicts of `params`, `muon`, `lr`, `weight_decay`, `name`. The momentum is Nesterov's, betas and
        eps are AdamW's."""
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "momentum": momentum, "betas": betas, "eps": eps})
        self.how = how
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
        self.placement(params, updates, self.how, group["lr"])

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
def whole_matrices(params: list[Tensor], updates: list[Tensor], how: NewtonSchulz, rate: float) -> None:
    """Single and DDP: every rank holds every matrix, and orthogonalises its share of each batch."""
    for i, matrix_RC in _shared_batches(updates, how):
        params[i].add_(matrix_RC, alpha=-rate * update_size(matrix_RC.shape))


def _shared_batches(matrices: Sequence[Tensor], how: NewtonSchulz) -> Iterator[tuple[int, Tensor]]:
    """As _in_batches, on all ranks together: each orthogonalises an equal part, all get the whole."""
    n = world_size()
    if n == 1:
        yield from _in_batches(matrices, how)
        return
    for batch in _batches([m.shape for m in matrices], n):
        share = -(-len(batch) // n)
        mine = [matrices[i] for i in batch[rank() * share : (rank() + 1) * share]]
        padded_SRC = matrices[batch[0]].new_zeros(share, *matrices[batch[0]].shape, dtype=how.dtype)
        if mine:
            padded_SRC[: len(mine)] = orthogonalise(mine, how)
        yield from zip(batch, gather(padded_SRC).flatten(0, 1), strict=False)  # padding at the end


def _in_batches(matrices: Sequence[Tensor], how: NewtonSchulz) -> Iterator[tuple[int, Tensor]]:
    """Each matrix's number and its orthogonal matrix, of which one batch is held at a time."""
    for batch in _batches([m.shape for m in matrices]):
        yield from zip(batch, orthogonalise([matrices[i] for i in batch], how), strict=True)


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
    def __call__(self, params: list[Tensor], updates: list[Tensor], how: NewtonSchulz, rate: float) -> None:
        for param, update in zip(params, updates, strict=True):
            first = rank() * update.numel()  # where this rank's part begins
            last = first + update.numel()
            mine: dict[Piece, Tensor] = {}
            for piece in self.pieces[id(param)]:
                if first <= piece.start and piece.end <= last:
                    mine[piece] = update[piece.start - first :][: piece.length].view(piece.shape)
            mine |= self._across(self.pieces[id(param)], update, first)
            owned = list(mine)
            for i, matrix_RC in _in_batches(list(mine.values()), how):
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
    def __call__(self, params: list[Tensor], updates: list[Tensor], how: NewtonSchulz, rate: float) -> None:
        for param, update in zip(params, updates, strict=True):
            pieces = self.pieces[id(param)]
            for batch in _batches([p.shape for p in pieces], world_size()):
                chosen = [pieces[i] for i in batch]
                shards_WF = gather(torch.cat([update[p.start :][: p.length] for p in chosen]))
                matrices = [
                    shards_WS.flatten()[: p.shape.numel()].view(p.shape)
                    for p, shards_WS in zip(chosen, shards_WF.split([p.length for p in chosen], dim=1), strict=True)
                ]
                for i, matrix_RC in _shared_batches(matrices, how):
                    p = chosen[i]
                    shard = matrix_RC.flatten()[rank() * p.length :][: p.length]
                    param[p.start : p.start + len(shard)].add_(shard, alpha=-rate * update_size(p.shape))
