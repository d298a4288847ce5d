"""The test session itself."""

from __future__ import annotations

import os
import subprocess
import sys

from paths import SUPPORT

HEARS = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"


def test_a_session_started_with_ctrl_c_ignored_hears_it_and_so_do_its_children() -> None:
    session = f"import subprocess, conftest\n{HEARS.replace('sys.exit(', 'assert not (')}\n"
    session += f"subprocess.run([sys.executable, '-c', {HEARS!r}], check=True)"
    deaf = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", sys.executable, "-c"]
    assert subprocess.run([*deaf, HEARS]).returncode == 1  # else this shows nothing
    subprocess.run([*deaf, session], env=os.environ | {"PYTHONPATH": f"{SUPPORT.parent}:{SUPPORT}"}, check=True)
