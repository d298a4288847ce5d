"""The identity of the code that runs: its hash, its packages, its commit. Imports no torch."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

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


def code_identity() -> dict[str, Any]:
    """What is stored of the code that runs: {"code_hash", "packages": {name: version}}."""
    return {"code_hash": code_hash(), "packages": package_versions()}


def git_state() -> dict[str, Any]:
    """{"commit": of this checkout, "dirty": whether it has changes}; None for what cannot be told."""

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
    return {"commit": commit, "dirty": None if status is None else bool(status)}
