"""`replicate export OUT`: trained cells as model folders of other software."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import SEED, folder, takes, verb
from replication.config import load_run
from replication.console import say
from replication.errors import UserError, require
from replication.runs.layout import SuiteDir


@verb
@takes("out", "output folder of a suite", folder)
@takes("--arm", "the arm; with --all only this one")
@takes("--seed", "the seed; with --all only this one", SEED)
@takes("--all", "every trained cell", bool)
@takes("--format", "hf: a folder of transformers", default="hf", choices=["hf"])
@takes("--to", "folder (default: OUT/export/ARM/seed-N); with --all one that gets ARM/seed-N in it", Path)
def export(args: Namespace) -> int:
    """Write a trained cell's weights, tokenizer and model card as a folder that transformers loads, load it, and
    compare its logits with those of our model. What is there already is left alone.

    Returns:
        0; 1 where cells are not trained.
    """
    if not args.all and (args.arm is None or args.seed is None):
        raise UserError("replicate export: name one cell by --arm and --seed, or all by --all")
    require("export", "transformers", "safetensors")
    import torch
    from transformers.utils import logging

    from replication.data.store import TokenStore
    from replication.export.folder import Evidence, export_cell
    from replication.generation.suite import trained_cells

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which would warn of it
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console, suite_dir = Console(), SuiteDir(args.out)
    trained, untrained = trained_cells(suite_dir, args.arm, args.seed)
    evidence = Evidence.of(suite_dir)
    for run in trained:
        config, parts = load_run([run.config]), (run.root.parent.name, run.root.name)
        target = args.to if args.to and not args.all else (args.to or suite_dir.root / "export").joinpath(*parts)
        store = TokenStore.open(suite_dir.data_folder(config.data.dir))
        made, is_new = export_cell(run, store, evidence, target)
        state = f"{made.model_type}, logits within {made.largest_difference:.1e} of ours" if is_new else "there already"
        say(console, f"{'/'.join(parts)}: {target} ({state})")
        say(console, f"  as GGUF: python convert_hf_to_gguf.py {target} --outfile {target}.gguf")
    if untrained:
        say(console, ("not trained:", "yellow"), f" {', '.join(untrained)}")
    return 1 if untrained else 0
