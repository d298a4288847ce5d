"""`bench step`: it times what it says it times, and its figures are computed as it says."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from training_setup import small_config

from replication.bench.step import Interleave, StepBench, bench_step, configure
from replication.errors import UserError
from replication.training.measure import Measure


def test_ratios_pair_each_block_with_its_neighbours():
    bench = StepBench(10, 128, plain_seconds=(1.0, 3.0, 1.0), product_seconds=(3.0, 2.0))
    assert bench.ratios == [1.5, 1.0]
    assert bench.median_ratio == 1.25


def test_the_upper_bound_is_the_order_statistic():
    n = 24
    bench = StepBench(1, 1, tuple([1.0] * (n + 1)), tuple(1 + i / 100 for i in range(n)))
    assert bench.upper_bound == pytest.approx(1.16)  # the 17th of 24: P(Binomial(24, 1/2) >= 17) = 0.032 < 0.05


@pytest.mark.parametrize("micro", [8, 2])
def test_the_plain_loop_is_the_same_step(monkeypatch, micro):
    """Both sides end on the same weights, bit for bit, so that a ratio compares like with like."""
    ends = {}
    turn = Interleave.on_train_end

    def keep(self, trainer, pl_module):
        turn(self, trainer, pl_module)
        ends["product"], ends["plain"] = pl_module.model.state_dict(), self.plain.model.state_dict()
        ends["lines"] = sum(isinstance(c, Measure) for c in trainer.callbacks)

    monkeypatch.setattr(Interleave, "on_train_end", keep)
    config = configure(small_config("baseline", f"--cluster.micro_batch_sequences={micro}"), n_blocks=2, block_steps=2)
    bench = bench_step(config, 2, Console(file=io.StringIO()))
    assert (len(bench.plain_seconds), len(bench.product_seconds)) == (3, 2)
    assert ends["lines"] == 1, "the measuring is timed with the rest"
    assert config.training.steps == 6
    # the plain loop has run one block more; take the product that far
    longer = configure(small_config("baseline", f"--cluster.micro_batch_sequences={micro}"), n_blocks=3, block_steps=2)
    plain = ends["plain"]
    bench_step(longer, 2, Console(file=io.StringIO()))
    assert all(torch.equal(plain[name], ends["product"][name]) for name in plain)


def test_several_processes_are_refused():
    with pytest.raises(UserError, match="bench step times one process, not 2"):
        configure(small_config("baseline", "--cluster.strategy=ddp", "--cluster.devices=2"), 2, 2)
