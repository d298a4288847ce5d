"""The LightningDataModule: each rank's share of the global batch of each step, and the fixed validation set."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from replication.config import RunConfig
from replication.data.store import TokenStore, training_order, validation_set


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    tokens_BS: Tensor  # int32 [B, block_size_tokens + 1]; -1 pads the last block of a source
    step_groups: int  # gain groups of the whole global batch that hold a valid token: the objective's divisor


class TrainingBatches(Dataset):
    """Item m is micro-batch m of one rank, counted from the start of training: a pure function of (data seed, m).

    Step k = m // accumulation. Its global batch is cut into slices of micro_batch_sequences; rank r takes slice
    (m % accumulation) * world_size + r, so that slices in (micro-batch, rank) order are the global order.
    """

    def __init__(self, config: RunConfig, store: TokenStore, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.store, self.rank, self.world_size = config, store, rank, world_size
        self.order = training_order(config, store)

    def __getitem__(self, m: int) -> Batch:
        step, micro = divmod(m, self.config.accumulation)
        sources, indices = self.order.global_batch(step, self.config.batch_sequences)
        valid = self.store.valid_targets("train", sources, indices)
        groups = valid.reshape(-1, self.config.gain_group_sequences).sum(1)
        start = (micro * self.world_size + self.rank) * self.config.micro_batch_sequences
        mine = slice(start, start + self.config.micro_batch_sequences)
        tokens = self.store.read("train", sources[mine], indices[mine])
        return Batch(torch.from_numpy(tokens), int((groups > 0).sum()))


class CountFrom(Sampler):
    """start, start + 1, ... without end: the trainer's max_steps ends it."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return count(self.start)


class ValidationBatches(Dataset):
    """One rank's share of the fixed validation set, which is the same for every seed, arm and machine."""

    def __init__(self, config: RunConfig, store: TokenStore, rank: int = 0, world_size: int = 1) -> None:
        self.store, self.batch_sequences = store, config.micro_batch_sequences
        sources, indices = validation_set(config, store)
        self.sources, self.indices = sources[rank::world_size], indices[rank::world_size]

    def __len__(self) -> int:
        return -(-len(self.sources) // self.batch_sequences)

    def __getitem__(self, i: int) -> Batch:
        if i >= len(self):
            raise IndexError(i)
        part = slice(i * self.batch_sequences, (i + 1) * self.batch_sequences)
        return Batch(torch.from_numpy(self.store.read("validation", self.sources[part], self.indices[part])), 0)


class TokenDataModule(LightningDataModule):
    """Loaders without state: on a resume the training loader starts at the trainer's step."""

    def __init__(self, config: RunConfig, store: TokenStore) -> None:
        super().__init__()
        self.config, self.store = config, store

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches = TrainingBatches(self.config, self.store, self.trainer.global_rank, self.trainer.world_size)
        return batch_loader(self.config, batches, CountFrom(self.trainer.global_step * self.config.accumulation))

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches = ValidationBatches(self.config, self.store, self.trainer.global_rank, self.trainer.world_size)
        return batch_loader(self.config, batches, None)


def batch_loader(config: RunConfig, batches: Dataset, sampler: Sampler | None) -> DataLoader:
    """The loader of micro-batches, in this process or in cluster.loader_workers that read ahead."""
    workers = config.cluster.loader_workers
    return DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=config.cluster.accelerator != "cpu" and torch.cuda.is_available(),
    )
