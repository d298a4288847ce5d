"""Arms x seeds -> cells, in the order in which they run: one seed block (all arms of a seed) after another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from replication.config import (
    RunConfig,
    SuiteConfig,
    arm_keys,
    find_config,
    flatten,
    load_cell,
    load_run,
    load_suite,
    refuse_differences,
    refuse_other_config,
    scientific,
    scientific_hash,
    to_dict,
    to_yaml,
    without_seeds,
)
from replication.errors import UserError
from replication.runs.files import remove_temporaries, write_text
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.starts import LoggedCell, logged_cells


@dataclass(frozen=True)
class Place:
    """The folder of one arm at one seed: all that its status needs, and no config is loaded for it."""

    arm: str
    seed: int
    run: RunDir

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def folder(self) -> str:
        """Relative to the output folder."""
        return f"runs/{self.name}"


@dataclass(frozen=True)
class Cell(Place):
    """One arm at one seed, and its config."""

    config: RunConfig

    @property
    def hash(self) -> str:
        return scientific_hash(self.config)


def places(suite: SuiteConfig, suite_dir: SuiteDir) -> list[Place]:
    """Every cell of a suite, seed block by seed block, so that an early end leaves whole pairs."""
    return [Place(arm, seed, suite_dir.cell(arm, seed)) for seed in suite.seeds for arm in suite.arms]


def load_cells(
    suite: SuiteConfig,
    suite_dir: SuiteDir,
    flags: Sequence[str] = (),
    cluster: Path | None = None,
    from_folder: bool = False,
) -> list[Cell]:
    """Every cell of a suite with its config, in the order of `places`.

    With from_folder, a cell that has a config.yaml is described by it, with the cluster file and the flags on top.

    Raises:
        UserError: a config that does not load, or an arm file that names another arm than its own.
    """
    check_arms_declare_alike(suite)
    of_arm = {}  # a cell differs from its arm's first in the seed alone
    for arm in suite.arms:
        of_arm[arm] = config = load_cell(suite, arm, suite.seeds[0], flags, cluster)
        if config.arm != arm:
            raise UserError(f"{find_config(arm, 'arms')}: key 'arm' says {config.arm}; it must be {arm}")
    cells = []
    for place in places(suite, suite_dir):
        there = from_folder and place.run.config.is_file()
        if there:
            config = load_run([place.run.config, *([cluster] if cluster else [])], flags)
        else:
            config = replace(of_arm[place.arm], seed=place.seed)
        cells.append(Cell(place.arm, place.seed, place.run, config))
    return cells


def check_arms_declare_alike(suite: SuiteConfig) -> None:
    """Raise UserError where one arm's file sets a key that another's does not: the pair certificate would fail."""
    declared = {arm: arm_keys(arm) for arm in suite.arms}
    union = set().union(*declared.values())
    for arm, keys in declared.items():
        if union - keys:
            raise UserError(
                f"{find_config(arm, 'arms')}: does not set {', '.join(sorted(union - keys))}, another arm of the suite "
                "does; arms are compared in declared keys alone, so set the same ones in every arm"
            )


def claim_folder(suite: SuiteConfig, suite_dir: SuiteDir, cells: Sequence[Cell]) -> dict[str, LoggedCell]:
    """Make the folder this suite's; returns the cells that have logged a step there.

    Seeds may be added to a folder later, and the questions asked of it (`analysis`) may change: no cell depends on
    them, and the report names each change since the plan was registered. Anything else that differs is refused before a
    cell runs.

    Raises:
        UserError: the folder holds another suite, or a cell of another config.
    """
    alike = [arm for arm in suite.arms if [a.casefold() for a in suite.arms].count(arm.casefold()) > 1]
    if alike:
        raise UserError(f"arms: {' and '.join(alike)} differ in case alone, and some file systems do not; rename one")
    there = refuse_other_suite(suite, suite_dir)
    remove_temporaries(suite_dir.root)
    claimed = replace(suite, seeds=tuple(dict.fromkeys([*(there.seeds if there else ()), *suite.seeds])))
    for cell in cells:
        refuse_other_config(cell.config, cell.run.config)
    logged = logged_cells(suite_dir.runs)
    _refuse_other_seeds(logged, cells)
    text = to_yaml(claimed)
    if not suite_dir.suite.is_file() or suite_dir.suite.read_text(encoding="utf-8") != text:
        write_text(suite_dir.suite, text)  # only then: a suite that is newer than the report makes it out of date
    return logged


def _refuse_other_seeds(logged: Mapping[str, LoggedCell], cells: Sequence[Cell]) -> None:
    """Raise UserError where other seeds of an arm were trained under another config, as flags can make it."""
    of_arm = {cell.arm: without_seeds(scientific(cell.config)) for cell in cells}
    planned = {cell.name for cell in cells}
    for name, cell in logged.items():
        run, arm = cell.run, cell.run.root.parent.name
        if arm not in of_arm or name in planned:
            continue
        try:
            keys = without_seeds(scientific(load_run([run.config])))
        except (UserError, OSError):
            continue  # the certificate names it
        what = f"{run.root}: a seed of another config, and seeds that differ in it are not pooled"
        refuse_differences(what, keys, of_arm[arm], "give the same flags, or choose another --out")


def refuse_other_suite(suite: SuiteConfig, suite_dir: SuiteDir) -> SuiteConfig | None:
    """The suite that a folder holds, if any.

    Raises:
        UserError: it is another one, seeds and analysis aside; or the folder holds something of somebody else's.
    """
    if suite_dir.suite.is_file():
        found = load_suite(suite_dir.suite)
        there, here = (
            {k: v for k, v in flatten(to_dict(s)).items() if k != "seeds" and not k.startswith("analysis.")}
            for s in (found, suite)
        )
        refuse_differences(f"{suite_dir.root}: holds another suite", there, here, "choose another --out")
        return found
    if suite_dir.root.exists() and any(_is_foreign(p, suite_dir) for p in suite_dir.root.iterdir()):
        raise UserError(f"{suite_dir.root}: is not empty and holds no suite; choose another --out")
    return None


def _is_foreign(path: Path, suite_dir: SuiteDir) -> bool:
    """Whether something in an output folder without a suite belongs to somebody else; a registered plan does not."""
    ours = path.name in ("data", "data.partial", "noise", "noise.json") or path.name.startswith(".")
    return not ours and not (suite_dir.plan.is_file() and re.fullmatch(r"plan(-\d+)?\.(json|md)", path.name))


def write_configs(cells: Sequence[Cell]) -> None:
    """Write each cell's config where it will run."""
    for cell in cells:
        write_text(cell.run.config, to_yaml(cell.config))
