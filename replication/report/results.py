"""Every number of the report in one dict, DIR/results.json: the templates and figures read this and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from replication.config import SuiteConfig, to_dict
from replication.protocol.certificate import Certificate
from replication.protocol.deviations import check_plan
from replication.protocol.diverged import why_diverged
from replication.report.answers import certified, factorial_answer, loss_answer, places, secondary_answers
from replication.report.description import (
    completions,
    config_summary,
    data_hashes,
    data_summary,
    fidelity_summary,
    generation_summary,
    machines,
    noise_summary,
    one_value,
    reproduce,
    warnings,
)
from replication.report.divergence import divergence_answer
from replication.report.judged import analyse_votes, votes_by_judge
from replication.report.load import Cell
from replication.runs.layout import SuiteDir
from replication.statistics.format import clean
from replication.statistics.losses import sign_flip_p
from replication.statistics.seeds import (
    BUDGET_TOLERANCE,
    budget_departure,
    differences_to_first,
    last_share_mean,
    late_mean,
    smallest_sign_flip_p,
    summarize_paired,
)
from replication.votes.record import Vote

FORMAT = 1
LATE_STEP_SHARE = 0.1
NAN = float("nan")


@dataclass(frozen=True)
class Quantity:
    """One number of a complete cell that arms are compared by."""

    key: str
    name: str
    unit: str
    value: Callable[[Cell], float]


def _final(tag: str) -> Callable[[Cell], float]:
    """The validation at the cell's last step; a validation of an earlier step is not the final one."""

    def value(cell: Cell) -> float:
        steps = cell.validation.steps
        return cell.validation.last(tag) if len(steps) and steps[-1] == cell.step else NAN

    return value


def quantities(late_validations: int) -> tuple[Quantity, ...]:
    """What arms are compared by; the late mean is over so many validations."""
    late = Quantity(
        "late_val_loss",
        "Validation loss, late mean",
        "nats",
        lambda cell: late_mean(cell.validation.column("val/loss_nats"), late_validations).value,
    )
    return (_FINAL_LOSS, late, *_OTHERS)


_FINAL_LOSS = Quantity("final_val_loss", "Validation loss at the last step", "nats", _final("val/loss_nats"))
_OTHERS = (
    Quantity(
        "entropy_predicted_tokens",
        "Entropy of the histogram of predicted tokens",
        "nats",
        _final("val/entropy_predicted_tokens_nats"),
    ),
    Quantity(
        "entropy_predictive",
        "Mean entropy of the predictive distribution",
        "nats",
        _final("val/entropy_predictive_nats"),
    ),
    Quantity(
        "grad_norm",
        f"Gradient norm, mean of the last {LATE_STEP_SHARE:.0%} of steps",
        "",
        lambda cell: last_share_mean(cell.per_step.get("train/grad_norm", np.empty(0)), LATE_STEP_SHARE).value,
    ),
)

PUBLISHED = (
    ("late_val_loss", "Validation loss, mean of the last 10 checkpoints", 3.946, 3.950, 3, "within its noise"),
    ("entropy_predicted_tokens", "Token entropy (not defined there)", 7.214, 7.425, 3, "higher"),
    ("grad_norm", "Gradient norm", 1.74, 2.50, 2, "higher"),
)
"""(quantity here, words there, baseline, both, digits printed, direction of both).

Phase 3: one seed, about 1.2 billion parameters, 3.93 billion tokens.
"""


def compute_results(
    suite_dir: SuiteDir,
    suite: SuiteConfig,
    cells: Sequence[Cell],
    certificate: Certificate,
    votes: Sequence[Vote] = (),
) -> dict[str, Any]:
    """All numbers of the report, as plain JSON values; a missing number is None.

    Args:
        suite_dir: the output folder; its plan and data manifest are read.
        suite: names and order of arms and seeds; the first arm is the baseline.
        cells: every cell of arms x seeds.
        certificate: of the same arms and seeds; pairs that do not hold are left out of every difference.
        votes: the record; empty: no votes yet.
    """
    a = suite.analysis.resolved(suite.arms)
    compared = quantities(a.late_validations)
    counted = votes_by_judge(votes, a.judge_kinds) if votes else None
    results = {
        "format": FORMAT,
        "suite": _suite(suite, cells, certificate),
        "plan": check_plan(suite_dir, suite, counted).to_dict(),
        "analysis": to_dict(a),
        "preference": _preference(votes, suite, cells, certificate, suite_dir.plan.is_file()),
        "certificate": certificate.to_dict(),
        "pairs_used": [{"arm": p.arm, "seed": p.seed} for p in certificate.pairs if p.state == "holds"],
        "pairs_refused": [asdict(p) for p in certificate.pairs if p.state != "holds"],
        "cells": [_cell(cell, compared) for cell in cells],
        "failures": [
            {"arm": c.arm, "seed": c.seed, "error": c.failure.error, "step": c.failure.step} for c in cells if c.failure
        ],
        "diverged": list(_diverged(suite_dir, suite, cells)),
        "late": _late(cells, a.late_validations),
        "quantities": [_quantity(q, suite, cells, certificate) for q in compared],
        "divergence": divergence_answer(cells, suite.arms),
        "gain": [_gain(cell) for cell in cells if len(cell.train.steps)],
        "warnings": list(warnings(suite_dir, suite, cells, certificate)),
        "config": config_summary(suite, cells),
        "fidelity": fidelity_summary(suite_dir, suite, cells),
        "data": data_summary(suite_dir, cells),
        "data_hashes": data_hashes(cells),
        "noise": noise_summary(suite_dir, cells, a.loss),
        "machines": machines(cells),
        "generation": generation_summary(suite_dir, cells),
        "samples": completions(suite, cells),
        "reproduce": reproduce(suite, cells),
    }
    results |= _answers(results, suite, cells, certificate)
    results["published"] = _published(results)
    return clean(results)


