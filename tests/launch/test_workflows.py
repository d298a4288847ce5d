"""The workflows of .github: what each may do, what it calls, and actionlint's word where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import CHECKOUT

from replication import __version__

WORKFLOWS = sorted((CHECKOUT / ".github" / "workflows").glob("*.yml"))
NAMES = [path.stem for path in WORKFLOWS]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES)
def test_a_workflow_may_read_and_what_writes_says_so(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    writing = [name for name, job in workflow["jobs"].items() if "permissions" in job]
    assert writing == (["release"] if path.stem == "wheel" else [])
    assert "pull_request_target" not in path.read_text()
    used = [step for step in steps(workflow) if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in used)
    assert all(s["with"]["persist-credentials"] is False for s in used if s["uses"].startswith("actions/checkout@"))
    named = re.findall(r"(?:\.ci|launch)/[\w./-]+\w", "\n".join(step.get("run", "") for step in steps(workflow)))
    assert [name for name in named if not (CHECKOUT / name).exists()] == []


def test_actionlint_finds_nothing() -> None:
    if not shutil.which("actionlint"):
        pytest.skip("needs actionlint")
    done = subprocess.run(["actionlint", *WORKFLOWS], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
