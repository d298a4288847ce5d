"""Gains and scales of your own: functions in a Python file, beside a suite or of an installed package.

    from replication import gain, scale

    @gain
    def focal(losses, plain, valid, *, gamma: float = 2.0, context):  # [G, N] -> [G, N]
    @scale
    def deepest(divergence, *, t: float = 0.5, context):  # [L] -> [L]

Shapes: G gain groups, N tokens in one group, L blocks. The harness calls a gain with one group at a time (G = 1), so
that its generator is that group's, and a scale with the blocks that layer_gain.exclude_blocks leaves (README.md, A gain
of your own). This module loads no torch; a plugin does.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_origin, get_type_hints

from replication.config import Keys, RunConfig
from replication.config.origin import load_file, remember
from replication.config.reading import Layer, build
from replication.errors import UserError
from replication.runs.files import file_sha256, write_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["gain", "scale"]
TENSORS: dict[Kind, int] = {"gain": 3, "scale": 1}
"""Arguments that come by place."""
ASKED = ("entropy", "inputs", "targets")
"""Arguments that a gain gets where its signature names them, because they cost something: the entropy of the predictive
distribution of each token in nats [G, N]; and of the group's sequences [G, sequences, T] the tokens that were fed, and
those to be predicted, -100 where there is none."""
MARK = "replication_plugin"


def gain(function: Callable[..., Any] | None = None, *, clamp: bool = False) -> Any:
    """Make a function a gain that arms may name in token_gain.function.

    Args:
        function: (losses, plain, valid, *, typed parameters, context) -> gains, all [G, N]: the loss that is trained,
            the same without label smoothing, both in nats; whether a token counts; and a Context. Pure: see
            `replicate check-gain`. ASKED may stand among the parameters.
        clamp: whether the result is clamped to the arm's token_gain.c_min and c_max, and the clamped shares logged.
    """
    return _marked("gain", function, clamp)


def scale(function: Callable[..., Any] | None = None, *, clamp: bool = False) -> Any:
    """Make a function scales that arms may name in layer_gain.function.

    Args:
        function: (divergence, *, typed parameters, context) -> scales, both [L]: the blocks' divergences of the step.
        clamp: whether the result is clamped to the arm's layer_gain.m_min and m_max.
    """
    return _marked("scale", function, clamp)


def _marked(kind: Kind, function: Callable[..., Any] | None, clamp: bool) -> Any:
    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        vars(function)[MARK] = kind, clamp
        return function

    return mark if function is None else mark(function)


@dataclass(frozen=True)
class Context:
    """The place in a run at which a function is called."""

    seed: int
    step: int  # from 0
    steps: int  # of the whole run
    learning_rate_fraction: float  # this step's share of the peak
    group: int = 0  # the gain group, in the step's global order; 0 for scales of a whole step
    kind: Kind = "gain"
    device: Any = "cpu"
    asked: Mapping[str, Tensor] = field(default_factory=dict)  # of ASKED, what the run's function asks for

    @cached_property
    def generator(self) -> torch.Generator:
        """Fresh and the same for the same seed, step and group, wherever the group is computed."""
        import torch

        text = f"{self.kind} {self.seed} {self.step} {self.group}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Function:
    """A function of a plugin, and the parameters with which it is called."""

    kind: Kind
    name: str
    file: str
    clamp: bool
    call: Callable[..., Any]
    form: type  # a dataclass of its parameters
    takes_context: bool
    asks: tuple[str, ...]  # of ASKED
    parameters: Keys = field(default_factory=dict)

    @classmethod
    def read(cls, file: str, function: Callable[..., Any]) -> Function:
        """Of what a decorator marked; UserError where its signature is none of the two."""
        kind, clamp = vars(function)[MARK]
        name, what = function.__name__, f"{file}: {function.__name__}"
        signature = inspect.signature(function).parameters
        try:
            hints = get_type_hints(function, include_extras=True)
        except NameError as error:
            raise UserError(f"{what}: a type cannot be read ({error}); import it outside of TYPE_CHECKING") from None
        by_name = [p for p in signature.values() if p.kind is p.KEYWORD_ONLY]
        if len(by_name) + TENSORS[kind] != len(signature):
            form = {"gain": "(losses, plain, valid, *, ..., context)", "scale": "(divergence, *, ..., context)"}[kind]
            raise UserError(f"{what}: the arguments of a {kind} are {form}, parameters after the star; change them")
        fields: list[Any] = []
        for p in by_name:
            if p.name == "context" or (kind == "gain" and p.name in ASKED):
                continue
            hint = hints.get(p.name)
            if hint not in (bool, int, float, str) and get_origin(hint) not in (Literal, Annotated):
                raise UserError(f"{what}: {p.name} needs a type, bool, int, float or str, such as `{p.name}: float`")
            fields.append((p.name, hint) if p.default is p.empty else (p.name, hint, field(default=p.default)))
        form_of = make_dataclass(name, fields, kw_only=True)
        asks = tuple(asked for asked in ASKED if asked in signature and kind == "gain")
        return cls(kind, name, file, clamp, function, form_of, "context" in signature, asks)

    def with_parameters(self, given: Keys, where: str) -> Function:
        """The function with parameters for its own; UserError for unknown ones, wrong types and what is missing."""
        try:
            return replace(self, parameters=dict(vars(build(self.form, [Layer(given, where)]))))
        except UserError as error:
            own = (p for p in inspect.signature(self.call).parameters.values() if p.name in self.form.__annotations__)
            takes = ", ".join(map(str, own)) or "no parameters"
            raise UserError(f"{error}; {self.name} of {self.file} takes {takes}") from None

    def __call__(self, context: Context, *tensors: Tensor) -> Tensor:
        """What it returns for these very tensors, in the dtype of the first; UserError where it has another shape."""
        more: Keys = {name: context.asked[name] for name in self.asks}
        if self.takes_context:
            more["context"] = replace(context, kind=self.kind, device=tensors[0].device)
        found = self.call(*tensors, **self.parameters, **more)
        shape = tuple(tensors[0].shape)
        if tuple(getattr(found, "shape", (None,))) != shape or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if hasattr(found, "dtype") else type(found).__name__
            raise UserError(f"{self.file}: {self.name} returned {got}; return numbers of the shape {list(shape)}")
        return found.to(tensors[0].dtype)

    def of_groups(self, context: Context, *tensors_GN: Tensor) -> Tensor:
        """[G, N]: of each group by itself, so that no cut of the batch changes a bit; context.group is the first."""
        import torch

        groups = zip(*(t.detach().clone().split(1) for t in tensors_GN), strict=True)  # it may write to what it gets
        asked = [{name: t[g : g + 1].clone() for name, t in context.asked.items()} for g in range(len(tensors_GN[0]))]
        contexts = (replace(context, group=context.group + g, asked=of) for g, of in enumerate(asked))
        found = [self(its_own, *of) for its_own, of in zip(contexts, groups, strict=True)]
        return torch.cat(found).detach()


class Functions(NamedTuple):
    """What a run takes from its plugins; None where the built-in formula acts."""

    gain: Function | None = None
    scale: Function | None = None


NO_FUNCTIONS = Functions()


def read_functions(path: Path, has_class: bool = False) -> dict[str, Function]:
    """The marked functions of a file, by name; UserError where it cannot be run, or marks none and has no class."""
    marked = [f for f in vars(load_file(path)).values() if inspect.isfunction(f) and MARK in vars(f)]
    if not marked and not has_class:
        raise UserError(f"{path}: marks no function; put @gain or @scale of `replication` above one")
    return {function.name: function for function in (Function.read(path.name, f) for f in marked)}


def functions_of(config: RunConfig, paths: Iterable[Path]) -> Functions:
    """The functions that a config names, of the files of its plugins.

    Raises UserError where a file is missing or another than the config's, a function is missing, or its parameters do
    not fit.
    """
    if not config.plugins:
        return NO_FUNCTIONS
    by_name, found = {path.name: path for path in paths}, dict[str, Function]()
    for name, sha256 in config.plugins.items():
        path = by_name.get(name)
        if path is None or not path.is_file():
            raise UserError(f"plugins: {name}, SHA-256 {sha256}, is not there; restore it, or choose another --out")
        if (there := file_sha256(path)) != sha256:
            raise UserError(
                f"{path}: the plugin was changed: its SHA-256 is {there}, and {config.arm}/seed-{config.seed} is "
                f"defined by {sha256}; restore that file, or choose another --out"
            )
        remember([path])
        for function in read_functions(path, has_class=f"{name}==" in (config.model.origin or "")).values():
            if function.name in found:
                raise UserError(
                    f"plugins: {found[function.name].file} and {name} both have {function.name}; rename one"
                )
            found[function.name] = function
    chosen: dict[str, Function] = {}
    for section, c, kind in (("token_gain", config.token_gain, "gain"), ("layer_gain", config.layer_gain, "scale")):
        fitting = {name: function for name, function in found.items() if function.kind == kind}
        if c.function is not None and c.function not in fitting:
            there = ", ".join(fitting) or "none"
            raise UserError(f"{section}.function: {c.function} is no {kind} of the plugins; those are {there}")
        if c.function is not None:
            chosen[kind] = fitting[c.function].with_parameters(c.parameters, f"{section}.parameters")
    return Functions(**chosen)


def keep_plugins(paths: Sequence[str | Path], folder: Path) -> None:
    """Copy plugins into OUT/plugins, whose copies the cells load; UserError where another one of that name is there."""
    for path in map(Path, paths):
        copy = folder / path.name
        if not copy.is_file():
            write_bytes(copy, path.read_bytes())
        elif (here := file_sha256(path)) != (there := file_sha256(copy)):
            raise UserError(
                f"{path}: the plugin was changed: its SHA-256 is {here}, that of the copy which the cells use, {copy}, "
                f"is {there}; restore the one that was changed, or choose another --out"
            )
