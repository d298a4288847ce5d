"""TensorBoard over seeds: runs beside the cells' own, that hold means, bands and paired differences; from the journals.

DIR/tensorboard/over-seeds/<arm>                       means, under the cells' tags, so that curves overlay
DIR/tensorboard/over-seeds/<arm>-minus-<first arm>     under versus_<first arm>/<tag>; the loss of each seed too
DIR/tensorboard/events.*                               the custom-scalars page

Each run also holds the bands of the questions' scalars (with_band/<tag>/low and high), and n_seeds.

A mean is over one set of seeds at all of its steps, because a mean over changing sets jumps where a seed ends. So it
stands at the steps that all counted seeds share, and grows as the slowest of them does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from replication.config import SuiteConfig, load_suite
from replication.errors import UserError
from replication.runs.files import hold_lock, remove_tree, write_text
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.withdrawn import read_withdrawals
from replication.statistics.seeds import mean_test, shared_steps
from replication.tensorboard import tags
from replication.tensorboard.event_file import NONE, SUFFIX, EventFile
from replication.tensorboard.live import Curve, LiveJournal

Curves = Mapping[str, Curve]

FOLDER, EARLIER = "over-seeds", "difference"
"""Where the runs are, and where earlier versions had those of differences."""
MARKER = "WRITTEN_BY_REPLICATE_TENSORBOARD"
ALIVE_SECONDS = 1800.0
"""How long after its journal's last line an interrupted cell counts as running: its lock may be another machine's."""
DESCRIPTION = (
    "Mean over the {} that are complete or running and not withdrawn, at the steps that all of them have. "
    "with_band/: the pointwise 95 % t interval of that mean. n_seeds/: how many are behind it."
)


class OverSeeds:
    """The synthetic runs of a suite's folder; `refresh` brings them up to the journals."""

    def __init__(self, suite: SuiteConfig, suite_dir: SuiteDir) -> None:
        self.root, self._dir = suite_dir.tensorboard, suite_dir
        self._journals: dict[tuple[str, int], LiveJournal] = {}
        self._suite_time: int | None = None
        self._take(suite)
        self._files: dict[str, EventFile] = {}
        self._page = EventFile(self.root)
        self._pages_written: list[tuple[list[int], bool]] = []
        self._counted: set[tuple[str, int]] = set()

    def _take(self, suite: SuiteConfig) -> None:
        self.suite = suite
        self._cells = {(arm, seed): self._dir.cell(arm, seed) for arm in suite.arms for seed in suite.seeds}
        for key, run in self._cells.items():
            self._journals.setdefault(key, LiveJournal(run.metrics, tags.is_read))

    def refresh(self) -> int:
        """Read what is new in the journals, write what follows from it, and return how many points that were."""
        self._follow_suite()
        changed = [journal.read() for journal in self._journals.values()]
        gone = read_withdrawals(self._dir).of("seed")
        counted = {(arm, seed) for (arm, seed), run in self._cells.items() if counts(run) and str(seed) not in gone}
        if not any(changed) and counted == self._counted:
            return 0
        self._counted = counted
        curves = {key: journal.curves() for key, journal in self._journals.items()}
        blocks = tags.shown_blocks({tag for of_cell in curves.values() for tag in of_cell})
        return self._write_means(curves, blocks) + self._write_differences(curves, blocks)

    def _follow_suite(self) -> None:
        """Take in the seeds that a later `replicate grid run` or `submit` added to suite.yaml; its arms stay."""
        try:
            now = self._dir.suite.stat().st_mtime_ns
            if now == self._suite_time:
                return
            self._suite_time = now
            seeds = (*self.suite.seeds, *load_suite(self._dir.suite).seeds)
        except (UserError, OSError):  # while somebody edits it
            return
        self._take(replace(self.suite, seeds=tuple(dict.fromkeys(seeds))))

    def _write_means(self, curves: Mapping[tuple[str, int], Curves], blocks: list[int]) -> int:
        n_points, banded = 0, []
        for arm in self.suite.arms:
            cells = [curves[arm, seed] for seed in self.suite.seeds if (arm, seed) in self._counted]
            means = over_seeds({tag: tag for tag in tags.averaged_tags(blocks)}, cells, blocks)
            n_points += self._file(arm, "seeds").bring_to(means)
            if means:
                banded.append(tags.band_tag(tags.TRAINING_LOSS, "low") in means)
        page = (blocks, bool(banded) and all(banded))  # bands come with the second seed
        if self._pages_written[-1:] != [page]:
            self._page.write_layout(tags.layout(*page, self.suite.arms[0]), len(self._pages_written))
            self._pages_written.append(page)
        return n_points

    def _write_differences(self, curves: Mapping[tuple[str, int], Curves], blocks: list[int]) -> int:
        n_points = 0
        first, *others = self.suite.arms
        names = {tag: tags.versus(tag, first) for tag in tags.question_tags(blocks)}
        for arm in others:
            pairs = {seed: differences(curves[arm, seed], curves[first, seed], names) for seed in self.suite.seeds}
            both = [pair for seed, pair in pairs.items() if {(arm, seed), (first, seed)} <= self._counted]
            each = {f"{names[tags.LOSS]}/seed-{seed}": pair.get(tags.LOSS, NONE) for seed, pair in pairs.items()}
            file = self._file(f"{arm}-minus-{first}", "paired differences of seeds")
            n_points += file.bring_to(over_seeds(names, both, blocks) | each)
        return n_points

    def _file(self, name: str, what: str) -> EventFile:
        return self._files.setdefault(name, EventFile(self.root / FOLDER / name, DESCRIPTION.format(what)))


