"""What a config names but does not hold, a class and initial weights, told by version or hash. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType

from replication.config.schema import ModelConfig
from replication.errors import UserError, first_line

_files: dict[str, Path] = {}  # plugins by their SHA-256


def identified(model: ModelConfig, plugins: Mapping[str, str]) -> ModelConfig:
    """The config with origin and weights_sha256 where it lacks them; UserError where what it names is not there."""
    if model.class_path is not None and model.origin is None:
        inner = re.findall(r'"class_path": "([^"]*)"', json.dumps(model.init_args))
        model = replace(model, origin=", ".join(sorted({_origin(c, plugins) for c in (model.class_path, *inner)})))
    if model.initial_weights is not None and model.weights_sha256 is None:
        model = replace(model, weights_sha256=sha256_of_weights(weight_files(model.initial_weights)))
    return model


def _origin(class_path: str, plugins: Mapping[str, str]) -> str:
    """package==version, or file==SHA-256."""
    top, file = class_path.partition(".")[0], f"{class_path.rpartition('.')[0]}.py"
    if file in plugins:
        return f"{file}=={plugins[file]}"
    with suppress(PackageNotFoundError, ValueError):
        return f"{top}=={version(top)}"
    for name in packages_distributions().get(top, ()):  # takes a second or two
        return f"{name}=={version(name)}"
    raise UserError(
        f"model.class_path: {class_path} is of no installed package and no plugin; install its package, or list its "
        "file, such as my_model.py, under `plugins` and write my_model.CLASS"
    )


def remember(paths: Iterable[Path]) -> None:
    """Let plugins be found by what an `origin` says of them."""
    _files.update((hashlib.sha256(path.read_bytes()).hexdigest(), path) for path in paths)


def plugin_of(class_path: str, origin: str) -> ModuleType | None:
    """The plugin that a class is of; None where it is of a package. UserError where its file is not there."""
    for file, _, sha256 in (entry.partition("==") for entry in origin.split(", ")):
        if file == f"{class_path.rpartition('.')[0]}.py":
            if sha256 not in _files:
                raise UserError(f"plugins: {file}, SHA-256 {sha256}, is not there; restore it, or choose another --out")
            return load_file(_files[sha256])
    return None


def load_file(path: Path) -> ModuleType:
    """A plugin as a module; UserError where it cannot be run.

    The very bytes are compiled, past Python's cache of compiled files, which goes by time and size.
    """
    module = ModuleType(f"replication_plugin_{path.stem}")
    module.__file__, sys.modules[module.__name__] = str(path), module
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: this plugin cannot be loaded ({why}); mend it") from error
    return module


def weight_files(named: str) -> tuple[Path, ...]:
    """The *.safetensors of a folder, or the one file; UserError where there is none."""
    path = Path(named).expanduser()
    if not (files := [path] if path.is_file() else sorted(path.glob("*.safetensors"))):
        raise UserError(
            f"model.initial_weights: {path} is no file and holds no *.safetensors; correct it (or state "
            "model.weights_sha256 too: cells that have begun go on without the files)"
        )
    return tuple(files)


@functools.cache
def sha256_of_weights(files: tuple[Path, ...]) -> str:
    """Of their bytes one after the other: `cat *.safetensors | sha256sum`."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
