"""`replicate doctor --cluster`: would this suite's jobs fit this cluster? Asked before anything is submitted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from replication.config import RunConfig, SuiteConfig
from replication.console import table
from replication.errors import UserError
from replication.grid import slurm
from replication.grid.doctor import Finding, findings_table, free_disk_gib, needs_of, verdict
from replication.grid.slurm import Site
from replication.model.cost import GPUS, predict_step
from replication.model.size import activation_gib, gib, parameter_count, state_needs

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")


def examine_cluster(suite: SuiteConfig, config: RunConfig, site: Site, out: Path, console: Console) -> int:
    """Print what a cell keeps in memory under each strategy, and what the cluster has for the jobs.

    `config` is that of one of its cells, with the cluster file. Returns 0, or 2 where something is missing that every
    job needs.
    """
    console.print(memory_table(config))
    c = config.cluster
    console.print(
        f"weights, gradients and optimizer; a micro-batch keeps {gib(activation_gib(config))} at least on top. This "
        f"cluster file: {c.strategy} on {config.world_size} process(es), {c.nodes} node(s)"
        f"{', offloaded' if c.offload_optimizer else ''}",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    if c.accelerator == "gpu" and config.model.class_path is None:  # of others no time is predicted
        console.print(time_table(suite, config))
    needs, (folder, free) = needs_of(suite, config), free_disk_gib(out)
    text = f"{gib(needs.checkpoints_gib)} of checkpoints for {needs.n_cells} cells, {gib(free)} free at {folder}"
    remedy = "choose another --out, or lower checkpoints.keep_last"
    disk = verdict("disk", text, needs.checkpoints_gib <= free, remedy, "missing")
    findings = [disk, *_scheduler(config, site)]
    console.print(findings_table(findings, "Jobs of this suite"))
    return 2 if any(f.verdict == "missing" for f in findings) else 0


def memory_table(config: RunConfig) -> Table:
    """GiB in each process, a row a strategy, a column a number of processes."""
    here, cluster = config.world_size, config.cluster
    counts = sorted({1, cluster.devices, here, 2 * here})
    shown = table(
        f"{parameter_count(config.model):,} parameters in {config.training.precision}: memory of each process",
        ("strategy", *(f"{n} process(es)" for n in counts)),
    )
    for strategy in STRATEGIES:
        chosen = strategy == cluster.strategy
        cells = [Text(strategy, "bold" if chosen else "")]
        for n in counts:
            text = "-"
            if strategy != "single" or n == 1:
                offload = cluster.offload_optimizer and strategy.startswith("zero")
                there = replace(cluster, strategy=strategy, devices=n, nodes=1, offload_optimizer=offload)  # type: ignore[arg-type]
                needs = state_needs(replace(config, cluster=there))
                text = gib(needs.device_gib) + (f" + {gib(needs.host_gib)} on the host" if needs.host_gib else "")
            cells.append(Text(text, "bold" if chosen and n == here else ""))
        shown.add_row(*cells)
    return shown


def time_table(suite: SuiteConfig, config: RunConfig) -> Table:
    """A step, a cell and the suite as model/cost.py predicts them, a row a strategy; or a row a kind of GPU."""
    n_cells, n = len(suite.arms) * len(suite.seeds), config.world_size
    shown = table(
        f"predicted for {n} GPU(s) (assumed rates, nothing measured)",
        ("strategy", "GPU", ">ms a step", ">tokens/s", ">GPU-hours a cell", f">of all {n_cells} cells"),
    )
    for strategy, gpu in product(STRATEGIES[1:], ["H100"]) if n > 1 else product(STRATEGIES[:1], GPUS):
        there = replace(config.cluster, strategy=strategy)  # type: ignore[arg-type]
        step = predict_step(replace(config, cluster=there), GPUS[gpu])
        hours = step.gpu_hours(config.training.steps)
        row = (strategy, gpu, f"{1e3 * step.seconds:,.0f}", f"{step.tokens_per_second:,.0f}", f"{hours:,.1f}")
        chosen = strategy == config.cluster.strategy and gpu == "H100"
        shown.add_row(*row, f"{n_cells * hours:,.0f}", style="bold" if chosen else "")
    return shown


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

    c = config.cluster
    cpus, gpus = c.devices * (c.slurm.cpus_per_task or 1), c.devices if c.accelerator == "gpu" else 0
    memory = float(c.slurm.memory_gib or 0)
    of = ("sinfo", "--noheader", f"--partition={partition}")
    lines = slurm.ask(*of, "--Node", "--format=%c|%m|%G").stdout.split()  # such as 64|515000|gpu:8, memory in MiB
    fit = 0
    for cores, megabytes, resources in (line.split("|") for line in lines):
        there = sum(int(n) for n in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", resources))
        fit += int(cores) >= cpus and there >= gpus and int(megabytes) / 1024 >= memory
    wanted = f"{c.nodes} node(s) of {cpus} cores, {gpus} GPUs{f', {gib(memory)}' if memory else ''}"
    text = f"{wanted}: {fit} of {len(lines)} nodes have that"
    remedy = "choose another cluster file, or another SITE_PARTITION"
    yield verdict("nodes", text, fit >= c.nodes, remedy, "missing")

    minutes, longest = c.slurm.time_limit_minutes, "".join(slurm.ask(*of, "--format=%l").stdout.split()[:1])
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", longest)  # else it is infinite
    days, hours, mins, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    limit = days * 1440 + hours * 60 + mins + seconds / 60
    text = f"{minutes} minutes a job; the partition allows {f'{limit:g}' if match else 'any'}"
    fits = match is None or minutes <= limit
    yield verdict("time limit", text, fits, "lower cluster.slurm.time_limit_minutes", "missing")

    text = (
        f"{c.stop_signal} to the {'batch shell' if c.slurm.signal_to == 'batch' else 'processes'} "
        f"{c.slurm.lead_seconds} s before the limit; then {site.on_preemption}"
    )
    requeues = site.on_preemption != "requeue" or slurm.setting("JobRequeue") != "0"
    remedy = "JobRequeue is 0 here: if jobs are not requeued, set SITE_ON_PREEMPTION=chain"
    yield verdict("stop", text, requeues, remedy)
    scratch = site.scratch or "the nodes' own temporary folder"
    yield Finding("scratch", f"{scratch}; each job looks at its room before it trains")
