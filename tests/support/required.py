"""A tool that a test needs and this machine lacks."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def do_without(tool: str, reason: str) -> NoReturn:
    """Skip the test with the reason; fail it where REPLICATION_REQUIRE names the tool, as `.ci/run` does."""
    if tool in os.environ.get("REPLICATION_REQUIRE", "").split():
        pytest.fail(reason)
    pytest.skip(reason)
