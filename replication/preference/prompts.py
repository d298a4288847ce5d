"""Prompt files: a JSON list, or one JSON object a line (.jsonl), of {"id", "category", "question"}.

The published prompt file has this form, so it loads too; it is not shipped, configs/prompts holds our own.
Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replication.config import config_root
from replication.errors import UserError

KEYS = {"id": int, "category": str, "question": str}


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: number, unique in its file; names the prompt in samples and votes.
        category: for instance `factual` or `creative`.
        question: the text put to the model, through the template of the config.
    """

    id: int
    category: str
    question: str


def load_prompts(path_or_name: str | Path) -> list[Prompt]:
    """Read a prompt file, in its order.

    Args:
        path_or_name: a path, a path under configs/ (`prompts/replication_32.json`), or the bare name of a
            file in configs/prompts (`replication_32`). Keys besides id, category and question are passed over.

    Raises:
        UserError: no such file, not JSON, no prompts, a missing or mistyped key, an empty question or an id
            that comes twice; the message names the file and the entry.
    """
    path = find_prompts(path_or_name)
    prompts: list[Prompt] = []
    seen: dict[int, str] = {}
    for place, entry in _entries(path):
        prompt = _prompt(entry, f"{path}: {place}")
        if prompt.id in seen:
            raise UserError(f"{path}: {place} has id {prompt.id}, as {seen[prompt.id]} does; give each its own")
        seen[prompt.id] = place
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: holds no prompts; write at least one {{id, category, question}}")
    return prompts


def find_prompts(path_or_name: str | Path) -> Path:
    """The prompt file by path, by path under configs/, or by bare name; UserError where there is none."""
    text, root = str(path_or_name), config_root()
    candidates = [Path(text), root / text.removeprefix("configs/")]
    candidates += [root / "prompts" / f"{text}{suffix}" for suffix in ("", ".json", ".jsonl")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.name for p in (root / "prompts").glob("*.json*"))) or "nothing"
    raise UserError(f"{text}: no such prompt file; configs/prompts has: {shipped}")


def _entries(path: Path) -> list[tuple[str, Any]]:
    """Each entry with the words that name its place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if path.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [(f"line {i}", _parse(line, f"{path}: line {i}")) for i, line in lines]
    entries = _parse(text, str(path))
    if not isinstance(entries, list):
        raise UserError(f"{path}: must be a list of prompts, not {type(entries).__name__}")
    return [(f"entry {i}", entry) for i, entry in enumerate(entries, 1)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); mend it there") from None


def _prompt(entry: Any, where: str) -> Prompt:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with {', '.join(KEYS)}, not {type(entry).__name__}")
    for key, kind in KEYS.items():
        if key not in entry:
            raise UserError(f"{where} lacks the key '{key}'; each prompt needs {', '.join(KEYS)}")
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            words = "a whole number" if kind is int else "text"
            raise UserError(f"{where}: key '{key}' must be {words}, not {entry[key]!r}")
    if not entry["question"].strip():
        raise UserError(f"{where}: key 'question' is empty; write the prompt or remove the entry")
    return Prompt(entry["id"], entry["category"], entry["question"])
