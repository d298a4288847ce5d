"""Config files and flags, merged into one checked config.

Layers, later ones win: the schema's defaults, then the files given (model, arm, data, cluster, suite), then flags.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from replication.config.identity import Keys, flatten, refuse_differences, scientific, to_dict, to_yaml
from replication.config.reading import (
    Layer,
    build,
    check_layer,
    flag_layers,
    hints,
    read_yaml,
)
from replication.config.schema import RunConfig, SuiteConfig
from replication.errors import UserError


def config_root() -> Path:
    """The shipped configs: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"  # first: beside an installed package may lie another one of this name
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str | Path, folder: str = "") -> Path:
    """A config file by path, by path under configs/, or (with folder) by bare name.

    Raises:
        UserError: no such file; the message lists what stands in the folder.
    """
    text = str(name)
    root = config_root()
    candidates = [Path(text), root / text.removeprefix("configs/")]
    if folder:
        candidates += [root / folder / text, root / folder / f"{text}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted(p.stem for p in (root / folder).glob("*.yaml")) if folder else []
    hint = f"; configs/{folder} has: {', '.join(shipped)}" if shipped else "; give a path, or a file under configs/"
    raise UserError(f"{text}: no such config file{hint}")


def help_of_keys() -> str:
    """Every key of a run: its type, its default and its line of documentation."""
    lines: list[str] = []

    def add(cls: type, prefix: str) -> None:
        for node, after in itertools.pairwise(ast.parse(inspect.getsource(cls)).body[0].body):  # type: ignore[attr-defined]
            if not isinstance(node, ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            name, words = ast.unparse(node.target), " ".join(ast.literal_eval(after.value).split())
            hint = hints(cls)[name]
            if dataclasses.is_dataclass(hint):
                lines.append(f"\n{words}")
                add(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
                continue
            default = cls.__dataclass_fields__[name].default  # type: ignore[attr-defined]
            lines.append(f"  --{prefix}{name}={_spelt(default)}")
            choices = [str(c) for c in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
            said = f"{words} One of {', '.join(choices)}." if choices else words
            lines.extend(textwrap.wrap(said, 110, initial_indent="      ", subsequent_indent="      "))

    add(RunConfig, "")
    return "\n".join(lines)


def _spelt(default: Any) -> str:
    if isinstance(default, bool | None):
        return json.dumps(default)
    return str(list(default) if isinstance(default, tuple) else default).replace("\n", "\\n")


def load_run(layers: Sequence[str | Path | Layer] = (), flags: Sequence[str] = ()) -> RunConfig:
    """Merge config files and flags into one checked RunConfig.

    Args:
        layers: config files, or what was read from elsewhere; later ones win.
        flags: command-line flags such as `--training.steps=20`; they win over the files.

    Raises:
        UserError: an unknown key, a wrong type, a number out of range or a contradiction, named with its file and line.
    """
    read = [layer if isinstance(layer, Layer) else read_config(layer) for layer in layers]
    return build(RunConfig, [*read, *flag_layers(flags, read_config)]).check()


def read_config(name: str | Path) -> Layer:
    """A config file of some run's keys, as it is written; raises as find_config and read_yaml do."""
    return read_yaml(find_config(name))


def load_suite(name: str | Path) -> SuiteConfig:
    """Read a suite file.

    Raises:
        UserError: unknown keys, wrong types, or no arm or seed.
    """
    path = find_config(name, "suites")
    layer = read_yaml(path)
    suite = build(SuiteConfig, [layer])
    start = "run."
    lines = {key.removeprefix(start): line for key, line in layer.lines.items() if key.startswith(start)}
    check_layer(RunConfig, Layer(suite.run, str(path), lines))  # here, where the lines are known
    beside = [path.resolve().parent / layer for layer in suite.layers]  # a suite's own files may lie beside it
    layers = [str(b) if b.is_file() else layer for b, layer in zip(beside, suite.layers, strict=True)]
    suite = replace(suite, layers=tuple(layers))
    if not suite.arms or not suite.seeds:
        raise UserError(f"{path}: key 'arms' and key 'seeds' need at least one entry each")
    for key, values in (("arms", suite.arms), ("seeds", suite.seeds)):
        if len(set(values)) != len(values):
            raise UserError(f"{path}: key '{key}' names something twice: {list(values)}")
    try:
        suite.analysis.check(suite.arms)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return suite


def load_cell(
    suite: SuiteConfig, arm: str, seed: int, flags: Sequence[str] = (), cluster: Path | None = None
) -> RunConfig:
    """The RunConfig of one cell: the suite's layers, the arm, the suite's run keys, a cluster file, the seed, flags."""
    arm_file = find_config(arm, "arms")
    shared: list[Path | Layer] = [Layer(suite.run, "the suite's run section")]
    if cluster is not None:
        shared.append(cluster)
    config = load_run([*suite.layers, arm_file, *shared], [f"--seed={seed}", *flags])
    values = flatten(to_dict(config))
    for key, declared in _arm_values(arm_file).items():
        if values[key] != declared:
            raise UserError(
                f"{key}: the arm {arm} is defined by {declared} ({arm_file}), but the suite's run keys or a flag set "
                f"{values[key]}; remove that, or write another arm file"
            )
    return config


def find_cluster(name: str) -> Path:
    """A cluster file, by path or by its name in configs/cluster.

    Raises:
        UserError: no such file, or one that sets other keys than the machine's.
    """
    path = find_config(name, "cluster")
    keys = {key.partition(".")[0] for key in check_layer(RunConfig, read_yaml(path))}
    if not keys <= {"cluster", "checkpoints", "logging"}:
        others = ", ".join(sorted(keys - {"cluster", "checkpoints", "logging"}))
        raise UserError(
            f"{path}: sets {others}; a cluster file says where cells run, not what they are: put it into the suite"
        )
    return path


def arm_keys(arm: str) -> set[str]:
    """Dotted keys that an arm's file sets: what this arm declares to differ in."""
    return set(_arm_values(find_config(arm, "arms")))


def _arm_values(path: Path) -> Keys:
    """The keys that an arm's file sets, as to_dict has them."""
    return flatten({key: to_dict(value) for key, value in check_layer(RunConfig, read_yaml(path)).items()})


def refuse_other_config(config: RunConfig, path: Path) -> None:
    """Raise UserError where a cell's config.yaml is of another scientific config; nothing where there is none."""
    if path.is_file() and path.read_text(encoding="utf-8") != to_yaml(config):
        what, remedy = f"{path.parent}: holds a cell of another config", "choose another --out, or remove it"
        refuse_differences(what, scientific(load_run([path])), scientific(config), remedy)
