"""`replicate doctor`: what this machine has, and what each suite and config file would need of it.

Torch and deepspeed are imported by a process of their own, beside everything else that is looked at.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from replication.audit.claims import load_claims
from replication.config import RunConfig, SuiteConfig, load_cell, load_suite
from replication.config.reading import check_layer, read_yaml
from replication.config.study import load_study
from replication.console import say, table
from replication.data.files import place
from replication.data.prompts import load_prompts
from replication.data.tokenizer import tokenizer_file
from replication.errors import SHIPPED, UserError, install
from replication.model.size import (
    GIB,
    activation_gib,
    checkpoint_gib,
    checkpoints_kept,
    gib,
    parameter_count,
    state_needs,
)

HUB_SECONDS = 1.5
CPU_FLOP_PER_MONTH = 1e11 * 30 * 86400  # generous for a desktop processor; a suite past it needs a GPU
INSTALL = f"run {install()}"
IMPORTS = """
import json, os, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, torch.version.cuda, [(g.name, g.total_memory) for g in gpus]]), flush=True)
if not gpus:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
"""
KNOWN_FAULTS = (  # package, releases, what is wrong with them, who says so; tests/README.md names our tests
    ("lightning", ">=2.6.2,<2.6.4", "published with malware: change every password and token of this machine",
     "GHSA-w37p-236h-pfx3"),
    ("deepspeed", ">=0.17.6,<0.18.3", "gradients of ZeRO 2 are silently wrong", "DeepSpeed#7718"),
    ("deepspeed", ">=0.18.3,<=0.19.3", "ZeRO 2 in bf16: silently wrong gradients of a module that runs twice in a step",
     "DeepSpeed#8224"),
    ("liger-kernel", "<0.8.2", "wrong gradients of the fused loss where tokens are weighted", "Liger-Kernel#1298"),
)  # fmt: skip

Verdict = Literal["ok", "warning", "missing", "broken"]
COLOUR = {"ok": "green", "warning": "yellow", "missing": "red", "broken": "red"}


@dataclass(frozen=True)
class Finding:
    """One row of the first table."""

    item: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""


def verdict(item: str, found: str, holds: bool, remedy: str, otherwise: Verdict = "warning") -> Finding:
    """A finding that is ok where something holds, and else has a remedy."""
    return Finding(item, found) if holds else Finding(item, found, otherwise, remedy)


@dataclass
class Machine:
    """Capacities that the suites are held against."""

    findings: list[Finding] = field(default_factory=list)
    memory_gib: float = 0.0
    gpu_gib: float = 0.0  # of the largest GPU that torch can use; 0 where there is none
    disk_gib: float = 0.0
    hub: bool = False


def doctor(console: Console, config_root: Path, suite: Path | None = None) -> int:
    """Print what this machine has, what each suite under config_root needs, and whether each config file loads.

    With a suite file, what that one needs alone. Returns 0, or 2 where a config file is broken. What the machine lacks
    is advice, not an error.
    """
    with console.status("looking at this machine"):
        machine = examine_machine()
    console.print(findings_table(machine.findings, "This machine"))
    suites = [suite] if suite else sorted((config_root / "suites").glob("*.yaml"))
    broken = _print_suites(console, config_root, machine, suites)
    broken += [] if suite else _print_files(console, config_root)
    if broken:
        say(console, ("broken config files:", "red"), f" {', '.join(broken)}")
    return 2 if broken else 0


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    """item, found, verdict, remedy."""
    names = ("item", "found", "verdict", "remedy")
    columns = [Column(name, overflow="fold", no_wrap=name in ("item", "verdict")) for name in names]
    rows = ((f.item, f.found, Text(f.verdict, COLOUR[f.verdict]), f.remedy) for f in findings)
    return table(title, columns, rows)


def examine_machine() -> Machine:
    """Look at everything once."""
    machine = Machine()
    command = [sys.executable, "-P", "-c", IMPORTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as imports:
        rows, surroundings = list(_computer(machine)), list(_surroundings(machine))
        try:
            out, err = imports.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            imports.kill()
            out, err = "", "importing torch and deepspeed takes over two minutes; look at the disk's load"
    fault, imported = (err.strip().splitlines() or ["it does not import"])[-1], imports.returncode == 0
    machine.findings += [*rows, *_torch(machine, out, fault), *_packages()]
    where = "runs on the GPU" if machine.gpu_gib else "runs on the CPU (gloo)"
    zero = verdict("ZeRO", where if imported else fault, imported, INSTALL, "missing")
    machine.findings += [zero, *surroundings]
    return machine


def _computer(machine: Machine) -> Iterator[Finding]:
    import psutil

    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    name, processor = platform.system(), platform.processor() or platform.machine()
    with suppress(OSError):
        name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    text = f"{name}, kernel {platform.release()}, {platform.machine()}"
    yield verdict("system", text, platform.system() == "Linux", "only Linux is tested")
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU", f"{processor}; {usable} usable cores of {os.cpu_count()}")
    memory = psutil.virtual_memory()
    machine.memory_gib = memory.available / GIB
    text = f"{memory.total / GIB:.1f} GiB, {machine.memory_gib:.1f} GiB free"
    remedy = "each process of the quickstart takes about 1 GiB; close something"
    yield verdict("memory", text, machine.memory_gib >= 2, remedy)


def _torch(machine: Machine, out: str, fault: str) -> Iterator[Finding]:
    """From what IMPORTS said."""
    if not out.startswith("["):
        yield Finding("torch", fault, "missing", INSTALL)
        return
    version, cuda, gpus = json.loads(out.partition("\n")[0])
    yield Finding("torch", f"{version}, {f'CUDA {cuda} build' if cuda else 'CPU build'}")
    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if gpus:
        machine.gpu_gib = max(memory / GIB for _, memory in gpus)
        names = ", ".join(f"{name} ({memory / GIB:.0f} GiB)" for name, memory in gpus)
        yield Finding("GPUs", f"{len(gpus)}: {names}; driver {driver or 'unknown'}")
    elif driver is not None:
        remedy = "install torch's CUDA build for this driver" if not cuda else "update the driver"
        yield Finding("GPUs", f"driver {driver}, but torch sees no GPU", "warning", remedy)
    else:
        yield Finding("GPUs", "none", "warning", "tiny models train on the CPU; the 1.2B run needs a GPU")


def _packages() -> Iterator[Finding]:
    """What is installed, and is known to be at fault."""
    needed, judging = ("lightning", "datasets", "deepspeed"), ("fastapi", "uvicorn", "sqlalchemy")
    there = {}
    for name in (*needed, "liger-kernel", "transformers", *judging):
        with suppress(importlib.metadata.PackageNotFoundError):
            there[name] = importlib.metadata.version(name)
    for name in needed:
        yield verdict(name, there.get(name, "not installed"), name in there, INSTALL, "missing")
    remedy = f"tests and `replicate export` need it: {install('export')}"
    yield verdict("transformers", there.get("transformers", "not installed"), "transformers" in there, remedy)
    lacking = [name for name in judging if name not in there]
    text = f"lacks {', '.join(lacking)}" if lacking else "the page, SQLite and PostgreSQL"
    yield verdict("judging", text, not lacking, f"`replicate judge`: {install('judge')}")
    for name, releases, fault, source in KNOWN_FAULTS:
        if name in there and SpecifierSet(releases, prereleases=True).contains(there[name]):
            yield Finding(name, f"{there[name]}: {fault} ({source})", "broken", INSTALL)


def _surroundings(machine: Machine) -> Iterator[Finding]:
    tools = [tool for tool in ("sbatch", "srun", "squeue") if shutil.which(tool)]
    if len(tools) == 3:
        yield Finding("SLURM", _run("sbatch", "--version") or "present, version unknown")
    elif tools:
        yield Finding("SLURM", f"only {', '.join(tools)}", "warning", "sbatch, srun and squeue belong together")
    else:
        yield Finding("SLURM", "not found", "warning", "not needed on one machine; on a cluster, use a login node")
    folder, machine.disk_gib = free_disk_gib(Path("out"))
    text = f"{machine.disk_gib:.1f} GiB free at {folder}"
    if os.access(folder, os.W_OK):
        remedy = "free some space, or choose another disk with --out"
        yield verdict("disk", text, machine.disk_gib >= 2, remedy)
    else:
        yield Finding("disk", f"{text}, not writable", "warning", "choose another folder with --out")
    yield _hub(machine)
    yield Finding("files", f"configs, examples and launch scripts in {SHIPPED}")
    version = _run("git", "--version")
    text = "not found" if version is None else version.removeprefix("git version ")
    yield verdict("git", text, version is not None, "install git: runs then record their commit")


def free_disk_gib(path: Path) -> tuple[Path, float]:
    """The nearest folder above a path that exists, and how much is free there."""
    folder = path.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder, shutil.disk_usage(folder).free / GIB


def _hub(machine: Machine) -> Finding:
    try:
        from huggingface_hub import constants
    except ImportError:
        return Finding("data hub", "huggingface_hub is not installed", "missing", INSTALL)
    if constants.HF_HUB_OFFLINE:
        return Finding("data hub", "switched off by HF_HUB_OFFLINE", "warning", "unset it to load hub data sets")

    reached: list[bool] = []

    def reach() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_SECONDS):
                reached.append(True)
        except urllib.error.HTTPError as error:
            reached.append(error.code < 500)  # something there speaks HTTP, if not to HEAD
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=reach, daemon=True)  # because no timeout covers the look-up of the name
    thread.start()
    thread.join(HUB_SECONDS + 0.5)
    machine.hub = any(reached)
    text = "reachable" if machine.hub else "not reachable: local files and the embedded corpus still work"
    return verdict("data hub", text, machine.hub, "for hub data sets, connect or set HF_ENDPOINT to a mirror")


def _run(*command: str) -> str | None:
    """First line that a program prints, or None where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else None


