"""The site file: what is true of one cluster, whatever runs there. A shell file, read by jobs and by `grid submit`."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from replication.errors import UserError

CHOICES = {"on_preemption": ("requeue", "chain", "end"), "gpus": ("gpus-per-node", "gres")}

# Prints every SITE_ variable that a file sets, null-terminated; what the file itself prints goes elsewhere.
_READ = 'source "$1" >&2; for name in ${!SITE_@}; do printf "%s=%s\\0" "$name" "${!name}"; done'


@dataclass(frozen=True)
class Site:
    """The variables of launch/site.env.example, without their prefix SITE_."""

    path: Path | None = None
    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    sbatch: str = ""
    gpus: str = "gpus-per-node"
    on_preemption: str = "requeue"
    modules: str = ""
    container: str = ""
    master_addr: str = ""
    scratch: str = ""


def default_site(path: Path | None) -> Site:
    """The named site file, else the checkout's launch/site.env, else a site that asks for nothing."""
    default = Path(__file__).parents[2] / "launch" / "site.env"
    return load_site(path or default) if path or default.is_file() else Site()


def load_site(path: Path) -> Site:
    """Read a site file as bash does, without changing anything here.

    Raises:
        UserError: the file is missing or fails, sets an unknown SITE_ variable, or one to what it cannot be.
    """
    if not path.is_file():
        raise UserError(f"--site: {path} does not exist; copy launch/site.env.example there and fill it in")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SITE_")}
    done = subprocess.run(
        ["bash", "-e", "-c", _READ, "bash", str(path.resolve())],
        env=environment, capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{path}: bash cannot read it ({reason}); fix it, launch/site.env.example shows the form")
    values = dict(item.partition("=")[::2] for item in done.stdout.split("\0") if item)
    known = {f"SITE_{name.upper()}": name for name in Site.__dataclass_fields__ if name != "path"}
    for variable in values:
        if variable not in known:
            raise UserError(f"{path}: unknown {variable}; the site's variables are {', '.join(known)}")
    given = {known[variable]: value for variable, value in values.items() if value}
    for name, choices in CHOICES.items():
        if given.get(name, choices[0]) not in choices:
            raise UserError(f"{path}: SITE_{name.upper()} is '{given[name]}'; it must be one of {', '.join(choices)}")
    return Site(path=path.resolve(), **given)
