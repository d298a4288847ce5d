"""A decoder-only transformer in plain torch.

Pre-norm blocks; RMSNorm; rotary positions; grouped-query attention with QK-norm; SwiGLU or a mixture of experts. Where
the published description leaves a detail open, the function is the one that transformers' `HunYuanMoEV1` computes
(QK-norm after the rotation; softmax, then top-k), so that weights load there (layout.py).

Shapes: B sequences, T positions, D width, H query heads, J key/value heads, C head width, V vocabulary, L blocks,
G gain groups, E experts, N tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from replication.config import ClusterConfig, ModelConfig
from replication.errors import UserError
from replication.model.head import CHUNK_LOGITS, Head, HeadOutput
from replication.model.loss import token_entropies
from replication.model.moe import MixtureOfExperts, Routing, SwiGLU, load_balance, together
from replication.model.size import padded_vocabulary


class Output(NamedTuple):
    """Everything that one forward pass gives besides logits; G = 0 groups where none were asked for."""

    hidden_BTD: Tensor  # after the final norm
    divergence_LG: Tensor  # of each block and group; no gradient; [3L, G] by parts: blocks, attentions, feed-forwards
    aux_G: Tensor  # load-balancing loss, mean over blocks; 0 for a dense model
    tokens_per_expert_LE: Tensor  # over all groups; [L, 0] for a dense model


class KVCache:
    """Keys and values of the positions seen so far, of B = `batch` rows, allocated once for `max_positions`."""

    def __init__(
        self, config: ModelConfig, batch: int, max_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (2, batch, config.n_kv_heads, max_positions, config.d_head)
        self.blocks = [BlockCache(torch.zeros(shape, device=device, dtype=dtype)) for _ in range(config.n_blocks)]

    @property
    def length(self) -> int:
        """Positions that every block has seen."""
        return self.blocks[-1].length

    def keep(self, rows_R: Tensor) -> None:
        """Forget all rows but these (int64 indices)."""
        for block in self.blocks:
            block.kv_2BJTC = block.kv_2BJTC.index_select(1, rows_R)


class BlockCache:
    """The part of one block."""

    def __init__(self, kv_2BJTC: Tensor) -> None:
        self.kv_2BJTC, self.length = kv_2BJTC, 0

    def update(self, k_BJTC: Tensor, v_BJTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions; return all positions so far."""
        start, self.length = self.length, self.length + k_BJTC.shape[2]
        assert start == 0 or k_BJTC.shape[2] == 1, "a cached forward is a prefill or one position"
        self.kv_2BJTC[0, :, :, start : self.length] = k_BJTC
        self.kv_2BJTC[1, :, :, start : self.length] = v_BJTC
        return self.kv_2BJTC[0, :, :, : self.length], self.kv_2BJTC[1, :, :, : self.length]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in at least fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary(
    base: float, d_head: int, start: int, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of positions start..start+length-1: [length, d_head] each."""
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = 1.0 / (base ** (torch.arange(0, d_head, 2, device=device, dtype=wide) / d_head))
    angles = torch.outer(torch.arange(start, start + length, device=device, dtype=wide), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate the pairs (i, i + C/2) of the last dimension by their angles."""
    first, second = x_BTHC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BTHC * cos_TC[:, None].to(x_BTHC.dtype) + turned * sin_TC[:, None].to(x_BTHC.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and QK-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.n_heads, self.n_kv_heads, self.d_head, self.qk_norm = c.n_heads, c.n_kv_heads, c.d_head, c.qk_norm
        self.q = nn.Linear(c.d_model, c.n_heads * c.d_head, bias=False)
        self.k = nn.Linear(c.d_model, c.n_kv_heads * c.d_head, bias=False)
        self.v = nn.Linear(c.d_model, c.n_kv_heads * c.d_head, bias=False)
        self.o = nn.Linear(c.n_heads * c.d_head, c.d_model, bias=False)
        if c.qk_norm != "none":
            self.q_norm = RMSNorm(c.d_head, c.norm_eps)
            self.k_norm = RMSNorm(c.d_head, c.norm_eps)
        self.kernel = "auto"

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], cache: BlockCache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        # heads stay behind positions, as the product leaves them, until the attention takes views of them
        q, k, v = (y.view(B, T, -1, self.d_head) for y in together(x_BTD, self.q, self.k, self.v))
        if self.qk_norm == "before_rotary":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if self.qk_norm == "after_rotary":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v)
        # one new position may see every cached one, so only a whole sequence needs the causal mask
        y = attend(q, k, v, T > 1, self.kernel)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
KERNELS["hopper"] = [
    *KERNELS["cudnn"],
    *KERNELS["flash"],
    *KERNELS["efficient"],
    *KERNELS["math"],
]  # the first that can


