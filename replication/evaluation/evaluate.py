"""One cell scored on tasks, on text files, and by its completions; what is there already is left alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from replication.config import load_run
from replication.config.reading import read_utf8
from replication.console import Reporter, say
from replication.data.store import TokenStore
from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError
from replication.evaluation.battery import battery
from replication.evaluation.record import Part, read_parts, write_parts
from replication.evaluation.scoring import Scorer
from replication.generation.completions import read_samples
from replication.generation.generate import load_model
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import Manifest, refuse_untrained
from replication.training.environment import prepare_torch

if TYPE_CHECKING:
    from replication.evaluation.harness import Task

OF_A_CELL = ("samples_sha256", "weights_sha256")
BATTERY = 1  # its version


def evaluate_cell(
    run: RunDir, suite_dir: SuiteDir, tasks: Sequence[Task], files: Mapping[str, Path], console: Console
) -> None:
    """Score a trained cell in fp32 on what its evaluation.json lacks, or has of other weights, tasks or files.

    Each score is on the disk before the next is begun. `files` are texts in UTF-8 by name, scored in bits per byte.
    """
    config, manifest, parts = load_run([run.config]), refuse_untrained(run), read_parts(run)
    name, of = f"{config.arm}/seed-{config.seed}", manifest.final_weights_sha256
    store, scorer = TokenStore.open(suite_dir.data_folder(config.data.dir)), None
    wanted: list[tuple[Part, Task | str | None]] = [(Part("task", t.name, t.asked, of, {}), t) for t in tasks]
    for file, path in files.items():
        text = _text(path)
        wanted.append((Part("file", file, hashlib.sha256(text.encode()).hexdigest(), of, {}), text))
    if run.samples.is_file():
        wanted.append((_completions(manifest), None))
    for part, what in wanted:
        there = parts.get(part.key)
        if there is not None and (there.asked, there.of) == (part.asked, part.of):
            say(console, f"{name}: {part.name}, there already")
            continue
        if what is None:
            scores = battery(read_samples(run))
        else:
            if scorer is None:
                fp32 = dataclasses.replace(config.generation, precision="32-true")
                prepare_torch(config)
                model = load_model(dataclasses.replace(config, generation=fp32), run)
                scorer = Scorer(model, config.data.block_size_tokens, store.end_of_text_id, Reporter(console))
            scores = _score(what, scorer, store.tokenizer)
        parts[part.key] = dataclasses.replace(part, scores=scores)
        write_parts(run, parts)
        said = ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if value is not None)
        say(console, f"{name}: {part.name}: {said or 'no score'}")


def _score(what: Task | str, scorer: Scorer, tokenizer: TextTokenizer) -> dict[str, float | None]:
    if not isinstance(what, str):
        from replication.evaluation.harness import run_task

        return run_task(what, scorer, tokenizer)
    (ids,), (unknown,) = tokenizer.encode_counted([what])
    if unknown:
        raise UserError(f"--files: the tokenizer does not know {unknown} bytes of a text, which would count as free")
    return {"bits per byte": -scorer.rolling([ids])[0] / math.log(2) / len(what.encode())}


def _completions(manifest: Manifest) -> Part:
    settings = {key: value for key, value in manifest.generation.items() if key not in OF_A_CELL}
    asked = hashlib.sha256(json.dumps([BATTERY, settings], sort_keys=True).encode()).hexdigest()
    return Part("completions", "completions", asked, manifest.generation.get("samples_sha256"), {})


def _text(path: Path) -> str:
    try:
        text = read_utf8(path)
    except OSError as error:
        raise UserError(f"--files: {path}: cannot be read ({error.strerror})") from None
    if not text:
        raise UserError(f"--files: {path}: is empty")
    return text