def _answers(
    results: dict[str, Any], suite: SuiteConfig, cells: Sequence[Cell], certificate: Certificate
) -> dict[str, Any]:
    """The questions of the plan: loss, factorial and secondary."""
    a = suite.analysis.resolved(suite.arms)
    values = next(q["values"] for q in results["quantities"] if q["key"] == a.loss)
    loss = loss_answer(values, certificate, suite.seeds, a)
    if loss is not None:
        loss["name"] = next(q["name"] for q in results["quantities"] if q["key"] == a.loss)
    factorial = factorial_answer(values, certificate, suite.seeds, places(cells, suite), a)
    secondary = secondary_answers(values, certificate, suite.seeds, a, loss, factorial, results["preference"])
    return {"loss": loss, "factorial": factorial, "secondary": secondary}


def _preference(
    votes: Sequence[Vote], suite: SuiteConfig, cells: Sequence[Cell], certificate: Certificate, is_planned: bool
) -> dict[str, Any] | None:
    """What the votes say of the treatment; None without votes, or in a suite of one arm."""
    a = suite.analysis.resolved(suite.arms)
    if a.treatment is None or a.baseline is None:
        return None
    others = [arm for arm in suite.arms if arm != a.baseline]
    good = {arm: certified(certificate, (arm, a.baseline), suite.seeds) for arm in others}
    seeds = {arm: [seed for seed, holds in zip(suite.seeds, good[arm], strict=True) if holds] for arm in others}
    categories = {
        sample["prompt_id"]: str(sample.get("category"))
        for cell in cells
        for sample in cell.samples
        if isinstance(sample.get("prompt_id"), int)
    }
    return analyse_votes(votes, suite.name, a, seeds, categories, is_planned)


# ---------------------------------------------------------------- suite and cells


def _suite(suite: SuiteConfig, cells: Sequence[Cell], certificate: Certificate) -> dict[str, Any]:
    n_complete = sum(cell.complete for cell in cells)
    held = [pair.arm for pair in certificate.pairs if pair.state == "holds"]
    n_paired = max((held.count(arm) for arm in suite.arms), default=0)
    return {
        "name": suite.name,
        "arms": list(suite.arms),
        "seeds": list(suite.seeds),
        "baseline": suite.arms[0],
        "cells_total": len(cells),
        "cells_complete": n_complete,
        "cells_not_complete": len(cells) - n_complete,
        "parameters": one_value(cell.manifest.parameters for cell in cells if not cell.manifest.is_empty),
        "tokens": one_value(cell.manifest.tokens for cell in cells if cell.complete),
        "n_paired": n_paired,  # seeds of the arm that has most certified pairs
        "smallest_sign_flip_p": smallest_sign_flip_p(n_paired),
        "two_by_two": places(cells, suite) is not None,
    }


def _cell(cell: Cell, compared: Sequence[Quantity]) -> dict[str, Any]:
    validations = cell.validation.steps
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "state": cell.state,
        "step": cell.step,
        "steps_planned": cell.config.get("training.steps"),
        "tokens": cell.tokens,
        "last_val_loss_nats": cell.validation.last("val/loss_nats"),
        "last_val_loss_unsmoothed_nats": cell.validation.last("val/loss_unsmoothed_nats"),
        "last_val_step": int(validations[-1]) if len(validations) else None,
        "tokens_per_second": cell.tokens / cell.wall_seconds if cell.wall_seconds > 0 else NAN,
        "wall_seconds": cell.wall_seconds,
        "config_hash": cell.manifest.config_hash,
        "final_weights_sha256": cell.manifest.final_weights_sha256,
        **{q.key: q.value(cell) if cell.complete else NAN for q in compared},
    }


