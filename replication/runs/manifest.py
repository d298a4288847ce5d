"""The manifest of a cell: what ran, from what, on what, and how it ended; and the marker COMPLETE's copy of its end.

Written by the training at every start and at the end, and by the sampling of completions. Every other part reads it
here: `read_manifest` where damage is an error, `find_manifest` where it counts as missing. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from replication.config import RunConfig, scientific_hash
from replication.errors import CHECKOUT, UserError
from replication.runs.files import file_sha256, read_object, sync, write_json
from replication.runs.layout import KEPT, RunDir
from replication.runs.ledger import append_of_cell
from replication.runs.records import from_json, to_json

SCHEMA = 2
"""Of manifests that say so; those of version 0.1.0 have no schema, and from_json reads them too."""
COMPUTES = ("config", "data", "generation", "grid/cell.py", "model", "objectives", "training")
"""The part of this package on which a cell's weights, measures and completions depend: what its processes load, but
for what only reads, places, starts, stamps or ends them. Every byte of it counts, comments too; report, judging page
and grid do not."""
PACKAGES = (
    *("replication", "torch", "lightning", "deepspeed", "datasets", "tokenizers", "torchmetrics", "numpy"),
    *("triton", "liger-kernel"),
)


@dataclass(frozen=True, kw_only=True)
class Code:
    """Code that ran."""

    code_hash: str | None = None  # None: an older version of this package did not record it
    packages: Mapping[str, str | None] = field(default_factory=dict)  # versions; None for what was not installed


@dataclass(frozen=True, kw_only=True)
class Git:
    """State of a checkout; None for what could not be told."""

    commit: str | None = None
    dirty: bool | None = None  # whether it had changes that no commit holds


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """None for what could not be told."""

    cpu: str | None = None
    cores: int | None = None
    gpus: tuple[str, ...] = ()
    memory_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Environment(Code):
    """Code, packages, checkout and hardware that a start ran with."""

    git: Git = field(default_factory=Git)
    hardware: Hardware = field(default_factory=Hardware)


@dataclass(frozen=True, kw_only=True)
class PlanStamp:
    """The registered plan that lay in the folder at a start."""

    sha256: str | None = None
    frozen_at: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The corpus that a cell was trained on."""

    hash: str | None = None
    dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Start(Environment):
    """One start of a cell's training."""

    at: str | None = None
    step: int | None = None  # from which it went on; 0: the first. Older records have none.
    plan: PlanStamp | None = None
    strategy: Mapping[str, Any] = field(default_factory=dict)
    """Sharding of the state: strategy, world_size, offload_optimizer."""
    ledger: str | None = None  # hash of the ledger's last line by then; "": it had none; None: not recorded
    machine: Mapping[str, Any] | None = None  # what may change a rounding (training/environment.py); old ones have none


@dataclass(frozen=True)
class Extension:
    """What `replicate grid extend` made of a cell: one of more steps, with all that it had behind it."""

    at: str
    from_steps: int
    to_steps: int
    why: str
    config_hash: str  # of the cell until then

    def __str__(self) -> str:
        return f"from {self.from_steps:,} to {self.to_steps:,} steps at {self.at}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second, over all processes."""

    measured: float | None = None  # median of the journal's lines
    predicted: float | None = None  # by model/cost.py, for as many H100s; None on a CPU


