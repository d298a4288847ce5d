"""Arms x seeds -> cells, one seed block (all arms of a seed) after another; made ready to run, and checked before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from replication.config import (
    MACHINE_KEYS,
    GenerationConfig,
    RunConfig,
    SuiteConfig,
    config_root,
    find_config,
    flatten,
    inlined,
    load_cell,
    load_run,
    load_suite,
    refuse_differences,
    scientific,
    scientific_hash,
    to_dict,
    to_yaml,
    without_seeds,
)
from replication.console import say
from replication.data.prompts import find_prompts, load_prompts
from replication.errors import UserError
from replication.objectives.plugins import functions_of, keep_plugins
from replication.protocol.preregistration import read_plan
from replication.runs.files import remove_temporaries, write_bytes, write_text
from replication.runs.layout import RunDir, SuiteDir, name_cells
from replication.runs.manifest import code_identity
from replication.runs.starts import (
    LoggedCell,
    code_facts,
    code_of,
    logged_cells,
    refuse_other_config,
    refuse_other_data,
    refuse_other_keys,
    unlike,
)


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


@dataclass(frozen=True)
class Grid:
    """A suite in its output folder, and its cells."""

    suite: SuiteConfig
    dir: SuiteDir
    cells: tuple[Cell, ...]

    @property
    def incomplete(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.run.complete.is_file()]


def places(suite: SuiteConfig, suite_dir: SuiteDir) -> list[Place]:
    """Every cell of a suite, seed block by seed block, so that an early end leaves whole pairs."""
    return [Place(arm, seed, suite_dir.cell(arm, seed)) for seed in suite.seeds for arm in suite.arms]


def load_grid(
    suite: SuiteConfig, suite_dir: SuiteDir, flags: Sequence[str] = (), cluster: Path | None = None, again: bool = False
) -> Grid:
    """Every cell (see load_cells); UserError also: its prompts do not load, or TensorBoard needs an arm's name."""
    # here, as it brings scipy, which a look at the cells can do without
    from replication.tensorboard.writer import refuse_taken_names

    refuse_taken_names(suite)
    cells = load_cells(suite, suite_dir, flags, cluster, again)
    for generation in _prompts_of(cells):
        load_prompts(generation)
    return Grid(suite, suite_dir, tuple(cells))


def load_cells(
    suite: SuiteConfig, suite_dir: SuiteDir, flags: Sequence[str] = (), cluster: Path | None = None, again: bool = False
) -> list[Cell]:
    """Every cell of a suite with its config, in the order of `places`.

    If again, a cell that has a config.yaml is described by it, with the cluster file and the flags on top.
    Raises UserError where a config does not load, an arm file names another arm than its own, or a plugin's function
    does not fit an arm.
    """
    of_arm = {}  # a cell differs from its arm's first in the seed alone
    for arm in suite.arms:
        of_arm[arm] = config = load_cell(suite, arm, suite.seeds[0], flags, cluster)
        if config.arm != arm:
            raise UserError(f"{find_config(arm, 'arms')}: key 'arm' says {config.arm}; it must be {arm}")
        if len(suite.seeds) > 1 and config.weights_seed is not None and config.data_seed is not None:
            raise UserError(
                "weights_seed: is fixed, and so is data_seed, so that all seeds would be one run; leave one of them "
                "null, or give one seed"
            )
        functions_of(config, map(Path, suite.plugins))
    cells = []
    for place in places(suite, suite_dir):
        if again and place.run.config.is_file():
            config = load_run([place.run.config, *([cluster] if cluster else [])], flags)
        else:
            config = replace(of_arm[place.arm], seed=place.seed)
        cells.append(Cell(place.arm, place.seed, place.run, config))
    return cells


def claim_folder(suite: SuiteConfig, suite_dir: SuiteDir, cells: Sequence[Cell]) -> dict[str, LoggedCell]:
    """Make the folder this suite's; returns the cells that have logged a step there.

    Seeds may be added to a folder later, and the questions asked of it (`analysis`) may change: no cell depends on
    them, and the report names each change since the plan was registered. Anything else that differs is refused before a
    cell runs: UserError where the folder holds another suite, or cells or other seeds of another config.
    """
    alike = [arm for arm in suite.arms if [a.casefold() for a in suite.arms].count(arm.casefold()) > 1]
    if alike:
        raise UserError(f"arms: {' and '.join(alike)} differ in case alone, and some file systems do not; rename one")
    there = refuse_other_suite(suite, suite_dir)
    keep_plugins(suite.plugins, suite_dir.plugins)
    remove_temporaries(suite_dir.root)
    for cell in cells:
        refuse_other_config(cell.config, cell.run)
    logged = logged_cells(suite_dir.runs)
    planned, of_arm = {cell.name for cell in cells}, {c.arm: without_seeds(scientific(c.config)) for c in cells}
    for name, found in logged.items():  # other seeds of an arm may have been trained under other flags
        run, arm = found.run, found.run.root.parent.name
        if arm not in of_arm or name in planned:
            continue
        try:
            keys = without_seeds(scientific(load_run([run.config])))
        except (UserError, OSError):
            continue  # the certificate names it
        what = "a seed of another config, and seeds that differ in it are not pooled"
        refuse_other_keys(run, what, keys, of_arm[arm], "give the same flags, or choose another --out")
    _keep_prompts(suite_dir, cells)
    seeds = tuple(dict.fromkeys([*(there.seeds if there else ()), *suite.seeds]))
    write_suite(replace(suite, seeds=seeds), suite_dir, there)
    return logged


