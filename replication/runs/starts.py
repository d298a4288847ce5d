"""The record of a cell's starts: which code ran, and how the machine cut the sums. Imports no torch.

Neither is part of a cell's config, so a cell may go on under other code or on another machine. That is allowed and
told: in fp32 another cut is another rounding, which grows over the steps. Other data are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from replication.config import (
    Keys,
    RunConfig,
    differences,
    load_run,
    machine_cut,
    refuse_differences,
    scientific,
    to_yaml,
)
from replication.errors import UserError
from replication.runs.journal import read_tail
from replication.runs.layout import RunDir, SuiteDir, cells_in, name_cells
from replication.runs.ledger import Ledger
from replication.runs.manifest import Code, Manifest, Start, find_manifest, git_state

Facts = Mapping[str, object]  # of one start: name -> value
NOT_RECORDED = "not recorded"


def has_logged(run: RunDir) -> bool:
    """Whether a cell has ever logged a step, which is when its data begin: a start that died before has none.

    The journal says it, and the manifest where the journal is gone, or was begun anew for want of a checkpoint.
    """
    with suppress(UserError):  # a journal that cannot be read says nothing
        if run.complete.is_file() or read_tail(run.metrics) is not None:
            return True
    manifest = find_manifest(run)
    return manifest is not None and (manifest.finished_at is not None or manifest.logged_before)


def refuse_other_config(config: RunConfig, run: RunDir) -> None:
    """Raise UserError where a cell's config.yaml is of another scientific config; nothing where there is none."""
    if not run.config.is_file() or run.config.read_text(encoding="utf-8") == to_yaml(config):
        return
    remedy = "choose another --out, or remove it"
    try:
        there = load_run([run.config])
    except UserError as error:  # of a version that had other keys, or damaged
        raise UserError(f"{error}; {remedy}{or_its_commit(run)}") from None
    refuse_other_keys(run, "holds a cell of another config", scientific(there), scientific(config), remedy)


def refuse_other_keys(run: RunDir, what: str, there: Keys, here: Keys, remedy: str) -> None:
    """refuse_differences of what a cell's folder has and a config; the remedy ends with or_its_commit."""
    if differences(there, here):
        refuse_differences(f"{run.root}: {what}", there, here, f"{remedy}{or_its_commit(run)}")


def or_its_commit(run: RunDir) -> str:
    """End of a remedy: to check out the commit that trained a cell last; "" where this is it, or none is known."""
    manifest = find_manifest(run)
    commit = manifest.git.commit if manifest else None
    if commit is None or commit == git_state().commit:
        return ""
    return f"; where the version makes the difference, `git checkout {commit}`, which trained it last"


@dataclass(frozen=True)
class LoggedCell:
    """A cell that has logged a step, and its manifest; an empty one where that cannot be read."""

    run: RunDir
    manifest: Manifest


def logged_cells(runs: Path) -> dict[str, LoggedCell]:
    """Every cell under OUT/runs that has logged a step, by arm/seed-n, planned or not."""
    found = ((f"{arm}/seed-{seed}", run) for arm, seed, run in cells_in(runs))
    return {name: LoggedCell(run, find_manifest(run) or Manifest()) for name, run in found if has_logged(run)}


def removed_cells(suite_dir: SuiteDir, ledger: Ledger) -> Iterator[tuple[str, str, bool]]:
    """(fault, name, whether its result was there) of each cell whose folder was removed since one of its starts."""
    for name in dict.fromkeys(entry.cell for entry in ledger.entries if entry.cell):
        run = RunDir(suite_dir.runs / name)
        manifest = find_manifest(run)
        if manifest is None and run.manifest.exists():
            continue  # damaged, and named as that
        known = [start.at for start in manifest.starts] if manifest else []
        left, n_lost, had_result, ended = Counter(known), 0, False, False
        for entry in reversed(ledger.entries):  # of two starts within a second the later one is there
            if entry.cell == name and entry.event == "complete":
                ended = True
            elif entry.cell == name and entry.event == "start":
                at = entry.facts.get("started_at")
                left[at] -= 1
                is_lost = left[at] < 0
                n_lost, had_result, ended = n_lost + is_lost, had_result or (is_lost and ended), False
        if n_lost:
            when = "after they were complete" if had_result else "before they were complete"
            yield f"cells that were removed {when}{' and trained again' if known else ''}", name, had_result


