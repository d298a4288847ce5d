"""What is timed beside the product: a training loop in nothing but torch, its random corpus, and trainings in turns.

Lightning, transformers and LitGPT do not hand control back after some steps. So each training has a thread, calls
`pause` before every block and stays there until its next turn: exactly one thread runs at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from replication.bench.blocks import Elapsed
from replication.config import RunConfig
from replication.data.module import Batch, CountFrom, TrainingBatches, batch_loader
from replication.data.store import Int64, TokenStore
from replication.model.loss import inputs_and_targets
from replication.model.transformer import Transformer, initialise
from replication.objectives.token_gain import group_objective
from replication.runs.manifest import package_versions
from replication.training.environment import cpu_name, prepare_torch, set_malloc
from replication.training.optimizers import build_optimizer, build_schedule

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""
END_OF_TEXT = 0
Pause = Callable[[], None]
"""Called by a training before the first step of every block."""


@dataclass(frozen=True)
class Machine:
    """Where a result was measured, and with what."""

    device: str
    threads: int
    versions: Mapping[str, str | None]


def describe(device: torch.device) -> Machine:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return Machine(name, torch.get_num_threads(), package_versions())


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prepare(config: RunConfig) -> None:
    """The process-wide settings of torch, and one heap: a thread takes memory where the main one does, as a run's does.

    glibc otherwise gives threads heaps of their own, which hand large tensors back to the system and take them again at
    every step, each at its own rate: the same step then costs one thread a tenth more than another. To be called before
    the first thread.
    """
    prepare_torch(config)
    set_malloc(M_ARENA_MAX, 1)


class Stopped(BaseException):
    """Ends a paused training from inside; nothing is wrong."""


class Turns:
    """A whole training, `train`, in a thread of its own, which runs only inside `block`."""

    def __init__(self, train: Callable[[Pause], None]) -> None:
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._instead: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, args=(train,), daemon=True)
        self._thread.start()
        self.block()  # to its first pause: what it takes to set up is in no block

    def block(self, instead: Callable[[], None] | None = None) -> Elapsed:
        """Run to the next pause, and wait for the device; raises what the training raised.

        `instead` is done in the training's thread while the training itself stays where it is. Memory is handed out by
        thread, so that only work in one thread, or in threads of one kind, compares fairly.
        """
        assert self._thread.is_alive(), "the training has ended before its last block"
        self._instead = instead
        started, cpu_started = time.perf_counter(), time.process_time()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return Elapsed(time.perf_counter() - started, time.process_time() - cpu_started)

    def close(self) -> None:
        """End the training where it is paused, or at its next pause, and wait for its thread."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def _main(self, train: Callable[[Pause], None]) -> None:
        self._go.acquire()
        try:
            train(self._pause)
        except Stopped:
            pass
        except BaseException as error:  # it is raised again where the block was asked for
            self._error = error
        finally:
            self._paused.release()

    def _pause(self) -> None:
        while not self._closed:
            synchronize()
            self._paused.release()
            self._go.acquire()
            if self._closed:
                break
            if self._instead is None:
                return
            self._instead()
        raise Stopped


class _SyntheticStore:
    """Uniformly random tokens, a pure function of (source, block), with one source and every position valid."""

    end_of_text_id = END_OF_TEXT

    def __init__(self, config: RunConfig) -> None:
        self.vocab_size, self.block_size_tokens = config.model.vocab_size, config.data.block_size_tokens

    def sizes(self, split: str) -> list[int]:
        return [1_000_000]

    def valid_targets(self, split: str, source_ids: Int64, indices: Int64) -> Int64:
        return np.full(len(indices), self.block_size_tokens)

    def read(self, split: str, source_ids: Int64, indices: Int64) -> npt.NDArray[np.int32]:
        positions = np.arange(self.block_size_tokens + 1, dtype=np.uint64)
        x = (indices.astype(np.uint64)[:, None] << np.uint64(20)) + positions
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((x >> np.uint64(33)) % np.uint64(self.vocab_size)).astype(np.int32)


def synthetic_store(config: RunConfig) -> TokenStore:
    """A corpus of random tokens, never on disk, of the config's vocabulary and block size."""
    return cast(TokenStore, _SyntheticStore(config))


def training_loader(config: RunConfig) -> DataLoader:
    """Micro-batches of random tokens from the first on, loaded as the product loads its own."""
    return batch_loader(config, TrainingBatches(config, synthetic_store(config)), CountFrom(0))


class PlainLoop:
    """The baseline's step: the product's model, groups, clipping, optimizer, schedule, precision and batches.

    `shared` is another training's model and its optimizer, so that memory holds one of each; None: new ones.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        block_steps: int,
        shared: tuple[Transformer, Optimizer] | None = None,
    ) -> None:
        self.config, self.device, self.block_steps = config, device, block_steps
        if shared is None:
            model = Transformer(config.model)
            initialise(model, config.effective_weights_seed)
            model.configure(config.cluster)
            model.to(device, torch.float64 if config.training.precision == "64-true" else torch.float32)
            shared = model, build_optimizer(config.training, model)
        self.model, self.optimizer = shared
        self.schedule = build_schedule(config.training, self.optimizer)
        self.loader = iter(training_loader(config))
        self.groups = config.micro_batch_sequences // config.gain_group_sequences
        self.limit = config.training.clip_norm or float("inf")

    def block(self) -> None:
        """Run the steps of a block."""
        for _ in range(self.block_steps):
            for _ in range(self.config.accumulation):
                batch = next(self.loader)
                with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in self.config.training.precision):
                    self.objective(batch).backward()
            self.clip()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def clip(self) -> Tensor:
        """Clip the gradients; their norm before."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)

    def objective(self, batch: Batch) -> Tensor:
        """This micro-batch's share of the step's objective."""
        inputs_BT, targets_BT = inputs_and_targets(batch.tokens_BS.to(self.device, non_blocking=True), END_OF_TEXT)
        out = self.model(inputs_BT, self.groups)
        losses = self.model.losses(out.hidden_BTD, targets_BT, self.config.training.label_smoothing).losses
        loss_GN, valid_GN = losses.smoothed_N.view(self.groups, -1), targets_BT.view(self.groups, -1) >= 0
        objective_G = group_objective(loss_GN, valid_GN) + self.config.model.aux_coef * out.aux_G
        return objective_G.sum() / batch.step_groups
