"""Process-wide settings of torch; what the manifest says of a start, code and machine among it, and of the end."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import platform
import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning_utilities.core import imports as installed
from rich.console import Console
from torch import nn

from replication.config import RunConfig, arm_keys, declared_keys, load_suite, machine_cut, scientific_hash
from replication.console import say, timestamp
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.model.cost import predict_step
from replication.protocol.preregistration import first_stamp, plan_stamp
from replication.runs.files import write_bytes
from replication.runs.journal import read_journal
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.ledger import append_of_cell, read_ledger
from replication.runs.manifest import (
    Data,
    Environment,
    Hardware,
    Manifest,
    Speed,
    Start,
    code_identity,
    code_patch,
    git_state,
    is_trained,
    read_manifest,
    update_manifest,
    write_manifest,
)
from replication.runs.starts import changes, code_facts, code_of, machine_of, or_its_commit
from replication.training.checkpoint_files import Sharding, checkpoint_folder, read_marker

SLOW_AND_UNUSED = ("transformers", "scipy", "matplotlib")  # by any metric that is computed here
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def uses_gpu(config: RunConfig) -> bool:
    """Whether this machine trains the config on GPUs."""
    return config.cluster.accelerator != "cpu" and torch.cuda.is_available()


def prepare_torch(config: RunConfig) -> None:
    """Process-wide settings: threads, what determinism takes, and silence about what we have decided."""
    if config.cluster.threads:
        torch.set_num_threads(config.cluster.threads)
    if not uses_gpu(config):
        keep_freed_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS needs it before first use
    # Deterministic mode would write NaN into every new buffer, DeepSpeed's buckets among them, at each backward.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    # DeepSpeed calls collectives by names that newer torch deprecates, and torch warns at every call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def import_torchmetrics() -> None:
    """Import torchmetrics before Lightning does, and without the packages above: a sixth of a small cell's time.

    It loads them for single metrics, wherever they are installed. What is installed lightning_utilities tells it, which
    knows of none of them while this runs. A process that has torchmetrics already keeps what it has.
    """
    if not hasattr(installed, "_version"):  # a release that asks otherwise: then it takes longer
        return
    is_there, version = installed.package_available, installed._version

    def known_version(name: str) -> str:
        if name in SLOW_AND_UNUSED:
            raise PackageNotFoundError(name)
        return version(name)

    vars(installed).update(package_available=lambda n: n not in SLOW_AND_UNUSED and is_there(n), _version=known_version)
    try:
        importlib.import_module("torchmetrics")
    finally:
        vars(installed).update(package_available=is_there, _version=version)


def keep_freed_memory() -> None:
    """Let glibc keep tensors of up to 32 MiB that were freed, for the next step: it hands them back to the system, and
    a seventh of a small model's time on a CPU is spent on being given them again, page by page."""
    set_malloc(M_MMAP_THRESHOLD, 32 << 20)
    set_malloc(M_TRIM_THRESHOLD, (2 << 30) - 1)


def set_malloc(option: int, value: int) -> None:
    """Set an option of glibc's malloc (mallopt(3)); elsewhere nothing."""
    with suppress(AttributeError, OSError):  # there is no such setting here
        ctypes.CDLL(None).mallopt(option, value)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Allow only deterministic kernels inside, or any; afterwards as before: a GPU has none for sampling's sums."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def cpu_name() -> str:
    """The model's name where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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


def start_manifest(
    config: RunConfig, run: RunDir, store: TokenStore, model: nn.Module, initial: str, step: int, console: Console
) -> None:
    """Write the manifest before the first step of a start; what earlier starts said is kept, the weights are compared.

    One line says what of code and machine is not as at the start before; the run goes on. `initial` is the SHA-256 of
    the model's weights before the strategy shards it; `step` that of the checkpoint which the start goes on from, or 0.
    """
    earlier = read_manifest(run) or Manifest()
    if earlier.initial_weights_sha256 not in (None, initial):
        raise UserError(
            f"{run.manifest}: this machine makes other initial weights for the same seed than the first start did; "
            f"resume where it began, or remove the cell and run it again{or_its_commit(run)}"
        )
    keys: tuple[str, ...] = ()
    with suppress(UserError):  # an arm without a file declares nothing, and the certificate will say so
        suite_file = SuiteDir.of(run).suite
        suite = load_suite(suite_file) if suite_file.is_file() else None
        of_suite = suite is not None and config.arm in suite.arms
        keys = tuple(sorted(declared_keys(suite) if suite and of_suite else arm_keys(config.arm)))
    machine, plan, cut = describe_machine(), plan_stamp(run), arithmetic(config)
    sharding = vars(Sharding.of_run(config))
    suite_dir = SuiteDir.around(run)
    ledger = read_ledger(suite_dir) if suite_dir else None
    here = Start(
        at=timestamp(),
        step=step,
        plan=plan,
        strategy=sharding,
        ledger=ledger.head if ledger else None,
        machine=cut,
        **vars(machine),
    )
    changed = [changes(code_of(earlier), code_facts(here)), changes(machine_of(earlier, None), cut)]
    if step and any(changed):
        said = ", ".join(filter(None, changed))
        say(console, ("goes on otherwise than it began:", "yellow"), f" {said}; the report will say so")
    first_plan, logged_before = first_stamp(run, earlier.plan, plan)
    manifest = Manifest(
        arm=config.arm,
        seed=config.seed,
        config_hash=scientific_hash(config),
        arm_keys=keys,
        plan=first_plan,
        logged_before=logged_before,
        data=Data(hash=store.hash, dir=str(config.data.dir or "data")),
        world_size=config.world_size,
        strategy=sharding,
        weights_seed=config.effective_weights_seed,
        parameters=sum(p.numel() for p in model.parameters()),
        initial_weights_sha256=initial,
        started_at=earlier.started_at or timestamp(),
        starts=(*earlier.starts, here),
        extensions=earlier.extensions,
        **vars(machine),
    )
    if machine.git.dirty and (patch := code_patch()):
        write_bytes(run.patch, patch)
    elif not any(start.git.dirty for start in earlier.starts):  # else it is of the code that they ran
        run.patch.unlink(missing_ok=True)
    write_manifest(run, manifest)
    name = f"{config.arm}/seed-{config.seed}"
    if ledger and earlier.started_at is None and any(entry.cell == name for entry in ledger.of("start")):
        append_of_cell(run, "removal")  # of the folder, of which nobody told us
    append_of_cell(run, "start", started_at=here.at, step=step)  # last: one that the manifest lacks was removed


def finish_manifest(config: RunConfig, run: RunDir) -> None:
    """Add what the last checkpoint says of the whole run; a kill between the two is made good by the next start.

    The checkpoint has just been read or written whole, and is not read again: the other ranks are leaving.
    """
    if not is_trained(run):
        marker = read_marker(checkpoint_folder(run, config.training.steps))
        final = {k: getattr(marker, k) for k in ("step", "tokens", "data_chain", "wall_seconds")}
        of_lines = [line.number("train/tokens_per_second") for line in read_journal(run.metrics)]
        known = [speed for speed in of_lines if speed is not None]
        ours = config.model.class_path is None
        speed = Speed(
            measured=round(statistics.median(known), 1) if known else None,
            predicted=round(predict_step(config).tokens_per_second, 1) if ours and uses_gpu(config) else None,
        )
        update_manifest(run, **final, final_weights_sha256=marker.weights_sha256, finished_at=timestamp(), speed=speed)
