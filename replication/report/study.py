"""Study: the numbers of an output folder as pandas frames, for a paper's own figures and tests.

    from replication import Study

    study = Study("out/mine")
    losses = study.metrics().query("tag == 'val/loss_nats'")

Reads the folder as `replicate report` does, with the same statistics, and writes nothing. README.md has the columns.
pandas comes with `datasets`; neither it nor anything else heavy is loaded before the first frame. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replication.config import SuiteConfig, load_suite
from replication.errors import UserError
from replication.runs.files import number
from replication.runs.journal import read_journal
from replication.runs.layout import SuiteDir
from replication.votes.record import COLUMNS, FURTHER, read_votes, uncounted_judges
from replication.votes.tally import chosen_arm

if TYPE_CHECKING:
    from pandas import DataFrame

    from replication.report.results import Results


class Study:
    """An output folder. What was read once is kept: make another Study to see what cells have logged since."""

    def __init__(self, out: str | Path) -> None:
        """Raises UserError where the folder holds no suite."""
        self.dir = SuiteDir(Path(out))
        if not self.dir.suite.is_file():
            raise UserError(f"{self.dir.suite}: no such file; give the output folder of `replicate grid run`")
        self.suite: SuiteConfig = load_suite(self.dir.suite)

    def cells(self) -> DataFrame:
        """One row a cell, those that are not complete too: state, step, last losses, speed, hashes, and each quantity
        that arms are compared by (NaN where the cell is not complete)."""
        return self._frame(self._results.cells)

    def metrics(self, per_step: bool = False) -> DataFrame:
        """One row a value of a cell's journal, tidy: cell, arm, seed, step, tag, value.

        A value that was not finite is NaN. With `per_step`, instead, the scalars that the journal has at every
        optimizer step (training loss, gradient norm), however seldom lines were logged.
        """
        import pandas as pd

        columns = ("cell", "arm", "seed", "step", "tag", "value")
        frame = pd.DataFrame(self._journal_values(per_step), columns=columns)
        return frame.astype({"cell": "category", "arm": "category", "tag": "category", "value": "float64"})

    def _journal_values(self, per_step: bool) -> Iterator[tuple[str, str, int, int, str, float | None]]:
        for seed in self.suite.seeds:
            for arm in self.suite.arms:
                found: dict[tuple[int, str], object] = {}  # a later line of the same step wins, as everywhere
                for line in read_journal(self.dir.cell(arm, seed).metrics):
                    if not per_step:
                        found |= {(line.step, tag): value for tag, value in line.values.items()}
                    for tag, values in line.per_step.items() if per_step else ():
                        first = line.step - len(values) + 1
                        found |= {(step, tag): value for step, value in enumerate(values, first)}
                for (step, tag), value in found.items():
                    if not isinstance(value, str):  # data_hash
                        yield f"{arm}/seed-{seed}", arm, seed, step, tag, number(value)

    def differences(self) -> DataFrame:
        """One row a quantity and arm: the paired difference to the baseline over certified seeds, with its 95 % t
        interval and the exact sign-flip p, as in the report's table."""
        return self._frame(difference_rows(self._results))

    def votes(self) -> DataFrame:
        """One row a vote of votes.csv, repeats too, with `chosen`: the arm that it is for, None for a tie; and whether
        its judge is `withdrawn`, or excluded by a rule of the study, so that no statistic counts it."""
        import pandas as pd

        gone = uncounted_judges(self.dir)
        votes = read_votes(self.dir.votes)
        rows = [asdict(v) | {"chosen": chosen_arm(v), "withdrawn": v.judge_id in gone} for v in votes]
        return pd.DataFrame(rows, columns=(*COLUMNS, *FURTHER, "chosen", "withdrawn"))

    def results(self) -> DataFrame:
        """results.json flattened, one row a value: its key, such as `loss.mean` or `quantities[0].pairs[2].low`."""
        import pandas as pd

        from replication.report.results import to_tree

        return pd.DataFrame(leaves(to_tree(self._results)).items(), columns=("key", "value")).astype({"value": object})

    @cached_property
    def _results(self) -> Results:
        from replication.report.report import compute

        return compute(self.dir, self.suite, readers=1)[2]  # other processes would run a caller's script again

    @staticmethod
    def _frame(rows: list[dict[str, object]]) -> DataFrame:
        """Rows as columns of their own types; what is missing is NaN."""
        import pandas as pd

        frame = pd.DataFrame(rows)
        return frame.astype({name: "float64" for name in frame if frame[name].isna().all()})


def difference_rows(results: Results) -> list[dict[str, object]]:
    """The table of paired differences, one row a quantity (or score of an evaluation) and arm."""
    rows: list[dict[str, object]] = []
    for q in (*results.quantities, *results.completions, *results.evaluations):
        for pair in q.pairs:
            of = {"quantity": q.key, "unit": q.unit, "arm": pair.arm, "baseline": results.suite.baseline}
            numbers = {key: value for key, value in asdict(pair).items() if key not in ("arm", "differences")}
            rows.append({**of, **numbers})
    return rows


def leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: value} of every value in a JSON tree; the entries of a list are [0], [1], ..."""
    if isinstance(tree, dict):
        inner = [(f"{key}.{name}" if key else name, value) for name, value in tree.items()]
    elif isinstance(tree, list):
        inner = [(f"{key}[{i}]", value) for i, value in enumerate(tree)]
    else:
        return {key: tree}
    return {name: leaf for path, value in inner for name, leaf in leaves(value, path).items()}
