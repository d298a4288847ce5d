"""A working folder whose files have the names of modules: nothing that the product starts may import them."""

from __future__ import annotations

from pathlib import Path

NAMES = ("datasets", "logging", "pickle", "queue", "random", "replication/__init__", "signal", "socket", "tensorboard")
NAMES += ("tokenizers", "torch", "yaml")


def shadowed(folder: Path) -> Path:
    """The folder, with modules in it that raise when they are imported."""
    for name in NAMES:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise ImportError('{name} of the current folder')\n")
    return folder
