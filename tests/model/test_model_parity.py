"""The transformer computes what transformers' HunYuanMoEV1 computes: logits and gradients, over shapes and dtypes."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM
from transformers.models.hunyuan_v1_moe import modeling_hunyuan_v1_moe as reference

from replication.config import ModelConfig
from replication.model.layout import config_of, weights_of
from replication.model.transformer import Transformer, initialise

SMALL = ModelConfig(vocab_size=61, n_blocks=2, d_model=32, n_heads=4, n_kv_heads=2, d_head=8, d_ff=24, init_std=0.2)
SHAPES = {
    "grouped queries": SMALL,
    "one head": replace(SMALL, n_heads=1, n_kv_heads=1, d_head=16),
    "every expert": replace(SMALL, top_k=4),
    "one expert of eight": replace(SMALL, n_experts=8, top_k=1),
    "deep, other base": replace(SMALL, n_blocks=5, rotary_base=500.0, norm_eps=1e-5),
    "tied head": replace(SMALL, tied_head=True),
}


class _Fp64Torch(types.ModuleType):
    """torch with `float` and `float32` meaning fp64: the reference casts up to fp32, which in fp64 would cast down."""

    def __getattr__(self, name: str):
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@pytest.fixture
def reference_in_fp64(monkeypatch):
    monkeypatch.setattr(reference, "torch", _Fp64Torch("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # its gate and rotary call .float()


def build_pair(config: ModelConfig, dtype: torch.dtype) -> tuple[Transformer, HunYuanMoEV1ForCausalLM]:
    torch.manual_seed(0)
    ours = Transformer(config)
    initialise(ours, 3)
    with torch.no_grad():  # norms away from 1, so that a misplaced one shows
        for name, p in ours.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    theirs = HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**config_of(config, 64, 0)))
    theirs.set_experts_implementation("eager")  # its grouped kernels have no fp64
    theirs.load_state_dict(weights_of(config, ours.state_dict()), strict=True)
    return ours.to(dtype), theirs.to(dtype).eval()


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def compare(config: ModelConfig, dtype: torch.dtype, batch: tuple[int, int]) -> tuple[float, float]:
    """Largest absolute difference of logits, and largest ||a - b|| / ||b|| over the gradients."""
    ours, theirs = build_pair(config, dtype)
    tokens_BT = torch.randint(0, config.vocab_size, batch, generator=torch.Generator().manual_seed(1))
    a = ours.logits(ours(tokens_BT).hidden_BTD)
    b = theirs(input_ids=tokens_BT, use_cache=False).logits
    ga, gb = (gradients(F.cross_entropy(x.flatten(0, 1), tokens_BT.flatten()), m) for x, m in ((a, ours), (b, theirs)))
    if config.tied_head:
        gb["lm_head.weight"] = gb["model.embed_tokens.weight"]
    ga = weights_of(config, ga)
    assert ga.keys() >= gb.keys()
    # a router that chooses one expert has gradient 0 but for rounding: such a tensor is held against the whole gradient
    floor = 1e-3 * torch.stack([g.norm() for g in gb.values()]).norm()
    worst = max(float((ga[k] - gb[k]).norm() / torch.maximum(gb[k].norm(), floor)) for k in gb)
    return float((a - b).detach().abs().max()), worst


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [(1, 1), (2, 17), (3, 64)])
def test_logits_and_gradients_equal_the_reference_in_fp64(reference_in_fp64, shape, batch):
    logits, grads = compare(SHAPES[shape], torch.float64, batch)
    assert logits < 1e-9
    assert grads < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_the_reference_in_fp32(shape):
    logits, grads = compare(SHAPES[shape], torch.float32, (2, 33))
    assert logits < 1e-4
    assert grads < 1e-4


def test_logits_are_near_the_reference_in_bf16():
    """Every expert is chosen, so that no route can flip on a bf16 rounding."""
    config = SHAPES["every expert"]
    ours, theirs = build_pair(config, torch.bfloat16)
    tokens_BT = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    a, b = ours.logits(ours(tokens_BT).hidden_BTD).float(), theirs(input_ids=tokens_BT).logits.float()
    assert float(((a - b).norm() / b.norm()).detach()) < 0.03


def test_a_wrong_place_of_qk_norm_is_noticed(reference_in_fp64):
    config = SHAPES["grouped queries"]
    ours, theirs = build_pair(config, torch.float64)
    for block in ours.blocks:
        block.attention.qk_norm = "before_rotary"
    tokens_BT = torch.arange(20)[None] % config.vocab_size
    difference = ours.logits(ours(tokens_BT).hidden_BTD) - theirs(input_ids=tokens_BT).logits
    assert float(difference.detach().abs().max()) > 1e-3