def write_suite(suite: SuiteConfig, suite_dir: SuiteDir, there: SuiteConfig | None) -> None:
    """Write OUT/suite.yaml, whole in itself; `there` is the suite that it holds."""
    kept = inlined(replace(suite, plugins=tuple(f"plugins/{Path(plugin).name}" for plugin in suite.plugins)))
    if there is None or to_dict(replace(_whole(there), plugins=kept.plugins)) != to_dict(kept):
        write_text(suite_dir.suite, to_yaml(kept))  # only then: a suite newer than the report makes it out of date


def _prompts_of(cells: Sequence[Cell]) -> list[GenerationConfig]:
    """A section `generation` for each prompt file that cells name."""
    sections = (cell.config.generation for cell in cells)
    return list({section.prompts: section for section in sections if section.prompts}.values())


def _keep_prompts(suite_dir: SuiteDir, cells: Sequence[Cell]) -> None:
    """Copy prompt files that are not shipped into the folder, so that it can be run again from itself."""
    for generation in _prompts_of(cells):
        path = find_prompts(generation)
        copy, text = suite_dir.prompts / path.name, path.read_bytes()
        if config_root().resolve() in path.resolve().parents or (copy.is_file() and copy.read_bytes() == text):
            continue
        if copy.is_file():
            raise UserError(
                f"{path}: is not what {copy} holds, a copy made when the folder was begun; restore it, remove the copy "
                "where no completion was sampled from it, or choose another --out"
            )
        write_bytes(copy, text)


def refuse_other_suite(suite: SuiteConfig, suite_dir: SuiteDir) -> SuiteConfig | None:
    """The suite that a folder holds; UserError: another one, seeds and analysis aside, or somebody else's files."""
    if suite_dir.suite.is_file():
        found = load_suite(suite_dir.suite)
        free = ("analysis.", *(f"run.{key}" for key in MACHINE_KEYS))
        there, here = (
            {k: v for k, v in flatten(to_dict(_whole(s))).items() if k != "seeds" and not k.startswith(free)}
            for s in (replace(s, plugins=tuple(Path(p).name for p in s.plugins)) for s in (found, suite))
        )
        refuse_differences(f"{suite_dir.root}: holds another suite", there, here, "choose another --out")
        return found
    names = [path.name for path in suite_dir.root.iterdir()] if suite_dir.root.exists() else []
    ours = r"data|data\.partial|plugins|noise|noise\.json|anchor|ledger\.jsonl|\.[^/]*"
    if suite_dir.plan.is_file():  # of a suite that is registered, and not begun
        ours += r"|plan(-\d+)?\.(json|md)"
    if not all(re.fullmatch(ours, name) for name in names):
        raise UserError(f"{suite_dir.root}: is not empty and holds no suite; choose another --out")
    return None


def _whole(suite: SuiteConfig) -> SuiteConfig:
    """The suite without layers; as it is where one of them is gone."""
    try:
        return inlined(suite)
    except UserError:
        return suite


def tell_before(grid: Grid, begun: Mapping[str, LoggedCell], console: Console) -> None:
    """Say what the report will say later: other code in the folder, the plan, cells outside it, too few pairs."""
    if grid.incomplete:
        ran = {name: code_of(cell.manifest) for name, cell in begun.items()}
        changed = unlike(ran | {"now": [code_facts(code_identity())]})
        if changed:
            say(console, ("cells of this folder ran other code:", "yellow"), f" {changed}; the report will say so")
        record = read_plan(grid.dir)
        if record is None:
            line = "no analysis plan is registered; `replicate preregistration register` before the first cell makes "
            say(console, f"{line}the result confirmatory")
        else:
            say(console, f"analysis plan {record.sha256[:16]}, registered at {record.frozen_at}")
            others = [cell.name for cell in grid.incomplete if record.plan.cells.get(cell.name) != cell.hash]
            if others:
                line = f"these cells are not the plan's, and the report will say so: {name_cells(others)}"
                say(console, (line, "yellow"), "; see `replicate preregistration show`")
    generation, votes = grid.cells[0].config.generation, grid.suite.analysis.votes_per_judge
    if generation.prompts and len(grid.suite.arms) >= 2:
        n_pairs = len(load_prompts(generation)) * len(grid.suite.seeds) * generation.samples_per_prompt**2
        if votes > n_pairs:  # `judge prepare` would refuse it afterwards
            line = f"analysis.votes_per_judge: {votes}, but there will be {n_pairs} pairs of completions to judge"
            say(console, (line, "yellow"), "; lower it, or give `replicate judge prepare` --votes")


def make_ready(grid: Grid, cells: Sequence[Cell], begun: Mapping[str, LoggedCell], console: Console) -> None:
    """Write the configs of cells, prepare the corpus where it is the folder's own, check what training will need."""
    from replication.data.store import TokenStore
    from replication.grid.cell import check_before_training

    if not cells:
        return
    write_configs(cells)
    data = cells[0].config.data
    if data.dir is None:
        from replication.data.prepare import prepare

        prepare(data, grid.dir.data, console)
    store = TokenStore.open(grid.dir.data_folder(data.dir))
    refuse_other_data(begun, store.dir, store.hash)
    for cell in cells:
        check_before_training(cell.config, store)


def write_configs(cells: Sequence[Cell]) -> None:
    """Write each cell's config where it will run."""
    for cell in cells:
        write_text(cell.run.config, to_yaml(cell.config))
