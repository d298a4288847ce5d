"""What the manifest says of code and machine, and the process-wide settings of torch."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from replication.config import RunConfig
from replication.provenance import git_state

PACKAGES = (
    "replication",
    "torch",
    "lightning",
    "deepspeed",
    "datasets",
    "tokenizers",
    "torchmetrics",
    "numpy",
)


def describe_machine() -> dict[str, Any]:
    """git commit and dirty flag, package versions, hardware; a thing that cannot be told is None, never guessed."""
    return {
        "git": git_state(),
        "packages": package_versions(),
        "hardware": {
            "cpu": cpu_name(),
            "cores": psutil.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
    }


def package_versions() -> dict[str, str | None]:
    """Versions of what computes, None for what is not installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def cpu_name() -> str:
    """The model's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def prepare_torch(config: RunConfig) -> None:
    """Process-wide settings: threads, determinism, and silence about what we have decided."""
    if config.cluster.threads:
        torch.set_num_threads(config.cluster.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS needs it before first use
    # Deterministic mode would write NaN into every new buffer, DeepSpeed's buckets among them, at each backward.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    # DeepSpeed calls collectives by names that newer torch deprecates, and torch warns at every call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
