"""How one run is spread over processes: single or DDP; and what is checked before its first step."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy

from replication.config import RunConfig
from replication.model.transformer import weights_sha256
from replication.training.ranks import check_ranks


def build_strategy(config: RunConfig) -> Strategy | str:
    """The Lightning strategy of a config. Gradients are averaged over ranks; the objective is scaled to match."""
    if config.cluster.strategy == "single":
        return "auto"
    return DDPStrategy(
        process_group_backend="gloo" if config.cluster.accelerator == "cpu" else "nccl",
        find_unused_parameters=False,  # every expert is in the graph, with zero rows if need be
        broadcast_buffers=False,
    )


class StartChecks(Callback):
    """Turns what would be a silent failure into a message before the first step, on every rank alike."""

    def __init__(self, config: RunConfig, identity: dict[str, str]) -> None:
        self.config, self.identity = config, identity

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_ranks(self.config, self.identity | {"weights at start": weights_sha256(pl_module.model)})  # type: ignore[arg-type]
