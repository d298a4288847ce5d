"""The budget of what is compiled: counted at published size without a GPU, and what a count must not miss."""

from dataclasses import replace

import pytest
import torch

from replication.bench import graphs
from replication.config import load_run
from replication.model import transformer
from replication.runs.records import write_record
from replication.training.environment import determinism

pytestmark = pytest.mark.filterwarnings("default")  # torch.compile looks at its own warnings while it traces


def small_config():
    """A block of every part, at a size that is lowered in seconds."""
    flags = ["--model.vocab_size=512", "--data.block_size_tokens=64", "--training.precision=bf16-mixed"]
    return load_run(["model/tiny.yaml", "cluster/one_gpu.yaml", "arms/both.yaml"], flags)


@pytest.fixture(scope="module")
def small_counts():
    return graphs.count_block(small_config())


@pytest.fixture
def budget(small_counts, tmp_path, monkeypatch):
    """The budget of the small block as it is."""
    counts = small_counts
    monkeypatch.setattr(graphs, "BUDGET", tmp_path / "budget.json")
    write_record(graphs.BUDGET, graphs.Budget("by hand", str(torch.__version__), {"block": counts}))
    assert counts.graphs == 1 and counts.breaks == 0
    return counts


@pytest.mark.slow
def test_the_published_block_and_head_are_within_their_budget():
    with determinism(True):  # counted is what the config says, whatever the process was set to
        assert graphs.over_budget(graphs.count_graphs(load_run(list(graphs.PUBLISHED))).parts) == []


def test_weights_are_cast_once_each_and_the_router_never(budget):
    model = small_config().model
    assert budget.cast_weights == sum(
        p.numel() for name, p in transformer.Block(model).named_parameters() if p.ndim == 2 and "router" not in name
    )
    assert graphs.over_budget({"block": budget}) == []


def test_a_planted_cast_exceeds_the_budget(budget, monkeypatch):
    attend = transformer.Attention.forward

    def with_a_cast(self, x_BTD, *args):
        return attend(self, x_BTD, *args) + x_BTD @ (2 * self.o.weight).to(torch.bfloat16)

    monkeypatch.setattr(transformer.Attention, "forward", with_a_cast)
    lines = graphs.over_budget({"block": graphs.count_block(small_config())})
    assert any(line.startswith("block: cast_weights ") for line in lines)
    assert any(line.startswith("block: products ") for line in lines)


def test_a_planted_graph_break_exceeds_the_budget(budget, monkeypatch):
    measure = transformer.divergence

    def with_a_break(x_BTD, y_BTD, n_groups):
        torch._dynamo.graph_break()
        return measure(x_BTD, y_BTD, n_groups)

    monkeypatch.setattr(transformer, "divergence", with_a_break)
    lines = graphs.over_budget({"block": graphs.count_block(small_config())})
    assert "block: breaks 1, the budget is 0" in lines


def test_another_torch_has_a_twentieth_of_room(budget):
    write_record(graphs.BUDGET, graphs.Budget("by hand", "0.0", {"block": budget}))
    assert graphs.over_budget({"block": replace(budget, kernel_mb=1.04 * budget.kernel_mb)}) == []
    [line] = graphs.over_budget({"block": replace(budget, kernel_mb=1.06 * budget.kernel_mb)})
    assert line.startswith("block: kernel_mb ")
