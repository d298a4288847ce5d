"""One global batch of 16 sequences, cut in every way: gains and scales do not notice, unless they are told to.

Shapes are micro-batch x accumulation on one or two ranks. With the published statistics, over the micro-batch, the same
batch gives other gains and other scales on another machine: the reason for gain groups.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_cells import run_cell, run_cells_on_ranks
from run_files import read_journal
from training_setup import small_config

from replication.config import scientific
from replication.errors import UserError
from replication.runs.layout import RunDir

SHAPES = [(2, 8), (4, 4), (8, 2), (16, 1)]
ON_TWO_RANKS = [(2, 4), (4, 2), (8, 1)]
BY_MICRO_BATCH = ("--training.gain_group_sequences=null", "--layer_gain.divergence=last_group")


def flags(micro_batch: int, *more: str) -> list[str]:
    return ["--training.batch_tokens=256", "--training.steps=1", "--logging.log_every_steps=1",
            "--training.warmup_steps=1", f"--cluster.micro_batch_sequences={micro_batch}",
            *more]  # fmt: skip


def first_step(root: Path, name: str, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain of every token of the step in global order, and the scale of every block, of a cell that has run."""
    by_rank = [torch.load(root / name / f"gains-{rank}.pt") for rank in range(ranks)]  # each [micro, groups, tokens]
    line = next(line for line in read_journal(RunDir(root / name).metrics) if "tokens" in line)
    return torch.stack(by_rank, dim=1).flatten(), torch.tensor([line[f"scale/block_{i:02d}"] for i in range(3)])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    for micro_batch, accumulation in SHAPES:
        for kind, more in (("groups", ()), ("micro", BY_MICRO_BATCH)):
            name = f"{kind}-1x{micro_batch}x{accumulation}"
            run_cell({"name": name, "arm": "both", "flags": flags(micro_batch, *more)}, root)
    two = ("--cluster.strategy=ddp", "--cluster.devices=2")
    cells = [{"name": f"groups-2x{m}x{a}", "arm": "both", "flags": flags(m, *two)} for m, a in ON_TWO_RANKS]
    run_cells_on_ranks(cells, root)
    return root


@pytest.mark.parametrize(("ranks", "shape"), [(1, s) for s in SHAPES[:-1]] + [(2, s) for s in ON_TWO_RANKS])
def test_gains_and_scales_of_the_first_step_are_the_global_batchs_alone(root, ranks, shape):
    gains, scales = first_step(root, "groups-1x16x1", 1)
    other_gains, other_scales = first_step(root, f"groups-{ranks}x{shape[0]}x{shape[1]}", ranks)
    assert gains.numel() == 256
    assert gains.std() > 0.1, "the gains of this step say something"
    assert (other_gains - gains).abs().max() < 1e-6
    assert (other_scales - scales).abs().max() < 1e-6


def test_statistics_of_the_micro_batch_change_with_the_machine(root, publish):
    """The published way, kept for comparison."""
    gains, scales = first_step(root, "micro-1x16x1", 1)
    for micro_batch, accumulation in SHAPES:
        other_gains, other_scales = first_step(root, f"micro-1x{micro_batch}x{accumulation}", 1)
        apart = float((other_gains - gains).abs().max()), float((other_scales - scales).abs().max())
        publish(f"statistics of the micro-batch, {micro_batch:2} x {accumulation}: gains up to {apart[0]:.1e}, "
                f"scales up to {apart[1]:.1e} from 16 x 1")  # fmt: skip
        if micro_batch < 16:
            assert apart[0] > 1e-2
            assert apart[1] > 1e-3
    two, published = first_step(root, "groups-1x2x8", 1), first_step(root, "micro-1x2x8", 1)
    assert torch.equal(two[0], published[0]), "a micro-batch of one group is that group"


def test_a_micro_batch_without_a_whole_group_is_refused():
    with pytest.raises(UserError, match=r"cluster\.micro_batch_sequences: 1 holds no whole number of gain groups .*2"):
        small_config("both", *flags(1))


def test_statistics_of_the_micro_batch_make_the_machine_part_of_the_experiment():
    keys = {m: scientific(small_config("both", *flags(m, *BY_MICRO_BATCH))) for m in (2, 8)}
    assert {m: k["cluster.micro_batch_sequences"] for m, k in keys.items()} == {2: 2, 8: 8}
    assert "cluster.micro_batch_sequences" not in scientific(small_config("both", *flags(2)))
