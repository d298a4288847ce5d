"""`replicate prepare`: named sources in, packed token blocks and a manifest out.

OUT/manifest.json            written last: the marker of completeness
OUT/tokenizer.json
OUT/train/<source>/          datasets.Dataset, one column `tokens`: int32 of fixed length block_size_tokens + 1
OUT/validation/<source>/
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from replication.config import DataConfig, SourceConfig
from replication.data.blocks import PAD, Int32, block_count, cut
from replication.data.folder import written_whole
from replication.data.progress import Reporter
from replication.data.request import request_differences, request_of
from replication.data.show import show_batch
from replication.data.spool import Bool, Int64, Spool, spool, validation_documents
from replication.data.store import FORMAT
from replication.data.tokenizer import TextTokenizer, check_tokenizer, load_tokenizer, train_tokenizer
from replication.data.workers import tethered
from replication.errors import UserError
from replication.rundir import read_json, remove_tree, write_json, write_text

if TYPE_CHECKING:
    import datasets

__all__ = ["prepare", "show_batch"]

TOKENIZER_BYTES = 8_000_000  # text that a tokenizer is trained on, shared among sources by their training bytes
MAP_DOCUMENTS = 64  # documents tokenised at once: the library holds about 100 bytes a token meanwhile
SHARD_SIZE = "1GB"
SPLITS = ("train", "validation")


def prepare(data: DataConfig, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Prepare a corpus, or find it prepared.

    Args:
        data: sources, tokenizer, block size and split.
        out: folder to write; it appears when it is complete, not before.
        console: where to report; none: nowhere.

    Returns:
        The manifest.

    Raises:
        UserError: a source or tokenizer that cannot be had, a corpus too small, a folder that holds something else or
            is being written, a full disk.
    """
    out, reporter = Path(out).resolve(), Reporter(console)
    _check(data)
    manifest = _existing(data, out)
    if manifest is not None:
        reporter.line(f"{out}: prepared before, nothing to do ({_summary(manifest)})")
        return manifest
    with written_whole(out) as folder, tethered(), _quiet_datasets():
        manifest = _write(data, folder, reporter)
    reporter.line(f"{out}: {_summary(manifest)}")
    return manifest


def _check(data: DataConfig) -> None:
    if not data.sources:
        raise UserError("data.sources: names no source; take a file of configs/data, or list at least one")
    for source in data.sources:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", source.name):
            raise UserError(
                f"data.sources: name '{source.name}' must be letters, digits, dot, dash and underscore, and not begin "
                "with a dot"
            )
    check_tokenizer(data.tokenizer)


def _existing(data: DataConfig, out: Path) -> dict[str, Any] | None:
    """The manifest where OUT holds this very preparation; None where OUT is free."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out}: is a file, not a folder; choose another --out")
    manifest = read_json(out / "manifest.json")
    if manifest is None and not any(out.iterdir()):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "request" not in manifest:
        raise UserError(f"{out}: exists and is not a preparation; choose another --out, or remove the folder")
    different = request_differences(request_of(data), manifest["request"])
    if different:
        keys = " and ".join(different)
        raise UserError(f"{out}: holds a preparation with another {keys}; choose another --out, or remove the folder")
    return manifest


def _summary(manifest: dict[str, Any]) -> str:
    sources = manifest["sources"].values()
    tokens = {split: sum(source[split]["tokens"] for source in sources) for split in SPLITS}
    return (
        f"{tokens['train']:,} training and {tokens['validation']:,} validation tokens, vocabulary "
        f"{manifest['vocab_size']:,}, data hash {manifest['hash'][:12]}"
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Our own bars instead of those of `datasets`; and workers that tokenise in one thread each.

    The environment variable also stops `tokenizers` from warning that a process forked after it had used threads.
    """
    import datasets

    shown = datasets.are_progress_bars_disabled()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
        _set_parallelism(before)


def _set_parallelism(value: str | None) -> None:
    if value is None:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = value


# ---------------------------------------------------------------- the steps


