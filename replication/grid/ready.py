"""From a suite to cells that are ready to run: all that can be checked before training, read and checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from replication.config import SuiteConfig
from replication.console import say
from replication.data.prompts import Prompt, load_prompts
from replication.grid.cells import Cell, load_cells, write_configs
from replication.protocol.preregistration import read_plan
from replication.runs.layout import SuiteDir, name_cells
from replication.runs.manifest import code_identity
from replication.runs.starts import LoggedCell, code_facts, code_of, refuse_other_data, unlike


@dataclass(frozen=True)
class Grid:
    """A suite in its output folder, with what its cells need."""

    suite: SuiteConfig
    dir: SuiteDir
    cells: tuple[Cell, ...]
    prompts: Mapping[str | None, Sequence[Prompt]]
    """By generation.prompts of a cell's config; none without."""

    @property
    def incomplete(self) -> list[Cell]:
        """Its cells that are not complete."""
        return [cell for cell in self.cells if not cell.run.complete.is_file()]


def load_grid(
    suite: SuiteConfig,
    suite_dir: SuiteDir,
    flags: Sequence[str] = (),
    cluster: Path | None = None,
    from_folder: bool = False,
) -> Grid:
    """Every cell's config and prompts: before a corpus is prepared, which may take hours. See cells.load_cells.

    Raises:
        UserError: a config or a file of prompts that does not load, or an arm whose name TensorBoard needs.
    """
    # here, as it brings scipy, which a look at the cells can do without
    from replication.tensorboard.writer import refuse_taken_names

    refuse_taken_names(suite)
    cells = load_cells(suite, suite_dir, flags, cluster, from_folder)
    names = {cell.config.generation.prompts for cell in cells}
    return Grid(suite, suite_dir, tuple(cells), {name: load_prompts(name) if name else [] for name in names})


def tell_before(grid: Grid, begun: Mapping[str, LoggedCell], console: Console) -> None:
    """Say what the report will say later: other code in the folder, the plan, cells outside it, too few pairs.

    Args:
        grid: the suite.
        begun: cells of its folder that have logged a step.
        console: a line each.
    """
    if grid.incomplete:
        tell_of_code(begun, console)
        tell_of_plan(grid, console)
    generation, votes = grid.cells[0].config.generation, grid.suite.analysis.votes_per_judge
    n_pairs = len(grid.prompts[generation.prompts]) * len(grid.suite.seeds) * generation.samples_per_prompt**2
    if len(grid.suite.arms) >= 2 and generation.prompts is not None and votes > n_pairs:
        # `judge prepare` would refuse it afterwards
        line = f"analysis.votes_per_judge: {votes}, but there will be {n_pairs} pairs of completions to judge"
        say(console, (line, "yellow"), "; lower it, or give `replicate judge prepare` --votes")


def tell_of_code(begun: Mapping[str, LoggedCell], console: Console) -> None:
    """A line where cells ran other code than this."""
    ran = {name: code_of(cell.manifest) for name, cell in begun.items()}
    changed = unlike({**ran, "now": [code_facts(code_identity())]})
    if changed:
        say(console, ("cells of this folder ran other code:", "yellow"), f" {changed}; the report will say so")


def tell_of_plan(grid: Grid, console: Console) -> None:
    """A line on whether an analysis plan is registered, and one where it has not the cells that are about to run."""
    record = read_plan(grid.dir)
    if record is None:
        say(
            console,
            "no analysis plan is registered; `replicate preregistration register` before the first cell makes the "
            "result confirmatory",
        )
        return
    say(console, f"analysis plan {record.sha256[:16]}, registered at {record.frozen_at}")
    others = [cell.name for cell in grid.incomplete if record.plan.cells.get(cell.name) != cell.hash]
    if others:
        line = f"these cells are not the plan's, and the report will say so: {name_cells(others)}"
        say(console, (line, "yellow"), "; see `replicate preregistration show`")


def make_ready(grid: Grid, cells: Sequence[Cell], begun: Mapping[str, LoggedCell], console: Console) -> None:
    """Write the configs of cells, prepare the corpus where it is the folder's own, check what training will need.

    Raises:
        UserError: what would otherwise be noticed only after hours.
    """
    from replication.data.store import TokenStore
    from replication.grid.cell import check_before_training

    if not cells:
        return
    write_configs(cells)
    if cells[0].config.data.dir is None:
        from replication.data.prepare import prepare as prepare_corpus

        prepare_corpus(cells[0].config.data, grid.dir.data, console)
    store = TokenStore.open(grid.dir.data_folder(cells[0].config.data.dir))
    refuse_other_data(begun, store.dir, store.hash)
    for cell in cells:
        check_before_training(cell.config, store, grid.prompts[cell.config.generation.prompts])
