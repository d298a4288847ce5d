"""A small suite with trained cells in an output folder, without completions: made in this process, in seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from small_corpus import prose_layer, texts, write_folder

from replication.config import load_suite
from replication.data.prepare import prepare
from replication.grid.cell import run_cell
from replication.grid.cells import claim_folder, load_cells, write_configs
from replication.runs.layout import SuiteDir

PROMPTS = [
    {"id": 3, "category": "factual", "question": "Where is the sea?"},
    {"id": 1, "category": "creative", "question": "A boat " + "and a boat " * 6},
    {"id": 7, "category": "creative", "question": "Why?"},
    {"id": 4, "category": "factual", "question": "How long is a river that nobody has seen?"},
]


def write_trained_suite(
    folder: Path,
    arms: Sequence[str] = ("baseline", "both"),
    seeds: Sequence[int] = (1, 2),
    untrained: str = "both/2",
    **model: object,
) -> SuiteDir:
    """folder/out, where every cell but `untrained` has two steps of training behind it; `model` are keys of its own."""
    write_folder(folder / "corpus", texts(40))
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    ours = {"n_blocks": 2, "d_model": 32, "d_head": 8, "d_ff": 16, "init_std": 0.1}
    layer = {
        "data": prose_layer(folder / "corpus"),
        "model": {"vocab_size": 300, **({} if "class_path" in model else ours), **model},
        "cluster": {"accelerator": "cpu", "threads": 1},
    }
    (folder / "layer.yaml").write_text(yaml.safe_dump(layer))
    suite = {
        "name": "small",
        "arms": list(arms),
        "seeds": list(seeds),
        "layers": [str(folder / "layer.yaml")],
        "run": {
            "training": {"steps": 2, "batch_tokens": 64, "warmup_steps": 1},
            "validation": {"every_steps": 2, "sequences": 4},
            "logging": {"log_every_steps": 1},
            "generation": {"prompts": str(prompts), "max_new_tokens": 12, "samples_per_prompt": 3, "rows_at_once": 4},
        },
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    suite_dir, loaded, quiet = SuiteDir(folder / "out"), load_suite(folder / "suite.yaml"), Console(file=io.StringIO())
    cells = load_cells(loaded, suite_dir)
    claim_folder(loaded, suite_dir, cells)
    write_configs(cells)
    prepare(cells[0].config.data, suite_dir.data, quiet)
    for cell in cells:
        if f"{cell.arm}/{cell.seed}" != untrained:
            run_cell(cell.config, suite_dir, quiet, "train")
    return suite_dir
