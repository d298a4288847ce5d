"""Sweeps of the learning rate: each arm's losses by rate, and the sweeps compared at the best rate of each.

An optimizer, or a change to one, that is compared at one rate alone may win by the rate (Choi et al. 2019, Schmidt et
al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from replication.config import SuiteConfig
from replication.protocol.certificate import Certificate
from replication.report.comparisons import Number, Row, Values, certified, diverged_limit
from replication.report.load import NAN, CellData, Floats
from replication.statistics.format import between, p_value, percent, rounded
from replication.statistics.seeds import at_best_rates, chosen_on_others, mean_test


@dataclass(frozen=True)
class SweptRate:
    arm: str
    rate: Number
    losses: list[Number]
    """One a seed; those of a cell that diverged and did not finish are the limit of the suite's rule."""
    mean: Number
    """Over the seeds at which all arms of all sweeps have a loss; as is sd."""
    sd: Number
    chosen_at: list[int]
    """Seeds whose other seeds choose this rate."""


@dataclass(frozen=True)
class Sweep:
    name: str
    rates: list[SweptRate]
    """In ascending order."""
    best: str | None
    """Arm of the lowest mean; None below two seeds."""
    edge: str
    """lowest or highest, where the best rate is that of those tried; else empty."""


@dataclass(frozen=True)
class BestRates:
    """One sweep less the first, each at its best rate; numbers as in statistics.seeds.AtBestRates."""

    id: str
    name: str
    baseline: str
    differences: list[Number]
    n: int
    mean: Number
    low: Number
    high: Number
    level: float
    p: Number


@dataclass(frozen=True)
class Sweeps:
    seeds: list[int]
    """At which all arms of all sweeps have a loss."""
    sweeps: list[Sweep]
    answers: list[BestRates]


def compare_sweeps(
    values: Values,
    certificate: Certificate,
    suite: SuiteConfig,
    cells: Sequence[CellData],
    diverged: Sequence[Row],
    level: float,
) -> Sweeps | None:
    """The answers to the plan's questions of best rates, in order; None in a suite without sweeps.

    Args:
        values: the losses that the plan compares.
        diverged: rows of `comparisons.diverged_rows`.
        level: of the intervals.
    """
    sweeps, seeds = suite.analysis.sweeps, suite.seeds
    if not sweeps:
        return None
    limit, losses = diverged_limit(suite.diverged, cells), dict[str, Floats]()
    lost = {(row["arm"], row["seed"]) for row in diverged if row["state"] != "complete"}
    for arm in (arm for arms in sweeps.values() for arm in arms):
        measured = np.where(certified(certificate, (arm,), seeds), np.array(values[arm], dtype=np.float64), NAN)
        losses[arm] = np.where([(arm, seed) in lost for seed in seeds], limit, measured)
    whole = np.isfinite(np.stack(list(losses.values()))).all(0)
    used = np.flatnonzero(whole) if whole.sum() > 1 else np.empty(0, dtype=np.int64)
    used_seeds = np.array(seeds)[used]
    rates = {c.arm: r for c in cells if isinstance(r := c.config.get("training.learning_rate"), int | float)}
    shown, tables = [], list[Floats]()
    for name, arms in sweeps.items():
        ascending = sorted(arms, key=lambda arm: rates.get(arm, NAN))
        tables.append(np.stack([losses[arm][used] for arm in ascending]))
        chosen_N, swept = chosen_on_others(tables[-1]), []
        for r, arm in enumerate(ascending):
            t, own = mean_test(tables[-1][r]), losses[arm].tolist()
            chosen_at = used_seeds[chosen_N == r].tolist()
            swept.append(SweptRate(arm, rates.get(arm), own, float(t.mean), float(t.sd), chosen_at))
        best = int(tables[-1].sum(1).argmin()) if len(used) else None
        edge = {0: "lowest", len(arms) - 1: "highest"}.get(-1 if best is None else best, "")
        shown.append(Sweep(name, swept, None if best is None else ascending[best], edge))
    answers = []
    for sweep, table in zip(shown[1:], tables[1:], strict=True):
        best_t = at_best_rates(tables[0], table, level)
        numbers = {key: getattr(best_t, key).item() for key in ("mean", "low", "high", "p")}
        names = f"best_rate_{sweep.name}", sweep.name, shown[0].name
        answers.append(BestRates(*names, best_t.held_out.tolist(), len(used), level=level, **numbers))
    return Sweeps(used_seeds.tolist(), shown, answers)


def lines(sweeps: Sweeps | None) -> Iterator[str]:
    """A sentence for each sweep that is compared, and for each whose best rate has nothing beyond it."""
    for answer in sweeps.answers if sweeps else ():
        if not answer.n:
            yield f"{answer.name} at its best learning rate: fewer than two seeds have a loss of every swept arm."
            continue
        yield (
            f"{answer.name} beside {answer.baseline}, each at the learning rate that the other seeds choose: "
            f"{rounded(answer.mean, answer.low, answer.high)} nats, {percent(answer.level)} interval "
            f"{between(answer.low, answer.high)}, p {p_value(answer.p)} before "
            f"correction, {answer.n} seeds."
        )
    for sweep in sweeps.sweeps if sweeps else ():
        if sweep.edge:
            rate = next(rate.rate for rate in sweep.rates if rate.arm == sweep.best)
            yield (
                f"The best rate of {sweep.name}, {rate:g}, is the {sweep.edge} that was tried: a rate beyond it "
                "may be better still, and then this is no comparison at the best."
            )
