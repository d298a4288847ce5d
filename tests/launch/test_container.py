"""The image of launch/container: what goes into it; with REPLICATION_FULL=1 and buildah it is built, and trains a cell.

Its base is the Dockerfile's; REPLICATION_BUILD are further options of `buildah bud`, such as
"--isolation chroot --build-arg BASE=localhost/debian".
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable

import pytest
from paths import CHECKOUT
from required import do_without

CONTAINER = CHECKOUT / "launch" / "container"


def buildah(*arguments: str) -> str:
    """What buildah prints last; its steps go to the test's captured output."""
    done = subprocess.run(["buildah", *arguments], cwd=CHECKOUT, stdout=subprocess.PIPE, encoding="utf-8", timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, shlex.join(arguments)
    return done.stdout.strip()


def test_the_image_gets_what_the_package_is_built_from_and_no_secrets() -> None:
    rules = (CHECKOUT / ".dockerignore").read_text().split()
    assert rules[0] == "*" and "launch/site.env" in rules
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]]
    needed += [*wheel["packages"], *wheel["force-include"], "launch/install.sh"]
    assert [path for path in needed if not any(fnmatch.fnmatch(path.split("/")[0], rule) for rule in let_in)] == []


def test_the_apptainer_definition_starts_from_the_image_that_the_page_exports() -> None:
    archive = re.search(r"^Bootstrap: oci-archive\nFrom: (\S+)$", (CONTAINER / "replication.def").read_text(), re.M)
    assert archive and f"oci-archive:{archive[1]}" in (CHECKOUT / "launch" / "README.md").read_text()


@pytest.mark.full
def test_an_image_is_built_and_trains_a_cell_for_a_user_who_is_not_root(publish: Callable[[str], None]) -> None:
    if not shutil.which("buildah"):
        do_without("buildah", "needs buildah (apt-get install buildah)")
    options = shlex.split(os.environ.get("REPLICATION_BUILD", ""))
    image = "localhost/replication-test"
    buildah("bud", *options, "--file", str(CONTAINER / "Dockerfile"), "--tag", image, ".")
    isolation = ["--isolation", "chroot"] if "chroot" in options else []
    name = buildah("from", image).splitlines()[-1]
    try:
        layers = "--config model/tiny.yaml --config data/python.yaml --config cluster/cpu.yaml"
        steps = "--training.steps=20 --training.warmup_steps=5"
        cell = f"replicate prepare {layers} --out out/data && replicate train {layers} {steps} --out out"
        said = buildah("run", *isolation, name, "--", "bash", "-c", f"id -u; {cell}; find out -name COMPLETE")
        assert said.splitlines()[0] == "1000"
        assert "out/runs/baseline/seed-1337/COMPLETE" in said
        size = buildah("images", "--format", "{{.Size}}", image)
    finally:
        buildah("rm", name)
    publish(f"the image of launch/container/Dockerfile: {size}")
