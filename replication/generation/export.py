"""The file in which the author's public A/B tool keeps completions of two models, read and written. Imports no torch.

{"metadata": {"model_a", "model_b", "questions_file", "n_generations", "temperature", "top_k", "max_tokens",
"generated_at"}, "questions": [{"id", "category", "question", "responses_a": [text, ...], "responses_b": [...]}]}

Entry i of a list is sample i. The file names no seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from replication.config.reading import load_json, read_utf8
from replication.data.prompts import find_prompts
from replication.errors import UserError
from replication.generation.completions import Completion, read_samples
from replication.runs.files import file_sha256, write_text
from replication.runs.layout import SuiteDir
from replication.runs.manifest import Manifest, read_manifest

SIDES = ("a", "b")
QUESTION_KEYS: dict[str, tuple[type, str]] = {
    "id": (int, "a whole number"), "category": (str, "text"), "question": (str, "text"),
    "responses_a": (list, "a list of texts"), "responses_b": (list, "a list of texts"),
}  # fmt: skip


# ---------------------------------------------------------------- reading


def read_export(path: Path, seed: int = 0) -> dict[int, dict[str, list[Completion]]]:
    """Seed -> arm -> completions; the two arms are the file's model_a and model_b, in this order.

    Args:
        path: the file.
        seed: that the completions are to carry.

    Raises:
        UserError: not such a file, or one whose lists are not as long as it says; names the question.
    """
    metadata, questions = _parts(path)
    arms = [_model(metadata, side, path) for side in SIDES]
    if arms[0] == arms[1]:
        raise UserError(f"{path}: model_a and model_b are both '{arms[0]}'; completions of one model make no pairs")
    count = metadata.get("n_generations")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{path}: metadata: key 'n_generations' must be a positive whole number, not {count!r:.60}")
    found: dict[str, list[Completion]] = {arm: [] for arm in arms}
    seen: dict[int, int] = {}
    for place, entry in enumerate(questions, 1):
        where = f"{path}: question {place}"
        _check_question(entry, count, where)
        if entry["id"] in seen:
            raise UserError(f"{where} has id {entry['id']}, as question {seen[entry['id']]} does; ids must differ")
        seen[entry["id"]] = place
        for arm, side in zip(arms, SIDES, strict=True):
            named = (arm, seed, entry["id"], entry["category"], entry["question"])
            found[arm] += [Completion(*named, i, text) for i, text in enumerate(entry[f"responses_{side}"])]
    return {seed: found}


def _parts(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """(metadata, questions) of a file of this form."""
    try:
        value = load_json(read_utf8(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a file of completions of two models") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})".replace("\n", " ")) from None
    metadata, questions = (value.get("metadata"), value.get("questions")) if isinstance(value, dict) else (None, None)
    if not isinstance(metadata, dict) or not isinstance(questions, list):
        raise UserError(f"{path}: must be an object with 'metadata' and a list 'questions'; is this another file?")
    if not questions:
        raise UserError(f"{path}: key 'questions' is empty; there is nothing to judge")
    return metadata, questions


def _model(metadata: dict[str, Any], side: str, path: Path) -> str:
    name = metadata.get(f"model_{side}")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: metadata: key 'model_{side}' must name a model, not {name!r:.60}")
    return name


def _check_question(entry: Any, count: int, where: str) -> None:
    """Raise UserError where an entry is no question with `count` texts a side."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with {', '.join(QUESTION_KEYS)}, not {type(entry).__name__}")
    for key, (kind, words) in QUESTION_KEYS.items():
        if not isinstance(entry.get(key), kind) or isinstance(entry[key], bool):
            raise UserError(f"{where}: key '{key}' must be {words}, not {entry.get(key)!r:.60}")
    for side in SIDES:
        texts = entry[f"responses_{side}"]
        if len(texts) != count:
            raise UserError(
                f"{where} (id {entry['id']}): responses_{side} has {len(texts)} entries, n_generations says {count}; "
                "the file is damaged, make it again"
            )
        odd = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if odd is not None:
            raise UserError(f"{where}: responses_{side}, entry {odd + 1} must be text, not {texts[odd]!r:.60}")


# ---------------------------------------------------------------- writing


def write_export(
    path: Path, suite_dir: SuiteDir, seed: int, arms: tuple[str, str], questions_file: str | None = None
) -> int:
    """Write the completions of two arms at one seed; returns the number of questions.

    Args:
        path: the file to write.
        suite_dir: the output folder.
        seed: of both cells.
        arms: become model_a and model_b.
        questions_file: the prompt file's name; null in the file where the completions are of other prompts.

    Raises:
        UserError: completions are missing, damaged or changed, were sampled in different ways, or of other prompts.
    """
    runs = [suite_dir.cell(arm, seed) for arm in arms]
    first, second = (read_samples(run) for run in runs)
    settings, other = (_settings((read_manifest(run) or Manifest()).generation) for run in runs)
    both = f"{arms[0]} and {arms[1]} at seed {seed}"
    again = "`replicate generate` makes them alike"
    if settings != other:
        keys = ", ".join(sorted(k for k in {*settings, *other} if settings.get(k) != other.get(k)))
        raise UserError(f"{both}: were sampled with different {keys}; {again}")
    a, b = _by_prompt(first), _by_prompt(second)
    if [(c.prompt_id, c.sample, c.question) for c in first] != [(c.prompt_id, c.sample, c.question) for c in second]:
        raise UserError(f"{both}: have completions of different prompts or samples; {again}")
    count = max(len(of_prompt) for of_prompt in a.values())
    if any([c.sample for c in of_prompt] != list(range(count)) for of_prompt in a.values()):
        raise UserError(f"{both}: lack samples of some prompts; {again}")
    if questions_file and file_sha256(find_prompts(questions_file)) != settings.get("prompts_sha256"):
        questions_file = None
    metadata = {
        "model_a": arms[0],
        "model_b": arms[1],
        "questions_file": questions_file,
        "n_generations": count,
        "temperature": settings.get("temperature"),
        "top_k": settings.get("top_k"),
        "max_tokens": settings.get("max_new_tokens"),
        "generated_at": datetime.fromtimestamp(runs[0].samples.stat().st_mtime).isoformat(timespec="seconds"),
    }
    questions = [
        {
            "id": id,
            "category": of_prompt[0].category,
            "question": of_prompt[0].question,
            "responses_a": [c.text for c in of_prompt],
            "responses_b": [c.text for c in b[id]],
        }
        for id, of_prompt in a.items()
    ]
    write_text(path, json.dumps({"metadata": metadata, "questions": questions}, indent=2, ensure_ascii=False) + "\n")
    return len(questions)


def _settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """How completions were made, without what is a cell's own."""
    own = ("samples_sha256", "weights_sha256")
    return {k: v for k, v in recorded.items() if k not in own}


def _by_prompt(completions: list[Completion]) -> dict[int, list[Completion]]:
    found: dict[int, list[Completion]] = {}
    for c in completions:
        found.setdefault(c.prompt_id, []).append(c)
    return {id: sorted(of_prompt, key=lambda c: c.sample) for id, of_prompt in found.items()}
