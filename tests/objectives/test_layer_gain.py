"""Layer gain against its slow restatement, and its corners."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slow_reference import slow_scales

from replication.config import LayerGainConfig
from replication.objectives.layer_gain import included_blocks, layer_scales, step_divergence
from replication.training.strategies import multiply_whole

PUBLISHED = LayerGainConfig()


def scales(config: LayerGainConfig, divergence: list[float]) -> list[float]:
    d = torch.tensor(divergence, dtype=torch.float64)
    return layer_scales(config, d, included_blocks(config, len(divergence))).tolist()


@pytest.mark.parametrize("exclude", [(), (0,), (1, 3)])
@pytest.mark.parametrize("t", [0.0, 0.5, 4.0])
def test_scales_equal_the_slow_reference(exclude, t):
    config = replace(PUBLISHED, t=t, exclude_blocks=exclude)
    divergence = [9.0, 1.0, 0.2, 0.4, 0.8]
    assert scales(config, divergence) == pytest.approx(slow_scales(config, divergence), rel=1e-12)


def test_a_hand_worked_example():
    """d = 1, 2, 3: mean 2; t = 0.5 gives 0.75, 1, 1.25."""
    assert scales(PUBLISHED, [1.0, 2.0, 3.0]) == [0.75, 1.0, 1.25]


def test_clamps_bind():
    assert scales(replace(PUBLISHED, t=10.0), [0.1, 1.0, 9.0]) == [0.1, 0.1, 3.0]


def test_excluded_blocks_keep_one_and_leave_the_mean():
    assert scales(replace(PUBLISHED, exclude_blocks=(0,)), [100.0, 1.0, 3.0]) == [1.0, 0.75, 1.25]


def test_nothing_is_scaled_where_the_mean_vanishes():
    assert scales(PUBLISHED, [0.0, 0.0, 1e-13]) == [1.0, 1.0, 1.0]


def test_step_mean_and_last_group():
    d = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert step_divergence(PUBLISHED, d).tolist() == [2.0, 6.0]
    assert step_divergence(replace(PUBLISHED, divergence="last_group"), d).tolist() == [3.0, 7.0]


def test_multiply_touches_each_block_and_nothing_else():
    blocks = [[torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))] for _ in range(3)]
    outside = torch.nn.Parameter(torch.ones(5))
    for p in [*blocks[0], *blocks[1], *blocks[2], outside]:
        p.grad = torch.ones_like(p)
    blocks[1][1].grad = None
    multiply_whole(blocks, torch.tensor([0.5, 2.0, 1.0]))
    assert [float(b[0].grad.unique()) for b in blocks] == [0.5, 2.0, 1.0]
    assert blocks[1][1].grad is None
    assert float(outside.grad.unique()) == 1.0