@dataclass(frozen=True)
class Needs:
    """Demands of one suite on a machine."""

    n_cells: int
    parameters: int
    training_gib: float  # one cell: weights, gradients and two Adam moments
    activations_gib: float | None  # that one micro-batch keeps for its backward, at least
    host_gib: float  # beside both, in memory: for a checkpoint
    tokens: int  # over all cells
    checkpoints_gib: float  # all cells, each with the checkpoints that it keeps and the one being written
    flop: float  # 6 x parameters x tokens, every expert counted


def needs_of(suite: SuiteConfig, config: RunConfig) -> Needs:
    """Estimate from the config of one cell; the cells of a suite share model and data."""
    n_cells, parameters = len(suite.arms) * len(suite.seeds), parameter_count(config.model)
    tokens = n_cells * config.training.steps * config.training.batch_tokens
    checkpoints = n_cells * checkpoints_kept(config) * checkpoint_gib(config)
    state = state_needs(config)
    memory = state.device_gib, activation_gib(config), state.host_gib
    return Needs(n_cells, parameters, *memory, tokens, checkpoints, flop=6.0 * parameters * tokens)


def _obstacles(needs: Needs, config: RunConfig, machine: Machine) -> Iterator[str]:
    """Why this machine cannot run a suite, in words; nothing where it can."""
    memory = needs.training_gib + (needs.activations_gib or 0.0)
    on_gpu = config.cluster.accelerator == "gpu" or (config.cluster.accelerator == "auto" and machine.gpu_gib > 0)
    if on_gpu and not machine.gpu_gib:
        yield "cluster.accelerator is gpu, and torch sees none"
    elif on_gpu and memory > machine.gpu_gib:
        yield f"{gib(memory)} do not fit the GPU's {gib(machine.gpu_gib)}"
    elif (host := needs.host_gib + (0 if on_gpu else memory)) > machine.memory_gib:
        yield f"{gib(host)} do not fit the {gib(machine.memory_gib)} of free memory"
    months = needs.flop / CPU_FLOP_PER_MONTH
    if not on_gpu and months > 1:
        yield f"{needs.flop:.0e} FLOP take months on a CPU (about {months:,.0f} at 1e11 a second)"
    if needs.checkpoints_gib > machine.disk_gib:
        yield f"{gib(needs.checkpoints_gib)} of checkpoints, and {gib(machine.disk_gib)} are free on disk"
    for what, state in data_needs(config):
        if state.startswith("missing"):
            yield f"{what}: {state}"
        elif state.startswith("hub") and not machine.hub:
            yield f"{what} comes from a hub that is not reachable"


