"""The parity table: every strategy gives the update of one process, in every arm, however the batch is cut.

{single, DDP x2, ZeRO 1, 2, 3 x2} x {4 arms} x {accumulation 1, 4} x {AdamW, SGD with momentum}, and Muon in arm both
with and without a clip that binds at every step; 20 steps of 16 sequences, beside one process at accumulation 1, as the
largest ||a - b||_F / ||b||_F over the weight tensors. SGD makes it a real test: Adam hides a scale. The ranks are real
processes of real DeepSpeed over gloo. Each test prints its part of the table.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memory_store import MemoryStore
from rank_cells import run_cell, run_cells_on_ranks
from run_files import read_journal
from training_setup import ARMS, MODEL, furthest, small_config

from replication.data.module import TrainingBatches
from replication.model.transformer import Transformer, initialise
from replication.runs.layout import RunDir

pytestmark = pytest.mark.slow

FULL = bool(os.environ.get("REPLICATION_FULL"))  # the whole table
STEPS, SEQUENCES, N_BLOCKS = 20, 16, 2
MODEL_OF_CELLS = dataclasses.replace(MODEL, n_blocks=N_BLOCKS)
RATES = {"sgd": 0.01, "adamw": 0.001, "muon": 0.001}
FP32, FP64 = "32-true", "64-true"
LIMITS = {  # (precision, optimizer, step) -> largest relative difference of a tensor
    (FP64, "sgd", 20): 1e-10, (FP64, "adamw", 20): 1e-10,
    (FP32, "sgd", 20): 1e-5, (FP32, "adamw", 1): 1e-5, (FP32, "adamw", 20): 1e-3,
    (FP64, "muon", 20): 1e-10, (FP32, "muon", 1): 1e-5, (FP32, "muon", 20): 1e-3,
}  # fmt: skip
PRECISIONS = {"single": (FP64, FP32), "ddp": (FP64, FP32), "zero1": (FP32,), "zero2": (FP32,), "zero3": (FP32,)}
if not FULL:
    del PRECISIONS["zero1"]  # its gradients lie where zero2's do
ACCUMULATIONS, OPTIMIZERS = (1, 4), ("sgd", "adamw")


def cell(strategy: str, arm: str, accumulation: int, optimizer: str, precision: str, **more: object) -> dict:
    world = 1 if strategy == "single" else 2
    flags = [f"--training.batch_tokens={SEQUENCES * 16}", f"--training.steps={STEPS}", "--checkpoints.every_steps=20",
             f"--training.optimizer={optimizer}", f"--training.learning_rate={RATES[optimizer]}",
             f"--training.precision={precision}", f"--cluster.strategy={strategy}", f"--cluster.devices={world}",
             f"--cluster.micro_batch_sequences={SEQUENCES // world // accumulation}", "--logging.log_every_steps=20",
             "--validation.every_steps=20"]  # fmt: skip
    name = "-".join((strategy, arm, str(accumulation), optimizer, precision, *more))
    return {"name": name, "arm": arm, "flags": flags, "keep": [1, STEPS], "n_blocks": N_BLOCKS, **more}


def named(suffix: str, c: dict, *flags: str) -> dict:
    """The cell with more flags, under another name."""
    return c | {"name": f"{c['name']}-{suffix}", "flags": [*c["flags"], *flags]}


def rows_of(strategy: str) -> list[tuple[str, int, str, str]]:
    """(arm, accumulation, optimizer, precision) of the table.

    The short form: on the ranks accumulation 4 alone, but for `both` with SGD, and fp64 for `both` alone; Adam hides a
    scale, so `both` alone; of ZeRO 3, whose steps are the slowest, the arms that scale gradients.
    """
    rows = list(itertools.product(ARMS, ACCUMULATIONS, OPTIMIZERS, PRECISIONS[strategy]))
    rows += itertools.product(("both",), ACCUMULATIONS, ("muon",), PRECISIONS[strategy])
    if FULL:
        return rows
    rows = [row for row in rows if row[2] == "sgd" or row[0] == "both"]
    if strategy == "single":
        return rows
    rows = [row for row in rows if row[1] == 4 or (row[0], row[2]) == ("both", "sgd")]
    rows = [row for row in rows if row[3] == FP32 or row[0] == "both"]
    return [row for row in rows if strategy != "zero3" or row[0] in ("layer_gain", "both")]


def cells_of(strategy: str) -> list[dict]:
    return [cell(strategy, *row) for row in rows_of(strategy)]


BINDING = ("--training.clip_norm=0.05", "--layer_gain.t=0.9")
LESS_MEMORY = ("--cluster.activation_checkpointing=true", "--cluster.head=chunked")  # on the ranks alone
MUON_CLIPPED = {s: named("clipped", cell(s, "both", 1, "muon", FP32), *BINDING, *(LESS_MEMORY if s != "single" else ()))
                | ({"small_parts": True} if s != "single" else {}) for s in PRECISIONS}  # fmt: skip


ZERO = ("zero1", "zero2", "zero3") if FULL else ("zero2", "zero3")
CONTROLS = [cell(s, "layer_gain", 1, "sgd", FP32, scale_as_published="yes") for s in ZERO]
CLIP = "--training.clip_norm=0.5"
CLIPPED = named("clipped", cell("single", "both", 1, "sgd", FP32), CLIP)
OFFLOADED = ("zero2", "zero3") if FULL else ("zero3",)
OFFLOAD = [named("offload", cell(s, "both", a, "sgd", FP32), CLIP, "--cluster.offload_optimizer=true")
           for s in OFFLOADED for a in (ACCUMULATIONS if FULL else (4,))]  # fmt: skip
IN_BACKWARD = "--layer_gain.apply=micro_batch"
HOOKS = named("hooks", cell("single", "both", 2, "sgd", FP32), IN_BACKWARD)
HOOKS_ON_RANKS = [named("hooks", cell(s, "both", 1, "sgd", FP32), IN_BACKWARD) for s in ("zero2", "zero3")]
UPDATE = [named("update", cell(s, "layer_gain", a, "adamw", FP64), "--layer_gain.apply=update")
          for s, a in (("single", 1), ("ddp", 4))]  # fmt: skip
PARTS = [named("parts", c, "--layer_gain.parts=attention_and_feed_forward") for c in UPDATE]
ONE_PLAIN_STEP = ("--training.precision=bf16-mixed", "--training.momentum=0", "--training.weight_decay=0",
                  "--training.clip_norm=0", "--training.warmup_steps=0", "--training.steps=1",
                  "--logging.log_every_steps=1", "--training.learning_rate=1.0")  # fmt: skip
BF16 = [named("bf16", cell(s, arm, 4, "sgd", FP32), *ONE_PLAIN_STEP)
        for s in ("zero2", "zero3") for arm in ("baseline", "layer_gain")]  # fmt: skip


def weights_after(root: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return torch.load(root / name / f"weights-{step:03d}.pt")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Every cell of one process; those at accumulation 1 are what all others are compared with."""
    root = tmp_path_factory.mktemp("parity")
    for c in [*cells_of("single"), CLIPPED, HOOKS, UPDATE[0], PARTS[0], MUON_CLIPPED["single"]]:
        run_cell(c, root)
    return root


