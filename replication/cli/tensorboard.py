"""`replicate tensorboard DIR`: runs over seeds beside the cells' own, kept up to date, and TensorBoard on both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from replication.cli.arguments import POSITIVE, folder, takes, verb, whole
from replication.errors import UserError
from replication.processes.launcher import end, still_running, tethered
from replication.runs.layout import SuiteDir

if TYPE_CHECKING:
    from replication.config import SuiteConfig


@verb
@takes("out", "output folder of a suite", folder)
@takes("--host", "address that TensorBoard listens at (default 127.0.0.1)", default="127.0.0.1")
@takes("--port", "its port; 0: a free one (default 6006)", whole(0, 65535), 6006)
@takes("--every", "between two looks (default 10)", POSITIVE, 10.0, metavar="SECONDS")
@takes("--once", "write and return, without TensorBoard", bool, either=False)
@takes("--no-serve", "keep writing, for a TensorBoard that runs elsewhere", bool, either=False)
def tensorboard(args: Namespace) -> None:
    """Write means, bands and paired differences over seeds beside the cells' curves, start TensorBoard, and keep both
    up to date while cells run. Ctrl-C ends it."""
    from replication.config import load_suite
    from replication.tensorboard.tags import first_page
    from replication.tensorboard.writer import claim

    suite_dir, console = SuiteDir(args.out), Console()
    if not suite_dir.suite.is_file():
        raise UserError(f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`")
    suite = load_suite(suite_dir.suite)
    with _writable(suite_dir, suite, args.once, console) as suite_dir, claim(suite, suite_dir) as over_seeds:
        n_points = over_seeds.refresh()
        console.print(f"wrote {n_points:,} points over seeds into {suite_dir.tensorboard}", soft_wrap=True)
        if args.once:
            return
        while args.no_serve:
            time.sleep(args.every)
            over_seeds.refresh()
        with _server(suite_dir.tensorboard, args.host, args.port) as (server, address):
            console.print(
                f"over seeds:   {address}/#custom_scalars&regexInput=over-seeds&_smoothingWeight=0", soft_wrap=True
            )
            console.print(f"curves:       {address}/{first_page(suite.arms[0])}      (Ctrl-C ends it)", soft_wrap=True)
            while server.poll() is None:
                over_seeds.refresh()
                still_running([server], args.every)
    raise UserError(f"tensorboard: ended with code {server.returncode}; its own lines above say why")


@contextmanager
def _writable(suite_dir: SuiteDir, suite: SuiteConfig, once: bool, console: Console) -> Iterator[SuiteDir]:
    """The folder; or, where it can only be read, a passing one that holds the same cells.

    Raises UserError for `once`: what is written would be gone with the passing one.
    """
    if os.access(suite_dir.tensorboard if suite_dir.tensorboard.is_dir() else suite_dir.root, os.W_OK):
        yield suite_dir
        return
    if once:
        raise UserError(f"{suite_dir.root}: can only be read, so that nothing can be written there; leave out --once")
    with tempfile.TemporaryDirectory(prefix="tensorboard-") as name:
        passing = SuiteDir(Path(name))
        passing.suite.symlink_to(suite_dir.suite.absolute())
        passing.runs.symlink_to(suite_dir.runs.absolute())
        passing.withdrawn.symlink_to(suite_dir.withdrawn.absolute())
        for seed in suite.seeds:
            for arm in suite.arms:
                passing.link_tensorboard(arm, seed)
        console.print(f"{suite_dir.root} can only be read: means over seeds lie in {name} meanwhile", soft_wrap=True)
        yield passing


@contextmanager
def _server(logdir: Path, host: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """TensorBoard and its address: a process of ours, which ends with the block, and with us however we end.

    Raises UserError where the port cannot be listened at; 0 is a free one.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port: {host}:{port}: {reason}; choose another --port, or 0 for a free one") from None
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", str(logdir), "--host", host]
    with tethered():
        server = subprocess.Popen(
            [*command, "--port", str(port), "--reload_interval", "5"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the other
            preexec_fn=lambda: None,  # with one, Popen runs the hooks that tether
        )
    try:
        yield server, f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        end([server])