def refuse_other_data(
    logged: Mapping[str, LoggedCell], corpus: Path | str, hash: str, but: RunDir | None = None
) -> None:
    """Raise UserError where cells (see logged_cells) were trained on data of another hash; `but` is not asked."""
    others: dict[str, list[str]] = {}
    for name, cell in logged.items():
        there, root = cell.manifest.data.hash, cell.run.root
        if there and there != hash and (but is None or root.resolve() != but.root.resolve()):
            runs = root.parent.parent
            others.setdefault(there[:16], []).append(name.rpartition("-")[2])
    if others:
        said = "; ".join(f"{there} of seeds {', '.join(dict.fromkeys(seeds))}" for there, seeds in others.items())
        raise UserError(
            f"data.dir: {corpus} holds the data {hash[:16]}, and cells in {runs} were trained on others ({said}); all "
            "of a suite share one corpus and validation set: name the folder of theirs, or choose another --out"
        )


def code_of(manifest: Manifest) -> list[Facts]:
    """Hash of the code and version of each package, of every start that lasts and of what made the completions."""
    made = [manifest.generated_by] if manifest.generated_by else []
    return [code_facts(code) for code in (*lasting_starts(manifest), *made)]


def code_facts(code: Code) -> Facts:
    """Of one record; a hash that an older version of this package did not record is NOT_RECORDED."""
    return {"code_hash": code.code_hash or NOT_RECORDED, **code.packages}


def machine_of(manifest: Manifest, config: RunConfig | None) -> list[Facts]:
    """The facts of the machine that may change a rounding, of every start that lasts.

    Older records have the strategy and the ranks alone; the cell's config.yaml, of its last start, says more of that.
    """
    found: list[Facts] = []
    for start in lasting_starts(manifest):
        old = {"ranks" if k == "world_size" else k: v for k, v in start.strategy.items()}
        found.append(old | {"device": NOT_RECORDED} | dict(start.machine or {}))
    if config is not None and found:
        found[-1] = machine_cut(config) | dict(found[-1])
    return found


def lasting_starts(manifest: Manifest) -> list[Start]:
    """The records of those starts of which a step is still in the cell's weights, oldest first.

    A start that a later one fell back behind, because it died before its first checkpoint, says nothing of the cell.
    """
    kept: list[Start] = []
    behind = float("inf")
    for start in reversed(manifest.all_starts):
        step = -1 if start.step is None else start.step  # older records do not say where they began
        if behind != 0 and step < behind:
            behind = step if step >= 0 else behind
            kept.append(start)
    return kept[::-1]


def unlike(of: Mapping[str, Sequence[Facts]]) -> str:
    """The facts that are not one value over all starts of all these cells, in words; "" where all are alike.

    A fact that a start lacks is not compared, save that code whose hash was not recorded is other code than one whose
    hash was.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, starts in of.items():
        for key, value in (item for facts in starts for item in facts.items()):
            names = found.setdefault(key, {}).setdefault(str(value), [])
            if name not in names and _is_known(key, value):
                names.append(name)
    return "; ".join(
        f"{key} is " + " and ".join(f"{value} ({name_cells(names)})" for value, names in values.items() if names)
        for key, values in found.items()
        if sum(map(bool, values.values())) > 1
    )


def changes(before: Sequence[Facts], now: Facts) -> str:
    """In which facts a start is not as the last of those before it, in words; "" where it is, or there is none."""
    last = before[-1] if before else {}
    changed = (k for k in now if k in last and _is_known(k, last[k]) and str(last[k]) != str(now[k]))
    return ", ".join(f"{k} {last[k]} -> {now[k]}" for k in changed)


def _is_known(key: str, value: object) -> bool:
    return value != NOT_RECORDED or key == "code_hash"
