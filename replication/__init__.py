"""Replicate an early language-model training result: token gain and layer gain, over many seeds.

For a plugin: the decorators `gain` and `scale`. For your own training: `Gains`, `GainsTrainer` (transformers) and
`GainsCallback` (Lightning). For a paper: `Study`. Each is loaded when it is asked for, so that nothing else here waits
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replication.objectives.hugging_face import GainsTrainer
    from replication.objectives.library import Gains
    from replication.objectives.lightning_callback import GainsCallback
    from replication.objectives.plugins import gain, scale
    from replication.report.study import Study

__all__ = ["Gains", "GainsCallback", "GainsTrainer", "Study", "gain", "scale"]
__version__ = "0.1.0"

_FILES = {
    "Gains": "objectives.library",
    "GainsCallback": "objectives.lightning_callback",
    "GainsTrainer": "objectives.hugging_face",
    "Study": "report.study",
    "gain": "objectives.plugins",
    "scale": "objectives.plugins",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"replication.{_FILES[name]}"), name)
