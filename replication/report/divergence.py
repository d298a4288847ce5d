"""Layer divergence beside the published figures: first, fourth and last block, early, at a third and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replication.report.load import Cell

Floats = NDArray[np.float64]

PUBLISHED_BLOCKS = 20
PUBLISHED_TRAINING_STEPS = 30_000
PUBLISHED_AT = (1_000, 10_000, 29_900)
"""Steps of the published run at which its data file is read here."""
PUBLISHED = {"first": (0, (1.77, 1.23, 1.44)), "fourth": (3, (0.18, 0.55, 0.71)), "last": (19, (0.12, 0.34, 0.60))}
"""Place -> (block, divergences at PUBLISHED_AT), of the arm with both changes: one seed, micro-batches of its end."""


def block_of(place: str, n_blocks: int) -> int | None:
    """The block of a model of n_blocks that stands for a published one; None where it is too shallow to have one."""
    block = {"first": 0, "fourth": 3, "last": n_blocks - 1}[place]
    return block if place != "fourth" or n_blocks > 4 else None


def divergence_answer(cells: Sequence[Cell], arms: Sequence[str]) -> dict[str, Any]:
    """Published and measured divergences at the same shares of training.

    Args:
        cells: of the suite; complete ones that may be pooled are read.
        arms: in the suite's order.

    Returns:
        published: a row a place. here: a row an arm and place, with the mean over seeds and every seed. growth is the
        last of the three values over the first.
    """
    published = [
        {
            "place": place,
            "block": block,
            "steps": list(PUBLISHED_AT),
            "values": list(values),
            "growth": values[-1] / values[0],
        }
        for place, (block, values) in PUBLISHED.items()
    ]
    here = [row for arm in arms for place in PUBLISHED if (row := _here(cells, arm, place))]
    steps = PUBLISHED_TRAINING_STEPS
    return {"blocks": PUBLISHED_BLOCKS, "training_steps": steps, "published": published, "here": here}


def _here(cells: Sequence[Cell], arm: str, place: str) -> dict[str, Any] | None:
    rows: list[dict[str, Any]] = []
    for cell in cells:
        n_blocks = len(cell.train.tags("divergence/"))
        block = block_of(place, n_blocks) if n_blocks else None
        if cell.arm == arm and cell.complete and cell.pooled and block is not None:
            steps, values = _at_shares(cell, f"divergence/block_{block:02d}")
            rows.append({"seed": cell.seed, "block": block, "steps": steps, "values": values})
    if not rows:
        return None
    table = np.array([row["values"] for row in rows], dtype=np.float64)  # [N, 3]
    growth = table[:, -1] / table[:, 0]
    return {
        "arm": arm,
        "place": place,
        "block": rows[0]["block"],
        "steps": rows[0]["steps"],
        "mean": table.mean(0).tolist(),
        "growth": float(growth.mean()),
        "seeds": [{**row, "growth": float(g)} for row, g in zip(rows, growth, strict=True)],
    }


def _at_shares(cell: Cell, tag: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the logged steps nearest to the published shares of training."""
    steps, values = cell.train.steps, cell.train.column(tag)
    nearest = [int(np.abs(steps - cell.step * at / PUBLISHED_TRAINING_STEPS).argmin()) for at in PUBLISHED_AT]
    return [int(steps[i]) for i in nearest], [float(values[i]) for i in nearest]
