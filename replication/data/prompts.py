"""Prompt files: a JSON list, or one JSON object a line (.jsonl), of {"id", "category", "question"}.

The published prompt file has this form, so it loads too; it is not shipped, configs/prompts holds our own.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replication.config import GenerationConfig, config_root
from replication.config.reading import load_json, read_utf8, unfit
from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError

KEYS = {"id": int, "category": str, "question": str}


@dataclass(frozen=True)
class Prompt:
    id: int  # unique in its file; names the prompt in samples and votes
    category: str  # for instance `factual` or `creative`
    question: str  # the text put to the model, through the template of the config


def load_prompts(named: str | Path | GenerationConfig) -> list[Prompt]:
    """Read a prompt file, in its order.

    Args:
        named: a path, a path under configs/ (`prompts/replication_32.json`), or the bare name of a file in
            configs/prompts (`replication_32`); of a config its `prompts`, which may lie beside it. Keys besides id,
            category and question are passed over.

    Raises:
        UserError: no such file, not JSON, no prompts, a missing or mistyped key, an id that no database holds, a text
            that is empty or cannot be stored, an id or a question that comes twice; the message names file and entry.
    """
    path = find_prompts(named)
    text = read_utf8(path)
    if path.suffix == ".jsonl":  # split by hand: a text may hold U+2028
        lines = {f"line {i}": line for i, line in enumerate(text.split("\n"), 1) if line.strip()}
        entries = [(place, _parse(line, f"{path}: {place}")) for place, line in lines.items()]
    else:
        found = _parse(text, str(path))
        if not isinstance(found, list):
            raise UserError(f"{path}: must be a list of prompts, not {type(found).__name__}")
        entries = [(f"entry {i}", entry) for i, entry in enumerate(found, 1)]
    prompts: list[Prompt] = []
    seen: dict[int | str, str] = {}
    for place, entry in entries:
        where = f"{path}: {place}"
        prompt = _prompt(entry, where)
        if prompt.id in seen:
            raise UserError(f"{where} has id {prompt.id}, as {seen[prompt.id]} does; give each its own")
        if prompt.question in seen:
            raise UserError(f"{where} asks what {seen[prompt.question]} does; a prompt is counted once, remove one")
        seen[prompt.id] = seen[prompt.question] = place
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: holds no prompts; write at least one {{id, category, question}}")
    return prompts


def find_prompts(named: str | Path | GenerationConfig) -> Path:
    """The prompt file by path, by path under configs/, or by bare name; UserError where there is none.

    One that a file names: beside it; or the copy of the output folder in which it is suite.yaml, or a cell's config.
    """
    root, candidates = config_root(), list[Path]()
    text = str(named.prompts if isinstance(named, GenerationConfig) else named)
    if isinstance(named, GenerationConfig) and named.folder:
        folder = Path(named.folder)
        out = folder.parents[2] if folder.parent.parent.name == "runs" else folder
        candidates = [folder / text, out / "prompts" / Path(text).name]
    candidates += [Path(text), root / text.removeprefix("configs/")]
    candidates += [root / "prompts" / f"{text}{suffix}" for suffix in ("", ".json", ".jsonl")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.name for p in (root / "prompts").glob("*.json*"))) or "nothing"
    raise UserError(f"{text}: no such prompt file; configs/prompts has: {shipped}")


def _parse(text: str, where: str) -> Any:
    try:
        return load_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); fix it there") from None


def _prompt(entry: Any, where: str) -> Prompt:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with {', '.join(KEYS)}, not {type(entry).__name__}")
    for key, kind in KEYS.items():
        if key not in entry:
            raise UserError(f"{where} lacks the key '{key}'; each prompt needs {', '.join(KEYS)}")
        value = entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            words = "a whole number" if kind is int else "text"
            raise UserError(f"{where}: key '{key}' must be {words}, not {value!r}")
    if abs(entry["id"]) >= 2**63:
        raise UserError(f"{where}: key 'id' must be a whole number of 64 bits, not {str(entry['id'])[:40]}")
    for key in ("category", "question"):
        if not entry[key].strip():
            raise UserError(f"{where}: key '{key}' is empty; write it or remove the entry")
        if problem := unfit(entry[key]):
            raise UserError(f"{where}: key '{key}' {problem}")
    return Prompt(**{key: entry[key] for key in KEYS})


def prompt_tokens(
    template: str, prompts: Sequence[Prompt], tokenizer: TextTokenizer, end_of_text_id: int
) -> dict[int, list[int]]:
    """Id -> what the model continues: the template's tokens, or the end of a text where there are none."""
    return {p.id: tokenizer.encode(template.format(question=p.question)) or [end_of_text_id] for p in prompts}