def _write(data: DataConfig, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Read, split, tokenise and cut every source into folder; the manifest comes last."""
    work = folder / "work"
    work.mkdir()
    spools = [_read(source, work, reporter) for source in data.sources]
    validation = validation_documents(spools, data.validation_fraction)
    _check_split(spools, validation)
    tokenizer = _tokenizer(data, spools, validation, reporter)
    write_text(folder / "tokenizer.json", tokenizer.json())
    sources = {
        s.source.name: _write_source(s, chosen, tokenizer, data, folder, reporter)
        for s, chosen in zip(spools, validation, strict=True)
    }
    manifest = {
        "format": FORMAT,
        "request": request_of(data),
        "hash": _content_hash(tokenizer, data.block_size_tokens, sources),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text_id": tokenizer.end_of_text_id,
        "block_size_tokens": data.block_size_tokens,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sources": sources,
        "packages": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("datasets", "tokenizers", "pyarrow")},
        },
    }
    remove_tree(work)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _read(source: SourceConfig, work: Path, reporter: Reporter) -> Spool:
    with reporter.bar(f"{source.name}: reading", None) as update:
        found = spool(source, work, update)
    report = found.report
    left_out = [f"{report.empty:,} empty"] if report.empty else []
    left_out += [f"{report.hidden:,} hidden"] if report.hidden else []
    if report.undecodable:
        more = ", ..." if report.undecodable > len(report.undecodable_files) else ""
        left_out += [f"{report.undecodable:,} undecodable: {', '.join(report.undecodable_files)}{more}"]
    text = f"{source.name}: {report.documents:,} documents, {int(found.sizes_bytes.sum()):,} bytes"
    reporter.line(text + (f"; left out {'; '.join(left_out)}" if left_out else ""))
    return found


def _check_split(spools: Sequence[Spool], validation: Sequence[Bool]) -> None:
    for s, chosen in zip(spools, validation, strict=True):
        if chosen.all():
            raise UserError(
                f"data.sources: source '{s.source.name}': its {len(chosen)} document(s) all fall to validation, which "
                "is split off by whole documents; give more documents (cut a long file into several), or lower "
                "data.validation_fraction"
            )


def _tokenizer(
    data: DataConfig, spools: Sequence[Spool], validation: Sequence[Bool], reporter: Reporter
) -> TextTokenizer:
    if data.tokenizer.path is not None:
        return load_tokenizer(data.tokenizer)
    texts = _tokenizer_texts(spools, validation)
    tokenizer = train_tokenizer(data.tokenizer, texts)
    reporter.line(f"tokenizer: trained, {tokenizer.vocab_size:,} entries")
    return tokenizer


def _tokenizer_texts(spools: Sequence[Spool], validation: Sequence[Bool]) -> Iterator[str]:
    """Training documents up to TOKENIZER_BYTES in all, each source in proportion to its training bytes."""
    available = [int(s.sizes_bytes[~chosen].sum()) for s, chosen in zip(spools, validation, strict=True)]
    share = min(1.0, TOKENIZER_BYTES / sum(available))
    for s, chosen, n_bytes in zip(spools, validation, available, strict=True):
        left = round(share * n_bytes)
        for number in s.ordered(~chosen):
            if left <= 0:
                break
            text = s.texts[int(number)]["text"]
            yield text[:left]  # a sample: only the tokenizer's training sees a document cut short
            left -= int(s.sizes_bytes[number])


def _write_source(
    s: Spool, validation: Bool, tokenizer: TextTokenizer, data: DataConfig, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """Tokenise a source and write its blocks of both splits; returns its entry in the manifest."""
    name, work = s.source.name, folder / "work"
    tokens = _tokenise(s, tokenizer, data.num_proc, work, reporter)
    entry: dict[str, Any] = {
        "kind": s.source.kind,
        "path": s.source.path,
        "documents": s.report.documents,
        "empty": s.report.empty,
        "hidden": s.report.hidden,
        "undecodable": s.report.undecodable,
        "undecodable_files": s.report.undecodable_files,
        "text_bytes": int(s.sizes_bytes.sum()),
    }
    for split, chosen in (("train", ~validation), ("validation", validation)):
        order = s.ordered(chosen)
        target = folder / split / name
        counts = _write_blocks(_documents(tokens, order), data.block_size_tokens, target, work)
        _check_size(name, split, counts, data.block_size_tokens)
        entry[split] = {"documents": len(order), "text_bytes": int(s.sizes_bytes[chosen].sum()), **counts}
    reporter.line(
        f"{name}: {entry['train']['tokens']:,} training tokens in {entry['train']['blocks']:,} blocks, "
        f"{entry['validation']['tokens']:,} validation tokens in {entry['validation']['blocks']:,}"
    )
    for left in work.glob(f"{name}.*"):
        left.unlink()
    return entry


def _check_size(name: str, split: str, counts: dict[str, Any], block_size_tokens: int) -> None:
    need = block_size_tokens + 1 if split == "train" else 2
    if counts["tokens"] < need:
        raise UserError(
            f"data.sources: source '{name}': its {split} split has {counts['tokens']} tokens, fewer than the {need} "
            "that one block needs; give more text, shorten data.block_size_tokens, or change data.validation_fraction"
        )


def _content_hash(tokenizer: TextTokenizer, block_size_tokens: int, sources: dict[str, Any]) -> str:
    """SHA-256 over the tokenizer, the block size and the hash of every source's tokens, in order."""
    lines = [hashlib.sha256(tokenizer.json().encode()).hexdigest(), str(block_size_tokens)]
    lines += [f"{split} {source[split]['sha256']}" for source in sources.values() for split in SPLITS]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- tokens


def _tokenise(s: Spool, tokenizer: TextTokenizer, num_proc: int, work: Path, reporter: Reporter) -> datasets.Dataset:
    """Column `tokens` (int32 lists, end-of-text at the end of each) of every document, in reading order."""
    import datasets

    n_documents = len(s.texts)
    done = work / f"{s.source.name}.done"
    done.touch()
    processes = min(num_proc, -(-n_documents // MAP_DOCUMENTS))
    forks = processes > 1
    _set_parallelism("false" if forks else "true")
    with reporter.polled_bar(f"{s.source.name}: tokenising", n_documents, lambda: done.stat().st_size):
        return s.texts.map(
            partial(_tokenise_batch, tokenizer=tokenizer, done=done),
            input_columns="text",
            batched=True,
            batch_size=MAP_DOCUMENTS,
            writer_batch_size=MAP_DOCUMENTS,
            remove_columns="text",
            features=datasets.Features({"tokens": datasets.List(datasets.Value("int32"))}),
            num_proc=processes if forks else None,
            load_from_cache_file=False,
            cache_file_name=str(work / f"{s.source.name}.tokens.arrow"),
            new_fingerprint=f"{s.source.name}-tokens",
        )


def _tokenise_batch(texts: list[str], tokenizer: TextTokenizer, done: Path) -> dict[str, list[Int32]]:
    end = [tokenizer.end_of_text_id]
    tokens = [np.array(ids + end, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]
    with open(done, "ab") as file:  # one byte a document: appending adds up over processes, and the size is the count
        file.write(b"." * len(texts))
    return {"tokens": tokens}


def _documents(tokens: datasets.Dataset, order: Int64) -> Iterator[Int32]:
    """Token arrays (int32 [n], views) of the documents in an order, straight from the Arrow buffers."""
    chunks = tokens.data.column("tokens").chunks
    values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
    offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
    ends = np.cumsum([len(chunk) for chunk in chunks])
    for number, c in zip(order, np.searchsorted(ends, order, side="right"), strict=True):
        row = int(number - ends[c]) + len(chunks[c])
        yield values[c][offsets[c][row] : offsets[c][row + 1]]


def _write_blocks(documents: Iterator[Int32], block_size_tokens: int, target: Path, work: Path) -> dict[str, Any]:
    """Write the blocks of a stream of documents as a Dataset.

    Returns:
        {"tokens": n, "blocks": n, "predicted_tokens": n, "sha256": of the stream's little-endian int32 bytes}.
    """
    import datasets
    import pyarrow as pa

    path = work / f"{target.name}.{target.parent.name}.blocks.arrow"
    counts = {"tokens": 0, "blocks": 0, "predicted_tokens": 0}
    digest = hashlib.sha256()

    def counted() -> Iterator[Int32]:
        for document in documents:
            counts["tokens"] += len(document)
            digest.update(document.astype("<i4", copy=False).tobytes())
            yield document

    schema = pa.schema([("tokens", pa.list_(pa.int32(), block_size_tokens + 1))])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for blocks in cut(counted(), block_size_tokens):
            column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), block_size_tokens + 1)
            writer.write_batch(pa.record_batch([column], schema=schema))
            counts["blocks"] += len(blocks)
            counts["predicted_tokens"] += int((blocks[:, 1:] != PAD).sum())
    # Every token but the first is a target exactly once: nothing was cut off, nothing counted twice.
    assert counts["predicted_tokens"] == max(0, counts["tokens"] - 1), counts
    assert counts["blocks"] == block_count(counts["tokens"], block_size_tokens), counts
    if counts["blocks"]:
        datasets.Dataset.from_file(str(path)).save_to_disk(str(target), max_shard_size=SHARD_SIZE)
    path.unlink()
    return {**counts, "sha256": digest.hexdigest()}
