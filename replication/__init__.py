"""Replicate an early language-model training result: token gain and layer gain, over many seeds.

For a plugin: the decorators `gain` and `scale`, loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replication.objectives.plugins import gain, scale

__all__ = ["gain", "scale"]
__version__ = "0.1.0"

_FILES = {"gain": "plugins", "scale": "plugins"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"replication.objectives.{_FILES[name]}"), name)
