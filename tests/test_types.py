"""Types: mypy over the package. `launch/test.sh` with arguments runs it before the tests that are named."""

from __future__ import annotations

import subprocess
import sys

from paths import CHECKOUT


def test_types_hold() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
