"""Our part of a step never makes the host wait: forward, head, grouped experts, gains, callbacks.

A dispatch mode fails on the operators that read a device value on the host (`_local_scalar_dense`, behind `.item()` and
`bool(tensor)`, and `nonzero`). It holds over every step but those at which a log line, a validation or a checkpoint is
due. The optimizer's own step and Lightning's bookkeeping are theirs.
"""

from __future__ import annotations

import pytest
import torch
from host_sync import NoHostSync
from memory_store import MemoryStore
from training_setup import ARMS, fit, small_config

from replication.objectives.callbacks import LayerGain
from replication.training.measure import Measure
from replication.training.module import LanguageModel

GUARDED = {
    LanguageModel: ("training_step", "backward", "configure_gradient_clipping"),
    LayerGain: ("on_before_backward", "on_before_optimizer_step"),
    Measure: ("on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step"),
}


@pytest.fixture
def guarded(monkeypatch):
    """Wrap every part of ours that runs in a step; count the calls that were watched."""
    watched: list[str] = []
    steps: list[int] = []

    def guard(owner, name):
        original = getattr(owner, name)

        def wrapper(self, *args, **kwargs):
            trainer = self.trainer if isinstance(self, LanguageModel) else args[0]
            if any(c._due for c in trainer.callbacks if isinstance(c, Measure)):
                return original(self, *args, **kwargs)
            with NoHostSync():
                watched.append(name)
                steps.append(trainer.global_step)
                return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for owner, names in GUARDED.items():
        for name in names:
            guard(owner, name)
    return watched


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("apply", ["step", "micro_batch"])
def test_a_step_without_a_log_line_never_synchronises(tmp_path, guarded, arm, apply):
    config = small_config(
        arm, f"--layer_gain.apply={apply}", "--cluster.micro_batch_sequences=4", "--logging.log_every_steps=3"
    )
    fit(config, tmp_path, MemoryStore())
    expected = {"training_step", "backward", "configure_gradient_clipping", "on_train_batch_end"}
    assert expected <= set(guarded)
    assert guarded.count("training_step") == 8, "four of the six steps, two micro-batches each"


def test_the_guard_notices_a_read():
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostSync():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostSync():
        torch.ones(3).nonzero()


def test_the_guard_notices_a_read_in_a_real_step(tmp_path, guarded, monkeypatch):
    objective = LanguageModel.objective

    def with_item(self, batch):
        observed = objective(self, batch)
        observed.loss_GN.mean().item()
        return observed

    monkeypatch.setattr(LanguageModel, "objective", with_item)
    with pytest.raises(AssertionError, match="makes the host wait"):
        fit(small_config(), tmp_path, MemoryStore())
