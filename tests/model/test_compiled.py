"""What compiling a block must not change: one graph, also inside DDP, and the precision of the router's gradient."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from replication.config import load_run
from replication.model.transformer import Transformer, initialise

pytestmark = [
    pytest.mark.filterwarnings("default"),  # torch.compile looks at its own warnings while it traces
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]
CONFIG = load_run(["model/tiny.yaml", "cluster/cpu.yaml"], ["--model.vocab_size=64", "--model.n_blocks=2"])


def model(compiled: bool) -> Transformer:
    made = Transformer(CONFIG.model)
    initialise(made, 1)
    made.configure(replace(CONFIG.cluster, compile=compiled, head="chunked"))
    return made


def backward(module: torch.nn.Module) -> None:
    tokens_BT = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(tokens_BT, 2)
        loss = out.hidden_BTD.float().square().mean() + out.aux_G.sum()
    loss.backward()


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_leaves_every_block_one_graph(graphs, process_group):
    """Its buckets end within a block here: torch's optimizer of DDP would cut the graph at each border."""
    backward(DistributedDataParallel(model(compiled=True), bucket_cap_mb=0.05))
    assert graphs["unique_graphs"] == 1  # that of the first block, which the second one takes too


def test_the_routers_gradient_is_in_fp32_as_in_eager_code(graphs):
    gradients = []
    for compiled in (False, True):
        made = model(compiled)
        backward(made)
        gradients.append(made.blocks[0].feed_forward.router.weight.grad)
    for gradient in gradients:
        assert (gradient != gradient.bfloat16().float()).float().mean() > 0.9  # as fp32 numbers are
    assert torch.allclose(*gradients, rtol=0.05, atol=1e-3 * float(gradients[0].abs().max()))
