"""What a difference in loss is worth in tokens, on a published scaling fit. Pure."""

from __future__ import annotations

import math

TOKENS_SCALE, TOKENS_EXPONENT = 2085.43, 0.3658
"""B and beta of L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3), as
Besiroglu et al. (2024, arXiv 2404.10102) fitted them again to the same runs; first published as 410.7 and 0.28."""
FITTED_PARAMETERS, FITTED_TOKENS = 70e6, 5e9
"""The smallest model and the fewest tokens of those runs: below either the fit is extrapolated."""


def worth_in_tokens(nats: float, tokens: float) -> float:
    """The share of `tokens` by which training had to be longer for a loss lower by so much, in a model of any size.

    B / (D (1 + x))^beta = B / D^beta - nats. Infinite where no number of further tokens is enough.
    """
    left = 1 - nats * tokens**TOKENS_EXPONENT / TOKENS_SCALE
    return left ** (-1 / TOKENS_EXPONENT) - 1 if left > 0 else math.inf
