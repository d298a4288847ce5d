"""Parts of the transformer against plain restatements: experts, load balance, divergence, cache, start."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

from replication.config import ClusterConfig, ModelConfig
from replication.model import transformer
from replication.model.moe import MixtureOfExperts, load_balance
from replication.model.size import parameter_count
from replication.model.transformer import KVCache, Transformer, initialise, weights_sha256

TINY = ModelConfig(vocab_size=50, n_blocks=3, d_model=32, d_head=8, d_ff=24, init_std=0.2)


def build(config: ModelConfig = TINY, seed: int = 1, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config)
    initialise(model, seed)
    return model.to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_equal_the_loop_in_value_and_gradient(top_k, dtype):
    torch.manual_seed(0)
    layer = MixtureOfExperts(replace(TINY, top_k=top_k))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    layer = layer.to(dtype)
    x = torch.randn(40, TINY.d_model, dtype=dtype, requires_grad=True)
    routing = layer.route(x)
    results = []
    for compute in (layer.grouped, layer.loop):
        y = compute(x, routing)
        grads = torch.autograd.grad(y.square().sum(), [x, *layer.gate, *layer.up, *layer.down], retain_graph=True)
        results.append([y, *grads])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for a, b in zip(*results, strict=True):
        assert float((a - b).detach().float().norm() / b.detach().float().norm()) < tolerance


def test_an_expert_without_tokens_still_has_a_gradient():
    layer = MixtureOfExperts(TINY)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0], layer.router.weight[1] = 9.0, 8.0
    x = torch.ones(1, 5, TINY.d_model)  # every token prefers experts 0 and 1
    for dtype in (torch.float32, torch.float64):
        layer = layer.to(dtype)
        layer.zero_grad()
        layer(x.to(dtype))[0].sum().backward()
        assert all(p.grad is not None for p in layer.gate)
        assert float(layer.gate[3].grad.abs().sum()) == 0.0


def test_load_balance_is_the_switch_formula_per_group():
    layer = MixtureOfExperts(TINY)
    torch.nn.init.normal_(layer.router.weight)
    routing = layer.route(torch.randn(12, TINY.d_model))
    aux_G, tokens_per_expert_GE = load_balance(routing, 3)
    for g in range(3):
        rows = range(4 * g, 4 * g + 4)
        expected = 0.0
        for e in range(4):
            share = sum(int(e in routing.experts_NK[n].tolist()) for n in rows) / 8
            expected += 4 * share * float(routing.probs_NE[list(rows), e].detach().sum()) / 4
        assert aux_G[g].item() == pytest.approx(expected, rel=1e-5)
        assert float(tokens_per_expert_GE[g].sum()) == 8
    uniform = routing._replace(
        probs_NE=torch.full((12, 4), 0.25), experts_NK=torch.tensor([[0, 1], [2, 3]]).repeat(6, 1)
    )
    assert load_balance(uniform, 1)[0].tolist() == [1.0]


def test_divergence_is_the_frobenius_ratio_of_each_group():
    model = build(dtype=torch.float64)
    batch = tokens(4, 10)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, args, out: seen.append((args[0], out[0])))
    measured = model(batch, n_groups=2).divergence_LG
    assert not measured.requires_grad
    for i, (x, y) in enumerate(seen):
        for g in range(2):
            part = slice(2 * g, 2 * g + 2)
            expected = (y[part] - x[part]).norm() / (x[part].norm() + 1e-8)
            assert measured[i, g].item() == pytest.approx(expected.item(), rel=1e-12)


def test_groups_do_not_see_one_another():
    model = build(dtype=torch.float64)
    batch = tokens(6, 10)
    whole = model(batch, n_groups=3)
    for g in range(3):
        alone = model(batch[2 * g : 2 * g + 2], n_groups=1)
        assert torch.allclose(whole.divergence_LG[:, g], alone.divergence_LG[:, 0], rtol=1e-12)
        assert torch.allclose(whole.aux_G[g], alone.aux_G[0], rtol=1e-12)


@pytest.mark.parametrize("qk_norm", ["after_rotary", "before_rotary", "none"])
@pytest.mark.parametrize("feed_forward", ["moe", "dense"])
def test_cached_decoding_equals_the_whole_sequence(qk_norm, feed_forward):
    config = replace(TINY, qk_norm=qk_norm, feed_forward=feed_forward)
    model = build(config, dtype=torch.float64)
    batch = tokens(3, 12)
    whole = model(batch).hidden_BTD
    cache = KVCache(config, 3, 12, batch.device, torch.float64)
    parts = [model(batch[:, :5], cache=cache).hidden_BTD]
    parts += [model(batch[:, t : t + 1], cache=cache).hidden_BTD for t in range(5, 12)]
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)


def test_the_future_does_not_reach_the_past():
    model = build(dtype=torch.float64)
    a, b = tokens(2, 12), tokens(2, 12)
    b[:, 8:] = (b[:, 8:] + 1) % TINY.vocab_size
    assert torch.allclose(model(a).hidden_BTD[:, :8], model(b).hidden_BTD[:, :8], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(model(a).hidden_BTD[:, 8:], model(b).hidden_BTD[:, 8:], rtol=1e-3)


def test_start_depends_on_seed_and_name_alone():
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    hashes = [weights_sha256(model.state_dict()) for model in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    deeper = build(replace(TINY, n_blocks=5))
    assert torch.equal(deeper.blocks[2].attention.q.weight, first.blocks[2].attention.q.weight)
    spread = torch.cat([p.flatten() for p in first.blocks.parameters() if p.ndim == 2]).std()
    assert float(spread) == pytest.approx(TINY.init_std, rel=0.02)
    assert torch.equal(first.norm.weight, torch.ones(TINY.d_model))


def test_weights_hash_sees_one_changed_weight():
    model = build()
    before = weights_sha256(model.state_dict())
    with torch.no_grad():
        model.blocks[1].feed_forward.down[3][0, 0] += 1e-6
    assert weights_sha256(model.state_dict()) != before


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tied_head": True},
        {"feed_forward": "dense"},
        {"shared_expert": False},
        {"qk_norm": "none"},
        {"n_experts": 7},
    ],
)
def test_parameter_count_is_the_closed_form(change):
    config = replace(TINY, **change)
    assert parameter_count(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_published_model_has_1_21e9_parameters():
    published = ModelConfig(
        vocab_size=100_031, n_blocks=20, d_model=1024, n_heads=16, n_kv_heads=8, d_head=64, d_ff=3072
    )
    assert parameter_count(replace(published, vocab_multiple=1)) == 1_211_622_912
    assert parameter_count(published) == 1_211_756_032  # 65 padded rows of embedding and head


def test_padding_of_the_vocabulary_is_zero_and_changes_nothing():
    exact, padded = (build(replace(TINY, vocab_multiple=n), dtype=torch.float64) for n in (1, 64))
    assert padded.embedding.weight.shape == padded.head.weight.shape == (64, TINY.d_model)
    losses = []
    for model in (exact, padded):
        hidden = model(tokens(2, 6)).hidden_BTD
        assert model.logits(hidden).shape[-1] == TINY.vocab_size
        losses.append(model.losses(hidden, tokens(2, 6, seed=1), 0.1).losses.smoothed_N)
        losses[-1].mean().backward()
    assert torch.allclose(*losses, rtol=1e-14)
    for a, b in zip(exact.parameters(), padded.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad[: len(a)], rtol=1e-12, atol=1e-16)
        assert b.grad[len(a) :].abs().sum() == 0 and b[len(a) :].abs().sum() == 0


@pytest.mark.parametrize("attention", ["auto", "math"])
def test_checkpointed_blocks_give_the_same_bits_and_measure_once(monkeypatch, attention):
    calls = []
    whole = transformer.divergence
    monkeypatch.setattr(transformer, "divergence", lambda *args: calls.append(1) or whole(*args))
    found = []
    for checkpointed in (False, True):
        model = build()
        model.configure(ClusterConfig(activation_checkpointing=checkpointed, attention=attention))
        ran = []
        model.blocks[0].attention.register_forward_hook(lambda *args, ran=ran: ran.append(1))
        out = model(tokens(4, 6), n_groups=2)
        (model.losses(out.hidden_BTD, tokens(4, 6, seed=1), 0.1).losses.smoothed_N.mean() + out.aux_G.sum()).backward()
        found.append([out.divergence_LG, *(p.grad for p in model.parameters())])
        assert len(ran) == 1 + checkpointed  # the block was computed again ...
    assert len(calls) == 2 * TINY.n_blocks  # ... and its divergence was not
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", ["math", "flash", "cudnn", "efficient", "hopper"])
def test_attention_kernels_are_given_what_they_can_take(monkeypatch, kernel):
    """Of the efficient kernel the heads' own copies alone, and of cuDNN's nothing: their kernels run on a GPU."""
    monkeypatch.setattr(
        transformer, "KERNELS", transformer.KERNELS | {name: [SDPBackend.MATH] for name in ("cudnn", "efficient")}
    )
    q, k, v = (torch.randn(2, heads, 5, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    expected = transformer.attend(q, k, v, True, "auto")
    given, product = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: given.append(a[1]) or product(*a, **kw))
    assert torch.allclose(transformer.attend(q, k, v, True, kernel), expected, atol=1e-6)
    assert given[0].shape[1] == (4 if kernel == "efficient" else 2), "heads that are shared stay shared"


@pytest.mark.parametrize("capability, kernel", [((8, 0), "auto"), ((9, 0), "hopper"), ((10, 0), "hopper")])
def test_auto_takes_cudnns_kernel_from_hopper_on(monkeypatch, capability, kernel):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    model = Transformer(TINY)
    model.configure(ClusterConfig())
    assert {block.attention.kernel for block in model.blocks} == {kernel}
    model.configure(ClusterConfig(attention="flash"))
    assert {block.attention.kernel for block in model.blocks} == {"flash"}
    assert transformer.KERNELS["hopper"][0] == SDPBackend.CUDNN_ATTENTION


@pytest.mark.filterwarnings("default")  # torch.compile looks at its own warnings while it traces: they must not raise
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_share_their_graphs_and_train_as_eager_ones(monkeypatch, backend):
    """As the published suites run: experts in bf16, the chunked head; checkpointed blocks on top.

    In bf16 a token may go to another expert than in fp64, compiled or not; so both are compared with fp64. The short
    form traces and cuts the graphs as inductor's users get them, and runs them without generating code.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    config = replace(TINY, vocab_size=61, n_blocks=6, init_std=0.05)

    def gradient(compiled: bool, exact: bool) -> torch.Tensor:
        model = build(config, dtype=torch.float64 if exact else torch.float32)
        model.configure(ClusterConfig(compile=compiled, head="chunked", activation_checkpointing=True))
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
                out = model(tokens(4, 16), n_groups=2)
                loss_N = model.losses(out.hidden_BTD, tokens(4, 16, seed=1), 0.1).losses.smoothed_N
            (loss_N.mean() + 0.01 * out.aux_G.mean()).backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    before = counters["stats"]["unique_graphs"]
    exact, eager, compiled = gradient(False, True), gradient(False, False), gradient(True, False)
    graphs = counters["stats"]["unique_graphs"] - before
    assert 1 <= graphs <= 4, "one for all six blocks, and the head's two"
    error = [float((g - exact).norm() / exact.norm()) for g in (eager, compiled)]
    assert error[1] < min(1.5 * error[0], 0.2), error


def test_dense_model_has_no_auxiliary_loss():
    out = build(replace(TINY, feed_forward="dense"))(tokens(4, 6), n_groups=2)
    assert out.aux_G.tolist() == [0.0, 0.0]
    assert out.tokens_per_expert_LE.shape == (3, 0)


def test_attention_is_causal_softmax_over_shared_heads():
    """A slow restatement of one attention layer: loops over heads and positions."""
    model = build(replace(TINY, qk_norm="none"), dtype=torch.float64)
    layer = model.blocks[0].attention
    x = torch.randn(1, 5, TINY.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ones, zeros = torch.ones(5, 8, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)
    fast = layer(x, (ones, zeros))  # no rotation
    q, k, v = ((x[0] @ w.weight.T).view(5, -1, 8) for w in (layer.q, layer.k, layer.v))
    slow = torch.zeros(5, 4, 8, dtype=torch.float64)
    for h in range(4):
        for t in range(5):
            weights = F.softmax(k[: t + 1, h // 2] @ q[t, h] / 8**0.5, dim=0)
            slow[t, h] = weights @ v[: t + 1, h // 2]
    assert torch.allclose(fast[0], slow.flatten(1) @ layer.o.weight.T, rtol=1e-12)
