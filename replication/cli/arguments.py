"""Arguments of the command line: how a verb declares them, their types, earlier spellings.

A verb is a function of its parsed arguments, and the decorators above it are those arguments, in the order of --help:

    @verb
    @takes("dir", "output folder of a suite", folder)
    @takes("--jobs", "cells side by side (default 1)", COUNT, 1)
    @takes_keys()
    def count(args: Namespace) -> None:
        \"\"\"Count a suite's cells.\"\"\"

Its docstring is the help. `actions` makes one verb of several such functions.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

from rich.console import Console

from replication.config.reading import Range, number_of
from replication.errors import UserError, did_you_mean

Function = Callable[[Namespace], int | None]
Verb = Callable[[Sequence[str]], int]
Declares = Callable[[Any], Any]


def takes(name: str, text: str, kind: Callable[[str], Any] = str, default: Any = None, **more: Any) -> Declares:
    """Declare an argument of the function below.

    Args:
        name: of a flag such as --jobs, which is `args.jobs` then, or of a word that stands bare.
        text: its line in --help.
        kind: what makes a value of its text; bool: a switch.
        more: what argparse's add_argument takes; `old`, an earlier spelling; or `either`, for those of which only one
            may be given: whether one must be.
    """
    more |= {"help": text} | ({"action": "store_true"} if kind is bool else {"type": kind, "default": default})
    declared = name, more.pop("old", None), more.pop("either", None), more

    def declare(act: Function) -> Function:
        vars(act).setdefault("arguments", []).insert(0, declared)
        return act

    return declare


def together(*declared: Declares) -> Declares:
    """Several arguments in one decorator."""
    return lambda act: functools.reduce(lambda made, declare: declare(made), reversed(declared), act)


def takes_keys(text: str = "Any key of a run may follow as a flag.") -> Declares:
    """Let keys of a run follow as flags, which are `args.keys` then; the text ends the description in --help."""

    def declare(act: Function) -> Function:
        vars(act)["keys"] = text
        return act

    return declare


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviations: --seed is not --seeds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))
        self._old_spellings: dict[str, tuple[str, int]] = {}

    def error(self, message: str) -> NoReturn:
        known = [*self._option_string_actions, *(str(c) for action in self._actions for c in action.choices or ())]
        wrong = re.search(r"(?:invalid choice: '|unrecognized arguments: )([\w-]+)", message)
        meant = did_you_mean(wrong[1], known) if wrong else ""
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}{meant}; see `{self.prog} --help`")

    def declare(self, act: Callable[..., Any]) -> Parser:
        """Take what a function says that it takes, which is `args.act` then."""
        self.set_defaults(act=act)
        self.description = f"{_first_paragraph(act)} {vars(act).get('keys', '')}".strip()
        either = None
        for name, old, needed, more in vars(act).get("arguments", []):
            if old:
                self.old_spelling(old, name)
            if needed is not None and either is None:
                either = self.add_mutually_exclusive_group(required=needed)
            (self if needed is None or either is None else either).add_argument(name, **more)
        return self

    def old_spelling(self, old: str, new: str = "", words: int = 1) -> None:
        """Let a flag's earlier name work for one more release, with a line on stderr that names the new one.

        Args:
            old: such as --seed-of-kills; --help does not show it.
            new: the flag as it is now, such as --seed; "" where its value stands bare now, as OUT does.
            words: that the old flag took: `--arms A B` with 2 is read as `--pair A,B`; 0 for a switch.
        """
        self._old_spellings[old] = (new, words)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does it, but in today's spelling; and a folder that is given by --out to a verb that takes it
        bare is named."""
        words, rest = [], iter(sys.argv[1:] if args is None else args)
        for word in rest:
            name, equals, value = word.partition("=")
            if name not in self._old_spellings:
                words.append(word)
                continue
            new, taken = self._old_spellings[name]
            print(f"{self.prog}: {name} is {new or 'left out'} now; the old form goes soon", file=sys.stderr)
            given = ",".join([value] * bool(equals) + [*islice(rest, taken - bool(equals))])
            words += [new, given] if new and taken else [new or given]
        bare = any(action.dest in ("out", "dir") and not action.option_strings for action in self._actions)
        for i, word in enumerate(words if bare and "--out" not in self._option_string_actions else ()):
            if word.partition("=")[0] == "--out":
                out = word.partition("=")[2] or "".join(words[i + 1 : i + 2]) or "DIR"
                raise UserError(f"{self.prog}: the output folder stands without --out: `{self.prog} {out}`")
        return super().parse_known_args(words, namespace)


def verb(act: Function) -> Verb:
    """`replicate NAME WORDS` of the function of that name: from the words to the exit code, 0 where it gives none."""

    def run(argv: Sequence[str]) -> int:
        parser = Parser(prog=f"replicate {act.__name__.replace('_', '-')}").declare(act)
        args, args.keys = parser.parse_known_args(argv) if "keys" in vars(act) else (parser.parse_args(argv), [])
        return act(args) or 0

    return run


def actions(name: str, text: str, *acts: Function, no_keys: str = "", **earlier: str) -> Verb:
    """`replicate NAME ACTION WORDS` of the functions of its actions.

    Args:
        no_keys: the remedy where keys are given to an action that takes none, beside others that do.
        earlier: the name that an action had before.
    """

    def run(argv: Sequence[str]) -> int:
        parser = Parser(prog=f"replicate {name}", description=text)
        names = "|".join(act.__name__ for act in acts)
        choices = parser.add_subparsers(dest="action", required=True, metavar=names, parser_class=Parser)
        for act in acts:
            line, before = _first_paragraph(act).rstrip("."), [earlier[act.__name__]] if act.__name__ in earlier else []
            choices.add_parser(act.__name__, help=line[0].lower() + line[1:], aliases=before).declare(act)
        args, rest = parser.parse_known_args(argv)
        args.keys = rest
        if args.keys and "keys" not in vars(args.act):
            if no_keys and "." in args.keys[0]:
                raise UserError(f"{parser.prog} {args.action}: {args.keys[0]} does not act here; {no_keys}")
            choices.choices[args.action].error(f"unrecognized arguments: {' '.join(args.keys)}")
        return args.act(args) or 0

    return run


def _first_paragraph(act: Function) -> str:
    return (act.__doc__ or "").partition("\n\n")[0]


def whole(low: int = 1, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Type of an argument that is a whole number from low to high."""
    return _typed(Annotated[int, Range(f"[{low}, {high}]")])


def number(interval: str) -> Callable[[str], float]:
    """Type of an argument that is a number in an interval, such as "(0, inf)"; it is finite."""
    return _typed(Annotated[float, Range(interval)])


def _typed(hint: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return number_of(hint, text.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Type of an argument that is a comma-separated list; sorted, each once."""
    return lambda text: sorted({one(part) for part in text.split(",")})


def folder(text: str) -> Path:
    """Type of an argument that is an output folder: the name of one in out/ is not it, but is known."""
    if not Path(text).exists() and (Path("out") / text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder; did you mean out/{text}?")
    return Path(text)


def table_console() -> Console:
    """Standard output for a table: wider than any row where no terminal says how wide it is."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=1000)


COUNT, NATURAL, POSITIVE, SEED = whole(), whole(0), number("(0, 1e9]"), whole(0, 2**32 - 1)
