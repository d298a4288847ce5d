"""The longest files, then fast tests; at the end time by file, and tables that tests measure, passed or not."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable

import pytest
from chromium import browser, clean  # noqa: F401  (fixtures)
from postgres_server import postgres  # noqa: F401  (a fixture: one server for all files of tests)

MEASURED = "measured"

# A shell starts background jobs, nohup and many CI runners start all, with SIGINT ignored, and children inherit that:
# nothing here would hear Ctrl-C. Restored once, for this process (each worker too) and for all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("test_slurm.py", "test_grid.py", "test_parity.py", "test_drill.py", "test_types.py")
"""Begun first, so that none ends late."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[bool, bool]:
        return item.path.name not in LONGEST, item.get_closest_marker("slow") is not None

    items.sort(key=place)  # stable: else the order of the files
    if not os.environ.get("REPLICATION_FULL"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="long form: REPLICATION_FULL=1"))


@pytest.fixture
def publish(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Adds lines to what is printed before pytest's closing line."""
    return lambda text: record_property(MEASURED, text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for outcome in ("passed", "failed", "") for r in terminalreporter.stats.get(outcome, [])]
    seconds: Counter[str] = Counter()
    for r in reports:
        seconds[r.nodeid.partition("::")[0]] += r.duration
    terminalreporter.section("seconds by file, the longest 30")
    terminalreporter.write_line("\n".join(f"{s:7.1f} {file}" for file, s in seconds.most_common(30)))
    lines = [text for r in reports if r.when == "call" for name, text in r.user_properties if name == MEASURED]
    if lines:
        terminalreporter.section(MEASURED)
        terminalreporter.write_line("\n".join(lines))
