"""model.initial_weights: a start from safetensors, by our names or by those of a class of transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replication.config import ModelConfig
from replication.config.origin import sha256_of_weights, weight_files
from replication.errors import UserError, first_line, require
from replication.model.foreign import Foreign, Model, parameters_in
from replication.model.layout import own_weights_of, weights_of


@torch.no_grad()
def set_initial_weights(model: Model, config: ModelConfig) -> None:
    """Fill a model with the weights, in its own precision.

    UserError where the files are not those of the config's hash, cannot be read, or lack a tensor, have one too many or
    one of another shape.
    """
    named, net = str(config.initial_weights), parameters_in(model)
    files, ours = weight_files(named), dict(net.named_parameters())
    if (there := sha256_of_weights(files)) != config.weights_sha256:
        raise UserError(
            f"model.initial_weights: {named} has SHA-256 {there}, and the run is defined by {config.weights_sha256}; "
            "restore those files, or choose another --out"
        )
    require("export", "transformers", "safetensors")
    try:
        found = _read(files, Path(named).expanduser(), model)
    except Exception as error:  # of files that are damaged
        raise UserError(f"model.initial_weights: {named} cannot be read ({first_line(error)}); restore it") from error
    expected: dict[str, Any] = ours
    known = {*net.state_dict(), *dict(net.named_buffers())}  # a tied weight by its other name; what is no parameter
    by_layout = not isinstance(model, Foreign) and not ours.keys() & found.keys()
    if by_layout:
        with torch.device("meta"):
            expected = weights_of(config, {name: torch.empty(p.shape) for name, p in ours.items()})
        if config.tied_head:
            known = {"lm_head.weight"}
            del expected["lm_head.weight"]
    unlike = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys() - known,
        "misshapen": {name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape},
    }
    if any(unlike.values()):
        said = "; ".join(f"{len(names)} {what}, such as {min(names)}" for what, names in unlike.items() if names)
        raise UserError(f"model.initial_weights: {named} does not fit the keys of model: tensors are {said}; "
                        "name weights of this model")  # fmt: skip
    first = dict[nn.Parameter, str]()
    if by_layout:
        tied = [("lm_head.weight", "model.embed_tokens.weight")] if config.tied_head else []
    else:
        tied = [(name, first.setdefault(p, name)) for name, p in net.named_parameters(remove_duplicate=False)]
    for name, kept in tied:
        if name in found and not torch.equal(found[name], found[kept]):
            raise UserError(f"model.initial_weights: {named} has another {name} than {kept}, which are one weight "
                            "here; train a model whose head is not tied")  # fmt: skip
    if by_layout:
        found = own_weights_of(config, {name: found[name].float() for name in expected}, ours)
    for name, parameter in ours.items():
        parameter.copy_(found[name])


def _read(files: Iterable[Path], path: Path, model: Model) -> dict[str, Tensor]:
    """Tensors by name; of a folder of transformers as it loads them, since it renames, cuts and joins some."""
    if not (path / "config.json").is_file() or (
        isinstance(model, Foreign) and not hasattr(model.net, "save_pretrained")
    ):
        from safetensors.torch import load_file

        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would say of tensors that do not fit, we say
    kind: Any = AutoModelForCausalLM
    asked: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if isinstance(model, Foreign):
        kind, asked = type(model.net), asked | {"config": copy.deepcopy(model.net.config)}
    loaded, told = kind.from_pretrained(path, local_files_only=True, **asked)
    found = {name: p for name, p in loaded.named_parameters() if name not in told["missing_keys"]}
    found |= {name: torch.empty(shape) for name, shape, _ in told["mismatched_keys"]}
    return found | dict.fromkeys(told["unexpected_keys"], torch.empty(0))
