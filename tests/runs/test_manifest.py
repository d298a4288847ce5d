"""The typed records of a run folder: one form, older forms read, damage of a field passed over or named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from replication.errors import UserError
from replication.runs.files import read_json, write_json
from replication.runs.layout import RunDir
from replication.runs.manifest import (
    SCHEMA,
    Code,
    Data,
    Environment,
    Git,
    Hardware,
    Manifest,
    PlanStamp,
    Start,
    find_manifest,
    is_trained,
    read_manifest,
    update_manifest,
    write_manifest,
)
from replication.runs.records import WrongForm, from_json, read_record, to_json, write_record

MACHINE = Environment(
    code_hash="c0de",
    packages={"torch": "2.13.0", "deepspeed": None},
    git=Git(commit="abc", dirty=False),
    hardware=Hardware(cpu="a CPU", cores=2, gpus=("a GPU",), memory_gib=3.5),
)
START = Start(at="now", step=0, plan=PlanStamp(sha256="5", frozen_at="then"), machine={"ranks": 1}, **vars(MACHINE))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "both" / "seed-1")
    write_manifest(run, Manifest(arm="both", seed=1, data=Data(hash="f"), starts=(START,), **vars(MACHINE)))
    return run


def test_it_reads_back_as_it_was_and_grows(run: RunDir) -> None:
    there = read_manifest(run)
    assert there == Manifest(arm="both", seed=1, data=Data(hash="f"), starts=(START,), **vars(MACHINE))
    assert not is_trained(run) and "finished_at" not in read_json(run.manifest)
    write_json(run.manifest, read_json(run.manifest) | {"of a later version": [1]})
    update_manifest(run, step=8, finished_at="now", generated_by=Code(code_hash="beef"))
    grown = read_manifest(run)
    assert grown is not None and (grown.step, grown.starts, grown.generated_by) == (8, (START,), Code(code_hash="beef"))
    assert is_trained(run) and read_json(run.manifest)["of a later version"] == [1]
    with pytest.raises(TypeError):
        update_manifest(run, finished="now")


def test_a_manifest_of_before_starts_were_recorded_has_the_one_that_it_describes(run: RunDir) -> None:
    tree = read_json(run.manifest)
    old = {k: v for k, v in tree.items() if k not in ("schema", "starts", "logged_before", "plan")}
    write_json(run.manifest, old | {"started_at": "then", "strategy": {"strategy": "ddp", "world_size": 2}})
    there = read_manifest(run)
    assert there is not None and there.starts == ()
    (start,) = there.all_starts
    assert (start.code_hash, start.step, start.machine, start.at) == ("c0de", None, None, "then")
    assert start.strategy == {"strategy": "ddp", "world_size": 2} and start.hardware.gpus == ("a GPU",)


@pytest.mark.parametrize("wrong", ["x", None, [], {}, True, float("nan"), 1e999, 2**63], ids=str)
def test_a_field_of_another_form_counts_as_missing(run: RunDir, wrong: object) -> None:
    fields = ("step", "seed", "arm_keys", "data", "git", "hardware", "packages", "plan", "generated_by", "wall_seconds")
    tree = read_json(run.manifest)
    for name in fields:
        write_json(run.manifest, tree | {name: wrong})
        there = read_manifest(run)
        assert there is not None
        assert getattr(there, name) in (getattr(Manifest(), name), PlanStamp(), Code()), name


def test_one_of_a_later_version_is_refused_and_damage_is_an_error_or_nothing(run: RunDir) -> None:
    write_json(run.manifest, read_json(run.manifest) | {"schema": SCHEMA + 1})
    with pytest.raises(UserError, match=r"manifest.json: has schema 3.*update it"):
        read_manifest(run)
    run.manifest.write_text("[1]")
    with pytest.raises(UserError, match="holds no JSON object"):
        read_manifest(run)
    assert find_manifest(run) is None
    run.manifest.unlink()
    assert read_manifest(run) is None and find_manifest(run) is None and not is_trained(run)


# ---------------------------------------------------------------- any record


@dataclass(frozen=True)
class Inner:
    n: int


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    share: float | None = None
    inner: tuple[Inner, ...] = ()
    of: dict[str, list[int]] = field(default_factory=dict)


def test_a_record_is_written_and_read(tmp_path: Path) -> None:
    record = Outer("x", "b", 1.0, (Inner(1), Inner(2)), {"k": [1]})
    assert from_json(Outer, to_json(record)) == record
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json", Outer) == record
    assert read_record(tmp_path / "none.json", Outer) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": None}, "name must be text, not 'None'"),
        ({"kind": "c"}, "kind must be one of a, b, not 'c'"),
        ({"share": "1"}, "share must be a number"),
        ({"share": float("inf")}, "share must be a number"),
        ({"inner": [{"n": 1}, {"n": 1.5}]}, r"inner\[1\].n must be a whole number, not '1.5'"),
        ({"inner": [{}]}, r"inner\[0\].n is missing"),
        ({"inner": {"n": 1}}, "inner must be a list"),
        ({"of": {"k": [True]}}, r"of.k\[0\] must be a whole number"),
        ({"of": 3}, "of must have keys of its own"),
    ],
)
def test_the_key_of_a_wrong_form_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(WrongForm, match=words):
        from_json(Outer, {"name": "x"} | change)
    write_json(tmp_path / "r.json", {"name": "x"} | change)
    with pytest.raises(UserError, match=r"r.json: .*restore it, or remove it"):
        read_record(tmp_path / "r.json", Outer)


def test_leniently_it_counts_as_missing_unless_it_must_be_there() -> None:
    tree = {"name": "x", "kind": 3, "inner": [{"n": 1}, None, {"n": "2"}], "of": {"k": [1, "x"], "l": 4}, "share": 1}
    assert from_json(Outer, tree, lenient=True) == Outer("x", share=1.0, inner=(Inner(1),), of={"k": [1]})
    with pytest.raises(WrongForm, match="name is missing"):
        from_json(Outer, {}, lenient=True)
