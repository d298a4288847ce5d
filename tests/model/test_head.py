"""Every way to the per-token losses against a naive fp64 reference: values, and gradients for any weights on tokens."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace

import pytest
import torch

from replication.config import ModelConfig
from replication.errors import UserError
from replication.model import head
from replication.model.head import Head
from replication.model.loss import IGNORE, entropy_sums

CONFIG = ModelConfig(vocab_size=61, d_model=24, vocab_multiple=16)
N = 37


def make(kind: str, compiled: bool = False, dtype: torch.dtype = torch.float64) -> Head:
    module = Head(CONFIG)
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(0))  # the padding too: it must not matter
    module.configure(kind, compiled)
    return module.to(dtype)


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_ND, targets_N with masked positions, and a gain for each token (some of them 0)."""
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(N, CONFIG.d_model, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(0, CONFIG.vocab_size, (N,), generator=generator)
    targets_N[[0, 5, N - 1]] = IGNORE
    gain_N = torch.rand(N, generator=generator, dtype=torch.float64) * 5
    gain_N[7] = 0.0
    return hidden_ND.to(dtype), targets_N, gain_N.to(dtype)


def naive(weight_VD: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, ...]:
    """Losses and gradients token by token, in fp64, from the definition."""
    hidden_ND, targets_N, gain_N = case()
    weight = weight_VD[: CONFIG.vocab_size].detach().double().requires_grad_()
    hidden = hidden_ND.requires_grad_()
    smoothed, plain = [], []
    for h, y in zip(hidden, targets_N, strict=True):
        log_p = torch.log(torch.exp(weight @ h) / torch.exp(weight @ h).sum())
        mask = 0.0 if y == IGNORE else 1.0
        plain.append(-log_p[y.clamp(min=0)] * mask)
        smoothed.append((-(1 - smoothing) * log_p[y.clamp(min=0)] - smoothing * log_p.mean()) * mask)
    objective = (torch.stack(smoothed) * gain_N).sum()
    return torch.stack(smoothed), torch.stack(plain), *torch.autograd.grad(objective, [hidden, weight])


def ours(module: Head, smoothing: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    hidden_ND, targets_N, gain_N = case(dtype)
    hidden_ND.requires_grad_()
    losses = module(hidden_ND, targets_N, smoothing).losses
    (losses.smoothed_N * gain_N).sum().backward()
    assert module.weight.grad[CONFIG.vocab_size :].abs().sum() == 0
    return losses.smoothed_N, losses.plain_N, hidden_ND.grad, module.weight.grad[: CONFIG.vocab_size]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["logits", "chunked"])
def test_it_equals_the_naive_reference_in_value_and_gradient(kind, smoothing, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 10 * CONFIG.vocab_size)  # chunks of 10, 10, 10 and 7 tokens
    module = make(kind)
    for a, b in zip(ours(module, smoothing), naive(module.weight, smoothing), strict=True):
        assert distance(a, b) < 1e-13


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_chunks_hold_in_the_precisions_of_training(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 10 * CONFIG.vocab_size)
    module = make("chunked", dtype=dtype)
    found = ours(module, 0.1, dtype)
    assert found[0].dtype == torch.float32 and found[3].dtype == dtype
    for a, b in zip(found, naive(module.weight, 0.1), strict=True):
        assert distance(a, b) < tolerance


def test_a_weight_on_the_plain_loss_has_a_gradient_too(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 10 * CONFIG.vocab_size)
    gradients = []
    for kind in ("logits", "chunked"):
        module, (hidden_ND, targets_N, gain_N) = make(kind), case()
        losses = module(hidden_ND, targets_N, 0.1).losses
        ((losses.smoothed_N + 2 * losses.plain_N) * gain_N).sum().backward()
        gradients.append(module.weight.grad)
    assert distance(*gradients) < 1e-13


def test_chunks_compute_in_the_dtype_of_autocast():
    module, (hidden_ND, targets_N, _) = make("chunked", dtype=torch.float32), case(torch.float32)
    plain = make("logits", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = module(hidden_ND, targets_N, 0.1).losses.smoothed_N
        expected = plain(hidden_ND, targets_N, 0.1).losses.smoothed_N
    losses.sum().backward()
    assert module.weight.grad.dtype == losses.dtype == torch.float32
    assert torch.allclose(losses, expected, rtol=1e-6)


def test_entropies_in_chunks_are_those_of_the_logits(monkeypatch):
    monkeypatch.setattr(head, "ENTROPY_LOGITS", 10 * CONFIG.vocab_size)
    for kind in ("logits", "chunked"):
        module, (hidden_ND, targets_N, _) = make(kind), case()
        losses, found = module(hidden_ND, targets_N, 0.1, entropies=True)
        assert torch.equal(losses.smoothed_N, module(hidden_ND, targets_N, 0.1).losses.smoothed_N)
        probs_NV = module(hidden_ND).softmax(-1)
        by_hand = torch.distributions.Categorical(probs_NV).entropy()[targets_N != IGNORE].sum()
        assert torch.allclose(found.predictive, by_hand, rtol=1e-10)
        expected = entropy_sums(probs_NV.log(), targets_N != IGNORE)
        assert torch.equal(found.predicted_V, expected.predicted_V)
        assert found.predicted_V.sum() == N - 3
        assert not found.predictive.requires_grad


@pytest.mark.parametrize("n_words", [64, 100, 256])
def test_the_most_likely_entries_are_counted_the_first_of_equal_ones(n_words):
    log_probs_NV = torch.randint(5, (50, n_words)).double().log_softmax(-1)
    expected = torch.bincount(torch.tensor(log_probs_NV.numpy().argmax(1)), minlength=n_words)
    assert torch.equal(entropy_sums(log_probs_NV, torch.ones(50, dtype=torch.bool)).predicted_V, expected.double())


@pytest.mark.filterwarnings("default")  # torch.compile looks at its own warnings while it traces: they must not raise
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", ["logits", "chunked"])
def test_the_compiled_head_equals_the_naive_reference(kind, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 10 * CONFIG.vocab_size)
    module = make(kind, compiled=True)
    for a, b in zip(ours(module, 0.1), naive(module.weight, 0.1), strict=True):
        assert distance(a, b) < 1e-13


LIGER = importlib.util.find_spec("liger_kernel") is not None
TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.gpu
@pytest.mark.skipif(not (LIGER and TRITON), reason="needs liger-kernel, and a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_liger_equals_the_naive_reference(smoothing):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = make("liger", dtype=torch.float32).to(device)
    hidden_ND, targets_N, gain_N = (t.to(device) for t in case(torch.float32))
    hidden_ND.requires_grad_()
    losses = module(hidden_ND, targets_N, smoothing).losses
    (losses.smoothed_N * gain_N).sum().backward()
    found = losses.smoothed_N, losses.plain_N, hidden_ND.grad, module.weight.grad[: CONFIG.vocab_size]
    for a, b in zip(found, naive(module.weight.cpu(), smoothing), strict=True):
        assert distance(a.cpu(), b) < 1e-4


@pytest.mark.skipif(LIGER, reason="liger-kernel is installed")
def test_a_missing_package_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"cluster\.head: liger needs a GPU and liger-kernel 0\.8\.2 or newer \(No module"
    ):
        make("liger")


def test_logits_are_of_the_real_vocabulary():
    module = make("logits")
    assert module(case()[0]).shape == (N, CONFIG.vocab_size)
    assert Head(replace(CONFIG, vocab_multiple=1)).weight.shape == (CONFIG.vocab_size, CONFIG.d_model)
