"""One cell scored on tasks, text files and by its distributions; what is there already is left alone."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from replication.config import RunConfig, load_run, load_suite
from replication.config.reading import read_utf8
from replication.console import Reporter, say
from replication.data.store import TokenStore
from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError
from replication.evaluation.distributions import compare_distributions
from replication.evaluation.record import Part, read_parts, write_parts
from replication.evaluation.scoring import Scorer
from replication.generation.generate import load_model
from replication.model.foreign import Model
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import is_trained, refuse_untrained
from replication.training.environment import prepare_torch

if TYPE_CHECKING:
    from replication.evaluation.harness import Task


DISTRIBUTIONS = 1  # their version
Others = Mapping[str, RunDir | None]
"""Cells whose distributions one is compared with, by the name of the score; None where there is none."""


def evaluate_cell(
    run: RunDir,
    suite_dir: SuiteDir,
    tasks: Sequence[Task],
    files: Mapping[str, Path],
    distributions: bool,
    console: Console,
) -> None:
    """Score a trained cell in fp32 on what its evaluation.json lacks, or has of other weights, tasks or files.

    Each score is on the disk before the next is begun. `files` are texts in UTF-8 by name, scored in bits per byte.
    """
    config, manifest, parts = load_run([run.config]), refuse_untrained(run), read_parts(run)
    name, of = f"{config.arm}/seed-{config.seed}", manifest.final_weights_sha256
    store, scorer = TokenStore.open(suite_dir.data_folder(config.data.dir)), None
    wanted: list[tuple[Part, Task | str | Others]] = [(Part("task", t.name, t.asked, of, {}), t) for t in tasks]
    for file, path in files.items():
        text = _text(path)
        wanted.append((Part("file", file, hashlib.sha256(text.encode()).hexdigest(), of, {}), text))
    if distributions:
        others = _others(config, suite_dir)
        asked = hashlib.sha256(f"{DISTRIBUTIONS} {config.validation.sequences} {store.hash}".encode()).hexdigest()
        weights = " ".join(str(other and refuse_untrained(other).final_weights_sha256) for other in others.values())
        beside = hashlib.sha256(weights.encode()).hexdigest()
        wanted.append((Part("distributions", "validation", asked, of, {}, beside), others))
    for part, what in wanted:
        there = parts.get(part.key)
        if there is not None and (there.asked, there.of, there.beside) == (part.asked, part.of, part.beside):
            say(console, f"{name}: {part.name}, there already")
            continue
        if scorer is None:
            prepare_torch(config)
            scorer = Scorer(_in_fp32(run), config.data.block_size_tokens, store.end_of_text_id, Reporter(console))
        if isinstance(what, Mapping):
            models = {key: _in_fp32(other) if other else None for key, other in what.items()}
            scores, entropies = compare_distributions(scorer.model, models, config, store, scorer.reporter)
            part = dataclasses.replace(part, entropies_nats=entropies)
        else:
            scores = _score(what, scorer, store.tokenizer)
        parts[part.key] = dataclasses.replace(part, scores=scores)
        write_parts(run, parts)
        said = ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if value is not None)
        say(console, f"{name}: {part.name}: {said or 'no score'}")


def _in_fp32(run: RunDir) -> Model:
    return load_model(load_run([run.config], ["--generation.precision=32-true"]), run)


def _others(config: RunConfig, suite_dir: SuiteDir) -> Others:
    """The first arm at the same seed, and the arm's own next trained seed (the first after the last)."""
    first = load_suite(suite_dir.suite).arms[0]
    trained = [(arm, seed) for arm, seed, run in suite_dir.cells() if is_trained(run)]
    own = sorted(seed for arm, seed in trained if arm == config.arm)
    after = own[(own.index(config.seed) + 1) % len(own)]
    baseline, other = (first, config.seed), (config.arm, after)
    beside = suite_dir.cell(*baseline) if baseline in trained and config.arm != first else None
    again = suite_dir.cell(*other) if len(own) > 1 else None
    return {f"KL from {first} at the same seed": beside, "KL from the same arm at another seed": again}


def _score(what: Task | str, scorer: Scorer, tokenizer: TextTokenizer) -> dict[str, float | None]:
    if not isinstance(what, str):
        from replication.evaluation.harness import run_task

        return run_task(what, scorer, tokenizer)
    (ids,), (unknown,) = tokenizer.encode_counted([what])
    if unknown:
        raise UserError(f"--files: the tokenizer does not know {unknown} bytes of a text, which would count as free")
    return {"bits per byte": -scorer.rolling([ids])[0] / math.log(2) / len(what.encode())}


def _text(path: Path) -> str:
    try:
        text = read_utf8(path)
    except OSError as error:
        raise UserError(f"--files: {path}: cannot be read ({error.strerror})") from None
    if not text:
        raise UserError(f"--files: {path}: is empty")
    return text
