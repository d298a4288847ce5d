"""Config files and flags, merged into one checked config.

Layers, later ones win: the schema's defaults, then the files given (model, arm, data, cluster, suite), then flags.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import glob
import hashlib
import inspect
import itertools
import json
import shutil
import textwrap
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from replication.config.identity import differences, flatten, to_dict
from replication.config.origin import identified, remember
from replication.config.reading import NULLS, Keys, Layer, Plain, build, check_layer, hints, read_yaml
from replication.config.schema import FOUND, RunConfig, SuiteConfig
from replication.errors import SHIPPED, UserError, did_you_mean


def config_root() -> Path:
    """The shipped configs: beside the package in a checkout, inside it in an installed wheel."""
    return SHIPPED / "configs"


def find_config(name: str | Path, folder: str = "") -> Path:
    """A config file by path, by path under configs/, or (with folder) by bare name.

    Raises UserError that lists what stands in the folder where there is no such file.
    """
    text, root = str(name), config_root()
    by_name = [root / folder / text, root / folder / f"{text}.yaml"] if folder else []
    for candidate in (Path(text), root / text.removeprefix("configs/"), *by_name):
        if candidate.is_file():
            return candidate
    shipped = sorted(p.stem for p in (root / folder).glob("*.yaml")) if folder else []
    hint = f"; configs/{folder} has: {', '.join(shipped)}" if shipped else "; give a path, or a file under configs/"
    raise UserError(f"{text}: no such config file{hint}")


def help_of_keys(of: str = "") -> str:
    """The keys of a run at or below one, such as training; none given: the sections. Raises UserError for no key."""
    keys: dict[str, str] = {}
    sections: dict[str, str] = {}
    width = max(shutil.get_terminal_size().columns - 2, 50)

    def add(cls: type, prefix: str) -> None:
        for node, after in itertools.pairwise(ast.parse(inspect.getsource(cls)).body[0].body):  # type: ignore[attr-defined]
            if not isinstance(node, ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            name, words = ast.unparse(node.target), " ".join(ast.literal_eval(after.value).split())
            if FOUND in cls.__dataclass_fields__[name].metadata:  # type: ignore[attr-defined]
                continue
            hint = hints(cls)[name]
            if dataclasses.is_dataclass(hint):
                sections[f"{prefix}{name}"] = words
                add(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
                continue
            entry = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
            default = {} if entry.default is dataclasses.MISSING else entry.default  # a mapping's is empty
            spelt = json.dumps(default) if isinstance(default, bool | None) else default
            spelt = str(list(spelt) if isinstance(spelt, tuple) else spelt).replace("\n", "\\n")
            choices = [str(c) for c in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
            said = f"{words} One of {', '.join(choices)}." if choices else words
            wrapped = textwrap.wrap(said, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
            keys[f"{prefix}{name}"] = "\n".join([f"  --{prefix}{name}={spelt}", *wrapped])

    add(RunConfig, "")
    if of:
        chosen = [text for key, text in keys.items() if f"{key}.".startswith(f"{of}.")]
        if not chosen:
            raise UserError(f"--help: no key {of}{did_you_mean(of, [*sections, *keys])}")
        return "\n".join([*([sections[of]] if of in sections else []), *chosen])
    told = [text for key, text in keys.items() if "." not in key]
    for section, words in sections.items():
        told += textwrap.wrap(words, width, initial_indent=f"  --{section}.*\n      ", subsequent_indent=" " * 6)
    return "\n".join(told)


OF_FILES = ("--data.tokenizer.path", "--generation.prompts")
"""Flags that name a file, which lies in the current folder."""


def load_run(layers: Sequence[str | Path | Layer] = (), flags: Sequence[str] = ()) -> RunConfig:
    """Merge config files and flags into one checked RunConfig.

    Args:
        layers: config files, or what was read from elsewhere; later ones win.
        flags: such as `--training.steps=20` or `--training.steps 20`, which win over the files; `--config FILE` is one
            more file.

    Raises UserError: an unknown key, a wrong type, a number out of range or a contradiction, named with its file and
    line; a word that is no flag, or a flag without its value.
    """
    read = [layer if isinstance(layer, Layer) else _read_keys(find_config(layer)) for layer in layers]
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--":
            raise UserError(
                f"{word}: is not a flag; a key of a run is given as --KEY=VALUE, such as --training.steps=20"
            )
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"{name}: has no value; write {name}=VALUE")
        here = {f"{name[2:].rpartition('.')[0]}.folder": None} if name in OF_FILES else {}
        flag = Layer({name[2:]: Plain(value)} | here, "")
        read.append(_read_keys(find_config(value)) if name == "--config" else flag)
    config = build(RunConfig, read)
    return replace(config, model=identified(config.model, config.plugins)).check()


def _read_keys(path: Path) -> Layer:
    layer = read_yaml(path)
    return replace(layer, tree=_find_files(layer.tree, path.resolve().parent))


def _find_files(tree: Any, folder: Path) -> Any:
    """The keys of a run that stand in a file of `folder`, with where the files lie that relative paths there mean."""

    def beside(part: Any) -> Any:
        text = part.get("path") if isinstance(part, dict) else None
        if not isinstance(text, str) or not text or Path(text).is_absolute():
            return part
        is_there = Path(folder, text).exists() or any(glob.iglob(text, root_dir=folder, recursive=True))
        return part | {"folder": str(folder) if is_there else None}  # none also over what an earlier layer said

    if not isinstance(tree, dict):
        return tree
    tree = dict(tree)
    if isinstance(data := tree.get("data"), dict):
        named = data.get("dir")
        places = (Path(root, named) for root in (folder, "") if isinstance(named, str) and named not in NULLS)
        found = next((Keys(dir=str(place.absolute())) for place in places if place.is_dir()), Keys())
        found |= {"tokenizer": beside(data["tokenizer"])} if "tokenizer" in data else {}
        if isinstance(data.get("sources"), list):
            found["sources"] = [beside(source) for source in data["sources"]]
        tree["data"] = data | found
    if isinstance(generation := tree.get("generation"), dict) and "prompts" in generation:
        tree["generation"] = generation | {"folder": str(folder)}
    return tree


def load_suite(name: str | Path) -> SuiteConfig:
    """Read a suite file; raises UserError as load_run does, and where there is no arm or no seed, or no such plugin."""
    path = find_config(name, "suites")
    layer = _name_own_arms(read_yaml(path), path.resolve().parent)
    suite = build(SuiteConfig, [layer])
    suite = replace(suite, run=_find_files(suite.run, path.resolve().parent))
    lines = {key.removeprefix("run."): line for key, line in layer.lines.items() if key.startswith("run.")}
    check_layer(RunConfig, Layer(suite.run, str(path), lines))  # here, where the lines are known
    for arm in suite.own_arms:
        check_layer(RunConfig, _arm_layer(suite, arm))
    if not suite.arms or not suite.seeds:
        raise UserError(f"{path}: key 'arms' and key 'seeds' need at least one entry each")
    for key, values in (("arms", suite.arms), ("seeds", suite.seeds)):
        if len(set(values)) != len(values):
            raise UserError(f"{path}: key '{key}' names something twice: {list(values)}")
    try:
        suite.analysis.check(suite.arms)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    beside = [(layer, path.resolve().parent / layer) for layer in suite.layers]  # a suite's own files may lie there
    plugins = tuple(str(find_plugin(plugin, path.resolve().parent)) for plugin in suite.plugins)
    return replace(suite, layers=tuple(str(b) if b.is_file() else layer for layer, b in beside), plugins=plugins)


def _name_own_arms(layer: Layer, folder: Path) -> Layer:
    """A suite's layer with names alone under `arms`: the keys of arms that stand there, or in a file, as own_arms."""
    arms, own = [], Keys()
    entries = layer.tree.get("arms") if isinstance(layer.tree, dict) else None
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            lines = {k.removeprefix(f"arms[{i}]."): line for k, line in layer.lines.items()}
            tree = {"arm" if key == "name" else key: value for key, value in entry.items()}
            if "arm" not in tree:
                raise layer.error(f"arms[{i}]", "the arm has no name; add one, such as `name: my_arm`")
            arm, found = str(tree["arm"]), Layer(tree, layer.where, lines)
        elif isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
            found = read_yaml(folder / entry if (folder / entry).is_file() else find_config(entry, "arms"))
            arm = str(found.tree["arm"] if isinstance(found.tree, dict) and "arm" in found.tree else Path(entry).stem)
        else:
            arms.append(entry)
            continue
        arms.append(arm)
        own[arm] = {"arm": arm, **{key: to_dict(value) for key, value in check_layer(RunConfig, found).items()}}
    return replace(layer, tree={**layer.tree, "arms": arms, "own_arms": own}) if own else layer


