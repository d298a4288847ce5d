"""Newton-Schulz, the optimizer beside torch's own, and the ways in which strategies cut matrices (without ranks)."""

from __future__ import annotations

import pytest
import torch
from host_sync import NoHostSync

from replication.config import load_run
from replication.errors import UserError
from replication.training import muon
from replication.training.muon import Muon, Partitions, Piece, Shards, orthogonalise, update_size, whole_matrices

SHAPES = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4)]


def matrices(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8), (1, 6, 6)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = orthogonalise(list(x))
    assert update_size(x.shape[1:]) == 0.2 * max(shape[1:]) ** 0.5
    assert torch.linalg.svdvals(y).min() > 0.6 and torch.linalg.svdvals(y).max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ v.mT
    assert torch.allclose(inner, torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2)), atol=1e-10)
    assert torch.allclose(orthogonalise(list(1000 * x)), y, rtol=1e-10)
    assert orthogonalise(list(torch.zeros(shape))).abs().sum() == 0


def test_bf16_arithmetic_gives_nearly_the_same():
    x = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    a, b = orthogonalise(list(x)), orthogonalise(list(x), torch.bfloat16)
    assert a.dtype == torch.float32 and b.dtype == torch.bfloat16, "what ranks gather is as small as it can be"
    assert 1e-5 < float((a - b).norm() / a.norm()) < 3e-2


def test_batches_hold_one_shape_and_no_more_than_their_size(monkeypatch):
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 50)
    assert list(muon._batches([torch.Size(s) for s in SHAPES])) == [[0, 2], [4], [1], [3]]
    assert list(muon._batches([torch.Size(s) for s in SHAPES], ranks=3)) == [[0, 2, 4], [1], [3]]


def expected() -> list[torch.Tensor]:
    """What a rate of -1 adds to weights of 0."""
    return [orthogonalise([m])[0] * update_size(m.shape) for m in matrices()]


def test_a_batch_is_its_matrices_one_by_one(monkeypatch):
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 50)
    found = [torch.zeros_like(m) for m in matrices()]
    whole_matrices(found, matrices(), None, -1.0)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected(), strict=True))


class Ranks:
    """The collectives of several ranks, played one after another: every rank's piece is known beforehand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.n, self.now = n, 0
        monkeypatch.setattr(muon, "world_size", lambda: n)
        monkeypatch.setattr(muon, "rank", lambda: self.now)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_parts_of_a_flat_buffer_give_the_parts_of_the_update(monkeypatch, n):
    """ZeRO 1 and 2: matrices across one or several borders, and padding at the end."""
    ranks = Ranks(monkeypatch, n)
    flat = torch.cat([m.flatten() for m in matrices()])
    part = -(-(len(flat) + 3) // n)
    padded = torch.cat([flat, flat.new_zeros(part * n - len(flat))])
    starts = [sum(a * b for a, b in SHAPES[:i]) for i in range(len(SHAPES))]
    pieces = [Piece(torch.Size(s), start, s[0] * s[1]) for s, start in zip(SHAPES, starts, strict=True)]
    across = torch.cat(
        [flat[p.start :][: p.length] for p in pieces if p.start // part != (p.start + p.length - 1) // part]
    )
    monkeypatch.setattr(muon, "sum_over_ranks", lambda whole: whole.copy_(across))
    found = []
    for ranks.now in range(n):
        mine = padded[ranks.now * part :][:part].clone()
        found.append(torch.zeros_like(mine))
        Partitions({found[-1]: pieces})([found[-1]], [mine], None, -1.0)
    whole = torch.cat([m.flatten() for m in expected()])
    assert torch.allclose(torch.cat(found)[: len(whole)], whole, rtol=1e-12)
    assert torch.cat(found)[len(whole) :].abs().sum() == 0


def test_shards_of_every_matrix_give_the_shards_of_the_update(monkeypatch):
    """ZeRO 3 on one rank; on several it is tested with DeepSpeed (test_parity.py)."""
    flat = torch.cat([torch.cat([m.flatten(), m.new_zeros(1)]) for m in matrices()])
    lengths = [a * b + 1 for a, b in SHAPES]  # each with one element of padding
    pieces = [Piece(torch.Size(s), sum(lengths[:i]), lengths[i]) for i, s in enumerate(SHAPES)]
    found = torch.zeros_like(flat)
    Shards({found: pieces})([found], [flat], None, -1.0)
    for piece, matrix in zip(pieces, expected(), strict=True):
        assert torch.allclose(found[piece.start :][: piece.length - 1], matrix.flatten(), rtol=1e-12)


def test_the_rest_is_trained_as_by_torchs_adamw():
    runs = []
    for ours in (True, False):
        p = torch.nn.Parameter(torch.ones(3, 4))
        group = {"params": [p], "lr": 0.1, "weight_decay": 0.1, "muon": False}
        optimizer = Muon([group], 0.95, (0.9, 0.95), 1e-8) if ours else torch.optim.AdamW(
            [p], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True)  # fmt: skip
        for k in range(3):
            p.grad = torch.full_like(p, 0.5 - k)
            optimizer.step()
        runs.append((p.detach(), optimizer.state_dict()["state"]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1][0].keys() == runs[1][1][0].keys()


def test_a_loaded_state_counts_its_steps_where_the_weights_are():
    """As on a GPU, whose fused AdamW takes no count on the CPU; checkpoints are loaded there."""
    p = torch.nn.Parameter(torch.ones(3, 4, device="meta"))
    optimizer = Muon([{"params": [p], "lr": 0.1, "muon": False}], 0.95, (0.9, 0.95), 1e-8)
    moments = {"exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)}
    state = optimizer.state_dict() | {"state": {0: moments | {"step": torch.tensor(5.0)}}}
    optimizer.load_state_dict(state)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {value.device.type for value in optimizer.state[p].values()} == {"meta"}


def test_it_agrees_with_torchs_muon_on_one_matrix():
    """torch.optim.Muon computes in bf16, so the two agree to its rounding."""
    a, b = (torch.nn.Parameter(torch.eye(8, 6)) for _ in range(2))
    theirs = torch.optim.Muon([a], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    ours = Muon(
        [{"params": [b], "lr": 0.1, "weight_decay": 0.1, "muon": True}], 0.95, (0.9, 0.95), 1e-8, torch.bfloat16
    )
    for k in range(3):
        a.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(k))
        b.grad = a.grad.clone()
        theirs.step(), ours.step()
    assert float((a - b).detach().norm() / a.detach().norm()) < 2e-2


def test_a_step_of_muon_never_reads_the_device_on_the_host():
    p = torch.nn.Parameter(torch.eye(8, 6))
    optimizer = Muon([{"params": [p], "lr": 0.1, "muon": True}], 0.95, (0.9, 0.95), 1e-8)
    p.grad = torch.ones_like(p)
    with NoHostSync():
        optimizer.step()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--cluster.strategy=zero2", "--cluster.offload_optimizer=true"), r"cluster\.offload_optimizer: Muon would"),
        (("--cluster.strategy=zero1", "--training.precision=bf16-mixed"), r"cluster\.strategy: zero1 with bf16-mixed"),
    ],
)
def test_what_it_cannot_do_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        load_run([], ["--training.optimizer=muon", *flags])
