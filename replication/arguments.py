"""How the command line reads its arguments."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from replication.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviations: --seed is not --seeds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")
