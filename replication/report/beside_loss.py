"""What stands beside the verdict on the loss: the set it was measured on, the margin's worth, cells that diverged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from replication.config import AnalysisConfig, SuiteConfig
from replication.protocol.certificate import Certificate
from replication.report.comparisons import ComparedArm, Number, Row, Values, certified, diverged_limit, paired
from replication.report.decisions import Decision, outcome
from replication.report.load import NAN, CellData
from replication.report.questions import LossAnswer
from replication.statistics.crossed import CrossedDesign
from replication.statistics.format import between, count, number, percent, rounded
from replication.statistics.scaling import FITTED_PARAMETERS, FITTED_TOKENS, worth_in_tokens
from replication.statistics.seeds import NOT_DECIDED, equivalence


@dataclass(frozen=True)
class ValidationNoise:
    """How far another validation set of as many sequences would move the mean difference, in nats."""

    n_sequences: int
    se: Number
    """Of the differences of the same sequences, each a mean over seeds."""
    low: Number
    high: Number
    """The interval over seeds and sequences, each a sample; None at one seed."""


@dataclass(frozen=True)
class WorstCase:
    """The difference with cells that diverged and did not finish counted at the limit of the suite's rule."""

    cells: list[str]
    nats: float
    n: int
    mean: Number
    low: Number
    high: Number
    verdict: str


@dataclass(frozen=True)
class BesideLoss:
    noise: ValidationNoise | None
    """None where the journals have no losses of single sequences."""
    tokens: int | None
    """Of training; None where cells have other numbers, or none is complete."""
    margin_in_tokens: Number
    """Share of them by which training had to be longer for the margin, by a scaling fit; None: no length would do."""
    is_extrapolated: bool
    worst: WorstCase | None


def beside_loss(
    loss: LossAnswer,
    values: Values,
    cells: Sequence[CellData],
    certificate: Certificate,
    suite: SuiteConfig,
    tokens: int | None,
    parameters: int | None,
    diverged: Sequence[Row],
    decision: Decision,
) -> BesideLoss:
    """Of the losses `values` that the answer is about; `diverged` are rows of `comparisons.diverged_rows`."""
    share = worth_in_tokens(loss.margin_nats, tokens) if tokens else NAN
    is_extrapolated = (tokens or 0) < FITTED_TOKENS or (parameters or 0) < FITTED_PARAMETERS
    of_cell = {(cell.arm, cell.seed): cell for cell in cells}
    last = suite.analysis.late_validations if loss.loss == "late_val_loss" else 1
    noise = _validation_noise(loss, of_cell, certificate, suite.seeds, last)
    worst = _worst_case(loss, values, of_cell, certificate, suite, diverged, decision)
    return BesideLoss(noise, tokens, share, is_extrapolated, worst)


def _validation_noise(
    loss: LossAnswer,
    cells: Mapping[tuple[str, int], CellData],
    certificate: Certificate,
    seeds: Sequence[int],
    last: int,
) -> ValidationNoise | None:
    pair, rows = (loss.arm, loss.baseline), []
    for seed, holds in zip(seeds, certified(certificate, pair, seeds), strict=True):
        treated, plain = (cells[arm, seed].sequence_losses[-last:] for arm in pair)
        if holds and treated.size and treated.shape == plain.shape:
            rows.append((treated - plain).mean(0))
    used = [row for row in rows if len(row) == len(rows[0]) and np.isfinite(row).all()]
    if not used or len(used) != loss.n or len(used[0]) < 2:
        return None
    differences_SQ = np.stack(used)
    n_seeds, n_sequences = differences_SQ.shape
    se = float(differences_SQ.mean(0).std(ddof=1) / np.sqrt(n_sequences))
    if n_seeds < 2:
        return ValidationNoise(n_sequences, se, NAN, NAN)
    of_seed, of_sequence = (index.ravel() for index in np.indices(differences_SQ.shape))
    design = CrossedDesign(of_seed, of_sequence, np.zeros_like(of_seed))
    t = design.t(differences_SQ.ravel(), null=0.0, alpha=2 * loss.alpha)
    return ValidationNoise(n_sequences, se, float(t.low), float(t.high))


