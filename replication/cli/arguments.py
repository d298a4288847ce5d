"""Arguments of the command line: parser, types, earlier spellings."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

from rich.console import Console

from replication.config.reading import Range, number_of
from replication.errors import UserError

UNCUT = 1000
"""Columns: more than a row has."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviations: --seed is not --seeds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))
        self._old_spellings: dict[str, tuple[str, int]] = {}

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}; see `{self.prog} --help`")

    def old_spelling(self, old: str, new: str = "", words: int = 1) -> None:
        """Let a flag's earlier name work for one more release, with a line on stderr that names the new one.

        Args:
            old: such as --seed-of-kills; --help does not show it.
            new: the flag as it is now, such as --seed; "" where its value stands bare now, as OUT does.
            words: that the old flag took: `--arms A B` with 2 is read as `--pair A,B`; 0 for a switch.
        """
        self._old_spellings[old] = (new, words)

    def _as_spelled_now(self, given: Sequence[str]) -> list[str]:
        found, rest = [], iter(given)
        for word in rest:
            name, equals, value = word.partition("=")
            if name in self._old_spellings:
                new, words = self._old_spellings[name]
                print(f"{self.prog}: {name} is {new or 'left out'} now; the old form goes soon", file=sys.stderr)
                values = [value] * bool(equals) + [*islice(rest, words - bool(equals))]
                found += [new, ",".join(values)] if new and words else [new or ",".join(values)]
            else:
                found.append(word)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does it, but a folder that is given by --out to a verb that takes it bare is named."""
        args = self._as_spelled_now(sys.argv[1:] if args is None else args)
        bare = any(action.dest in ("out", "dir") and not action.option_strings for action in self._actions)
        for i, word in enumerate(args if bare and "--out" not in self._option_string_actions else ()):
            if word.partition("=")[0] == "--out":
                out = word.partition("=")[2] or "".join(args[i + 1 : i + 2]) or "DIR"
                raise UserError(f"{self.prog}: the output folder stands without --out: `{self.prog} {out}`")
        return super().parse_known_args(args, namespace)


def whole(low: int = 1, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Type of an argument that is a whole number from low to high."""
    return _argument(Annotated[int, Range(f"[{low}, {high}]")])


def number(interval: str) -> Callable[[str], float]:
    """Type of an argument that is a number in an interval, such as "(0, inf)"; it is finite."""
    return _argument(Annotated[float, Range(interval)])


def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Type of an argument that is a comma-separated list; sorted, each once."""
    return lambda text: sorted({one(part) for part in text.split(",")})


def folder(text: str) -> Path:
    """Type of an argument that is an output folder: the name of one in out/ is not it, but is known."""
    if not Path(text).exists() and (Path("out") / text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder; did you mean out/{text}?")
    return Path(text)


def table_console() -> Console:
    """Standard output for a table: as wide as its longest row where no terminal says how wide it is."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=UNCUT)


def _argument(hint: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return number_of(hint, text.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


COUNT, NATURAL, POSITIVE = whole(), whole(0), number("(0, 1e9]")