def data_needs(config: RunConfig) -> list[tuple[str, str]]:
    """(source or tokenizer, its state) for all that the data need; begins with embedded, local, hub or missing."""
    if config.data.dir is not None:
        prepared = Path(config.data.dir).expanduser()
        there = (prepared / "manifest.json").is_file()
        return [("data.dir", "local: prepared" if there else f"missing: no preparation in {prepared}")]
    found = []
    for source in config.data.sources:
        path = place(source)
        if source.kind.startswith("python_"):
            state = "embedded"
        elif source.kind == "hub":
            state = f"hub: {source.path}"
        elif path.exists() or any(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))):
            state = "local: files present"
        else:
            state = f"missing: no file at {path}"
        found.append((source.name, state))
    if not found:
        found = [("data.sources", "missing: the suite names no source")]
    tokenizer = config.data.tokenizer.path
    if tokenizer is not None:
        local = tokenizer_file(config.data.tokenizer).is_file()
        found.append(("tokenizer", "local: file present" if local else f"hub: {tokenizer}"))
    return found


def _print_suites(console: Console, config_root: Path, machine: Machine, suites: Sequence[Path]) -> list[str]:
    """Print what each suite needs; return the names of suite files that do not load."""
    columns = (Column("suite", no_wrap=True), Column("item", no_wrap=True), Column("need", overflow="fold"))
    shown = table("What each suite needs", columns)
    broken = []
    for path in suites:
        try:
            rows = list(_suite_rows(path, config_root, machine))
        except UserError as error:
            broken.append(f"suites/{path.name}")
            rows = [("broken", Text(str(error), "red"))]
        for i, (item, need) in enumerate(rows):
            shown.add_row(Text(path.stem if i == 0 else ""), item, need)
        shown.add_section()
    console.print(shown)
    console.print(
        "memory = parameters x 4 numbers (weight, gradient, two Adam moments; one for SGD and what Muon trains)\n"
        "x 4 bytes (8 under 64-true) + what a micro-batch keeps for its backward at least; 3 numbers more on the\n"
        "host, from which checkpoints are written; checkpoints = cells x (kept + 1) x parameters x 3 numbers (ZeRO: 4)",
        style="dim",
        soft_wrap=True,
    )
    return broken


