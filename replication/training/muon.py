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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from replication.training.ranks import gather, rank, sum_over_ranks, world_size

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at zero, values end in about 0.7..1.2
STEPS = 5
Group = dict[str, Any]  # torch's form of a parameter group
BATCH_ELEMENTS = 1 << 26  # of matrices that are brought together at a time: 256 MB in fp32


@torch.no_grad()
def orthogonalise(matrices_MRC: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The matrices with all singular values brought near 1, times 0.2 sqrt(max(R, C)): about AdamW's update.

    Args:
        matrices_MRC: any float dtype; 0 gives 0.
        dtype: of the arithmetic; none: theirs.

    Returns:
        [M, R, C] in the dtype of matrices_MRC.
    """
    rows, columns = matrices_MRC.shape[1:]
    x = matrices_MRC / torch.linalg.matrix_norm(matrices_MRC, keepdim=True).clamp(min=1e-12)
    x = x.to(dtype or x.dtype)
    x = x.mT if rows > columns else x  # the smaller side's products
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x.mT if rows > columns else x
    return x.to(matrices_MRC.dtype) * (0.2 * math.sqrt(max(rows, columns)))


class Placement(Protocol):
    """Orthogonalises matrices wherever the strategy keeps them. Called on all ranks together."""

    def __call__(self, params: list[Tensor], updates: list[Tensor], orthogonal: Orthogonalise) -> list[Tensor]:
        """Pieces of orthogonal matrices, in the shapes of the updates (pieces of momentum, one for each param)."""


Orthogonalise = Callable[[Tensor], Tensor]


class Muon(Optimizer):
    """One optimizer over groups of two kinds: those with `muon` True, and AdamW's.

    Args:
        groups: dicts of `params`, `muon`, `lr`, `weight_decay`, `name`.
        momentum: Nesterov's, of the Muon groups.
        betas: AdamW's.
        eps: AdamW's.
        dtype: of the Newton-Schulz arithmetic; none: that of the gradients.

    Attributes:
        placement: where matrices are kept; a strategy that cuts them sets its own.
    """

    def __init__(
        self,
        groups: list[Group],
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "momentum": momentum, "betas": betas, "eps": eps})
        self.dtype = dtype
        self.placement: Placement = whole_matrices

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the closure, where given, computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["muon"] else self._adamw)(group, params)
        return loss

    @torch.no_grad()
    def _muon(self, group: Group, params: list[Tensor]) -> None:
        gradients = _gradients(params)
        buffers = [self._state(p, "momentum_buffer") for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        updates = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
        updates = self.placement(params, updates, lambda matrices_MRC: orthogonalise(matrices_MRC, self.dtype))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    @torch.no_grad()
    def _adamw(self, group: Group, params: list[Tensor]) -> None:
        first, second = ([self._state(p, name) for p in params] for name in ("exp_avg", "exp_avg_sq"))
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        adamw(
            params,
            _gradients(params),
            first,
            second,
            [],
            [self.state[p]["step"] for p in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, param: Tensor, name: str) -> Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param)
        return state[name]


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


# ---------------------------------------------------------------- how matrices are kept


def whole_matrices(params: Sequence[Tensor], updates: list[Tensor], orthogonal: Orthogonalise) -> list[Tensor]:
    """Single and DDP: every rank holds every matrix, and orthogonalises its share of each batch.

    The results take the places of the updates in their list, so that no second copy of all of them is held.
    """
    for batch in _batches([u.shape for u in updates], world_size()):
        stacked_MRC = torch.stack([updates[i] for i in batch])
        stacked_MRC = _shared(stacked_MRC, orthogonal) if world_size() > 1 else orthogonal(stacked_MRC)
        for i, matrix_RC in zip(batch, stacked_MRC, strict=True):
            updates[i] = matrix_RC
    return updates


def _shared(stacked_MRC: Tensor, orthogonal: Orthogonalise) -> Tensor:
    """Each rank orthogonalises an equal part; all get the whole."""
    share = -(-len(stacked_MRC) // world_size())
    mine_SRC = stacked_MRC[rank() * share : (rank() + 1) * share]
    padded_SRC = stacked_MRC.new_zeros(share, *stacked_MRC.shape[1:])
    if len(mine_SRC):
        padded_SRC[: len(mine_SRC)] = orthogonal(mine_SRC)
    return gather(padded_SRC).flatten(0, 1)[: len(stacked_MRC)]


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


class Partitions:
    """ZeRO 1 and 2: matrices one after another in a flat buffer, of which each rank keeps an equal, contiguous part.

    A matrix inside one part is orthogonalised there. Those that lie across a border, fewer than there are ranks, are
    added up from their pieces on all ranks first.
    """

    def __init__(self, pieces: dict[Tensor, list[Piece]]) -> None:
        """`pieces`: for this rank's flat part of each group, where every matrix lies in the whole buffer."""
        self.pieces = {id(flat): of_flat for flat, of_flat in pieces.items()}

    def __call__(self, params: list[Tensor], updates: list[Tensor], orthogonal: Orthogonalise) -> list[Tensor]:
        found = []
        for param, update in zip(params, updates, strict=True):
            first = rank() * update.numel()  # where this rank's part begins
            last = first + update.numel()
            mine: dict[Piece, Tensor] = {}
            for piece in self.pieces[id(param)]:
                if first <= piece.start and piece.start + piece.length <= last:
                    mine[piece] = update[piece.start - first :][: piece.length].view(piece.shape)
            mine |= self._across(self.pieces[id(param)], update, first)
            out = torch.zeros_like(update)
            for piece, matrix_RC in _orthogonal_pieces(mine, orthogonal):
                begin, end = max(piece.start, first), min(piece.start + piece.length, last)
                out[begin - first : end - first] = matrix_RC.flatten()[begin - piece.start : end - piece.start]
            found.append(out)
        return found

    @staticmethod
    def _across(pieces: list[Piece], update: Tensor, first: int) -> dict[Piece, Tensor]:
        """The matrices that lie across a border of parts, whole, of which this rank keeps a piece."""
        part = update.numel()
        across = [p for p in pieces if p.start // part != (p.start + p.length - 1) // part]
        if not across:
            return {}
        whole = update.new_zeros(sum(p.length for p in across))
        cut = dict(zip(across, whole.split([p.length for p in across]), strict=True))
        mine = {}
        for piece, flat in cut.items():
            begin, end = max(piece.start, first), min(piece.start + piece.length, first + part)
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

    def __call__(self, params: list[Tensor], updates: list[Tensor], orthogonal: Orthogonalise) -> list[Tensor]:
        found = []
        for param, update in zip(params, updates, strict=True):
            out = torch.zeros_like(update)
            pieces = self.pieces[id(param)]
            for batch in _batches([p.shape for p in pieces], world_size()):
                chosen = [pieces[i] for i in batch]
                shards_WF = gather(torch.cat([update[p.start :][: p.length] for p in chosen]))
                matrices = [
                    shards_WS.flatten()[: p.shape.numel()].view(p.shape)
                    for p, shards_WS in zip(chosen, shards_WF.split([p.length for p in chosen], dim=1), strict=True)
                ]
                for p, matrix_RC in zip(chosen, whole_matrices(matrices, matrices, orthogonal), strict=True):
                    shard = matrix_RC.flatten()[rank() * p.length :][: p.length]
                    out[p.start : p.start + len(shard)] = shard
            found.append(out)
        return found


def _orthogonal_pieces(mine: dict[Piece, Tensor], orthogonal: Orthogonalise) -> Iterator[tuple[Piece, Tensor]]:
    pieces = list(mine)
    for batch in _batches([p.shape for p in pieces]):
        stacked_MRC = orthogonal(torch.stack([mine[pieces[i]] for i in batch]))
        yield from ((pieces[i], matrix_RC) for i, matrix_RC in zip(batch, stacked_MRC, strict=True))