def find_plugin(name: str, folder: Path = Path()) -> Path:
    """The file of a plugin: one beside `folder`, or that of the module which an installed package registers so.

    Raises UserError where there is neither.
    """
    if (folder / name).is_file():
        return (folder / name).resolve()
    for group in ("replication.gains", "replication.scales"):
        for entry in entry_points(group=group, name=name):
            with suppress(ImportError):
                if (spec := find_spec(entry.module)) is not None and spec.origin is not None:
                    return Path(spec.origin)
    raise UserError(
        f"plugins: {name} is no file in {folder.resolve()}, and no installed package registers that name under "
        "replication.gains or replication.scales; correct it"
    )


def plugin_layer(paths: Sequence[str | Path]) -> Layer:
    """The key `plugins` of a run: names and hashes of files. Raises UserError where two have one name."""
    remember(map(Path, paths))
    files = {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
    if len(files) < len(paths):
        raise UserError(f"plugins: two of {', '.join(map(str, paths))} have one name; rename a file")
    return Layer({"plugins": files}, "plugins")


def inlined(suite: SuiteConfig) -> SuiteConfig:
    """The suite with the keys of its layers in `run`: the same cells, without the layers' files.

    What an arm sets wins over layers, so it is left out there; an arm that lacks a key which another sets gets the
    layers' value among its own. Raises UserError as load_run does.
    """
    layers = Keys()
    for layer in suite.layers:
        layers |= _set_keys(_read_keys(find_config(layer)))
    of_arm = {arm: _set_keys(_arm_layer(suite, arm)) for arm in suite.arms}
    by_arms, own, arms = set().union(*of_arm.values()), _set_keys(Layer(suite.run, "run")), dict(suite.own_arms)
    for arm, keys in of_arm.items():
        lacking = {k: v for k, v in layers.items() if k in by_arms and k not in {*keys, *own}}
        if lacking:
            arms[arm] = _nested(keys | lacking)
    run = _nested({key: value for key, value in layers.items() if key not in by_arms} | own)
    return replace(suite, layers=(), run=run, own_arms=arms)


def _set_keys(layer: Layer) -> Keys:
    """The dotted keys that a layer sets; a mapping of any keys, which a later layer replaces whole, is one value."""
    keys = check_layer(RunConfig, layer)
    return {key: to_dict(value) for key, value in keys.items() if not key.endswith(".folder")}  # see FOUND


def _nested(keys: Keys) -> Keys:
    """Dotted keys as sections."""
    tree = Keys()
    for dotted, value in keys.items():
        *sections, last = dotted.split(".")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, tree)[last] = value
    return tree


