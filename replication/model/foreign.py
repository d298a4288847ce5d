"""Someone else's model in place of ours: built from model.class_path, its blocks seen through hooks.

Shapes: B sequences, T positions, D width, V vocabulary, L blocks, G gain groups.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from replication.config import ClusterConfig, ModelConfig
from replication.config.origin import identified, plugin_of
from replication.errors import UserError, first_line
from replication.model.head import CHUNK_LOGITS, HeadOutput, losses_of_logits
from replication.model.loss import token_entropies
from replication.model.transformer import Output, Transformer, divergence, tie, unset_transformer


class BlockDivergences:
    """Forward hooks that take the divergence of each gain group from blocks in training mode."""

    def __init__(self, blocks: Iterable[nn.Module], groups: Callable[[int], int]) -> None:
        """`groups` says how many there are in so many sequences; 0 measures nothing. A block takes x [B, T, D] first,
        or as `hidden_states`, and returns y, alone or first of a tuple."""
        self._groups, found = groups, list(blocks)
        self.seen: list[Tensor | None] = [None] * len(found)  # [G] of each block's latest forward pass
        self._hooks = [b.register_forward_hook(self._hook(i), with_kwargs=True) for i, b in enumerate(found)]

    def _hook(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def measure(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not block.training:
                return
            x_BTD = args[0] if args else kwargs["hidden_states"]
            if n_groups := self._groups(len(x_BTD)):
                y_BTD = output if isinstance(output, Tensor) else output[0]
                self.seen[i] = divergence(x_BTD, y_BTD, n_groups)

        return measure

    def take(self, n_groups: int, what: str) -> Tensor:
        """Divergences [L, G] of the latest forward pass; UserError, which begins with `what`, where a block saw none.

        A block that is checkpointed is seen again in backward: what that leaves, the next forward pass overwrites.
        """
        seen, self.seen = self.seen, [None] * len(self.seen)
        found = [d_G for d_G in seen if d_G is not None and len(d_G) == n_groups]
        if len(found) < len(seen):
            raise UserError(
                f"{what}: {len(seen) - len(found)} of {len(seen)} blocks did not see the {n_groups} groups of these "
                "labels; call it once after each forward pass, on the same sequences"
            )
        return torch.stack([d_G.to(found[0].device) for d_G in found])

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def find_blocks(path: str, model: nn.Module, what: str) -> list[nn.Module]:
    """The blocks at a path such as transformer.h; UserError, which begins with `what`, where there are none."""
    try:
        return list(model.get_submodule(path).children())
    except AttributeError:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise UserError(f"{what}: the model has no {path!r}; its lists are {', '.join(lists)}") from None


def build(config: ModelConfig) -> nn.Module:
    """The object of a class_path in fp32, in training mode, as its constructor leaves it.

    UserError where package or plugin are not those of `origin`, or the object cannot be made.
    """
    plugins = dict(entry.split("==") for entry in str(config.origin).split(", ") if ".py==" in entry)
    there = identified(dataclasses.replace(config, origin=None, weights_sha256=""), plugins).origin
    if config.origin not in (None, there):
        raise UserError(f"model.origin: the run is defined by {config.origin}, and {there} is installed; install the "
                        "former, or choose another --out")  # fmt: skip
    model = _made({"class_path": config.class_path, "init_args": config.init_args}, str(there))
    model.register_load_state_dict_pre_hook(_complete)
    return cast(nn.Module, model.float().train())


def _complete(model: nn.Module, state: dict[str, Tensor], prefix: str, *more: object) -> None:
    """Before weights are loaded: a tied one gets all of its names, and a buffer that the file lacks stays the
    constructor's, since no step of training changes one (`try_out`)."""
    tie(model, state, prefix)
    buffers = dict(model.named_buffers())
    for name in model.state_dict().keys() & buffers.keys():
        state.setdefault(prefix + name, buffers[name])


