"""The import rule: arrows point down only, and what must answer at once loads without torch.

The tables come first; a name stands for that module and everything below it. Lazy imports inside functions count as
imports, because they are arrows too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import CHECKOUT

from replication.runs.manifest import COMPUTES

# From the floor up. A module may import its own layer and those before it; a longer name is placed before its folder.
LAYERS = [
    ["errors", "console", "protocol.paper"],
    ["config"],
    ["runs"],
    ["processes"],
    ["model", "objectives", "votes"],
    ["data", "statistics"],
    ["audit", "protocol"],
    ["training"],
    ["generation"],
    ["evaluation", "export"],
    ["tensorboard"],
    ["grid", "judging", "report"],
    ["bench", "simulation"],
    ["cli"],
    ["__main__"],
]

# What a part must not import, whatever its layer.
FRAMEWORKS = ["lightning", "pytorch_lightning", "deepspeed"]
EXPERIMENT = ["torch", *FRAMEWORKS, "replication.training", "replication.model"]
STAGES = [
    f"replication.{name}" for name in ("training", "grid", "generation", "judging", "report", "audit", "simulation")
]
EVIDENCE = ["statistics", "votes", "simulation", "tensorboard", "audit", "report"]
FORBIDDEN = {
    "model": [*FRAMEWORKS, *STAGES, "replication.data", "replication.objectives"],
    "objectives": [*FRAMEWORKS, *STAGES, "replication.data"],
    "data": STAGES,
    # stages meet through files (and processes), not through each other's objects
    "grid": [*EXPERIMENT, "replication.generation"],
    **{part: [*EXPERIMENT, "replication.generation"] for part in EVIDENCE},
    "judging": [*EXPERIMENT, "replication.grid", "replication.report"],
}
EXCEPTIONS = {
    "objectives.callbacks": ["lightning"],  # the two Lightning callbacks that switch the objectives on
    "objectives.lightning_callback": ["lightning"],  # the same in anyone's module
    "grid.cell": ["replication.training", "replication.generation"],  # one cell, from nothing to COMPLETE
    "grid.doctor": ["replication.model.size"],
    "grid.cluster": ["replication.model.size", "replication.model.cost"],
}

# The only modules that may import a thing.
RESERVED = {
    "deepspeed": ["training.strategies"],
    "replication.cli.main": ["__main__"],
    "yaml": ["config.reading"],  # one reader, which guesses at nothing
}

# What answers at once, or runs on a laptop without torch.
TORCH_FREE = [
    *("errors", "console", "config", "runs", "processes", "protocol", "cli", "grid", "judging", *EVIDENCE),
    *("model.size", "bench.drill", "training.phases"),
    *(f"generation.{name}" for name in ("completions", "export", "suite")),
    *(f"evaluation.{name}" for name in ("battery", "record")),
    *(f"data.{name}" for name in ("order", "store", "prepare", "prompts")),
]
HEAVY = ["torch", "lightning", "deepspeed", "transformers"]

# What needs a model and trains none: Lightning takes three times as long to load as torch.
LIGHTNING_FREE = ["generation", "export", "model", "evaluation.evaluate"]

# Absolute paths of a developer's machine.
MACHINE_PATH = re.compile(r"(?<![\w.)}])/(work|tmp/dev|root)/")
NOT_OURS = {".git", ".venv", "out", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
BINARY = {".xz", ".png", ".npz", ".safetensors", ".parquet", ".arrow"}
INVISIBLE = {*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xAD, 0xFEFF}

PACKAGE = CHECKOUT / "replication"


def module_name(path: Path) -> str:
    """`training.train` for replication/training/train.py, `training` for its __init__.py."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_within(name: str, table: list[str]) -> bool:
    """Whether a dotted name is one of the table's, or lies below one."""
    return any(name == entry or name.startswith(entry + ".") for entry in table)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from replication import cli` counts as `replication.cli.main`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it out from `replication`"
            assert node.module is not None
            yield node.lineno, node.module
            if is_within(node.module, ["replication"]):
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from ((node.lineno, name) for name in names if name.removeprefix("replication.") in MODULES)


IMPORTS = [(name, line, target) for name, path in MODULES.items() for line, target in imports_of(path)]


def layer_of(name: str) -> int:
    """The layer whose entry fits the name most closely; `cli.arguments` before `cli`."""
    fits = [(len(entry), i) for i, layer in enumerate(LAYERS) for entry in layer if is_within(name, [entry])]
    assert fits, f"replication.{name} is in no layer; give it a place in LAYERS"
    return max(fits)[1]


def our_files() -> Iterator[Path]:
    for path in sorted(CHECKOUT.rglob("*")):
        parts = path.relative_to(CHECKOUT).parts
        generated = NOT_OURS & set(parts) or any(p.endswith(".egg-info") for p in parts)
        if path.is_file() and not generated and path.suffix not in BINARY:
            yield path


# ---------------------------------------------------------------- arrows


def test_arrows_point_down() -> None:
    wrong = []
    for name, line, target in IMPORTS:
        inner = target.removeprefix("replication.")
        if name and target != inner and layer_of(inner) > layer_of(name):
            wrong.append(f"replication.{name}, line {line}: imports {target}, which lies above it")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_part_imports_nothing_that_it_must_not_know(part: str) -> None:
    wrong = [
        f"replication.{name}, line {line}: imports {target}"
        for name, line, target in IMPORTS
        if is_within(name, [part])
        and is_within(target, FORBIDDEN[part])
        and not is_within(target, EXCEPTIONS.get(name, []))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("thing", RESERVED)
def test_reserved_imports_stay_where_they_belong(thing: str) -> None:
    wrong = [
        f"replication.{name}, line {line}: imports {target}; only {RESERVED[thing]} may"
        for name, line, target in IMPORTS
        if is_within(target, [thing]) and name not in RESERVED[thing]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_bite() -> None:
    """The reader of imports sees what the tables speak of, lazy imports included."""
    seen = {(name, target) for name, _, target in IMPORTS}
    assert ("__main__", "replication.cli.main") in seen
    assert ("cli.train", "replication.config") in seen
    assert ("model.transformer", "torch") in seen
    assert layer_of("data.prompts") < layer_of("training") < layer_of("generation.generate")


PLACES = ["errors", "console", "processes", "protocol", "runs", "statistics.looks"]
"""Of what a cell's processes load, what only reads, places, starts, stamps or ends them; and the levels that a plan's
words state."""


def test_the_hash_of_the_code_covers_all_that_a_cell_computes_with() -> None:
    below, todo = set(), ["grid.cell", "generation.suite"]
    while todo:
        below.add(name := todo.pop())
        ours = {t.removeprefix("replication.") for n, _, t in IMPORTS if n == name and t.startswith("replication.")}
        todo += ours & MODULES.keys() - below
    covered = [name.removesuffix(".py").replace("/", ".") for name in COMPUTES]
    assert {"training.muon", "generation.sampling", "model.head"} < below
    assert sorted(name for name in below if not is_within(name, [*covered, *PLACES])) == []


def test_numbers_of_the_command_line_have_a_range() -> None:
    """`type=int` takes -1 and a thousand digits, `type=float` nan: `arguments` has types that say what may be."""
    wrong = [
        f"replication.{name}, line {node.value.lineno}: type={ast.unparse(node.value)}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "type" and ast.unparse(node.value) in ("int", "float")
    ]
    assert not wrong, "\n".join(wrong)


def test_text_is_read_and_written_as_utf_8_whatever_the_locale() -> None:
    wrong = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            what, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            is_open = what == "open" or (
                what.endswith(".open") and re.match(r"'[rawx]", ast.unparse(node)[len(what) + 1 :])
            )
            binary = re.search(r"'[rawx+]*b[rawx+]*'|, mode, buffering=0", ast.unparse(node)) is not None
            text = (
                what.endswith((".read_text", ".write_text")) or (is_open and not binary) or words.get("text") == "True"
            )
            if text and "encoding" not in words:
                wrong.append(f"replication.{name}, line {node.lineno}: {what} without an encoding")
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- loading at once


IMPORT_ONE_AFTER_THE_OTHER = """
import importlib, sys
heavy, names = sys.argv[1].split(","), sys.argv[2:]
for name in names:
    importlib.import_module(f"replication.{name}")
    found = [m for m in heavy if m in sys.modules]
    if found:
        sys.exit(f"importing replication.{name} also imports {found}")
"""


def first_that_loads_what_is_heavy(names: list[str], heavy: list[str] = HEAVY) -> str:
    """The first of the modules, imported one after the other in a fresh process, that brings one of `heavy` along."""
    command = [sys.executable, "-c", IMPORT_ONE_AFTER_THE_OTHER, ",".join(heavy), *names]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    return done.stderr.strip()


def test_what_must_answer_at_once_loads_without_torch() -> None:
    names = [name for name in MODULES if is_within(name, TORCH_FREE)]
    assert len(names) > 80
    assert first_that_loads_what_is_heavy(names) == ""


def test_what_trains_no_model_loads_without_lightning() -> None:
    names = [name for name in MODULES if is_within(name, LIGHTNING_FREE)]
    assert len(names) > 15
    assert first_that_loads_what_is_heavy(names, HEAVY[1:]) == ""


LOAD_A_TRAINING = """
import sys
from replication.training.environment import import_torchmetrics
import_torchmetrics()
import replication.training.train
from lightning_utilities.core.imports import RequirementCache, package_available
assert package_available("scipy") and RequirementCache("scipy>=1"), "afterwards it is there again"
print([m for m in ("transformers", "scipy", "matplotlib.pyplot") if m in sys.modules])
"""


def test_a_training_loads_nothing_for_metrics_that_nobody_computes() -> None:
    """Of torchmetrics, by way of Lightning: a sixth of the time of a small cell."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD_A_TRAINING], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_test_of_loading_bites() -> None:
    said = first_that_loads_what_is_heavy(["errors", "model.head", "config"])
    assert said.startswith("importing replication.model.head also imports ['torch'"), said


def test_every_name_of_the_torch_free_table_is_a_module() -> None:
    assert [entry for entry in TORCH_FREE if entry not in MODULES] == []


# ---------------------------------------------------------------- text


def test_no_file_holds_a_machine_path() -> None:
    wrong = []
    for path in our_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        wrong += [f"{path.relative_to(CHECKOUT)} holds {m.group()}" for m in MACHINE_PATH.finditer(text)]
    assert not wrong, "\n".join(wrong)


def test_text_is_plain_utf_8() -> None:
    """No carriage returns, and no characters that a reader cannot see; escapes such as \\u200b are fine."""
    wrong = []
    for path in our_files():
        data = path.read_bytes()
        invisible = {f"U+{ord(c):04X}" for c in data.decode("utf-8") if ord(c) in INVISIBLE}
        if invisible or b"\r\n" in data:
            wrong.append(f"{path.relative_to(CHECKOUT)}: {', '.join(sorted(invisible)) or 'carriage returns'}")
    assert not wrong, "\n".join(wrong)


def test_no_python_is_started_that_looks_into_the_current_folder_for_modules() -> None:
    """A yaml.py there, or another clone's replication/, would be imported instead of what is installed."""
    sources = [*(CHECKOUT / "replication").rglob("*.py"), *(CHECKOUT / "launch").glob("*.s*")]
    starts = re.compile(r'(sys\.executable,|PYTHON\}?")\s+(?!"?-P)"?-')
    assert [f"{p.name}: {line}" for p in sources for line in p.read_text().splitlines() if starts.search(line)] == []