@pytest.fixture(scope="module")
def trained(one_process) -> Path:
    """Beside them, every cell of two ranks, in one start of the ranks."""
    cells = [c for strategy in PRECISIONS if strategy != "single" for c in cells_of(strategy)]
    muon = [c for strategy, c in MUON_CLIPPED.items() if strategy != "single"]
    run_cells_on_ranks([*cells, *muon, *CONTROLS, *OFFLOAD, *HOOKS_ON_RANKS, UPDATE[1], PARTS[1], *BF16], one_process)
    return one_process


def flipped_routes(arm: str, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How many (token, block) pairs of the next global batch go to another set of experts, and of how many."""
    config = small_config(arm, f"--training.batch_tokens={SEQUENCES * 16}", model=MODEL_OF_CELLS)
    tokens = TrainingBatches(config, MemoryStore(blocks=(6, 5)))[STEPS].tokens_BS.long().clamp(min=0)[:, :-1]
    chosen = []
    for weights in (a, b):
        model = Transformer(config.model)
        model.load_state_dict(weights)
        seen: list[torch.Tensor] = []
        for block in model.blocks:
            block.feed_forward.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out[1].experts_NK))
        with torch.no_grad():
            model(tokens)
        chosen.append(torch.stack(seen).sort(-1).values)
    return int((chosen[0] != chosen[1]).any(-1).sum()), chosen[0][..., 0].numel()


def test_the_count_of_flipped_routes_counts(one_process):
    weights = weights_after(one_process, cell("single", "both", 1, "adamw", FP32)["name"], STEPS)
    name = "blocks.1.feed_forward.router.weight"
    flipped, total = flipped_routes("both", weights | {name: -weights[name]}, weights)
    assert 0 < flipped < total


def compare(root: Path, strategy: str, publish: Callable[[str], None]) -> list[str]:
    """Publish the strategy's part of the table; return a line for each cell beyond its limit."""
    beyond = []
    publish(f"\n{'strategy':8} {'arm':11} {'accumulation':>12} {'optimizer':>9} {'precision':>9} {'step':>4}"
          f" {'difference':>10} {'limit':>7} {'flipped routes':>15}")  # fmt: skip
    for arm, accumulation, optimizer, precision in rows_of(strategy):
        if strategy == "single" and accumulation == 1:
            continue  # the reference itself
        for step in (1, STEPS):
            limit = LIMITS.get((precision, optimizer, step))
            if limit is None:
                continue
            reference = cell("single", arm, 1, optimizer, precision)["name"]
            b = weights_after(root, reference, step)
            a = weights_after(root, cell(strategy, arm, accumulation, optimizer, precision)["name"], step)
            difference = furthest(a, b)
            flipped = "{} of {}".format(*flipped_routes(arm, a, b)) if (precision, optimizer) == (FP32, "adamw") else ""
            line = (f"{strategy:8} {arm:11} {accumulation:>12} {optimizer:>9} {precision:>9} {step:>4}"
                    f" {difference:>10.1e} {limit:>7.0e} {flipped:>15}")  # fmt: skip
            publish(line)
            if not difference < limit:
                beyond.append(line)
    return beyond


@pytest.mark.parametrize("strategy", list(PRECISIONS))
def test_every_strategy_gives_the_update_of_one_process(trained, strategy, publish):
    assert compare(trained, strategy, publish) == []


@pytest.mark.parametrize("strategy", [s for s in PRECISIONS if s != "single"])
def test_muon_is_clipped_by_the_norm_of_the_gradient(trained, strategy, publish):
    """Not of the update: the scaled gradient is clipped, then goes into the momentum, at every stage.

    On the ranks with checkpointed blocks, the chunked head, and matrices cut at every border; none changes an update.
    """
    reference, found = MUON_CLIPPED["single"]["name"], MUON_CLIPPED[strategy]["name"]
    norms = [norm for line in read_journal(RunDir(trained / found).metrics)
             for norm in line.get("per_step", {}).get("train/grad_norm", [])]  # fmt: skip
    assert len(norms) == STEPS and min(norms) > 0.05, "every step is clipped"
    difference = furthest(weights_after(trained, found, STEPS), weights_after(trained, reference, STEPS))
    publish(f"{found}: {difference:.1e}")
    assert difference < LIMITS[FP32, "muon", 20]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c["name"])
