"""Whether a cell diverged, by the rule that its suite froze: an outcome of the experiment, not a failure to retry."""

from __future__ import annotations

import math

from replication.config import DivergedRule
from replication.runs.failures import read_failure
from replication.runs.journal import read_last_losses
from replication.runs.layout import RunDir


def why_diverged(run: RunDir, rule: DivergedRule, warmup_steps: int, vocab_size: int) -> str:
    """Why a cell counts as diverged, in words; "" where it does not. Reads the end of its journal alone.

    The log of the vocabulary's size, the loss of a uniform guess, is the limit where the rule names none.
    """
    failure = read_failure(run) if not run.complete.is_file() else None
    if failure and failure.diverged:
        return failure.error
    step, losses = read_last_losses(run.metrics, rule.for_steps)
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < len(losses):
        return f"a training loss of the last {len(losses)} steps up to step {step} was not finite"
    if len(finite) < rule.for_steps or step < warmup_steps + rule.for_steps:
        return ""
    limit = math.log(vocab_size) if rule.above_nats is None else rule.above_nats
    if min(finite) <= limit:
        return ""
    return f"train/loss_nats above {limit:.3f} in each of the {rule.for_steps} steps up to step {step}"
