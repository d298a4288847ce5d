"""Arms x seeds -> cells, in the order in which they run: one seed block (all arms of a seed) after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from replication.config import (
    RunConfig,
    SuiteConfig,
    arm_keys,
    flatten,
    load_cell,
    load_run,
    refuse_differences,
    refuse_other_config,
    scientific_hash,
    to_dict,
    to_yaml,
)
from replication.errors import UserError
from replication.rundir import RunDir, SuiteDir, write_text


@dataclass(frozen=True)
class Cell:
    """One arm at one seed."""

    arm: str
    seed: int
    config: RunConfig
    run: RunDir

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def hash(self) -> str:
        return scientific_hash(self.config)


def plan(suite: SuiteConfig, suite_dir: SuiteDir, flags: Sequence[str] = (), from_folder: bool = False) -> list[Cell]:
    """Every cell of a suite, seed block by seed block, so that an early end leaves whole pairs.

    With from_folder, a cell that has a config.yaml is described by it: what is there, not what a new run would be.

    Raises:
        UserError: a config that does not load, or an arm file that names another arm than its own.
    """
    check_arms_declare_alike(suite)
    cells = []
    for seed in suite.seeds:
        for arm in suite.arms:
            run = suite_dir.cell(arm, seed)
            there = from_folder and run.config.is_file()
            config = load_run([run.config]) if there else load_cell(suite, arm, seed, flags)
            if config.arm != arm:
                raise UserError(f"configs/arms/{arm}.yaml: key 'arm' says {config.arm}; it must be {arm}")
            cells.append(Cell(arm, seed, config, run))
    return cells


def check_arms_declare_alike(suite: SuiteConfig) -> None:
    """Raise UserError where one arm's file sets a key that another's does not: the pair certificate would fail."""
    declared = {arm: arm_keys(arm) for arm in suite.arms}
    union = set().union(*declared.values())
    for arm, keys in declared.items():
        if union - keys:
            raise UserError(
                f"configs/arms/{arm}.yaml: does not set {', '.join(sorted(union - keys))}, another arm of the suite "
                "does; arms are compared in declared keys alone, so set the same ones in every arm"
            )


def claim_folder(suite: SuiteConfig, suite_dir: SuiteDir, cells: Sequence[Cell]) -> None:
    """Make the folder this suite's, and write each new cell's config beside where it will run.

    Seeds may be added to a folder later; anything else that differs is refused before a cell runs.

    Raises:
        UserError: the folder holds another suite, or a cell of another config.
    """
    claimed = to_dict(suite)
    if suite_dir.suite.is_file():
        there = yaml.safe_load(suite_dir.suite.read_text()) or {}
        kept, wanted = ({k: v for k, v in flatten(d).items() if k != "seeds"} for d in (there, claimed))
        refuse_differences(f"{suite_dir.root}: holds another suite", kept, wanted, "choose another --out")
        claimed["seeds"] = list(dict.fromkeys([*there["seeds"], *claimed["seeds"]]))
    elif suite_dir.root.exists() and any(p.name not in ("data", "data.partial") for p in suite_dir.root.iterdir()):
        raise UserError(f"{suite_dir.root}: is not empty and holds no suite; choose another --out")
    for cell in cells:
        refuse_other_config(cell.config, cell.run.config)
    write_text(suite_dir.suite, yaml.safe_dump(claimed, sort_keys=False))
    for cell in cells:
        if not cell.run.complete.is_file():
            write_text(cell.run.config, to_yaml(cell.config))
