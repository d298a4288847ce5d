"""Arguments of the command line: earlier names of flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from replication.cli.arguments import Parser


def parser() -> Parser:
    made = Parser(prog="replicate verb")
    made.add_argument("out", type=Path)
    made.add_argument("--seed", type=str)
    made.add_argument("--pair")
    made.add_argument("--full", action="store_true")
    made.old_spelling("--out")
    made.old_spelling("--seed-of-kills", "--seed")
    made.old_spelling("--arms", "--pair", words=2)
    made.old_spelling("--whole", "--full", words=0)
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "o", "--seed-of-kills=3", "--arms", "a", "b", "--whole"],
        ["--out=o", "--whole", "--seed-of-kills", "3", "--arms", "a", "b"],
    ],
)
def test_an_old_spelling_is_read_as_the_new_one_and_says_so(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = parser().parse_args(words)
    assert (args.out, args.seed, args.pair, args.full) == (Path("o"), "3", "a,b", True)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and "replicate verb: --seed-of-kills is --seed now; the old form goes soon" in said


def test_the_new_spelling_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args(["o", "--seed=3", "--pair", "a,b"])
    assert (args.out, args.seed, args.pair) == (Path("o"), "3", "a,b")
    assert capsys.readouterr().err == ""