def load_cell(
    suite: SuiteConfig, arm: str, seed: int, flags: Sequence[str] = (), cluster: Path | None = None
) -> RunConfig:
    """The RunConfig of one cell: the suite's layers, the arm, the suite's run keys, a cluster file, the seed, flags."""
    of_arm = _arm_layer(suite, arm)
    own = [Layer(suite.run, "the suite's run section"), plugin_layer(suite.plugins)]
    of_machine = [] if cluster is None else [cluster]
    config = load_run([*suite.layers, of_arm, *own, *of_machine], [f"--seed={seed}", *flags])
    values = flatten(to_dict(config))
    for key, declared in _arm_values(of_arm).items():
        if values.get(key) != declared:
            raise UserError(
                f"{key}: the arm {arm} is defined by {declared} ({of_arm.where}), but the suite's run keys or a flag "
                f"set {values.get(key)}; remove that, or write another arm file"
            )
    return config


def set_by_flags(suite: SuiteConfig, arm: str, seed: int, keys: Keys) -> dict[str, str]:
    """{key: --KEY=VALUE} of those of a cell's dotted keys that the suite alone does not give."""
    changed = differences(flatten(to_dict(load_cell(suite, arm, seed))), keys)
    return {
        key: f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, (_, v) in changed.items() if key in keys
    }


def find_cluster(name: str) -> Path:
    """A cluster file, by path or by its name in configs/cluster.

    Raises UserError where there is none, or it sets other keys than the machine's.
    """
    path = find_config(name, "cluster")
    keys = {key.partition(".")[0] for key in check_layer(RunConfig, read_yaml(path))}
    if others := ", ".join(sorted(keys - {"cluster", "checkpoints", "logging"})):
        raise UserError(
            f"{path}: sets {others}; a cluster file says where cells run, not what they are: put it into the suite"
        )
    return path


def arm_keys(arm: str) -> set[str]:
    """Dotted keys that an arm's file sets: what this arm declares to differ in."""
    return set(_arm_values(read_yaml(find_config(arm, "arms"))))


def declared_keys(suite: SuiteConfig) -> set[str]:
    """Dotted keys that any arm of a suite sets. All of its arms declare them: one that does not set a key, the value
    that it has there. Raises UserError where an arm cannot be read.
    """
    return {key for arm in suite.arms for key in _arm_values(_arm_layer(suite, arm))}


def _arm_layer(suite: SuiteConfig, arm: str) -> Layer:
    """The keys of an arm: the suite's own, or those of its file."""
    if arm in suite.own_arms:
        return Layer(suite.own_arms[arm], f"{suite.name}: arm {arm}")
    return read_yaml(find_config(arm, "arms"))


def _arm_values(layer: Layer) -> Keys:
    """The dotted keys that an arm, or another layer, sets, those of mappings too."""
    return flatten({key: to_dict(value) for key, value in check_layer(RunConfig, layer).items()})