def _diverged(suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Cells that diverged by the suite's rule, complete ones too: they stay in every comparison."""
    for c in cells:
        facts = [c.config.get(key) for key in ("training.warmup_steps", "model.vocab_size")]
        if None in facts:
            continue
        why = why_diverged(suite_dir.cell(c.arm, c.seed), suite.diverged, *facts)  # type: ignore[arg-type]
        if why:
            yield {"arm": c.arm, "seed": c.seed, "state": c.state, "why": why}


def _late(cells: Sequence[Cell], k: int) -> dict[str, Any]:
    """Which part of training the late-checkpoint mean is over, of the first complete cell with validations."""
    for cell in cells:
        if cell.complete and len(cell.validation.steps):
            late = cell.validation.steps[-k:]
            first = int(late[0])
            return {
                "k": len(late),
                "k_asked": k,
                "first_step": first,
                "last_step": int(late[-1]),
                "share_of_training": (cell.step - first) / cell.step if cell.step else NAN,
            }
    return {"k": 0, "k_asked": k, "first_step": None, "last_step": None, "share_of_training": None}


# ---------------------------------------------------------------- comparisons


def _quantity(q: Quantity, suite: SuiteConfig, cells: Sequence[Cell], certificate: Certificate) -> dict[str, Any]:
    """Values of complete cells, and differences of the pairs that the certificate lets pass."""
    by_name = {(cell.arm, cell.seed): cell for cell in cells}
    values = np.array([
        [q.value(by_name[arm, seed]) if by_name[arm, seed].complete else NAN for seed in suite.seeds]
        for arm in suite.arms
    ])  # fmt: skip
    differences = differences_to_first(values)
    pairs = []
    for arm, row in zip(suite.arms[1:], differences, strict=True):
        passed = [certificate.pair(arm, seed).state == "holds" for seed in suite.seeds]
        used = np.where(passed, row, NAN)
        p = float(sign_flip_p(used))
        pairs.append({"arm": arm, "differences": used.tolist(), **asdict(summarize_paired(used)), "p_sign_flip": p})
    pooled = values[:, [seed not in certificate.not_pooled for seed in suite.seeds]]
    means = {arm: _mean(row) for arm, row in zip(suite.arms, pooled, strict=True)}
    baseline = pooled[0][np.isfinite(pooled[0])]
    return {
        "key": q.key,
        "name": q.name,
        "unit": q.unit,
        "values": {arm: row.tolist() for arm, row in zip(suite.arms, values, strict=True)},
        "means": means,
        "baseline_range": float(np.ptp(baseline)) if len(baseline) > 1 else NAN,
        "pairs": pairs,
    }


def _mean(values: np.ndarray) -> float:
    """Mean of the seeds that have a value; NaN where none has."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else NAN


def _published(results: dict[str, Any]) -> dict[str, Any]:
    """The published table beside the same quantities here: comparable in direction only."""
    by_key = {q["key"]: q for q in results["quantities"]}
    baseline = results["suite"]["baseline"]
    applies = baseline == "baseline" and "both" in results["suite"]["arms"]
    rows = []
    for key, words, there_baseline, there_both, digits, direction in PUBLISHED:
        q = by_key[key]
        pair = next((p for p in q["pairs"] if p["arm"] == "both"), None) if applies else None
        rows.append({
            "published_name": words,
            "here_name": q["name"],
            "unit": q["unit"],
            "published_baseline": there_baseline,
            "published_both": there_both,
            "published_difference": round(there_both - there_baseline, 6),
            "digits": digits,
            "here_baseline": q["means"][baseline] if applies else None,
            "here_both": q["means"]["both"] if applies else None,
            "here_difference": pair["mean"] if pair else None,
            "published_direction": direction,
            "here_direction": side(pair) if pair else "no such pair in this suite",
        })  # fmt: skip
    return {"applies": applies, "rows": rows}


def side(pair: dict[str, Any]) -> str:
    """On which side of the baseline an arm lies, in words."""
    n, up, down = pair["n"], pair["n_positive"], pair["n_negative"]
    if not n:
        return "not measured in any certified pair"
    seeds = "the one seed" if n == 1 else f"{n} of {n} seeds"
    if n in (up, down):
        return f"{'higher' if up else 'lower'} at {seeds}"
    return f"higher at {up}, lower at {down} of {n} seeds"


def _gain(cell: Cell) -> dict[str, Any]:
    """Whether the token gain preserves the total gradient budget in one cell (objectives/README.md, Token gain)."""
    mean = cell.train.column("gain/mean")
    budget = budget_departure(mean)
    failing = cell.train.steps[np.abs(np.where(np.isfinite(mean), mean, 1.0) - 1) > BUDGET_TOLERANCE]
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "applied": cell.config.get("token_gain.enabled"),
        "n_measured": budget.n_measured,
        "n_failing": budget.n_failing,
        "share_failing": budget.share,
        "last_failing_step": int(failing[-1]) if len(failing) else None,
        "largest_mean": float(np.nanmax(mean)) if budget.n_measured else NAN,
        "last_mean": cell.train.last("gain/mean"),
        "last_mean_before_clamp": cell.train.last("gain/mean_before_clamp"),
        "last_std": cell.train.last("gain/std"),
        "last_share_at_min": cell.train.last("gain/share_at_min"),
        "last_share_at_max": cell.train.last("gain/share_at_max"),
    }
