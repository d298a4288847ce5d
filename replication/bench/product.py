"""The product's own training as a contestant, and where a step of it takes its time.

It is Lightning, every callback, the journal and TensorBoard on schedule. A breakdown comes of marks in the order of
execution, each of which says what runs from here on. A part of the model is wrapped between two identities whose
forward and backward leave the marks, so that its share of backward is seen too. On a GPU a mark is a CUDA event in the
stream, elsewhere a clock reading. Marks cost something, so these blocks are not those that are compared.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from replication.bench.loops import END_OF_TEXT, Turns, synchronize, synthetic_store
from replication.config import RunConfig, SourceConfig
from replication.console import table
from replication.data.module import Batch, TokenDataModule
from replication.errors import UserError
from replication.model.transformer import Transformer
from replication.objectives.callbacks import LayerGain, TokenGain
from replication.runs.layout import RunDir
from replication.training.module import LanguageModel
from replication.training.train import build_trainer

ARMS: dict[str, tuple[type[Callback], ...]] = {
    "baseline": (),
    "token_gain": (TokenGain,),
    "layer_gain": (LayerGain,),
    "both": (TokenGain, LayerGain),
}
"""The interventions of each arm; the constants are the config's."""
REST, DATA, OPTIMIZER = "rest", "data wait", "clipping and optimizer"
"""Parts of a step, besides those of the model."""


def configure(config: RunConfig, block_steps: int, arm: str = "both") -> RunConfig:
    """`endless`, for one process whose weights a plain loop can train too; raises UserError for another."""
    if config.world_size > 1:
        raise UserError(
            f"cluster.devices: this times one process, not {config.world_size}; choose 1 (`replicate bench scaling` "
            "times several)"
        )
    if config.cluster.strategy.startswith("zero"):
        raise UserError(
            f"cluster.strategy: {config.cluster.strategy} keeps weights and optimizer where a plain loop cannot train "
            "them; choose single (`replicate bench scaling` times it at one process, too)"
        )
    return endless(config, block_steps, arm)


def endless(config: RunConfig, block_steps: int, arm: str) -> RunConfig:
    """The config as a training without end of an arm, on random tokens, without validation or checkpoint.

    Raises UserError for blocks of so many steps that only some of them have a log line.
    """
    every, never = config.logging.log_every_steps, 10**9
    if block_steps % every:
        raise UserError(
            f"--block-steps: {block_steps} is no multiple of logging.log_every_steps ({every}), so blocks would differ "
            f"in their log lines; choose a multiple, or add --logging.log_every_steps={block_steps}"
        )
    if config.plugins:
        raise UserError("plugins: bench times the built-in gains and scales; leave the plugins out")
    return dataclasses.replace(
        config,
        arm=arm,
        token_gain=dataclasses.replace(config.token_gain, enabled=TokenGain in ARMS[arm]),
        layer_gain=dataclasses.replace(config.layer_gain, enabled=LayerGain in ARMS[arm]),
        data=dataclasses.replace(config.data, sources=(SourceConfig("synthetic", path="in memory"),)),
        training=dataclasses.replace(config.training, steps=never, decay_steps=0, initial_weights=None),
        validation=dataclasses.replace(config.validation, every_steps=never),
        checkpoints=dataclasses.replace(config.checkpoints, every_steps=never, keep_every_steps=None),
        generation=dataclasses.replace(config.generation, prompts=None),
    ).check()


