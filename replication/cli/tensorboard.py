"""`replicate tensorboard DIR`: runs over seeds beside the cells' own, kept up to date, and TensorBoard on both."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from rich.console import Console

from replication.cli.arguments import POSITIVE, Parser, folder, whole
from replication.errors import UserError
from replication.processes.children import end, still_running
from replication.runs.layout import SuiteDir

if TYPE_CHECKING:
    from replication.config import SuiteConfig


def tensorboard(argv: list[str]) -> int:
    """The verb: parse, claim the folder, write; then serve and refresh until Ctrl-C."""
    args = _arguments(argv)
    from replication.config import load_suite
    from replication.tensorboard.tags import run_filter
    from replication.tensorboard.writer import claim

    suite_dir, console = SuiteDir(args.out), Console()
    if not suite_dir.suite.is_file():
        raise UserError(f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`")
    suite = load_suite(suite_dir.suite)
    page = f"#custom_scalars&regexInput={quote(run_filter(len(suite.arms), len(suite.seeds)))}"
    with _writable(suite_dir, suite, args.once, console) as suite_dir, claim(suite, suite_dir) as over_seeds:
        n_points = over_seeds.refresh()
        console.print(f"wrote {n_points:,} points over seeds into {suite_dir.tensorboard}", soft_wrap=True)
        if args.once:
            return 0
        if args.no_serve:
            while True:
                time.sleep(args.every)
                over_seeds.refresh()
        with _server(suite_dir.tensorboard, args.host, _free_port(args.host, args.port)) as (server, address):
            console.print(f"curves:       {address}/{page}      (Ctrl-C ends it)", soft_wrap=True)
            while server.poll() is None:
                over_seeds.refresh()
                still_running([server], args.every)
    raise UserError(f"tensorboard: ended with code {server.returncode}; its own lines above say why")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="replicate tensorboard",
        description="Write means, bands and paired differences over seeds beside the cells' curves, start TensorBoard, "
        "and keep both up to date while cells run. Ctrl-C ends it.",
    )
    parser.add_argument("out", type=folder, help="output folder of a suite")
    parser.add_argument("--host", default="127.0.0.1", help="address that TensorBoard listens at (default 127.0.0.1)")
    parser.add_argument("--port", type=whole(0, 65535), default=6006, help="its port; 0: a free one (default 6006)")
    parser.add_argument(
        "--every", type=POSITIVE, default=10.0, metavar="SECONDS", help="between two looks (default 10)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="write and return, without TensorBoard")
    how.add_argument("--no-serve", action="store_true", help="keep writing, for a TensorBoard that runs elsewhere")
    return parser.parse_args(argv)


@contextmanager
def _writable(suite_dir: SuiteDir, suite: SuiteConfig, once: bool, console: Console) -> Iterator[SuiteDir]:
    """The folder; or, where it can only be read, a passing one that holds the same cells.

    Raises:
        UserError: it can only be read, and what is written once would be gone with the passing one.
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
        for seed in suite.seeds:
            for arm in suite.arms:
                passing.link_tensorboard(arm, seed)
        console.print(f"{suite_dir.root} can only be read: means over seeds lie in {name} meanwhile", soft_wrap=True)
        yield passing


@contextmanager
def _server(logdir: Path, host: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """TensorBoard and its address: a process of ours, which ends with the block, and with us however we end."""
    from replication.processes.children import tethered

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


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        UserError: it cannot be listened at.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port: {host}:{port}: {reason}; choose another --port, or 0 for a free one") from None
        return int(probe.getsockname()[1])