def attend(q_BHTC: Tensor, k_BJTC: Tensor, v_BJTC: Tensor, causal: bool, kernel: str) -> Tensor:
    """softmax(q k' / sqrt(C)) v by one kernel (ClusterConfig.attention): [B, H, T, C].

    The kernel is chosen here, around the product itself, so that a checkpointed block takes the same one again in
    backward. One of them knows no shared heads, and gets every head its own copy.
    """
    if kernel == "auto":
        return F.scaled_dot_product_attention(q_BHTC, k_BJTC, v_BJTC, is_causal=causal, enable_gqa=True)
    if kernel == "efficient":
        copies = q_BHTC.shape[1] // k_BJTC.shape[1]
        k_BJTC, v_BJTC = k_BJTC.repeat_interleave(copies, 1), v_BJTC.repeat_interleave(copies, 1)
    with sdpa_kernel(KERNELS[kernel], set_priority=True):
        return F.scaled_dot_product_attention(q_BHTC, k_BJTC, v_BJTC, is_causal=causal, enable_gqa=True)


class Block(nn.Module):
    """One pre-norm block; measures its own divergence where groups are asked for.

    Where it is checkpointed, activations are computed again in backward instead of kept. What is measured lies outside
    of what is computed again.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward: nn.Module = (
            MixtureOfExperts(config) if config.feed_forward == "moe" else SwiGLU(config.d_model, config.d_ff)
        )
        self.checkpointed = self.by_parts = False

    def forward(
        self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], n_groups: int = 0, cache: BlockCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y [B, T, D], divergence [G], or by parts [3, G]: of block, attention, feed-forward; aux [G] and tokens
        per expert [E] (empty where n_groups is 0)."""
        if self.checkpointed and torch.is_grad_enabled():
            assert cache is None, "a cached forward has no backward"
            made = checkpoint(self._run, x_BTD, angles, use_reentrant=False, preserve_rng_state=False)
        else:
            made = self._run(x_BTD, angles, cache)
        y_BTD, routing, middle_BTD = made
        aux_G = tokens_per_expert_E = x_BTD.new_zeros(0)
        if routing is not None and n_groups:
            aux_G, tokens_per_expert_GE = load_balance(routing, n_groups)
            tokens_per_expert_E = tokens_per_expert_GE.sum(0)
        found = divergence(x_BTD, y_BTD, n_groups)
        if middle_BTD is not None:
            of_parts = divergence(x_BTD, middle_BTD, n_groups), divergence(middle_BTD, y_BTD, n_groups)
            found = torch.stack([found, *of_parts])
        return y_BTD, found, aux_G, tokens_per_expert_E

    def _run(
        self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], cache: BlockCache | None = None
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        middle = x_BTD + self.attention(self.attention_norm(x_BTD), angles, cache)
        fed = self.feed_forward(self.feed_forward_norm(middle))
        fed, routing = fed if isinstance(self.feed_forward, MixtureOfExperts) else (fed, None)
        return middle + fed, routing, middle if self.by_parts else None


@torch.no_grad()
def divergence(x_BTD: Tensor, y_BTD: Tensor, n_groups: int) -> Tensor:
    """d_g = ||y - x|| / (||x|| + 1e-8) over each group of consecutive sequences (objectives/README.md, Divergence).

    Frobenius norms over all B/G * T * D entries of a group, in at least fp32. Returns [G]; [0] where n_groups is 0.
    """
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    if not n_groups:
        return x_BTD.new_zeros(0, dtype=wide)
    # of each position first: compiled, that is one pass with what makes y
    of_position = (torch.linalg.vector_norm(z_BTD, dim=2, dtype=wide) for z_BTD in (y_BTD - x_BTD, x_BTD))
    change_G, size_G = (torch.linalg.vector_norm(z_BT.view(n_groups, -1), dim=1) for z_BT in of_position)
    return change_G / (size_G + 1e-8)


def compile_block(block: Block) -> None:
    """Compile a block in place, to one graph.

    Without torch's own optimizer of DDP, which would cut it at the borders of DDP's buckets; and with backward outside
    of autocast, as eager code runs it: else the router, whose forward is in fp32, would have its gradient in bf16.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._functorch.config.backward_pass_autocast = "off"
    block.compile(dynamic=False)


def tie(model: nn.Module, state: dict[str, Tensor], prefix: str, *more: object) -> None:
    """Before weights are loaded: give a tied one all of its names, because consolidated weights have it once."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if (kept := first.setdefault(parameter, name)) in state:
            state.setdefault(name, state[kept])


