"""Code and machine, as the manifest says it, and the process-wide settings of torch."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from replication.config import RunConfig, machine_cut
from replication.runs.manifest import Environment, Hardware, code_identity, git_state
from replication.training.strategies import uses_gpu


def describe_machine() -> Environment:
    """Code, package versions, hardware; a thing that cannot be told is None, never guessed."""
    code = code_identity()
    hardware = Hardware(
        cpu=cpu_name(),
        cores=psutil.cpu_count(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
    )
    return Environment(git=git_state(), code_hash=code.code_hash, packages=code.packages, hardware=hardware)


def arithmetic(config: RunConfig) -> Mapping[str, Any]:
    """All of the machine that may change how sums are rounded: the config's `machine_cut`, threads and device."""
    on_gpu = uses_gpu(config)
    device = torch.cuda.get_device_name() if on_gpu else cpu_name()
    return {**machine_cut(config), "threads": None if on_gpu else torch.get_num_threads(), "device": device}


def cpu_name() -> str:
    """The model's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