def _worst_case(
    loss: LossAnswer,
    values: Values,
    cells: Mapping[tuple[str, int], CellData],
    certificate: Certificate,
    suite: SuiteConfig,
    diverged: Sequence[Row],
    decision: Decision,
) -> WorstCase | None:
    lost = {(row["arm"], row["seed"]) for row in diverged if row["state"] != "complete"}
    used, differences = [], paired(values, certificate, loss.arm, loss.baseline, suite.seeds)
    limit = diverged_limit(suite.diverged, cells.values())
    for i, seed in enumerate(suite.seeds):
        pair = [(loss.arm, seed), (loss.baseline, seed)]
        if np.isnan(differences[i]) and lost.intersection(pair):
            treated, plain = (limit if place in lost else values[place[0]][i] for place in pair)
            differences[i] = (NAN if treated is None else treated) - (NAN if plain is None else plain)
            used += [f"{arm}/seed-{seed}" for arm, _ in pair if (arm, seed) in lost]
    if not used:
        return None
    t = equivalence(differences, loss.margin_nats, loss.alpha)
    verdict = outcome(decision, float(t.p)) if t.n >= loss.min_seeds else NOT_DECIDED
    return WorstCase(used, limit, int(t.n), float(t.mean), float(t.low), float(t.high), verdict)


def lines(beside: BesideLoss, loss: LossAnswer, unsmoothed: ComparedArm, a: AnalysisConfig) -> Iterator[str]:
    """A sentence or two for each."""
    level = percent(loss.interval_level)
    if unsmoothed.mean is not None and loss.mean and unsmoothed.mean != loss.mean:
        found = rounded(unsmoothed.mean, unsmoothed.low, unsmoothed.high)
        times = f"{number(unsmoothed.mean / loss.mean, 2)} times as large"
        yield (
            f"Without label smoothing the difference is {found} nats, {times}: smoothing mixes "
            "into every token's loss a part that is no likelihood of the text."
        )
    noise, share, worst = beside.noise, beside.margin_in_tokens, beside.worst
    these = f"these {count(noise.n_sequences)} sequences" if noise else "this validation set"
    where = f"Intervals over seeds are conditional on {these}"
    if noise is None:
        yield f"{where}; how far another set would move the difference was not recorded."
    else:
        both = f", and over seeds and sequences the {level} interval is {between(noise.low, noise.high)}"
        yield (
            f"{where} of validation. The standard error of the difference over sequences, paired, is "
            f"{number(noise.se, 4)} nats{both if noise.low is not None else ''}."
        )
    none = f"No reason was registered for the margin of {a.margin_nats:g} nats."
    yield f"The margin's reason, as registered: {a.margin_reason}" if a.margin_reason else none
    if beside.tokens:
        more = "no number of further tokens" if share is None else f"{percent(share, 1)} more tokens"
        beyond = " (extrapolated: no run of the fit was so small)" if beside.is_extrapolated else ""
        yield (
            "On the scaling fit of Hoffmann et al. (2022), with the constants of Besiroglu et al. (2024), "
            f"{a.margin_nats:g} nats at {count(beside.tokens)} tokens is worth {more}{beyond}."
        )
    if worst:
        yield (
            f"Worst case, with what diverged and did not finish ({', '.join(worst.cells)}) counted at "
            f"{number(worst.nats, 2)} nats, the limit of the rule: {worst.verdict} (mean difference "
            f"{rounded(worst.mean, worst.low, worst.high)} nats, {level} interval "
            f"{between(worst.low, worst.high)}, "
            f"{worst.n} seeds). The verdict is of complete cells."
        )
