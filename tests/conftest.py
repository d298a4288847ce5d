"""Tables that tests measure, printed at the end of the run whether or not they pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_TABLES: list[str] = []


@pytest.fixture(scope="session")
def publish() -> Callable[[str], None]:
    """Adds lines to what is printed before pytest's closing line."""
    return _TABLES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TABLES:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(_TABLES))
