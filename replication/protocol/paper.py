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

    parameters: float  # about: one or two digits are published
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

    baseline: int
    both: int
    ties: int

    @property
    def share(self) -> float:
        """Of decisive votes, for the arm with both changes: 59.9 %."""
        return self.both / (self.baseline + self.both)

    @property
    def tie_share(self) -> float:
        """Of all votes: 33.6 %."""
        return self.ties / (self.baseline + self.both + self.ties)


VOTES = VoteCounts(baseline=314, both=470, ties=397)
"""Of 42 judges on 32 prompts."""

LATE_CHECKPOINTS = 10
"""In the published mean of the last validation losses."""


@dataclass(frozen=True)
class Metric:
    """A published row of Phase 3's table of results."""

    quantity: str  # key of the same quantity in results.json
    name: str
    baseline: float
    both: float
    digits: int  # printed after the point
    direction: Literal["higher", "lower", "within its noise"]  # of both, against the baseline, as the paper words it


_LATE = f"Validation loss, mean of the last {LATE_CHECKPOINTS} checkpoints"
METRICS = (
    Metric("late_val_loss", _LATE, 3.946, 3.950, digits=3, direction="within its noise"),
    Metric("entropy_predicted_tokens", "Token entropy (not defined there)", 7.214, 7.425, digits=3, direction="higher"),
    Metric("grad_norm", "Gradient norm", 1.74, 2.50, digits=2, direction="higher"),
)


@dataclass(frozen=True)
class BlockDivergence:
    """Divergence of one block of Phase 3's arm with both changes: micro-batches at the end of a step, one seed."""

    place: Literal["first", "fourth", "last"]
    block: int
    values: tuple[float, float, float]  # at DIVERGENCE_STEPS


DIVERGENCE_STEPS = (1_000, 10_000, 29_900)
"""At which the data file of the divergences is read here."""
DIVERGENCES = (
    BlockDivergence("first", 0, (1.77, 1.23, 1.44)),
    BlockDivergence("fourth", 3, (0.18, 0.55, 0.71)),
    BlockDivergence("last", 19, (0.12, 0.34, 0.60)),
)
