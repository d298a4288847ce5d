"""The published results that this harness replicates: every constant of the paper and its data files that code reads.

A settings table with our values beside them is in protocol/fidelity.py; what the paper prints, claim by claim, is in
configs/claims. Imports nothing, so that every folder may import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingRun:
    """The size of one published training run, in the terms of the config."""

    parameters: float
    """About: one or two digits are published."""
    steps: int
    batch_tokens: int
    blocks: int | None = None
    width: int | None = None
    seed: int | None = None
    gpu_hours: float | None = None

    @property
    def tokens(self) -> int:
        """Consumed in all steps."""
        return self.steps * self.batch_tokens


PHASE_1 = TrainingRun(parameters=5e7, steps=5_000, batch_tokens=32_768)
PHASE_2 = TrainingRun(parameters=5e7, steps=8_000, batch_tokens=32_768)
PHASE_3 = TrainingRun(
    parameters=1.2e9, steps=30_000, batch_tokens=131_072, blocks=20, width=1024, seed=1337, gpu_hours=180.0
)
"""Baseline against both changes, which the judges compared; 7.5 days on one RTX 5090."""
SCALE_UP = TrainingRun(parameters=1.48e9, steps=7_000, batch_tokens=131_072, blocks=24, width=1280, seed=1337)
"""As far as the pair was read; its batch is taken to be Phase 3's."""


@dataclass(frozen=True)
class VoteCounts:
    """Votes of all judges on Phase 3's completions."""

    judges: int
    prompts: int
    baseline: int
    both: int
    ties: int

    @property
    def n(self) -> int:
        return self.baseline + self.both + self.ties

    @property
    def share(self) -> float:
        """Of decisive votes, for the arm with both changes: 59.9 %."""
        return self.both / (self.baseline + self.both)

    @property
    def tie_share(self) -> float:
        """Of all votes: 33.6 %."""
        return self.ties / self.n


VOTES = VoteCounts(judges=42, prompts=32, baseline=314, both=470, ties=397)


@dataclass(frozen=True)
class Filters:
    """Whom the published sensitivity analyses leave out."""

    fast_seconds: float
    """People whose median time to a vote lies below it."""
    tie_share: float
    """Judges with a larger share of ties."""
    votes_per_judge: int
    """Judges with fewer votes."""


FILTERS = Filters(fast_seconds=15.0, tie_share=0.8, votes_per_judge=VOTES.prompts)

LATE_CHECKPOINTS = 10
"""In the published mean of the last validation losses."""


@dataclass(frozen=True)
class Metric:
    """A published row of Phase 3's table of results."""

    quantity: str
    """Key of the same quantity in results.json."""
    name: str
    baseline: float
    both: float
    digits: int
    """Printed after the point."""
    direction: Literal["higher", "lower", "within its noise"]
    """Of both, against the baseline, as the paper words it."""


METRICS = (
    Metric(
        "late_val_loss",
        f"Validation loss, mean of the last {LATE_CHECKPOINTS} checkpoints",
        3.946,
        3.950,
        digits=3,
        direction="within its noise",
    ),
    Metric("entropy_predicted_tokens", "Token entropy (not defined there)", 7.214, 7.425, digits=3, direction="higher"),
    Metric("grad_norm", "Gradient norm", 1.74, 2.50, digits=2, direction="higher"),
)


@dataclass(frozen=True)
class BlockDivergence:
    """Divergence of one block of Phase 3's arm with both changes: micro-batches at the end of a step, one seed."""

    place: Literal["first", "fourth", "last"]
    block: int
    values: tuple[float, float, float]
    """At DIVERGENCE_STEPS."""


DIVERGENCE_STEPS = (1_000, 10_000, 29_900)
"""At which the data file of the divergences is read here."""
DIVERGENCES = (
    BlockDivergence("first", 0, (1.77, 1.23, 1.44)),
    BlockDivergence("fourth", 3, (0.18, 0.55, 0.71)),
    BlockDivergence("last", 19, (0.12, 0.34, 0.60)),
)
