"""Other trainers as contestants: Hugging Face's Trainer around our model, and LitGPT's own model in its own loop.

Their packages are imported where they are used; `missing` says what is not there.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from replication.bench.plain import PlainLoop, training_loader
from replication.bench.synthetic import SyntheticStore
from replication.bench.turns import Pause
from replication.config import RunConfig
from replication.data.module import Batch, CountFrom, TrainingBatches, batch_loader
from replication.data.store import TokenStore
from replication.model.size import padded_vocabulary

NEEDED = {
    "HF Trainer": (("transformers", "accelerate"), "pip install 'replication[peers]'"),
    # its pinned jsonargparse and huggingface-hub are older than ours, and its model and loop need neither
    "LitGPT": (("litgpt",), "pip install --no-deps 'litgpt>=0.5.13,<0.6'"),
}


def missing(name: str) -> str | None:
    """What a contestant lacks, with the remedy; None where it can run."""
    packages, remedy = NEEDED.get(name, ((), ""))
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"{', '.join(absent)} not installed: {remedy}" if absent else None


# ---------------------------------------------------------------- Hugging Face


class _Objective(nn.Module):
    """Our model and objective as transformers' Trainer wants them: keyword inputs to a loss."""

    def __init__(self, loop: PlainLoop) -> None:
        super().__init__()
        self.model, self._objective, self._accumulation = loop.model, loop.objective, loop.config.accumulation

    def forward(self, tokens_BS: Tensor, step_groups: int) -> dict[str, Tensor]:
        # the Trainer divides by the accumulation, which the objective has done
        return {"loss": self._objective(Batch(tokens_BS, step_groups)) * self._accumulation}


class _Inputs(Dataset):
    """Micro-batches as keyword inputs."""

    def __init__(self, config: RunConfig, store: SyntheticStore) -> None:
        self.batches = TrainingBatches(config, cast(TokenStore, store))

    def __getitem__(self, m: int) -> dict[str, Any]:
        return self.batches[m]._asdict()


def train_with_hugging_face(
    config: RunConfig, store: SyntheticStore, device: torch.device, block_steps: int, pause: Pause
) -> None:
    """transformers' Trainer on the plain loop's model, objective, optimizer and schedule; logs, saves nothing."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    loop, inputs = PlainLoop(config, store, device, block_steps), _Inputs(config, store)

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


# ---------------------------------------------------------------- LitGPT


class _Tokens:
    """Stored blocks alone, on the device, with a pause before the first of every block of steps."""

    def __init__(self, loader: DataLoader, device: torch.device, micro_batches: int, pause: Pause) -> None:
        self.loader, self.device, self.micro_batches, self.pause = loader, device, micro_batches, pause

    def __iter__(self) -> Iterator[Tensor]:
        for m, batch in enumerate(self.loader):
            if m % self.micro_batches == 0:
                self.pause()
            yield batch.tokens_BS.to(self.device, non_blocking=True)


def litgpt_sizes(config: RunConfig) -> dict[str, Any]:
    """Arguments of LitGPT's Config for a dense model of our sizes."""
    m = config.model
    return {
        "name": "bench",
        "block_size": config.data.block_size_tokens,
        "vocab_size": m.vocab_size,
        "padded_vocab_size": padded_vocabulary(m),
        "n_layer": m.n_blocks,
        "n_embd": m.d_model,
        "n_head": m.n_heads,
        "n_query_groups": m.n_kv_heads,
        "head_size": m.d_head,
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": m.d_ff,
        "norm_class_name": "RMSNorm",
        "norm_eps": m.norm_eps,
        "norm_qk": m.qk_norm != "none",
        "rope_base": int(m.rotary_base),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
    }


def train_with_litgpt(
    config: RunConfig, store: SyntheticStore, device: torch.device, block_steps: int, pause: Pause
) -> None:
    """LitGPT's model of our sizes in the loop of its pretraining, which logs at our log lines and saves nothing.

    It differs from the others in what it computes: no label smoothing, no groups or divergences, and its loss is taken
    128 tokens at a time.
    """
    from lightning.fabric import Fabric
    from litgpt import GPT, Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import fit

    t, sequences = config.training, config.micro_batch_sequences
    fabric = Fabric(accelerator=device.type, devices=1, precision=t.precision)
    fabric.print = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with fabric.init_module():
        model = GPT(Config(**litgpt_sizes(config)))
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
    tokens = _Tokens(training_loader(config, store), device, block_steps * config.accumulation, pause)
    looked_at = [torch.zeros(sequences, config.data.block_size_tokens + 1, dtype=torch.int64, device=device)]
    with tempfile.TemporaryDirectory() as folder:
        fit(fabric, 1, state, tokens, looked_at, Path(folder), None, training, never)