@dataclass(frozen=True, kw_only=True)
class Manifest(Environment):
    """A field that is not known, or has another form than it should, is None or empty."""

    schema: int = SCHEMA
    arm: str | None = None
    seed: int | None = None
    config_hash: str | None = None
    arm_keys: tuple[str, ...] = ()  # dotted keys that the arm's file sets
    plan: PlanStamp | None = None  # of the first start that logged a step
    logged_before: bool = False  # whether a start before the latest one logged a step
    data: Data = field(default_factory=Data)
    world_size: int | None = None
    strategy: Mapping[str, Any] = field(default_factory=dict)
    weights_seed: int | None = None
    parameters: int | None = None
    initial_weights_sha256: str | None = None
    started_at: str | None = None
    starts: tuple[Start, ...] = ()  # oldest first; the oldest manifests have none, see `all_starts`
    preflight: Mapping[str, Any] | None = None  # findings of the ranks before the first step: room, needs, bandwidth
    deepspeed: Mapping[str, Any] | None = None  # the config that DeepSpeed resolved
    step: int | None = None  # the last; with it the cell is trained, as are the five below
    tokens: int | None = None
    data_chain: str | None = None
    wall_seconds: float | None = None
    final_weights_sha256: str | None = None
    finished_at: str | None = None
    speed: Speed | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the completions, with prompts_sha256, weights_sha256 and samples_sha256."""
    generated_by: Code | None = None
    extensions: tuple[Extension, ...] = ()  # oldest first

    @property
    def all_starts(self) -> tuple[Start, ...]:
        """Those that are recorded; of an older manifest the one that its own fields describe."""
        inherited = {f.name: getattr(self, f.name) for f in dataclasses.fields(Environment)}
        return self.starts or (Start(at=self.started_at, plan=self.plan, strategy=self.strategy, **inherited),)


ONCE_KNOWN = ("preflight", "deepspeed", "step", "tokens", "data_chain", "wall_seconds", "final_weights_sha256",
              "finished_at", "speed", "generation", "generated_by", "extensions")  # fmt: skip
"""Fields that the file has no key for until they are known."""


def code_hash() -> str:
    """SHA-256 of the names and bytes of the source files that COMPUTES covers, first 16 hex digits."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for part in COMPUTES:
        for path in sorted((package / part).rglob("*.py")) or [package / part]:
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str | None]:
    """Versions of what computes, None for what is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions | {"python": platform.python_version()}


def code_identity() -> Code:
    """Of the code that runs."""
    return Code(code_hash=code_hash(), packages=package_versions())


def git_state() -> Git:
    """Of the checkout that this package is in."""
    status, commit = _git("status", "--porcelain"), _git("rev-parse", "HEAD")
    return Git(
        commit=None if commit is None else commit.decode().strip(), dirty=None if status is None else bool(status)
    )


def _git(*words: str, code: int = 0) -> bytes | None:
    """What a command of git prints in this checkout; None where it ends with another code, or there is no git."""
    if CHECKOUT is None:  # the repository around an environment is not ours
        return None
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == code else None


def code_patch() -> bytes:
    """The changes of package and configs that no commit holds, for `git apply`, new files too; empty where none are."""
    package = ("replication", "configs")
    diff = ("diff", "--binary", "--no-ext-diff", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")  # whatever is set
    changed = _git(*diff, "HEAD", "--", *package)
    new = (_git("ls-files", "--others", "--exclude-standard", "-z", "--", *package) or b"").split(b"\0")
    added = [_git(*diff, "--no-index", "/dev/null", os.fsdecode(name), code=1) for name in new if name]
    return b"".join(part for part in (changed, *added) if part)


def write_manifest(run: RunDir, manifest: Manifest) -> None:
    """Begin the cell's manifest, or begin it anew."""
    tree = to_json(manifest)
    write_json(run.manifest, {k: v for k, v in tree.items() if v not in (None, {}, []) or k not in ONCE_KNOWN})


def update_manifest(run: RunDir, **changes: Any) -> None:
    """Change fields of the manifest that is there; keys that only another version knows stay."""
    dataclasses.replace(Manifest(), **changes)  # TypeError for what is no field
    write_json(run.manifest, read_object(run.manifest) | to_json(changes))


def read_manifest(run: RunDir) -> Manifest | None:
    """A cell's manifest, of any version; None: there is none. UserError: no reading it, or it is of a later version."""
    tree = read_object(run.manifest)
    if not tree:
        return None
    manifest = from_json(Manifest, tree, lenient=True)
    if manifest.schema > SCHEMA:
        raise UserError(
            f"{run.manifest}: has schema {manifest.schema}, this version of replication reads up to {SCHEMA}; update it"
            + (f", at least to commit {manifest.git.commit}, which trained the cell" if manifest.git.commit else "")
        )
    return manifest


def find_manifest(run: RunDir) -> Manifest | None:
    """As read_manifest, but None also where it cannot be read."""
    with suppress(UserError, OSError):
        return read_manifest(run)
    return None


def is_trained(run: RunDir) -> bool:
    """Whether a cell has been trained to its last step, completions or not (UserError: its manifest is damaged)."""
    manifest = read_manifest(run)
    return manifest is not None and manifest.finished_at is not None


def refuse_untrained(run: RunDir) -> Manifest:
    """The manifest of a cell that has been trained to its last step; UserError where it has not been."""
    manifest = read_manifest(run)
    if manifest is None or manifest.finished_at is None:
        raise UserError(f"{run.root}: is not trained to its last step, so it cannot generate; train it first")
    return manifest


def mark_cell_complete(config: RunConfig, run: RunDir) -> None:
    """Write the marker of a cell that is trained and has the completions that its config asks for.

    All that it stands for is on the disk before it is; the certificate compares it with journal and manifest.
    Raises UserError where the journal is gone.
    """
    if not run.metrics.is_file():
        raise UserError(f"{run.metrics}: is gone, and with it the cell's numbers; restore it, or train the cell again")
    manifest = read_manifest(run) or Manifest()
    sync(run.metrics)  # manifest, checkpoints and samples.jsonl were, when they were written
    marker = {"config_hash": scientific_hash(config), **{k: getattr(manifest, k) for k in (*KEPT, "finished_at")}}
    marker["journal_sha256"] = file_sha256(run.metrics)
    of_weights = manifest.final_weights_sha256
    append_of_cell(run, "complete", journal_sha256=marker["journal_sha256"], final_weights_sha256=of_weights)
    write_json(run.complete, marker)
