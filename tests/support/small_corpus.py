"""A small corpus of real files, the same everywhere, and configs over it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from replication.config import DataConfig, SourceConfig, TokenizerConfig
from replication.data.blocks import PAD

END_OF_TEXT = "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts(n: int, seed: int = 0) -> list[str]:
    """n documents of a few hundred words, with other scripts, odd white space and a spelled-out end-of-text in them."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(300)]
    words += ["Grüße", "данные", "数据", "🙂", END_OF_TEXT, "a\tb", " two  spaces", "\r\n"]
    return [f"Document {i}.\n" + " ".join(rng.choices(words, k=rng.randint(100, 400))) for i in range(n)]


def write_folder(folder: Path, documents: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(documents):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return folder


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)))
    return path


def prose_layer(path: Path) -> dict[str, object]:
    """The data section of a config over one folder of text files."""
    return {
        "block_size_tokens": 16,
        "num_proc": 1,
        "tokenizer": {"vocab_size": 300},
        "validation_fraction": 0.1,
        "sources": [{"name": "prose", "kind": "text", "path": str(path)}],
    }


def two_sources(root: Path, n: int = 40, vocab_size: int = 320, num_proc: int = 1) -> DataConfig:
    """A folder of text files and a JSON-lines file under root, blocks of 16 tokens."""
    folder, lines = root / "files", root / "lines.jsonl"
    write_folder(folder, texts(n, seed=1))
    write_jsonl(lines, texts(n, seed=2))
    return DataConfig(
        block_size_tokens=16,
        sources=(
            SourceConfig(name="files", kind="text", path=str(folder), weight=3.0),
            SourceConfig(name="lines", kind="jsonl", path=str(lines), weight=1.0),
        ),
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        validation_fraction=0.1,
        num_proc=num_proc,
    )


def uncut(blocks: np.ndarray) -> np.ndarray:
    """The stream (int32 [n]) that consecutive blocks int32 [k, T + 1], from the first to the last, were cut from."""
    stream = np.concatenate([blocks[:1, 0], blocks[:, 1:].ravel()])
    return stream[stream != PAD]