def test_a_loop_over_param_grad_does_nothing_under_zero_and_the_table_notices(trained, control, publish):
    """The negative control: with the scale left out, silently, the fp32 SGD row fails."""
    reference = weights_after(trained, cell("single", "layer_gain", 1, "sgd", FP32)["name"], STEPS)
    without = weights_after(trained, cell("single", "baseline", 1, "sgd", FP32)["name"], STEPS)
    got = weights_after(trained, control["name"], STEPS)
    apart = furthest(got, reference), furthest(got, without)
    publish(f"{control['name']}: {apart[0]:.1e} from layer_gain, {apart[1]:.1e} from baseline")
    assert apart[0] > 10 * LIMITS[FP32, "sgd", 20]
    assert apart[1] < LIMITS[FP32, "sgd", 20], "what trained was the baseline, under another name"


@pytest.mark.parametrize("offload", OFFLOAD, ids=lambda c: c["name"])
def test_optimizer_offload_gives_the_same_update(trained, offload, publish):
    """Its gradients, and the norms that clipping uses, lie elsewhere."""
    difference = furthest(
        weights_after(trained, offload["name"], STEPS), weights_after(trained, CLIPPED["name"], STEPS)
    )
    publish(f"{offload['name']}: {difference:.1e}")
    norms = [norm for line in read_journal(RunDir(trained / CLIPPED["name"]).metrics)
             for norm in line.get("per_step", {}).get("train/grad_norm", [])]  # fmt: skip
    assert len(norms) == STEPS and min(norms) > 0.5, "every step is clipped"
    assert difference < LIMITS[FP32, "sgd", 20]


@pytest.mark.parametrize("hooks", HOOKS_ON_RANKS, ids=lambda c: c["name"])
def test_scaling_in_backward_works_under_zero(trained, hooks):
    """Two ranks of eight sequences are what two micro-batches of eight are to one process."""
    assert furthest(
        weights_after(trained, hooks["name"], STEPS), weights_after(trained, HOOKS["name"], STEPS)
    ) < LIMITS[FP32, "sgd", 20]  # fmt: skip


@pytest.mark.parametrize("pair", [UPDATE, PARTS], ids=["blocks", "parts"])
def test_a_scaled_update_is_the_same_on_two_ranks(trained, pair):
    ends = [weights_after(trained, c["name"], STEPS) for c in pair]
    assert furthest(*ends) < LIMITS[FP64, "adamw", 20]


@pytest.mark.parametrize("pair", [BF16[:2], BF16[2:]], ids=["zero2", "zero3"])
def test_in_bf16_each_block_moves_by_its_scale(trained, pair):
    """One step of plain SGD from the same fp32 weights: a block's update is the baseline's times its scale."""
    model = Transformer(MODEL_OF_CELLS)
    initialise(model, 1)
    baseline, scaled = (weights_after(trained, c["name"], 1) for c in pair)
    journal = next(line for line in read_journal(RunDir(trained / pair[1]["name"]).metrics) if "tokens" in line)
    scales = {f"blocks.{i}.": journal[f"scale/block_{i:02d}"] for i in range(N_BLOCKS)}
    assert max(abs(scale - 1) for scale in scales.values()) > 0.01
    for name, parameter in model.named_parameters():
        start = parameter.detach()
        scale = next((s for prefix, s in scales.items() if name.startswith(prefix)), 1.0)
        moved, expected = scaled[name] - start, (baseline[name] - start) * scale
        assert float((moved - expected).norm()) <= 1e-5 * float(start.norm()), name