class Clock:
    """Marks of one phase; off until `start`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.running = device.type == "cuda", False
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        """From here on `part` runs."""
        if not self.running:
            return
        now: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self._marks.append((part, now))

    def start(self) -> None:
        self._marks, self.running = [], True
        self(REST)

    def stop(self) -> dict[str, float]:
        """Seconds of each part since `start`; they add up to the whole time."""
        self(REST)
        self.running = False
        synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in pairwise(self._marks):
            seconds[part] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        return dict(seconds)


class _MarkedData(TokenDataModule):
    """The product's loaders, with marks around the wait for each training batch."""

    def __init__(self, config: RunConfig, clock: Clock) -> None:
        super().__init__(config, synthetic_store(config))
        self.clock = clock

    def train_dataloader(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = iter(super().train_dataloader())
        while True:
            self.clock(DATA)
            batch = next(batches)  # endless
            self.clock(REST)
            yield batch


def silent_trainer(config: RunConfig, folder: str, block_steps: int, before_block: Callable[[], None]) -> Trainer:
    """The product's trainer, journal, TensorBoard and all, in a folder that nobody keeps.

    Its first callback calls `before_block` before the first micro-batch of every block.
    """

    def on_train_batch_start(trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % (block_steps * config.accumulation) == 0:
            before_block()

    start = {"config hash": "", "data hash": "synthetic"}
    trainer = build_trainer(config, RunDir(Path(folder)), start, None, Console(file=io.StringIO()))
    _callbacks(trainer).insert(0, LambdaCallback(on_train_batch_start=on_train_batch_start))
    return trainer


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


class Product(Turns):
    """A training of the product by a config of `configure`; between blocks its arm can be switched."""

    def __init__(self, config: RunConfig, block_steps: int) -> None:
        self.config, self.block_steps = config, block_steps
        self.module = LanguageModel(config, END_OF_TEXT)
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = silent_trainer(config, self._folder.name, block_steps, self._pause)
        self.device = self.trainer.strategy.root_device
        self.clock = Clock(self.device)
        self._data = _MarkedData(config, self.clock)
        self._all = _callbacks(self.trainer)[1:]
        self._on = set(ARMS[config.arm])
        super().__init__(lambda _: self.trainer.fit(self.module, datamodule=self._data))

    def close(self) -> None:
        """End the training and let go of model, optimizer and folder."""
        super().close()
        self._folder.cleanup()
        del self.module, self.trainer, self._data, self._all

    def switch(self, arm: str) -> None:
        """From the next step on train as this arm: callbacks that it lacks leave the training, the others join it."""
        joining, leaving = set(ARMS[arm]) - self._on, self._on - set(ARMS[arm])
        for callback in self._all:
            if type(callback) in joining:
                callback.setup(self.trainer, self.module, "fit")
                callback.on_fit_start(self.trainer, self.module)
            elif type(callback) in leaving:
                callback.on_fit_end(self.trainer, self.module)
                callback.teardown(self.trainer, self.module, "fit")
        self._on = set(ARMS[arm])
        left_out = {TokenGain, LayerGain} - self._on
        _callbacks(self.trainer)[1:] = [callback for callback in self._all if type(callback) not in left_out]


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of each part of a step of the product, all interventions on, forward and backward together."""

    steps: int
    milliseconds: dict[str, float]

    def table(self) -> Table:
        whole = sum(self.milliseconds.values())
        rows = [(part, f"{ms:,.2f}", f"{ms / whole:.1%}") for part, ms in self.milliseconds.items()]
        columns = ["part, forward and backward", ">ms a step", ">share"]
        return table("where a step's time goes (arm both, with marks)", columns, rows)


def take_breakdown(product: Product, blocks: int) -> Breakdown:
    """Some blocks with marks, all interventions on; one more warms the marks up."""
    product.switch("both")
    clock, steps = product.clock, blocks * product.block_steps
    with ExitStack() as undo:
        for module, name, part in _parts(product.module.model):
            original, own = getattr(module, name), module.__dict__
            undo.callback(partial(own.__setitem__, name, original) if name in own else partial(own.pop, name))
            own[name] = _timed(original, part, clock)
        hook = product.trainer.optimizers[0].register_step_post_hook(lambda *_: clock(REST))
        undo.callback(hook.remove)
        # the layer scale, the clipping and the update; the optimizer's own hook ends it
        mark = LambdaCallback(on_before_optimizer_step=lambda *_: clock(OPTIMIZER))
        _callbacks(product.trainer).insert(1, mark)
        product.block()
        clock.start()
        for _ in range(blocks):
            product.block()
        seconds = clock.stop()
    longest = sorted(seconds, key=lambda part: (part == REST, -seconds[part]))
    return Breakdown(steps, {part: 1000 * seconds[part] / steps for part in longest})


def _parts(model: Transformer) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, attribute that is called, part); a compiled block is one part, for its kernels are of all of it."""
    for block in cast(Iterable[Any], model.blocks):
        if block._compiled_call_impl is not None:
            yield block, "_compiled_call_impl", "blocks, compiled"
            continue
        yield block.attention, "forward", "attention"
        yield block.feed_forward, "forward", "experts" if model.config.feed_forward == "moe" else "feed-forward"
    yield model, "losses", "head"


def _timed(call: Callable[..., Any], part: str, clock: Clock) -> Callable[..., Any]:
    """`call` with marks around it, forward and backward: its first argument and its first result are tensors."""

    def mark_end(out: Any) -> Any:
        if isinstance(out, Tensor):
            return _Mark.apply(out, clock, REST, part)
        items = (mark_end(out[0]), *out[1:])  # however deep in tuples the first tensor is
        return type(out)(*items) if hasattr(out, "_fields") else items

    return lambda x, *args, **kwargs: mark_end(call(_Mark.apply(x, clock, part, REST), *args, **kwargs))


class _Mark(torch.autograd.Function):
    """The identity; says `ahead` on the way forward and `back` on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, ahead: str, back: str) -> Tensor:
        clock(ahead)
        ctx.clock, ctx.back = clock, back
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.clock(ctx.back)
        return gradient, None, None, None
