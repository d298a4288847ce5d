"""`replicate bench graphs`: what torch.compile makes of a block and of the head, counted at any size, not run.

Inductor lowers forward and backward on tensors that take no memory, for this machine's CPU, and the counts are read
off its scheduler: graphs, breaks, products, kernels and the bytes that they move. A GPU's code has the same graphs,
products and casts, and its fused kernels move about a tenth less (README.md, Graphs). Counts are of one micro-batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from replication.bench.blocks import Result
from replication.config import RunConfig, load_run
from replication.console import table
from replication.model import head
from replication.model.cost import StepTime, predict_step
from replication.model.size import padded_vocabulary
from replication.model.transformer import Block, compile_block, rotary
from replication.runs.records import read_record, write_record
from replication.training.environment import determinism

BUDGET = Path(__file__).with_name("budget.json")
PUBLISHED = ("model/1b2.yaml", "training/phase3.yaml", "cluster/one_gpu.yaml", "arms/both.yaml")
MB = 1e6


@dataclass
class Counts:
    """Of one part, forward and backward together; bytes in 10^6."""

    graphs: int = 0
    breaks: int = 0
    products: int = 0
    """Matrix products, grouped ones and attention."""
    kernels: int = 0
    """Fused kernels."""
    kernel_mb: float = 0.0
    """Read and written by fused kernels."""
    product_mb: float = 0.0
    """Read and written by products."""
    saved_mb: float = 0.0
    """Kept from forward to backward, parameters and the input aside."""
    cast_weights: int = 0
    """Numbers of parameters that are cast to another dtype."""


class NotRun(Exception):
    """In place of the first compiled call: everything is lowered by then."""


class _Lowered:
    """A compiled module that is not built."""

    __file__ = key = ""

    @staticmethod
    def call(args: Any) -> Any:
        raise NotRun


@contextmanager
def counting(counts: Counts, module: nn.Module | None = None) -> Iterator[None]:
    """Lower what is compiled inside, add it to the counts, and run nothing; `module` has the weights."""
    import torch._dynamo  # these take seconds
    import torch._functorch.config
    import torch._inductor.compile_fx
    import torch._inductor.config
    import torch._inductor.graph

    shapes = {p.shape for p in module.parameters() if p.ndim == 2} if module is not None else set()

    def take(graph: Any) -> Any:
        graph.codegen()
        for node, words in graph.count_bytes()[1]:
            n_bytes = 4 * words / MB  # the scheduler counts in words of four bytes
            if type(node).__name__.startswith("Extern"):
                counts.products += n_bytes > 0
                counts.product_mb += n_bytes
            else:
                counts.kernels += 1
                counts.kernel_mb += n_bytes
        return _Lowered()

    cut = torch._inductor.compile_fx.min_cut_rematerialization_partition

    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        forward, backward = cut(joint, *args, **kwargs)
        kept = forward.graph.output_node().args[0][kwargs["num_fwd_outputs"] :]
        values = [node.meta["val"] for node in kept if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
        counts.saved_mb += sum(v.nbytes for v in values if isinstance(v, Tensor)) / MB
        counts.cast_weights += sum(_cast(node, shapes) for node in forward.graph.nodes)
        return forward, backward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(patch.object(torch._inductor.graph.GraphLowering, "compile_to_module", take))
        stack.enter_context(patch.object(torch._inductor.compile_fx, "min_cut_rematerialization_partition", partition))
        stack.callback(torch._dynamo.reset)
        stack.enter_context(suppress(NotRun))
        yield
    found = torch._dynamo.utils.counters
    counts.graphs += found["stats"]["unique_graphs"]
    counts.breaks += sum(found["graph_break"].values())


def _cast(node: torch.fx.Node, shapes: set[torch.Size]) -> int:
    """Numbers that a node casts, where it casts nothing but weights, or several of them in one."""
    if node.target is not torch.ops.prims.convert_element_type.default:
        return 0
    sources = node.all_input_nodes
    while any(s.op == "call_function" for s in sources):
        sources = [i for s in sources for i in (s.all_input_nodes if s.op == "call_function" else [s])]
    return node.meta["val"].numel() if sources and all(s.meta["val"].shape in shapes for s in sources) else 0


def count_block(config: RunConfig) -> Counts:
    """One block, with as many sequences and groups as a micro-batch has."""
    counts, m, length = Counts(), config.model, config.data.block_size_tokens
    with FakeTensorMode():
        block = Block(m)
        compile_block(block)
        x_BTD = torch.empty(config.micro_batch_sequences, length, m.d_model, requires_grad=True)
        angles = rotary(m.rotary_base, m.d_head, 0, length, x_BTD.device, x_BTD.dtype)
        groups = config.micro_batch_sequences // config.gain_group_sequences
        with counting(counts, block), _autocast(config):
            block(x_BTD, angles, groups)
    return counts


def count_head(config: RunConfig) -> Counts:
    """The compiled functions of one chunk of the chunked head on a GPU; its other products are in model/cost.py."""
    m, smoothing = config.model, config.training.label_smoothing
    counts, dtype = Counts(), torch.bfloat16 if config.training.precision == "bf16-mixed" else torch.float32
    rows = head.chunk_rows(config.micro_batch_sequences * config.data.block_size_tokens, m.vocab_size, fused=True)
    with FakeTensorMode(), torch.no_grad():
        hidden_RD = torch.empty(rows, m.d_model, dtype=dtype)
        weight_PD = torch.empty(padded_vocabulary(m), m.d_model, dtype=dtype)
        targets_R = torch.empty(rows, dtype=torch.int64)
        of_tokens = [torch.empty(rows) for _ in range(3)]
        for function, arguments in (
            (head._chunk_losses, (hidden_RD, weight_PD, targets_R, m.vocab_size, False)),
            (head._chunk_slopes, (hidden_RD, weight_PD, targets_R, *of_tokens, smoothing, m.vocab_size)),
        ):
            with counting(counts):
                torch.compile(function, dynamic=False)(*arguments)
    return counts


def _autocast(config: RunConfig) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bf16-mixed")


@dataclass(frozen=True)
class GraphCounts(Result):
    """Counts of a config, and the step that they predict on one H100."""

    bench: ClassVar = "graphs"
    config: RunConfig
    torch: str
    parts: Mapping[str, Counts]
    step: StepTime

    def tables(self) -> list[Table]:
        rows = [(name, *(f"{v:,.0f}" for v in asdict(counts).values())) for name, counts in self.parts.items()]
        columns = ["part", *(f">{name.replace('_', ' ')}" for name in asdict(Counts()))]
        step = [
            (p.name, f"{p.flops / 1e12:,.0f}", f"{p.n_bytes / 1e9:,.0f}", f"{1e3 * p.seconds:,.0f}")
            for p in self.step.parts
        ]
        total = (
            f"{self.step.tokens_per_second:,.0f} tokens/s, {1e3 * self.step.seconds:,.0f} ms a step, on assumed rates"
        )
        return [
            table(f"compiled for one micro-batch, torch {self.torch}", columns, rows),
            table(f"predicted: {total}", ["part of a step", ">TFLOP", ">GB", ">ms"], step),
        ]


def count_graphs(config: RunConfig) -> GraphCounts:
    """Both parts, as a GPU's cluster file would compile them."""
    with determinism(config.training.deterministic):  # which has products of its own
        parts = {"block": count_block(config), "head": count_head(config)}
    return GraphCounts(config, str(torch.__version__), parts, predict_step(config))


@dataclass(frozen=True)
class Budget:
    """budget.json: counts of the published model that may not grow without a reason."""

    renewed_by: str
    torch: str
    parts: dict[str, Counts]


def over_budget(parts: Mapping[str, Counts]) -> list[str]:
    """A line for each count that is above the one in budget.json: exactly, or by a twentieth on another torch."""
    budget = read_record(BUDGET, Budget)
    assert budget is not None
    room = 1.001 if budget.torch == torch.__version__ else 1.05
    return [
        f"{part}: {name} {value:,.0f}, the budget is {most:,.0f}"
        for part, counts in parts.items()
        for name, value in asdict(counts).items()
        if value > (most := getattr(budget.parts[part], name)) * room
    ]


def main() -> int:
    """Renew budget.json: `python -m replication.bench.graphs`."""
    found = count_graphs(load_run(list(PUBLISHED)))
    parts = {name: Counts(**{k: round(v, 1) for k, v in asdict(of).items()}) for name, of in found.parts.items()}
    write_record(BUDGET, Budget("python -m replication.bench.graphs", found.torch, parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
