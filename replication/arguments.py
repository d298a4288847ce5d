"""How the command line reads its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

from replication.errors import UserError
from replication.reading import Range, number_of


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviations: --seed is not --seeds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}; see `{self.prog} --help`")


def whole(low: int = 1, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Type of an argument that is a whole number from low to high."""
    return _argument(Annotated[int, Range(f"[{low}, {high}]")])


def number(interval: str) -> Callable[[str], float]:
    """Type of an argument that is a number in an interval, such as "(0, inf)"; it is finite."""
    return _argument(Annotated[float, Range(interval)])


def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Type of an argument that is a comma-separated list; sorted, each once."""
    return lambda text: sorted({one(part) for part in text.split(",")})


def _argument(hint: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return number_of(hint, text.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


COUNT, NATURAL, POSITIVE = whole(), whole(0), number("(0, 1e9]")
