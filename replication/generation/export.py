"""The file in which the author's public A/B tool keeps completions of two models, read and written. Imports no torch.

{"metadata": {"model_a", "model_b", "questions_file", "n_generations", "temperature", "top_k", "max_tokens",
"generated_at"}, "questions": [{"id", "category", "question", "responses_a": [text, ...], "responses_b": [...]}]}

Entry i of a list is sample i.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from replication.config import GenerationConfig
from replication.config.reading import load_json, read_utf8
from replication.data.prompts import find_prompts
from replication.errors import UserError
from replication.generation.completions import Completion, read_samples
from replication.runs.files import file_sha256, write_text
from replication.runs.layout import SuiteDir
from replication.runs.manifest import Manifest, read_manifest
from replication.runs.records import WrongForm, from_json, to_json


@dataclass(frozen=True)
class Metadata:
    """What is read of the settings alike for both models."""

    model_a: str
    model_b: str
    n_generations: int


@dataclass(frozen=True)
class Question:
    """A prompt with the texts of both models."""

    id: int
    category: str
    question: str
    responses_a: tuple[str, ...]
    responses_b: tuple[str, ...]


@dataclass(frozen=True)
class Export:
    metadata: Metadata
    questions: tuple[Question, ...]


def read_export(path: Path, seed: int = 0) -> dict[int, dict[str, list[Completion]]]:
    """Seed -> arm -> completions; the two arms are the file's model_a and model_b, in this order.

    The file names no seed; the completions carry this one. UserError where it is not such a file, or damaged.
    """
    try:
        export = from_json(Export, load_json(read_utf8(path)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a file of completions of two models") from None
    except WrongForm as error:
        raise UserError(f"{path}: {error}; is this another file, or damaged?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})".replace("\n", " ")) from None
    about = export.metadata
    if not (about.model_a and about.model_b):
        raise UserError(f"{path}: metadata.model_a and metadata.model_b must each name a model")
    if about.model_a == about.model_b:
        raise UserError(
            f"{path}: model_a and model_b are both '{about.model_a}'; completions of one model make no pairs"
        )
    if about.n_generations < 1:
        raise UserError(f"{path}: metadata.n_generations must be a positive whole number, not {about.n_generations}")
    if not export.questions:
        raise UserError(f"{path}: key 'questions' is empty; there is nothing to judge")
    found: dict[str, list[Completion]] = {about.model_a: [], about.model_b: []}
    seen: dict[int, int] = {}
    for place, q in enumerate(export.questions, 1):
        where = f"{path}: question {place}"
        if q.id in seen:
            raise UserError(f"{where} has id {q.id}, as question {seen[q.id]} does; ids must differ")
        seen[q.id] = place
        for (arm, of_arm), side in zip(found.items(), "ab", strict=True):
            texts = getattr(q, f"responses_{side}")
            if len(texts) != about.n_generations:
                raise UserError(
                    f"{where} (id {q.id}): responses_{side} has {len(texts)} entries, n_generations says "
                    f"{about.n_generations}; the file is damaged, make it again"
                )
            of_arm += [Completion(arm, seed, q.id, q.category, q.question, i, text) for i, text in enumerate(texts)]
    return {seed: found}


def write_export(
    path: Path, suite_dir: SuiteDir, seed: int, arms: tuple[str, str], prompts: GenerationConfig | None = None
) -> int:
    """Write the completions of two arms, as model_a and model_b, at one seed; returns the number of questions.

    `prompts` names the prompt file; null in the file where the completions are of other prompts. UserError
    where completions are missing, damaged or changed, or the two arms' were sampled in different ways.
    """
    runs = [suite_dir.cell(arm, seed) for arm in arms]
    first, second = (read_samples(run) for run in runs)
    own = ("samples_sha256", "weights_sha256")  # of each cell
    recorded = [(read_manifest(run) or Manifest()).generation for run in runs]
    settings, other = ({k: v for k, v in one.items() if k not in own} for one in recorded)
    both, again = f"{arms[0]} and {arms[1]} at seed {seed}", "`replicate generate` makes them alike"
    if settings != other:
        keys = ", ".join(sorted(k for k in {*settings, *other} if settings.get(k) != other.get(k)))
        raise UserError(f"{both}: were sampled with different {keys}; {again}")
    if [(c.prompt_id, c.sample, c.question) for c in first] != [(c.prompt_id, c.sample, c.question) for c in second]:
        raise UserError(f"{both}: have completions of different prompts or samples; {again}")
    by_prompt: dict[int, list[tuple[Completion, Completion]]] = {}
    for a, b in zip(first, second, strict=True):
        by_prompt.setdefault(a.prompt_id, []).append((a, b))
    pairs = [sorted(of_prompt, key=lambda pair: pair[0].sample) for of_prompt in by_prompt.values()]
    count = max(map(len, pairs))
    if any([a.sample for a, _ in of_prompt] != list(range(count)) for of_prompt in pairs):
        raise UserError(f"{both}: lack samples of some prompts; {again}")
    asked = prompts and prompts.prompts and file_sha256(find_prompts(prompts)) == settings.get("prompts_sha256")
    metadata = {
        "model_a": arms[0],
        "model_b": arms[1],
        "questions_file": prompts.prompts if prompts and asked else None,
        "n_generations": count,
        "temperature": settings.get("temperature"),
        "top_k": settings.get("top_k"),
        "max_tokens": settings.get("max_new_tokens"),
        "generated_at": datetime.fromtimestamp(runs[0].samples.stat().st_mtime).isoformat(timespec="seconds"),
    }
    questions = []
    for of_prompt in pairs:
        one = of_prompt[0][0]
        texts_a, texts_b = (tuple(c.text for c in side) for side in zip(*of_prompt, strict=True))
        questions.append(Question(one.prompt_id, one.category, one.question, texts_a, texts_b))
    export = {"metadata": metadata, "questions": to_json(questions)}
    write_text(path, json.dumps(export, indent=2, ensure_ascii=False) + "\n")
    return len(questions)
