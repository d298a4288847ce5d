"""A run's full state as a copy on the host: taken at once, written to files while the training goes on.

For strategies whose state is whole on the first rank. The weights are in a file of their own, and in no other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from replication.runs.files import FileFacts
from replication.runs.layout import STATE, WEIGHTS
from replication.training.checkpoint_files import load_plain

PREFIX = "model."
"""Of the model's parameters, in the LightningModule's state."""


class HostCopy(TorchCheckpointIO):
    """Lightning's way to a checkpoint and back: a save copies to the host, and `write` writes what was copied.

    The buffers of one save are taken again by the next: as many bytes of host memory as the state has. Where it is on a
    GPU they are pinned, so that the copy runs at the speed of the bus, and torch rounds each up to a power of two.
    `write` must have ended before the next save.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._held: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copy; the path is not written yet. Lightning calls this on the first rank alone."""
        old, self._buffers = iter(self._buffers), []

        def copy(tensor: Tensor) -> Tensor:
            tensor, buffer = tensor.detach(), next(old, None)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers.append(buffer.copy_(tensor, non_blocking=True))
            return buffer

        found = checkpoint["state_dict"]
        once = {(t.data_ptr() if t.numel() else name, t.shape): name for name, t in reversed(found.items())}
        state = {name: found[name] for name in sorted(once.values())}  # a tied weight counts once
        self._held = apply_to_collection(checkpoint | {"state_dict": state}, Tensor, copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def write(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, FileFacts]]:
        """Write STATE and WEIGHTS into a folder; the weights by name, and sizes and checksums of the files.

        Touches nothing that the training works with, so that a thread can do it.
        """
        state = dict(self._held["state_dict"])
        weights = {k.removeprefix(PREFIX): state.pop(k) for k in list(state) if k.startswith(PREFIX)}
        files = {STATE: self._held | {"state_dict": state}, WEIGHTS: weights}
        return weights, {name: save_hashed(content, folder / name) for name, content in files.items()}

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The full state with its weights; older files have them themselves."""
        state, weights = load_plain(Path(path)), load_plain(Path(path).with_name(WEIGHTS))
        state["state_dict"] = {f"{PREFIX}{name}": weight for name, weight in weights.items()} | state["state_dict"]
        return state


class _Hashed(io.BufferedWriter):
    """A file that hashes what is written to it: a checkpoint of 15 GB need not be read again for its checksum."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self.digest.update(data)
        return super().write(data)


def save_hashed(content: Mapping[str, Any], path: Path) -> FileFacts:
    """Write a file with torch.save; its size and checksum."""
    with _Hashed(path) as file:
        torch.save(content, file)
        return FileFacts(file.tell(), file.digest.hexdigest())
