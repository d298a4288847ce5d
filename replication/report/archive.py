"""An output folder as one file, and the proof that the report follows from it: computed again, number by number.

It holds suite, plan, votes, report, prepared corpus, prompts, and of every cell all but its checkpoints (see `weights`)
and TensorBoard's copy of the journal. It does not hold the panel's database, which may name people, nor the sealed key.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console

from replication.config import load_suite
from replication.console import Reporter
from replication.errors import UserError, first_line
from replication.report.report import compute
from replication.report.results import to_tree
from replication.report.study import leaves
from replication.runs.files import damage, naming, narrowed_marker, read_object
from replication.runs.layout import WEIGHTS, SuiteDir, name_cells

KINDS = {".tar.zst": "zstd", ".tar.xz": "xz", ".tar.gz": "gz", ".tar": ""}
TOP_FILES = (".yaml", ".json", ".jsonl", ".md", ".html", ".csv")
FOLDERS = ("data", "prompts", "plugins", "anchor", "figures", "tables")
NOT_COMPARED = ("made_from", "reproduce", "figures")
"""Of results.json: a hash of the files, commands, and the names of pictures."""
ROUNDING = 1e-9
"""Relative: another machine's libraries may round the last digits of a statistic otherwise."""


def pack(suite_dir: SuiteDir, target: Path, weights: Literal["last", "none"], console: Console | None = None) -> int:
    """Write the archive, whole or not at all; returns the number of files in it.

    Its members belong to nobody, so that no user's name is in it. With `weights` "last", each cell's newest checkpoint
    is there as `replicate prune` would leave it. UserError where a cell runs, or the report is not of what is there.
    """
    kind = kind_of(target)
    suite = load_suite(suite_dir.suite)
    inputs = suite_dir.inputs_sha256(suite_dir.cell(arm, seed) for seed in suite.seeds for arm in suite.arms)
    told = read_object(suite_dir.results)
    if told.get("made_from") != inputs:
        raise UserError(f"{suite_dir.results}: is not of what the folder holds now; run `replicate report` first")
    if running := [f"{arm}/seed-{seed}" for arm, seed, run in suite_dir.cells() if run.is_locked()]:
        raise UserError(f"{suite_dir.root}: {name_cells(running)} run now, and what they write would be torn; end them")
    if any(cell["state"] == "running" for cell in told["cells"]):
        raise UserError(f"{suite_dir.results}: is of a time when cells ran; run `replicate report` first")
    root = target.name.removesuffix(next(k for k in KINDS if target.name.endswith(k)))
    members = sorted(_members(suite_dir))
    checkpoints = (
        [found for _, _, run in suite_dir.cells() if (found := run.newest_marked())] if weights == "last" else []
    )
    members += [(folder.relative_to(suite_dir.root) / WEIGHTS, folder / WEIGHTS) for folder in checkpoints]
    temporary, done = target.with_name(f".{target.name}.{os.getpid()}"), 0
    total = sum(path.stat().st_size for _, path in members)
    try:
        with naming(target), _opened(temporary, kind, "w") as tar, Reporter(console).bar("archive", total) as show:
            for name, path in members:
                with open(path, "rb") as file:
                    _add(tar, f"{root}/{name}", file, path.stat().st_size, int(path.stat().st_mtime))
                show(done := done + path.stat().st_size)
            for folder in checkpoints:
                marker = json.dumps(narrowed_marker(folder, [WEIGHTS], pruned_at="archived"), indent=2).encode()
                place = f"{root}/{folder.relative_to(suite_dir.root)}/COMPLETE"
                _add(tar, place, io.BytesIO(marker), len(marker), int(folder.stat().st_mtime))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(members)


def check(archive: Path, console: Console | None = None) -> list[str]:
    """Unpack into a temporary folder, make results.json again from it, and compare; nothing is trained or drawn.

    Returns a line for each key of results.json that differs, and for each damaged checkpoint. UserError where there is
    no such archive, or what it holds is none of ours.
    """
    kind = kind_of(archive)
    if not archive.is_file():
        raise UserError(f"{archive}: no such file; name one that `replicate archive OUT -o FILE` wrote")
    with TemporaryDirectory(prefix="replication-") as temporary:
        try:
            with _opened(archive, kind, "r") as tar:
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
            raise UserError(f"{archive}: cannot be unpacked ({first_line(error)}); fetch or make it again") from None
        suite_dir = next((SuiteDir(path.parent) for path in Path(temporary).glob("*/suite.yaml")), None)
        if suite_dir is None or not suite_dir.results.is_file():
            raise UserError(f"{archive}: holds no suite with its report; make it with `replicate archive OUT -o FILE`")
        Reporter(console).line(f"{archive}: unpacked; every number is computed again")
        again = to_tree(compute(suite_dir, load_suite(suite_dir.suite))[2])
        found = differing(leaves(read_object(suite_dir.results)), leaves(again))
        folders = [folder for _, _, run in suite_dir.cells() for folder in run.checkpoint_folders()]
        return found + [
            f"{folder.relative_to(suite_dir.root)} {fault}" for folder in folders if (fault := damage(folder))
        ]


def differing(told: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each key whose value is not the same in two flat trees; numbers to within rounding."""
    lines = []
    for key in dict.fromkeys((*told, *now)):
        a, b = told.get(key), now.get(key)
        are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
        same = math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING**2) if are_numbers else a == b  # type: ignore[arg-type]
        if not same and not key.startswith(NOT_COMPARED):
            lines.append(f"{key}: {a} in the archive, {b} from its files")
    return lines


def kind_of(path: Path) -> str:
    """The compression that a name says. Raises UserError where it says none."""
    kind = next((kind for suffix, kind in KINDS.items() if path.name.endswith(suffix)), None)
    if kind is None:
        raise UserError(f"{path}: its name must end in one of {', '.join(KINDS)}")
    return kind


@contextmanager
def _opened(path: Path, kind: str, mode: Literal["r", "w"]) -> Iterator[tarfile.TarFile]:
    if kind == "zstd":  # not in the standard library of Python 3.11; pyarrow comes with datasets
        import pyarrow

        opened = pyarrow.output_stream if mode == "w" else pyarrow.input_stream
        pipe: Any = f"{mode}|"
        with opened(str(path), compression=kind) as stream, tarfile.open(fileobj=stream, mode=pipe) as tar:
            yield tar
        return
    with tarfile.open(path, f"{mode}:{kind}") as tar:  # type: ignore[call-overload]
        yield tar


def _members(suite_dir: SuiteDir) -> Iterator[tuple[Path, Path]]:
    """(name in the folder, path) of each file but the weights; links are followed, as a corpus may lie elsewhere."""
    root = suite_dir.root
    yield from (
        (path.relative_to(root), path) for path in root.iterdir() if path.suffix in TOP_FILES and path.is_file()
    )
    if (record := suite_dir.judging / "panel.json").is_file():
        yield record.relative_to(root), record
    for folder in FOLDERS:
        for inside, _, names in os.walk(root / folder, followlinks=True):
            yield from ((Path(inside, name).relative_to(root), Path(inside, name)) for name in names)
    for _, _, run in suite_dir.cells():
        files = (*run.root.iterdir(), *run.root.glob("sampled/*/*"))
        yield from ((p.relative_to(root), p) for p in files if p.is_file() and p.name[0] != ".")


def _add(tar: tarfile.TarFile, name: str, file: Any, n_bytes: int, mtime: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = n_bytes, mtime, 0o644
    tar.addfile(member, file)
