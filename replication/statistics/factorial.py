"""The 2x2 of preference: what token gain, layer gain and their interaction do to the share of decisive votes. Pure.

A decisive vote between two arms of one seed is y = +1/2 for the second and -1/2 for the first, and

    y = x b + seed + prompt + judge + seed x prompt + rest        x = f(second) - f(first)

with f an arm's token gain t and layer gain l, each +-1/2, and t l. So b are the main effects and the interaction as
they are taken of the loss: what a change adds to the share, in the mean of the other off and on; and how much more it
adds with the other on. The least squares estimate of b is the mean over the V votes of b + V w e, with their weights w
and residuals e; and a mean with crossed random effects is what `crossed.CrossedDesign` tests.

Shapes: V decisive votes; three effects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from replication.statistics.crossed import CrossedDesign, CrossedT

Floats = NDArray[np.float64]

EFFECTS = ("token_gain", "layer_gain", "interaction")


def contrast(first: tuple[bool, bool], second: tuple[bool, bool]) -> Floats:
    """x [3] of a vote between two arms, each given as whether (token gain, layer gain) act; of the second chosen."""
    (t, s), (u, v) = (np.array(arm, dtype=np.float64) - 0.5 for arm in (first, second))
    return np.array([u - t, v - s, u * v - t * s])


def effects_t(score: ArrayLike, contrasts: ArrayLike, factors: Sequence[ArrayLike], alpha: float) -> CrossedT | None:
    """Both main effects and the interaction, against zero; arrays are [3], in the order of EFFECTS.

    Args:
        score: [V], 1 where the second arm was chosen, 0 where the first was.
        contrasts: float [V, 3], see `contrast`.
        factors: labels [V] of seed, prompt and judge.
        alpha: of the two-sided tests; the intervals cover 1 - alpha.

    Returns:
        None where the votes do not reach all four arms, or are too few to tell the effects.
    """
    y, x = np.asarray(score, dtype=np.float64) - 0.5, np.asarray(contrasts, dtype=np.float64).reshape(-1, len(EFFECTS))
    if len(y) <= len(EFFECTS) or np.linalg.matrix_rank(x.T @ x) < len(EFFECTS):
        return None
    weights = np.linalg.solve(x.T @ x, x.T)
    estimates = weights @ y
    parts = estimates[:, None] + len(y) * weights * (y - x @ estimates)
    return CrossedDesign(*factors).t(parts, null=0.0, alpha=alpha)
