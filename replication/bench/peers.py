"""`replicate bench peers`: one dense model and batch in our training, in a plain torch loop, and in other trainers.

All of them take turns in one process, with the plain loop between any two. Beside them the two interventions: ours, and
as a first version writes them. The other trainers are Hugging Face's around our model, and LitGPT's own model in its
own loop; their packages are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from replication.bench.blocks import RATIOS, Interleaved, Result, facts, interleave
from replication.bench.loops import (
    END_OF_TEXT,
    Machine,
    Pause,
    PlainLoop,
    Turns,
    describe,
    prepare,
    synthetic_store,
    training_loader,
)
from replication.bench.product import Product, configure
from replication.config import RunConfig
from replication.console import progress, table
from replication.data.module import Batch, CountFrom, TrainingBatches, batch_loader
from replication.errors import UserError
from replication.model.loss import inputs_and_targets
from replication.model.size import padded_vocabulary
from replication.model.transformer import rotary
from replication.training.environment import determinism

PLAIN, PRODUCT, BOTH, NAIVE = "plain loop", "product", "both, product", "both, naive"
HUGGING_FACE, LITGPT = "HF Trainer", "LitGPT"
ARM_OF = {PRODUCT: "baseline", BOTH: "both"}
PACKAGES = ("torch", "lightning", "transformers", "accelerate", "litgpt")
NEEDED = {
    HUGGING_FACE: (("transformers", "accelerate"), "pip install 'replication[peers]'"),
    # its pinned jsonargparse and huggingface-hub are older than ours, and its model and loop need neither
    LITGPT: (("litgpt",), "pip install --no-deps 'litgpt>=0.5.13,<0.6'"),
}
REMARKS = {
    PLAIN: "the same step in torch alone",
    PRODUCT: "Lightning, callbacks, journal, TensorBoard",
    HUGGING_FACE: "the same model; logs kept in memory",
    LITGPT: "its own model and loop; no smoothing",
    BOTH: "both interventions, as trained here",
    NAIVE: "host reads, quantiles, loop over names",
}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class PeersBench(Result):
    """Findings of one run of `bench peers`."""

    bench: ClassVar = "peers"
    machine: Machine
    block_steps: int
    interleaved: Interleaved
    skipped: dict[str, str]  # what the contestants lack that did not run
    config: RunConfig

    @property
    def names(self) -> list[str]:
        return [name for name in REMARKS if name not in self.skipped]

    def tables(self) -> list[Table]:
        """The contestants, then what they are."""
        c, speeds = self.interleaved, self.interleaved.tokens_per_second
        speed = {name: 1 / ratio.median for name, ratio in c.time_over_reference.items()} | {PLAIN: 1.0}
        rows = [(n, f"{speeds[n]:,.0f}", f"{speed[n]:.4f}", *c.ratio_cells(n)) for n in self.names]
        about = {
            **(REMARKS | self.skipped),
            "versions": ", ".join(f"{k} {v}" for k, v in self.machine.versions.items() if v),
            "machine": f"{self.machine.device}, {self.machine.threads} CPU thread(s)",
            "compiled": "yes" if self.config.cluster.compile else "no",
            "pairs": f"{len(c.times(PRODUCT))} blocks of {self.block_steps} steps, a log line every "
            f"{self.config.logging.log_every_steps}",
        }
        title = "one dense model and batch, interleaved in one run"
        return [table(title, ["", ">tokens/s", ">speed", *RATIOS], rows), facts("what they are", about)]


def bench_peers(config: RunConfig, block_steps: int, rounds: int, console: Console) -> PeersBench:
    """Time the contestants that are installed: so many blocks of each count.

    Raises UserError for a model or an optimizer that the others have not.
    """
    if config.model.feed_forward != "dense":
        raise UserError("model.feed_forward: bench peers compares a dense model; remove model.feed_forward=moe")
    if config.training.optimizer != "adamw":
        raise UserError(
            f"training.optimizer: bench peers trains with AdamW everywhere, not {config.training.optimizer}; remove it"
        )
    config = configure(config, block_steps, "baseline")
    prepare(config)
    on_gpu = config.cluster.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    trainers: dict[str, Callable[[RunConfig, torch.device, int, Pause], None]] = {
        PLAIN: partial(_train_by_hand, PlainLoop), NAIVE: partial(_train_by_hand, NaiveLoop),
        HUGGING_FACE: train_with_hugging_face, LITGPT: train_with_litgpt,
    }  # fmt: skip
    skipped = {name: lack for name in REMARKS if (lack := missing(name))}
    with determinism(config.training.deterministic), progress(console) as bars, ExitStack() as stack:
        task = bars.add_task("", total=None)
        contestants: dict[str, Turns] = {}
        for name in (n for n in REMARKS if n not in skipped):
            bars.update(task, description=f"setting up: {name}")
            if name in ARM_OF:
                contestant: Turns = Product(configure(config, block_steps, ARM_OF[name]), block_steps)
            else:
                contestant = Turns(partial(trainers[name], config, device, block_steps))
            contestants[name] = stack.enter_context(closing(contestant))
        bars.remove_task(task)
        others, tokens = list(contestants)[1:], block_steps * config.training.batch_tokens
        interleaved = interleave(PLAIN, others, rounds, tokens, lambda name: contestants[name].block(), bars)
    versions = {p: metadata.version(p) if importlib.util.find_spec(p) else None for p in PACKAGES}
    return PeersBench(replace(describe(device), versions=versions), block_steps, interleaved, skipped, config)


def missing(name: str) -> str | None:
    """The packages that a contestant lacks, with the remedy; None where it can run."""
    packages, remedy = NEEDED.get(name, ((), ""))
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"{', '.join(absent)} not installed: {remedy}" if absent else None


class NaiveLoop(PlainLoop):
    """Both interventions as a first version writes them: the formulas without the care, on the whole micro-batch.

    Every block's divergence and the gain's statistics are read on the host as they arise, the quantiles of the gain are
    computed at every step, and the scales are handed out by a loop over all parameters' names.
    """

    def __init__(self, config: RunConfig, device: torch.device, block_steps: int) -> None:
        super().__init__(replace(config, cluster=replace(config.cluster, compile=False)), device, block_steps)
        if config.cluster.compile:
            logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it says where the graph breaks: that is meant
        # compiled as a whole, as its author would: the reads inside break the graph at every block
        self._losses = torch.compile(self._forward) if config.cluster.compile else self._forward
        self.divergences: list[float] = []
        self.read: dict[str, float] = {}

    def objective(self, batch: Batch) -> Tensor:
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS.to(self.device), END_OF_TEXT)
        loss_N = self._losses(inputs_BT, targets_BT)
        g = self.config.token_gain
        with torch.no_grad():
            gain_N = (1 + g.s * (loss_N - loss_N.mean()) / (loss_N.var() + g.eps)).clamp(g.c_min, g.c_max)
            self.read |= {"loss": loss_N.mean().item(), "gain": gain_N.mean().item(), "std": gain_N.std().item()}
            for q in QUANTILES:
                self.read[f"gain_{q}"] = torch.quantile(gain_N, q).item()
        return (gain_N * loss_N).mean() / self.config.accumulation

    def _forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        m = self.config.model
        x_BTD = self.model.embedding(inputs_BT)
        angles = rotary(m.rotary_base, m.d_head, 0, inputs_BT.shape[1], x_BTD.device, x_BTD.dtype)
        self.divergences = []
        for block in self.model.blocks:
            y_BTD, *_ = block(x_BTD, angles)
            with torch.no_grad():
                self.divergences.append(((y_BTD - x_BTD).norm() / (x_BTD.norm() + 1e-8)).item())
            x_BTD = y_BTD
        hidden_BTD = self.model.norm(x_BTD)
        return self.model.losses(hidden_BTD, targets_BT, self.config.training.label_smoothing).losses.smoothed_N

    def clip(self) -> Tensor:
        g, mean = self.config.layer_gain, sum(self.divergences) / len(self.divergences)
        for i, divergence in enumerate(self.divergences):
            scale = min(max(1 + g.t * (divergence / mean - 1), g.m_min), g.m_max)
            for name, parameter in self.model.named_parameters():
                if name.startswith(f"blocks.{i}.") and parameter.grad is not None:
                    parameter.grad.mul_(scale)
        norm = super().clip()
        self.read["norm"] = norm.item()
        return norm


def _train_by_hand(
    kind: type[PlainLoop], config: RunConfig, device: torch.device, block_steps: int, pause: Pause
) -> None:
    loop = kind(config, device, block_steps)
    while True:
        pause()
        loop.block()


class _Objective(nn.Module):
    """Our model and objective as transformers' Trainer wants them: keyword inputs to a loss."""

    def __init__(self, loop: PlainLoop) -> None:
        super().__init__()
        self.model, self._objective, self._accumulation = loop.model, loop.objective, loop.config.accumulation

    def forward(self, tokens_BS: Tensor, step_groups: int) -> dict[str, Tensor]:
        # the Trainer divides by the accumulation, which the objective has done
        return {"loss": self._objective(Batch(tokens_BS, step_groups)) * self._accumulation}