def _made(value: Any, origin: str) -> Any:
    """What a value of init_args stands for."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return value
    path = str(value["class_path"])
    module, _, name = path.rpartition(".")
    given = {key: _made(part, origin) for key, part in (value.get("init_args") or {}).items()}
    try:
        kind = getattr(plugin_of(path, origin) or importlib.import_module(module), name)
        named = inspect.signature(kind).parameters
        for key in sorted(given.keys() - named.keys()):  # transformers' configurations take any, in silence
            if close := difflib.get_close_matches(key, named, 1, 0.85):
                raise TypeError(f"it has no {key}; did you mean {close[0]}?")
        return kind(**given)
    except UserError:
        raise
    except Exception as error:  # of somebody else's code
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model.class_path: {path} cannot be made of its init_args ({why}); correct them") from error


def without_memory(config: ModelConfig) -> nn.Module:
    """Names and shapes of the model of a config."""
    with torch.device("meta"):
        return Transformer(config) if config.class_path is None else build(config)


class TokenHistory:
    """In place of a cache: the tokens so far [B, T], which the model reads anew for each further one."""

    def __init__(self) -> None:
        self.tokens_BT: Tensor | None = None

    def keep(self, rows_R: Tensor) -> None:
        assert self.tokens_BT is not None
        self.tokens_BT = self.tokens_BT[rows_R]


class Foreign:
    """The model of a class_path, called as our own is: its logits stand for the hidden states.

    `net` holds the parameters, by the names that the class's own checkpoints have.
    """

    aux_coef = 1.0  # its load-balancing loss has its weight

    def __init__(self, config: ModelConfig, seed: int) -> None:
        """The constructor draws weights and buffers from torch's generator at this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too
            self.net = build(config)
        self.name, self.vocab_size = str(config.class_path), config.vocab_size
        self.blocks = find_blocks(str(config.blocks), self.net, "model.blocks")
        if not self.blocks:
            raise UserError(f"model.blocks: {config.blocks} of {self.name} holds no blocks; name the list that does")
        self._n_groups = 0  # of the forward pass
        self._divergences = BlockDivergences(self.blocks, lambda _: self._n_groups)
        self._takes = inspect.signature(self.net.forward).parameters

    def configure(self, cluster: ClusterConfig) -> None:
        """Fit the computation to a machine; UserError for what the class does not offer."""
        if cluster.activation_checkpointing:
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second up to version 6
            enable: Any = next((getattr(self.net, name) for name in names if hasattr(self.net, name)), None)
            if enable is None:
                raise UserError(f"cluster.activation_checkpointing: {self.name} has no {names[0]}; set it to false")
            enable({"use_reentrant": False})

    def __call__(self, tokens_BT: Tensor, n_groups: int = 0, cache: Any = None) -> Output:
        """Run the model; see Transformer.forward. The cache is one of `new_cache`."""
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            known_BT = cache.tokens_BT
            tokens_BT = cache.tokens_BT = tokens_BT if known_BT is None else torch.cat((known_BT, tokens_BT), 1)
            options["logits_to_keep"] = 1
        self._n_groups = n_groups
        out = self.net(tokens_BT, **{key: value for key, value in options.items() if key in self._takes})
        logits_BTV, aux = getattr(out, "logits", out), getattr(out, "aux_loss", None)
        aux_G = logits_BTV.new_zeros(n_groups)
        if n_groups and aux is not None:
            if n_groups > 1:
                raise UserError(
                    f"training.gain_group_sequences: {self.name} gives one load-balancing loss a micro-batch; "
                    "make that the group with null, or set output_router_logits to false in model.init_args"
                )
            aux_G = aux_G + cast(Any, self.net).config.router_aux_loss_coef * aux
        measured = self._divergences.take(n_groups, "model.blocks") if n_groups else logits_BTV.new_zeros(0, 0)
        return Output(logits_BTV, measured, aux_G, logits_BTV.new_zeros(len(self.blocks), 0))

    def logits(self, logits: Tensor) -> Tensor:
        return logits

    def losses(
        self, logits_BTV: Tensor, targets_BT: Tensor, label_smoothing: float, entropies: bool = False
    ) -> HeadOutput:
        """Losses of all N = B * T tokens, in order; see Transformer.losses."""
        return losses_of_logits(logits_BTV.flatten(0, 1), targets_BT.flatten(), label_smoothing, entropies)

    def entropies(self, logits_BTV: Tensor) -> Tensor:
        return token_entropies(logits_BTV.flatten(0, 1).split(max(1, CHUNK_LOGITS // self.vocab_size)))

    def block_parameters(self) -> list[list[nn.Parameter]]:
        return [list(block.parameters()) for block in self.blocks]

    def new_cache(self, batch: int, max_positions: int) -> TokenHistory:
        limit = getattr(getattr(self.net, "config", None), "max_position_embeddings", None)
        if limit is not None and max_positions > limit + 1:  # the last token is not fed
            raise UserError(
                f"generation.max_new_tokens: a prompt and its completion have {max_positions} tokens, and {self.name} "
                f"has {limit} positions; lower it, shorten the prompts, or give it more in model.init_args"
            )
        return TokenHistory()

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.net.parameters()

    @torch.no_grad()
    def try_out(self, length: int, device: torch.device) -> None:
        """Run it in training mode; UserError for a model whose objective would not be the one that is stated: logits of
        another shape, random numbers, statistics of batches, or sight of later positions."""
        tokens_1T = torch.zeros((1, length), dtype=torch.int64, device=device)
        generator = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
        random, buffers = generator(), {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        try:
            logits_BTV = self(tokens_1T, 1).hidden_BTD
        except UserError:
            raise
        except Exception as error:  # of somebody else's code
            raise UserError(
                f"model.class_path: {self.name} does not run on {length} tokens ({type(error).__name__}: "
                f"{first_line(error)}): it takes token ids [B, T] and returns logits, as .logits or alone; its blocks "
                "take x first, or as hidden_states, and return y, alone or first of a tuple"
            ) from error
        drawn, shape = not torch.equal(random, generator()), [1, tokens_1T.shape[1], self.vocab_size]
        changed = [n for n, b in self.net.named_buffers() if n in buffers and not torch.equal(b, buffers[n])]
        tokens_1T[0, -1] = 1
        change = (self(tokens_1T, 1).hidden_BTD - logits_BTV)[:, :-1].abs().max()
        sizes = "give its vocabulary, model.vocab_size and the tokenizer's (data.tokenizer.padded_vocab_size) one size"
        for wrong, what in (
            (list(logits_BTV.shape) != shape, f"gives logits {list(logits_BTV.shape)}, not {shape}: {sizes}"),
            (drawn, "draws random numbers in training: set its dropout to 0"),
            (changed, f"keeps statistics of batches ({', '.join(changed[:1])}): choose a norm without them"),
            (change > 0.01 * logits_BTV.abs().max(), "lets positions see later ones: give it a causal mask"),
        ):
            if wrong:
                raise UserError(f"model.class_path: {self.name} {what}")


Model = Transformer | Foreign


def unset_model(config: ModelConfig, seed: int) -> Model:
    """The model of a config, for weights that follow; `seed` is that of what a constructor draws and no file keeps."""
    return unset_transformer(config) if config.class_path is None else Foreign(config, seed)


def parameters_in(model: Model) -> nn.Module:
    """The module that holds them."""
    return model.net if isinstance(model, Foreign) else model
