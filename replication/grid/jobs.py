"""The scripts that are submitted: a header from the cluster and site files, then a script of launch/, word for word."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from replication.config import RunConfig
from replication.errors import UserError
from replication.grid.site import Site

JobStage = Literal["train", "generate", "report"]
BODY = {"train": "array.sbatch", "generate": "array.sbatch", "report": "report.sbatch"}
REPORT_MINUTES = 60
"""Time limit of the report, where the cells' own is not shorter."""


@dataclass(frozen=True)
class Job:
    """One call of sbatch: an array with one element a cell, or the report."""

    name: str
    stage: JobStage
    cells: tuple[str, ...]  # folders relative to the output folder, in the order of the array
    config: RunConfig  # of one of the cells, which share their cluster section
    after: str = ""  # name, or beginning of names, of jobs whose chains it waits for as well


def checkout() -> Path:
    """The folder of the launch scripts.

    Raises:
        UserError: the package was installed without them.
    """
    root = Path(__file__).parents[2]
    if not (root / "launch" / "array.sbatch").is_file():
        raise UserError(f"{root / 'launch'}: no launch scripts there; submit from a checkout of the repository")
    return root


def script(job: Job, site: Site, folder: Path, at_once: int) -> str:
    """The whole text of a job's script.

    Args:
        job: what it runs.
        site: the site file's.
        folder: where the job's scheduler output goes.
        at_once: most elements that run side by side.
    """
    body = (checkout() / "launch" / BODY[job.stage]).read_text(encoding="utf-8")
    head, lines = _split(body)
    settings = {
        "REPLICATION_CHECKOUT": str(checkout()),
        "REPLICATION_SITE": str(site.path or "/dev/null"),
        "REPLICATION_PYTHON": sys.executable,
        "REPLICATION_STOP_SIGNAL": job.config.cluster.stop_signal,
        "REPLICATION_LEAD_SECONDS": str(job.config.cluster.slurm.lead_seconds),
        "REPLICATION_MAX_REQUEUES": str(job.config.cluster.slurm.max_requeues),
        **({"REPLICATION_AFTER": job.after} if job.after else {}),
    }
    written = [
        head[0],
        f"# Written by `replicate grid submit`: settings of this job, then launch/{BODY[job.stage]}, word for word.",
        *(f"#SBATCH {option}" for option in options(job, site, folder, at_once)),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.items()),
        "",
        *head[1:],
        *lines,
    ]
    return "\n".join(written) + "\n"


def _split(body: str) -> tuple[list[str], list[str]]:
    """A script's lines before its #SBATCH lines, and those after them."""
    lines = body.rstrip("\n").split("\n")
    marked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    return lines[: marked[0]], lines[marked[-1] + 1 :]


def options(job: Job, site: Site, folder: Path, at_once: int) -> list[str]:
    """The options of sbatch, one a line."""
    cluster, slurm = job.config.cluster, job.config.cluster.slurm
    trains = job.stage == "train"
    minutes = slurm.time_limit_minutes if job.stage != "report" else min(REPORT_MINUTES, slurm.time_limit_minutes)
    found = [f"--job-name={job.name}", f"--chdir={_word(Path.cwd())}"]
    if job.stage == "report":
        found += [f"--output={_word(folder / 'output.txt')}"]
    else:
        found += [f"--array=0-{len(job.cells) - 1}%{min(at_once, len(job.cells))}"]
        found += [f"--output={_word(folder / 'output-%a.txt')}"]
    found += ["--open-mode=append", f"--nodes={cluster.nodes if trains else 1}"]
    found += [f"--ntasks-per-node={cluster.devices if trains else 1}"]
    if cluster.accelerator == "gpu" and job.stage != "report":
        gpus = cluster.devices if trains else 1
        found += [f"--gpus-per-node={gpus}" if site.gpus == "gpus-per-node" else f"--gres=gpu:{gpus}"]
    if slurm.cpus_per_task:
        found += [f"--cpus-per-task={slurm.cpus_per_task}"]
    if slurm.memory_gib and job.stage != "report":
        found += [f"--mem={slurm.memory_gib if trains else -(-slurm.memory_gib // cluster.devices)}G"]
    found += [f"--time={minutes}"]
    found += [f"--signal={'B:' if slurm.signal_to == 'batch' else ''}{cluster.stop_signal}@{slurm.lead_seconds}"]
    found += ["--requeue" if site.on_preemption == "requeue" else "--no-requeue"]
    for name in ("account", "partition", "qos", "constraint"):
        if getattr(site, name):
            found += [f"--{name}={getattr(site, name)}"]
    return found + ([site.sbatch] if site.sbatch else [])


def _word(path: Path) -> str:
    """A path as one word of an #SBATCH line."""
    return f'"{path}"' if " " in str(path) else str(path)


def arguments(job: Job, folder: Path, out: Path) -> list[str]:
    """The script's own arguments."""
    return [str(out)] if job.stage == "report" else [str(folder / "plan.txt"), str(out), job.stage]


def plain_name(text: str) -> str:
    """A name without the characters that schedulers trip over."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)


def check_accelerator(configs: Sequence[RunConfig]) -> None:
    """Raise UserError where a config leaves open whether its job needs GPUs."""
    if any(config.cluster.accelerator == "auto" for config in configs):
        raise UserError(
            "cluster.accelerator: auto does not say whether a job needs GPUs; choose cpu or gpu, or give a file of "
            "configs/cluster with --cluster"
        )