def _suite_rows(path: Path, root: Path, machine: Machine) -> Iterator[tuple[str, Text]]:
    """(item, need); the layers and arms of `root` come before the shipped ones of the same name."""
    suite = load_suite(path)
    layers = tuple(str(root / layer) if (root / layer).is_file() else layer for layer in suite.layers)
    configs = []
    for arm in suite.arms:  # each, so that a broken arm file shows
        file = root / "arms" / f"{arm}.yaml"
        here = dataclasses.replace(suite, layers=layers)
        known = arm in suite.own_arms or not file.is_file()
        configs.append(load_cell(here, arm if known else str(file), suite.seeds[0]))
    config = configs[0]
    needs = needs_of(suite, config)
    told = {
        "cells": f"{needs.n_cells} ({len(suite.arms)} arms x {len(suite.seeds)} seeds)",
        "parameters": f"{needs.parameters:,}",
        "memory of a cell": f"{gib(needs.training_gib)} + {gib(needs.activations_gib)}; host {gib(needs.host_gib)}",
        "tokens in total": f"{needs.tokens:,}",
        "checkpoints": f"up to {gib(needs.checkpoints_gib)}",
    }
    if config.generation.prompts is not None:
        told["prompts"] = f"{len(load_prompts(config.generation))} x {config.generation.samples_per_prompt}"
    told["data"] = "; ".join(f"{what}: {state}" for what, state in data_needs(config))
    yield from ((item, Text(need)) for item, need in told.items())
    obstacles = "; ".join(_obstacles(needs, config, machine))
    yield "runs here", Text.assemble(("no", "red"), f": {obstacles}") if obstacles else Text("yes", "green")


def _print_files(console: Console, config_root: Path) -> list[str]:
    """Print whether each config, prompt and claims file loads by itself; return the names of those that do not."""
    shown = table("Config files", (Column("file", no_wrap=True), Column("state", overflow="fold")))
    folders = ("model", "arms", "data", "training", "cluster", "claims", "studies")
    files = [p for folder in folders for p in sorted((config_root / folder).glob("*.yaml"))]
    files += sorted((config_root / "prompts").glob("*.json*"))
    broken = []
    for path in files:
        name, holds = f"{path.parent.name}/{path.name}", ""
        try:
            if path.suffix in (".json", ".jsonl"):
                holds = f": {len(load_prompts(path))} prompts"
            elif path.parent.name == "claims":
                holds = f": {len(load_claims(path).claims)} claims"
            elif path.parent.name == "studies":
                load_study(path)
            else:
                check_layer(RunConfig, read_yaml(path))  # whether values fit together shows in a suite
            state = Text.assemble(("loads", "green"), holds)
        except UserError as error:
            broken.append(name)
            state = Text(str(error).removeprefix(f"{path}: "), "red")
        shown.add_row(Text(name), state)
    console.print(shown)
    return broken
