"""Completions as judges and reports meet them: samples.jsonl of a cell, read and checked. Imports no torch.

A line of samples.jsonl is {"arm", "seed", "prompt_id", "category", "question", "sample", "completion", "tokens",
"stopped"}: stopped says whether the model ended the text itself, or max_new_tokens did.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replication.errors import UserError
from replication.runs.files import file_sha256
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import Manifest, read_manifest

KEYS = {
    "arm": str, "seed": int, "prompt_id": int, "category": str, "question": str, "sample": int, "completion": str,
}  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        arm: that it came from; hidden from judges.
        seed: training seed of the cell.
        prompt_id: number of the prompt, unique in its file.
        category: the prompt's.
        question: the prompt's text, without the template.
        sample: from 0; which of the prompt's answers it is.
        text: what the model wrote.
    """

    arm: str
    seed: int
    prompt_id: int
    category: str
    question: str
    sample: int
    text: str


def read_samples(run: RunDir) -> list[Completion]:
    """The completions of one cell, in the file's order.

    Raises:
        UserError: no samples.jsonl, an empty or torn one, a line that is no completion, completions of several cells,
            two of one prompt and sample, or another file than the manifest recorded.
    """
    path, found = run.samples, []
    again = "`replicate generate` makes it again"
    for number, line in enumerate(_lines(path, again), 1):
        found.append(_completion(line, f"{path}: line {number}", again))
    cells = sorted({f"{c.arm}/seed-{c.seed}" for c in found})
    if len(cells) > 1:
        raise UserError(f"{path}: mixes completions of {', '.join(cells)}; {again}")
    seen: set[tuple[int, int]] = set()
    for c in found:
        if (c.prompt_id, c.sample) in seen:
            raise UserError(f"{path}: has sample {c.sample} of prompt {c.prompt_id} twice; {again}")
        seen.add((c.prompt_id, c.sample))
    _refuse_changed(run)
    return found


def _refuse_changed(run: RunDir) -> None:
    """Raise UserError where samples.jsonl is not what the manifest says how it was sampled.

    It was edited, or sampled anew and killed before the manifest was written: then the settings are of other texts.
    """
    recorded = (read_manifest(run) or Manifest()).generation.get("samples_sha256")
    if recorded is not None and file_sha256(run.samples) != recorded:
        raise UserError(
            f"{run.samples}: is not the file whose settings {run.manifest.name} records; it was edited, or sampling it "
            "again was cut off: `replicate generate` makes it again"
        )


def suite_completions(suite_dir: SuiteDir, arms: Sequence[str]) -> dict[int, dict[str, list[Completion]]]:
    """Seed -> arm -> completions, of the seeds at which every one of the arms is complete and has completions.

    Args:
        suite_dir: the output folder.
        arms: names; each inner dict has them all, in this order.

    Raises:
        UserError: a complete cell's samples.jsonl is damaged, or another cell's; a seed is never left out for that.
    """
    found: dict[int, dict[str, list[Completion]]] = {}
    for seed in _seeds(suite_dir, arms):
        runs = {arm: suite_dir.cell(arm, seed) for arm in arms}
        if all(run.complete.is_file() and run.samples.is_file() for run in runs.values()):
            found[seed] = {arm: _samples_of(run, arm, seed) for arm, run in runs.items()}
    return found


def _seeds(suite_dir: SuiteDir, arms: Sequence[str]) -> list[int]:
    """Seeds of the first arm's folders, ascending."""
    return sorted(seed for arm, seed, _ in suite_dir.cells() if [arm] == list(arms[:1]))


def _samples_of(run: RunDir, arm: str, seed: int) -> list[Completion]:
    completions = read_samples(run)
    if (completions[0].arm, completions[0].seed) != (arm, seed):
        there = f"{completions[0].arm}/seed-{completions[0].seed}"
        raise UserError(f"{run.samples}: holds completions of {there}; `replicate generate` makes it again")
    return completions


def _lines(path: Path, again: str) -> list[str]:
    """The file's lines, at least one; a completion may hold other line breaks than \\n, so only that one counts."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `replicate generate` makes it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start}); {again}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {again}") from None
    if not text.endswith("\n"):
        raise UserError(f"{path}: {'is torn in its last line' if text else 'is empty'}; {again}")
    return text[:-1].split("\n")


def is_completion(value: Any) -> bool:
    """Whether parsed JSON is a line of samples.jsonl."""
    return isinstance(value, dict) and all(type(value.get(key)) is kind for key, kind in KEYS.items())


def _completion(line: str, where: str, again: str) -> Completion:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not valid JSON; {again}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with {', '.join(KEYS)}; {again}")
    for key, kind in KEYS.items():
        if type(value.get(key)) is not kind:
            words = "a whole number" if kind is int else "text"
            raise UserError(f"{where}: key '{key}' must be {words}, not {value.get(key)!r:.60}; {again}")
    return Completion(*(value[key] for key in KEYS))
