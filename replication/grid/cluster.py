"""`replicate doctor --cluster`: would this suite's jobs fit this cluster? Asked before anything is submitted."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from replication.config import RunConfig, SuiteConfig
from replication.console import table
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.doctor import Finding, findings_table, free_disk_gib
from replication.grid.site import Site
from replication.model.size import checkpoint_gib, checkpoints_kept, gib, parameter_count, state_needs

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")


def examine_cluster(suite: SuiteConfig, config: RunConfig, site: Site, out: Path, console: Console) -> int:
    """Print what a cell keeps in memory under each strategy, and what the cluster has for the jobs.

    Args:
        suite: the suite.
        config: of one of its cells, with the cluster file.
        site: the site file's.
        out: folder of the results.
        console: where the tables go.

    Returns:
        0, or 2 where something is missing without which no job could start.
    """
    console.print(memory_table(config))
    c = config.cluster
    console.print(
        f"weights, gradients and optimizer; activations come on top. This cluster file: {c.strategy} on "
        f"{config.world_size} process(es), {c.nodes} node(s){', offloaded' if c.offload_optimizer else ''}",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    findings = [_disk(suite, config, out), *_scheduler(config, site)]
    console.print(findings_table(findings, "Jobs of this suite"))
    return 2 if any(f.verdict == "missing" for f in findings) else 0


def memory_table(config: RunConfig) -> Table:
    """GiB in each process, a row a strategy, a column a number of processes."""
    here = config.world_size
    counts = sorted({1, config.cluster.devices, here, 2 * here})
    shown = table(
        f"{parameter_count(config.model):,} parameters in {config.training.precision}: memory of each process",
        ("strategy", *(f"{n} process(es)" for n in counts)),
    )
    for strategy in STRATEGIES:
        chosen = strategy == config.cluster.strategy
        cells = [(strategy, chosen), *((_memory(config, strategy, n), chosen and n == here) for n in counts)]
        shown.add_row(*(Text(text, "bold" if bold else "") for text, bold in cells))
    return shown


def _memory(config: RunConfig, strategy: str, n: int) -> str:
    if strategy == "single" and n > 1:
        return "-"
    offload = config.cluster.offload_optimizer and strategy.startswith("zero")
    cluster = dataclasses.replace(config.cluster, strategy=strategy, devices=n, nodes=1, offload_optimizer=offload)  # type: ignore[arg-type]
    needs = state_needs(dataclasses.replace(config, cluster=cluster))
    return gib(needs.device_gib) + (f" + {gib(needs.host_gib)} on the host" if needs.host_gib else "")


def _disk(suite: SuiteConfig, config: RunConfig, out: Path) -> Finding:
    cells = len(suite.arms) * len(suite.seeds)
    needed = cells * checkpoints_kept(config) * checkpoint_gib(config)
    folder, free = free_disk_gib(out)
    text = f"{gib(needed)} of checkpoints for {cells} cells, {gib(free)} free at {folder}"
    if needed > free:
        return Finding("disk", text, "missing", "choose another --out, or lower checkpoints.keep_last")
    return Finding("disk", text)


# ---------------------------------------------------------------- what the scheduler says


@dataclass(frozen=True)
class _Node:
    name: str
    cpus: int
    memory_gib: float
    gpus: int


def _scheduler(config: RunConfig, site: Site) -> Iterator[Finding]:
    try:
        partitions = slurm.partitions()
    except UserError as error:
        yield Finding("SLURM", str(error), "missing", "call this on a login node")
        return
    if not partitions:
        yield Finding("SLURM", "no partition is up", "missing", "is the scheduler up?")
        return
    partition = site.partition or partitions[0]
    if partition not in partitions:
        lacking = f"no {partition} among {', '.join(partitions)}"
        yield Finding("partition", lacking, "missing", "set SITE_PARTITION in the site file")
        return
    yield Finding("partition", partition + ("" if site.partition else " (the default one)"))
    yield from (_nodes(config, partition), _time(config, partition), _stopping(config, site))
    scratch = site.scratch or "the nodes' own temporary folder"
    yield Finding("scratch", f"{scratch}; each job looks at its room before it trains")


def _nodes(config: RunConfig, partition: str) -> Finding:
    c = config.cluster
    cpus = c.devices * (c.slurm.cpus_per_task or 1)
    gpus = c.devices if c.accelerator == "gpu" else 0
    memory = float(c.slurm.memory_gib or 0)
    nodes = [_parse_node(line) for line in slurm.node_lines(partition)]
    fit = [n for n in nodes if n.cpus >= cpus and n.gpus >= gpus and n.memory_gib >= memory]
    wanted = f"{c.nodes} node(s) of {cpus} cores, {gpus} GPUs{f', {gib(memory)}' if memory else ''}"
    text = f"{wanted}: {len(fit)} of {len(nodes)} nodes have that"
    if len(fit) < c.nodes:
        return Finding("nodes", text, "missing", "choose another cluster file, or another SITE_PARTITION")
    return Finding("nodes", text)


def _parse_node(line: str) -> _Node:
    name, cpus, megabytes, resources = line.split("|")
    gpus = sum(int(n) for n in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", resources))
    return _Node(name, int(cpus), int(megabytes) / 1024, gpus)


def _time(config: RunConfig, partition: str) -> Finding:
    minutes, limit = config.cluster.slurm.time_limit_minutes, slurm.time_limit_minutes(partition)
    text = f"{minutes} minutes a job; the partition allows {'any' if limit is None else f'{limit:g}'}"
    if limit is not None and minutes > limit:
        return Finding("time limit", text, "missing", "lower cluster.slurm.time_limit_minutes")
    return Finding("time limit", text)


def _stopping(config: RunConfig, site: Site) -> Finding:
    c = config.cluster
    text = (
        f"{c.stop_signal} to the {'batch shell' if c.slurm.signal_to == 'batch' else 'processes'} "
        f"{c.slurm.lead_seconds} s before the limit; then {site.on_preemption}"
    )
    if site.on_preemption == "requeue" and slurm.setting("JobRequeue") == "0":
        remedy = "JobRequeue is 0 here: if jobs are not requeued, set SITE_ON_PREEMPTION=chain"
        return Finding("stop", text, "warning", remedy)
    return Finding("stop", text)
