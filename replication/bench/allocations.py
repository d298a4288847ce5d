"""Counts the bytes of live tensors while code runs, on real tensors or on fake ones, which take no memory and no time.

What a kernel allocates and frees inside itself is not seen; every result of an operator is, views counted once.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountAllocations(TorchDispatchMode):
    """Inside the block, bytes of storages made there: `live` now, `peak` at most. What was there before counts not."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, 0)  # its storage is older than the block, or known
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, tensor.untyped_storage().nbytes())
        return out

    def _see(self, tensor: torch.Tensor, n_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self.live -= n_bytes
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
