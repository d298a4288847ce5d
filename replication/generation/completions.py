"""Completions as judges and reports meet them: samples.jsonl of a cell, read and checked. Imports no torch.

A line of samples.jsonl is {"arm", "seed", "prompt_id", "category", "question", "sample", "completion", "tokens",
"stopped"}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from replication.errors import UserError
from replication.runs.files import file_sha256
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import Manifest, read_manifest
from replication.runs.records import WrongForm, from_json, to_json

AGAIN = "`replicate generate` makes it again"


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    arm: str
    """Hidden from judges."""
    seed: int
    """The training seed of the cell."""
    prompt_id: int
    category: str
    question: str
    """The prompt's text, without the template."""
    sample: int
    """From 0; which of the prompt's answers it is."""
    text: str
    tokens: int | None = field(default=None, compare=False)
    """Their number; None where it is not known, as in the published A/B tool's file."""
    stopped: bool | None = field(default=None, compare=False)
    """Whether the model ended the text itself, or max_new_tokens did."""

    @classmethod
    def of_line(cls, line: str | bytes) -> Completion:
        """Of a line of samples.jsonl; WrongForm where it is no completion, which says why."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise WrongForm("is not valid JSON") from None
        if isinstance(value, dict):
            if "completion" not in value:
                raise WrongForm("completion is missing")
            value["text"] = value.pop("completion")
        return from_json(cls, value)

    def line(self) -> str:
        """For samples.jsonl, with its end."""
        value = {"completion" if k == "text" else k: v for k, v in to_json(self).items() if v is not None}
        return json.dumps(value, ensure_ascii=False) + "\n"


def read_samples(run: RunDir) -> list[Completion]:
    """The completions of one cell, in the file's order; UserError where the file is missing, damaged or edited."""
    path, found = run.samples, list[Completion]()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `replicate generate` makes it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None
    if not text.endswith("\n"):
        raise UserError(f"{path}: {'is torn in its last line' if text else 'is empty'}; {AGAIN}")
    for number, line in enumerate(text[:-1].split("\n"), 1):  # a completion may hold other line breaks
        try:
            found.append(Completion.of_line(line))
        except WrongForm as error:
            raise UserError(f"{path}: line {number}: {error}; {AGAIN}") from None
    cells = sorted({f"{c.arm}/seed-{c.seed}" for c in found})
    if len(cells) > 1:
        raise UserError(f"{path}: mixes completions of {', '.join(cells)}; {AGAIN}")
    seen: set[tuple[int, int]] = set()
    for c in found:
        if (c.prompt_id, c.sample) in seen:
            raise UserError(f"{path}: has sample {c.sample} of prompt {c.prompt_id} twice; {AGAIN}")
        seen.add((c.prompt_id, c.sample))
    # edited, or sampled anew and killed before the manifest was written: then the settings are of other texts
    recorded = (read_manifest(run) or Manifest()).generation.get("samples_sha256")
    if recorded is not None and file_sha256(path) != recorded:
        raise UserError(
            f"{path}: is not the file whose settings {run.manifest.name} records; it was edited, or sampling it again "
            f"was cut off: {AGAIN}"
        )
    return found


def suite_completions(suite_dir: SuiteDir, arms: Sequence[str]) -> dict[int, dict[str, list[Completion]]]:
    """Seed -> arm -> completions, of the seeds at which every one of the arms is complete and has completions.

    UserError where a complete cell's samples.jsonl is damaged, or another cell's: a seed is never left out for that.
    """
    found: dict[int, dict[str, list[Completion]]] = {}
    for seed in sorted(seed for arm, seed, _ in suite_dir.cells() if [arm] == list(arms[:1])):
        runs = {arm: suite_dir.cell(arm, seed) for arm in arms}
        if not all(run.complete.is_file() and run.samples.is_file() for run in runs.values()):
            continue
        found[seed] = {arm: read_samples(run) for arm, run in runs.items()}
        for arm, (first, *_) in found[seed].items():
            if (first.arm, first.seed) != (arm, seed):
                there = f"{first.arm}/seed-{first.seed}"
                raise UserError(f"{runs[arm].samples}: holds completions of {there}; {AGAIN}")
    return found
