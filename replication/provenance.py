"""Which code this is, where it can be told; and the form of every time that is written down. Imports no torch."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any


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


def timestamp() -> str:
    """Now, to the second, with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
