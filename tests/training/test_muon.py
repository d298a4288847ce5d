"""Newton-Schulz, the optimizer beside torch's own, and the ways in which strategies cut matrices (without ranks)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from host_sync import NoHostSync
from torch.utils.flop_counter import FlopCounterMode

from replication.config import load_run
from replication.errors import UserError
from replication.model.cost import newton_schulz_flops
from replication.training import muon
from replication.training.muon import (
    COEFFICIENTS,
    POLAR_EXPRESS,
    PUBLISHED,
    SAFETY,
    Muon,
    NewtonSchulz,
    Partitions,
    Piece,
    Shards,
    orthogonalise,
    update_size,
    whole_matrices,
)

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
    a, b = orthogonalise(list(x)), orthogonalise(list(x), NewtonSchulz(torch.bfloat16))
    assert a.dtype == torch.float32 and b.dtype == torch.bfloat16, "what ranks gather is as small as it can be"
    assert 1e-5 < float((a - b).norm() / a.norm()) < 3e-2


def minimax(low: float, high: float) -> np.ndarray:
    """(a, b, c) of the odd polynomial of degree 5 whose largest distance to 1 on [low, high] is least.

    Remez' exchange: the error has one size and four alternating signs, at both ends and at the two extrema between.
    """
    points = np.linspace(low, high, 4)
    for _ in range(100):
        *p, _ = np.linalg.solve(np.column_stack([points, points**3, points**5, [1, -1, 1, -1]]), np.ones(4))
        extrema = np.sort(np.roots([5 * p[2], 3 * p[1], p[0]]).real) ** 0.5
        points = np.array([low, *extrema, high])
    return np.array(p)


def test_polar_express_is_what_its_paper_prescribes():
    """Each step's polynomial is the best one for the values that the steps before leave of [0.001, 1]; the first one's
    for [0.024, 1], times what makes its distances to 1 equal at the ends of the whole interval."""
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for found in POLAR_EXPRESS:
        p = minimax(max(low, cushion * high), high)
        at_low, at_high = (p @ [x, x**3, x**5] for x in (low, high))
        p *= 2 / (at_low + at_high) if low < cushion * high else 1.0
        assert np.array(found) == pytest.approx(p / SAFETY ** np.array([1, 3, 5]), rel=1e-9)
        low = p @ [low, low**3, low**5]
        high = 2 - low
    assert (low, high) == pytest.approx((0.8764, 1.1236), abs=1e-4)


def test_polar_express_lifts_small_values_nearer_to_one():
    values = torch.logspace(-3, -0.1, 40, dtype=torch.float64)
    values[-1] = (1 - values[:-1].square().sum()).sqrt() if values[:-1].square().sum() < 1 else values[-1]
    x = torch.diag(values / values.norm())
    ends = {name: orthogonalise([x], NewtonSchulz(coefficients=c))[0].diagonal() for name, c in COEFFICIENTS.items()}
    assert float((ends["polar_express"] - 1).abs().max()) < float((ends["quintic"] - 1).abs().max())


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS)
@pytest.mark.parametrize("shape", [(3, 24, 8), (2, 8, 16), (2, 10, 64), (2, 12, 8)])
def test_by_the_gram_matrix_is_the_same_function(coefficients, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] *= torch.logspace(0, -6, shape[2], dtype=torch.float64)  # one that has hardly a rank
    x[-1, :, 1:] = 0
    plain, gram = (orthogonalise(list(x), NewtonSchulz(coefficients=coefficients, gram=g)) for g in (False, True))
    assert (plain - gram).abs().max() < 1e-10
    assert torch.equal(plain, gram) == (shape == (2, 12, 8)), "a matrix that is nearly square goes the plain way"
    assert orthogonalise(list(0 * x), NewtonSchulz(gram=True)).abs().sum() == 0


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_by_the_gram_matrix_bf16_holds_for_a_spread_of_singular_values(coefficients):
    """Its arithmetic is in fp32: in bf16 the squares of small values are lost, and the result is none."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 32, generator=generator))[0] for n in (32, 96))
    x = u * torch.logspace(0, -5, 32) @ v.mT
    how = NewtonSchulz(torch.bfloat16, coefficients, gram=True)
    found, exact = orthogonalise([x], how), orthogonalise([x.double()], how._replace(dtype=torch.float64))
    assert found.dtype == torch.bfloat16
    assert float((found - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("rows, columns", [(8, 8), (12, 8), (8, 16), (40, 8)])
@pytest.mark.parametrize("gram", [False, True])
def test_its_arithmetic_is_counted_as_torch_counts_it(rows, columns, gram):
    with FlopCounterMode(display=False) as counter:
        orthogonalise([torch.ones(rows, columns)], NewtonSchulz(gram=gram))
    assert counter.get_total_flops() == newton_schulz_flops(rows, columns, gram)
    if max(rows, columns) >= 2 * min(rows, columns):
        assert newton_schulz_flops(rows, columns, True) < newton_schulz_flops(rows, columns)


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
    whole_matrices(found, matrices(), PUBLISHED, -1.0)
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
        Partitions({found[-1]: pieces})([found[-1]], [mine], PUBLISHED, -1.0)
    whole = torch.cat([m.flatten() for m in expected()])
    assert torch.allclose(torch.cat(found)[: len(whole)], whole, rtol=1e-12)
    assert torch.cat(found)[len(whole) :].abs().sum() == 0


def test_shards_of_every_matrix_give_the_shards_of_the_update(monkeypatch):
    """ZeRO 3 on one rank; on several it is tested with DeepSpeed (test_parity.py)."""
    flat = torch.cat([torch.cat([m.flatten(), m.new_zeros(1)]) for m in matrices()])
    lengths = [a * b + 1 for a, b in SHAPES]  # each with one element of padding
    pieces = [Piece(torch.Size(s), sum(lengths[:i]), lengths[i]) for i, s in enumerate(SHAPES)]
    found = torch.zeros_like(flat)
    Shards({found: pieces})([found], [flat], PUBLISHED, -1.0)
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
    group, how = {"params": [b], "lr": 0.1, "weight_decay": 0.1, "muon": True}, NewtonSchulz(torch.bfloat16)
    ours = Muon([group], 0.95, (0.9, 0.95), 1e-8, how)
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
