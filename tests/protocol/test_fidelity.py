"""The fidelity tables of configs/README.md: up to date, every key there, what deviates marked and explained."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from paths import CHECKOUT

from replication.errors import UserError
from replication.protocol import fidelity
from replication.protocol.fidelity import BEGIN, END, SECTIONS, UNPUBLISHED, Line, Row, lines, renewed, tables

fresh = functools.cache(tables)  # loading configs is most of the time of these tests


@functools.cache
def all_lines() -> list[Line]:
    return [line for section in SECTIONS for line in lines(section)]


def test_the_page_is_up_to_date() -> None:
    text = (CHECKOUT / "configs" / "README.md").read_text(encoding="utf-8")
    assert renewed(text, fresh()) == text, "run python -m replication.protocol.fidelity --write; read the difference"


def test_a_verdict_is_what_the_values_say() -> None:
    for line in all_lines():
        published = line.row.published
        if published is UNPUBLISHED:
            assert line.verdict == "our choice"
        elif line.row.keys == "parameters":
            assert (line.verdict == "as published") == (0.98 <= line.ours / published <= 1.02)
        else:
            assert (line.verdict == "as published") == (line.ours == published)


def test_what_is_not_as_published_has_a_reason_and_a_mark() -> None:
    for line in all_lines():
        assert line.verdict == "as published" or line.row.reason, line.row
    marked = [row for row in fresh().splitlines() if "| deviates; " in row]
    assert len(marked) == 2 * sum(line.verdict == "deviates" for line in all_lines()), "once in each table"


def test_ours_is_read_from_the_configs() -> None:
    """A changed config turns a published value into a deviation."""
    steps = Row("training.steps training.batch_tokens", (30_000, 131_072), "why")
    section = replace(SECTIONS[0], rows=(steps,))
    assert lines(section)[0].verdict == "as published"
    shorter = replace(section, rows=(replace(steps, published=(20_000, 131_072)),))
    assert lines(shorter)[0] == Line(shorter.rows[0], (30_000, 131_072), "deviates")


def test_a_key_that_no_run_has_is_named() -> None:
    section = replace(SECTIONS[0], rows=(Row("training.stepps", 1),))
    with pytest.raises(UserError, match=r"training\.stepps: a row of the fidelity table names it"):
        lines(section)


def test_the_command_renews_what_stands_between_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = [sys.executable, "-m", "replication.protocol.fidelity", "--write", str(file)]
    subprocess.run(command, check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    assert file.read_text() == f"before\n{BEGIN}\n{fresh()}\n{END}\nafter\n"


def test_a_file_without_markers_is_left_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(fidelity, "tables", fresh)
    file = tmp_path / "page.md"
    file.write_text("nothing here\n")
    assert fidelity.main(["--write", str(file)]) == 2
    assert file.read_text() == "nothing here\n"
    assert BEGIN in capsys.readouterr().err
