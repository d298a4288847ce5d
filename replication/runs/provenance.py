"""The identity of the code that runs: its hash, its packages, its commit. Imports no torch."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

COMPUTES = ("config", "data", "generation", "grid/cell.py", "model", "objectives", "training")
"""The part of this package on which a cell's weights, measures and completions depend: what its processes load, but
for what only reads, places, starts, stamps or ends them. Every byte of it counts, comments too; report, judging page
and grid do not."""
PACKAGES = (
    *("replication", "torch", "lightning", "deepspeed", "datasets", "tokenizers", "torchmetrics", "numpy"),
    *("triton", "liger-kernel"),
)


def code_hash() -> str:
    """SHA-256 of the names and bytes of the source files that COMPUTES covers, first 16 hex digits."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for part in COMPUTES:
        for path in sorted((package / part).rglob("*.py")) or [package / part]:
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str | None]:
    """Versions of what computes, None for what is not installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class Code:
    """Code that ran."""

    code_hash: str | None = None
    """None: an older version of this package did not record it."""
    packages: Mapping[str, str | None] = field(default_factory=dict)
    """Versions; None for what was not installed."""


def code_identity() -> Code:
    """Of the code that runs."""
    return Code(code_hash=code_hash(), packages=package_versions())


@dataclass(frozen=True, kw_only=True)
class Git:
    """State of a checkout; None for what could not be told."""

    commit: str | None = None
    dirty: bool | None = None
    """Whether it had changes that no commit holds."""


def git_state() -> Git:
    """Of the checkout that this package is in."""

    def git(*args: str) -> str | None:
        try:
            root = Path(__file__).parent
            done = subprocess.run(
                ["git", *args],
                cwd=root,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain")
    return Git(commit=commit, dirty=None if status is None else bool(status))