class Transformer(nn.Module):
    """The language model; call `losses` or `logits` on the hidden states of forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.aux_coef = config.aux_coef if config.feed_forward == "moe" else None
        self.embedding = nn.Embedding(padded_vocabulary(config), config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Head(config)
        if config.tied_head:
            self.head.weight = self.embedding.weight  # type: ignore[assignment]
            self.register_load_state_dict_pre_hook(tie)

    def configure(self, cluster: ClusterConfig) -> None:
        """Fit the computation to a machine: what is kept, fused, and by which kernels (UserError for missing ones)."""
        if cluster.attention in ("cudnn", "efficient") and not torch.cuda.is_available():
            raise UserError(f"cluster.attention: {cluster.attention} runs on a GPU, and torch sees none; choose auto")
        kernel: str = cluster.attention
        on_gpu = torch.cuda.is_available() and cluster.accelerator != "cpu" and torch.version.hip is None
        if kernel == "auto" and on_gpu and torch.cuda.get_device_capability() >= (9, 0):
            kernel = "hopper"
        self.head.configure(cluster.head, cluster.compile)
        for block in self.blocks:
            block.checkpointed = cluster.activation_checkpointing  # type: ignore[assignment]
            block.attention.kernel = kernel  # type: ignore[union-attr]
            if cluster.compile:
                compile_block(block)  # type: ignore[arg-type]

    def forward(self, tokens_BT: Tensor, n_groups: int = 0, cache: KVCache | None = None) -> Output:
        """Run the blocks.

        Args:
            tokens_BT: int64 token ids.
            n_groups: G groups of B/G consecutive sequences for divergence and load balance; 0 measures nothing.
            cache: earlier positions; it is extended by T.
        """
        c, measured = self.config, []
        start, caches = (cache.length, cache.blocks) if cache is not None else (0, [None] * c.n_blocks)
        x_BTD = self.embedding(tokens_BT)
        angles = rotary(c.rotary_base, c.d_head, start, tokens_BT.shape[1], x_BTD.device, x_BTD.dtype)
        for block, of_block in zip(self.blocks, caches, strict=True):
            x_BTD, *found = block(x_BTD, angles, n_groups, of_block)
            measured.append(found)
        divergence_LG, aux_LG, tokens_per_expert_LE = (torch.stack(column) for column in zip(*measured, strict=True))
        if divergence_LG.dim() == 3:
            divergence_LG = divergence_LG.transpose(0, 1).flatten(0, 1)
        aux_G = aux_LG.mean(0) if aux_LG.shape[1] else x_BTD.new_zeros(n_groups)
        return Output(self.norm(x_BTD), divergence_LG, aux_G, tokens_per_expert_LE)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.head(hidden)

    def losses(
        self, hidden_BTD: Tensor, targets_BT: Tensor, label_smoothing: float, entropies: bool = False
    ) -> HeadOutput:
        """Losses of all N = B * T tokens, in order, and where asked for their entropies added up (see Head)."""
        output: HeadOutput = self.head(hidden_BTD.flatten(0, 1), targets_BT.flatten(), label_smoothing, entropies)
        return output

    @torch.no_grad()
    def entropies(self, hidden_BTD: Tensor) -> Tensor:
        """token_entropies of the logits [N]: one more product of the head, a few tokens' at a time."""
        chunks = hidden_BTD.flatten(0, 1).split(max(1, CHUNK_LOGITS // self.config.vocab_size))
        return token_entropies(self.head(hidden_RD) for hidden_RD in chunks)

    def new_cache(self, batch: int, max_positions: int) -> KVCache:
        """For generation: empty, of the weights' device and dtype."""
        weight = self.embedding.weight
        return KVCache(self.config, batch, max_positions, weight.device, weight.dtype)

    def block_parameters(self) -> list[list[nn.Parameter]]:
        """Every parameter inside block i, for i = 0..L-1: what a layer scale multiplies."""
        return [list(block.parameters()) for block in self.blocks]

    def part_parameters(self) -> list[list[nn.Parameter]]:
        """The same of each block's attention, then of each one's feed-forward, with the norm before it: 2L lists."""
        return [
            [p for name, p in block.named_parameters() if name.startswith(part)]
            for part in ("attention", "feed_forward")
            for block in self.blocks
        ]


def unset_transformer(config: ModelConfig) -> Transformer:
    """A model on the CPU in fp32 with no weights yet: torch would draw some first, which takes a large one a while."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    if config.tied_head:
        model.head.weight = model.embedding.weight  # type: ignore[assignment]
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Set every weight as a pure function of (seed, parameter name): normal with init_std, norms at 1, padding at 0.

    Each parameter has a generator of its own on the CPU, in fp32, so that the start is the same under every strategy,
    device, precision and order of construction.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
            continue
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows = model.config.vocab_size if name in ("embedding.weight", "head.weight") else parameter.shape[0]
        values = torch.empty(rows, parameter.shape[1], dtype=torch.float32)
        parameter[:rows].copy_(values.normal_(0.0, model.config.init_std, generator=generator))
        parameter[rows:].zero_()


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and fp32 bytes of consolidated parameters by name, sorted (a tied one counts once)."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