class _Inputs(TrainingBatches):
    """Micro-batches as keyword inputs."""

    def __getitem__(self, m: int) -> dict[str, Tensor | int]:  # type: ignore[override]
        return super().__getitem__(m)._asdict()


def train_with_hugging_face(config: RunConfig, device: torch.device, block_steps: int, pause: Pause) -> None:
    """transformers' Trainer on the plain loop's model, objective, optimizer and schedule; logs, saves nothing."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    loop, inputs = PlainLoop(config, device, block_steps), _Inputs(config, synthetic_store(config))

    class Blocks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % block_steps == 0:
                pause()

    class OnOurBatches(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return batch_loader(config, inputs, CountFrom(0))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=config.training.steps,
            per_device_train_batch_size=config.micro_batch_sequences,
            gradient_accumulation_steps=config.accumulation,
            max_grad_norm=loop.limit,
            logging_steps=config.logging.log_every_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=config.training.precision == "bf16-mixed",
            remove_unused_columns=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # it would spread the batch over every GPU that it sees
        trainer = OnOurBatches(
            model=_Objective(loop), args=arguments, train_dataset=inputs,
            optimizers=(loop.optimizer, loop.schedule), callbacks=[Blocks()],
        )  # fmt: skip
        cast(Any, trainer).log = lambda *args, **kwargs: None  # it prints
        trainer.train()


def train_with_litgpt(config: RunConfig, device: torch.device, block_steps: int, pause: Pause) -> None:
    """LitGPT's model of our sizes in the loop of its pretraining, which logs at our log lines and saves nothing.

    It differs from the others in what it computes: no label smoothing, no groups or divergences, and its loss is taken
    128 tokens at a time.
    """
    from lightning.fabric import Fabric
    from litgpt import GPT, Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import fit

    def tokens() -> Iterator[Tensor]:
        """Stored blocks alone, on the device, with a pause before the first of every block of steps."""
        for i, batch in enumerate(training_loader(config)):
            if i % (block_steps * config.accumulation) == 0:
                pause()
            yield batch.tokens_BS.to(device, non_blocking=True)

    m, t, sequences = config.model, config.training, config.micro_batch_sequences
    sizes = Config(
        name="bench",
        block_size=config.data.block_size_tokens,
        vocab_size=m.vocab_size,
        padded_vocab_size=padded_vocabulary(m),
        n_layer=m.n_blocks,
        n_embd=m.d_model,
        n_head=m.n_heads,
        n_query_groups=m.n_kv_heads,
        head_size=m.d_head,
        mlp_class_name="LLaMAMLP",
        intermediate_size=m.d_ff,
        norm_class_name="RMSNorm",
        norm_eps=m.norm_eps,
        norm_qk=m.qk_norm != "none",
        rope_base=int(m.rotary_base),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    fabric = Fabric(accelerator=device.type, devices=1, precision=t.precision)
    fabric.print = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with fabric.init_module():
        model = GPT(sizes)
    model.max_seq_length = config.data.block_size_tokens
    optimizer = torch.optim.AdamW(
        model.parameters(), t.learning_rate, (t.beta1, t.beta2), t.adam_eps, t.weight_decay, fused=True
    )
    state = {
        "model": fabric.setup(cast(nn.Module, torch.compile(model)) if config.cluster.compile else model),
        "optimizer": fabric.setup_optimizers(optimizer),
        "iter_num": 0,
        "step_count": 0,
    }
    training = TrainArgs(
        save_interval=None,
        log_interval=config.logging.log_every_steps,
        global_batch_size=config.batch_sequences,
        micro_batch_size=sequences,
        lr_warmup_steps=t.warmup_steps,
        max_tokens=t.steps * t.batch_tokens,
        max_norm=t.clip_norm or None,
    )
    never = EvalArgs(interval=t.steps, max_iters=1, initial_validation=False, final_validation=False)
    looked_at = [torch.zeros(sequences, config.data.block_size_tokens + 1, dtype=torch.int64, device=device)]
    with tempfile.TemporaryDirectory() as folder:
        fit(fabric, 1, state, tokens(), looked_at, Path(folder), None, training, never)