def over_seeds(names: Mapping[str, str], cells: Sequence[Curves], blocks: list[int]) -> dict[str, Curve]:
    """The run of one arm, or of its differences: means and bands of the tags in names, under those names.

    Cells are the curves of each counted seed; a seed counts for a tag from its first value of it on. There is no band
    below two seeds, and no curve where the seeds share no step.
    """
    run: dict[str, Curve] = {}
    banded = tags.question_tags(blocks)
    for tag, name in names.items():
        there = [curves[tag] for curves in cells if tag in curves]
        steps, values_NT = shared_steps(there) if there else NONE
        if not len(steps):
            continue
        over_N = mean_test(values_NT.T)
        run[name] = steps, over_N.mean
        for which, values in (("low", over_N.low), ("high", over_N.high)):
            if tag in banded and not np.isnan(values).any():
                run[tags.band_tag(name, which)] = steps, values
        if tag in tags.COUNTED:
            run[tags.COUNTED[tag]] = steps, np.full(len(steps), float(len(there)))
    return run


def differences(arm: Curves, baseline: Curves, wanted: Iterable[str]) -> dict[str, Curve]:
    """One seed's arm minus its baseline in the wanted tags, at the steps that both have."""
    found = {}
    for tag in wanted:
        if tag in arm and tag in baseline:
            steps, (ours, theirs) = shared_steps([arm[tag], baseline[tag]])
            if len(steps):
                found[tag] = steps, ours - theirs
    return found


@contextmanager
def claim(suite: SuiteConfig, suite_dir: SuiteDir) -> Iterator[OverSeeds]:
    """The synthetic runs of a folder, for one process; what an earlier one wrote is removed.

    Raises UserError: another process writes them; an arm or a folder that is not ours has their name.
    """
    root = suite_dir.tensorboard
    refuse_taken_names(suite)
    with hold_lock(root, "another `replicate tensorboard` writes here; look at its page, or end it"):
        for folder in (root / FOLDER, root / EARLIER):
            if folder.exists() and not (folder / MARKER).is_file():
                raise UserError(f"{folder}: not written by `replicate tensorboard`; move it away")
            # renamed whole: a folder without the marker, left by an interruption, would look like somebody else's
            old, new = (folder.with_name(f".{folder.name}.{word}") for word in ("old", "new"))
            remove_tree(old)
            remove_tree(new)
            try:
                write_text(new / MARKER, "Removed and written anew by each `replicate tensorboard`.\n")
            except OSError:
                remove_tree(new)
                raise
            if folder.exists():
                folder.rename(old)
            if folder.name == FOLDER:
                new.rename(folder)
            remove_tree(old)
            remove_tree(new)
        for path in root.glob(f"events.*.{SUFFIX}"):
            path.unlink()
        yield OverSeeds(suite, suite_dir)


def refuse_taken_names(suite: SuiteConfig) -> None:
    """Raise UserError where an arm has the name of our own runs."""
    for name in (FOLDER, EARLIER):
        if name in suite.arms:
            raise UserError(f"suite {suite.name}: key arms: '{name}' is the name of runs over seeds; rename the arm")


def counts(run: RunDir) -> bool:
    """Whether a cell is among those that a mean is over: complete, or running as far as its files tell.

    A cell that failed leaves the mean at all of its steps: it would hold the mean back for ever. It comes back when it
    runs again.
    """
    state = run.state()
    if state != "interrupted":
        return state in ("complete", "running")
    try:
        # of another node's clock, which may be ahead of this one's
        return abs(time.time() - run.metrics.stat().st_mtime) < ALIVE_SECONDS
    except OSError:
        return False
