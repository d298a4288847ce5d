"""`replicate prepare`: named sources in, packed token blocks and a manifest out (folder.py has every file's form).

Without a token budget the sources are read whole, then tokenised; with one they are streamed (corpus.py).
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from replication.config import DataConfig, SourceConfig, TokenizerConfig
from replication.console import Reporter, timestamp
from replication.data.corpus import IngestedCorpus, StreamedCorpus
from replication.data.files import changed, local_files
from replication.data.folder import (
    FORMAT,
    MANIFEST,
    ORIGINS,
    SPLITS,
    CorpusManifest,
    Origin,
    Progress,
    SourceRecord,
    read_manifest,
    read_origins,
    read_progress,
    request_differences,
    request_of,
    written_whole,
)
from replication.data.hub import commit_of
from replication.data.tokenise import tokenising
from replication.data.tokenizer import TextTokenizer, check_tokenizer, load_tokenizer, tokenizer_file, train_tokenizer
from replication.errors import UserError
from replication.processes.launcher import tethered
from replication.runs.files import write_text
from replication.runs.records import write_record

TOKENIZER_BYTES = 8_000_000  # text that a tokenizer is trained on, shared among sources by training bytes or weight
PLACES = 2  # how an unfinished preparation says where it stands; raised when that changes

# What is told as a warning: it is rarely meant.
UNKNOWN_SHARE = 0.01  # of a source's bytes, that the tokenizer does not know
TOKEN_BYTES = 1.25  # of text a token, of a tokenizer with WORDS entries: it spells the text out
WORDS = 1000
TIMES_VALIDATION = 3  # times data.validation_fraction
TIMES_READ = 16  # a source, while another is read once


def prepare(data: DataConfig, out: Path, console: Console | None = None) -> CorpusManifest:
    """Prepare a corpus, or find it prepared: the folder appears when it is complete, not before.

    Raises:
        UserError: a source or tokenizer that cannot be had, a corpus too small, a folder that holds something else or
            is being written, a full disk.
    """
    out, reporter = Path(out).resolve(), Reporter(console)
    if not data.sources:
        raise UserError("data.sources: names no source; take a file of configs/data, or list at least one")
    for source in data.sources:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", source.name):
            raise UserError(
                f"data.sources: name '{source.name}' must be letters, digits, dot, dash and underscore, and not begin "
                "with a dot"
            )
    check_tokenizer(data.tokenizer)
    if (manifest := _found(data, out, reporter)) is not None:
        return manifest
    # Everything that another call must have in common with this one to continue its work; None where none can.
    packages = {"replication": PLACES, **{name: version(name) for name in ("datasets", "tokenizers")}}
    request = {**request_of(data), "packages": packages} if data.token_budget is not None else None
    with ExitStack() as stack:
        folder = stack.enter_context(written_whole(out, request, reporter.line))
        stack.enter_context(tethered())
        import datasets

        if not datasets.are_progress_bars_disabled():  # our own are shown
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        manifest = _write(data, folder, reporter)
    for source in data.sources:
        commit = manifest.sources[source.name].revision
        if commit is not None and commit != source.revision:
            reporter.line(f"{source.name}: to pin what was read, set  revision: {commit}")
    reporter.line(f"{out}: {_summary(manifest)}")
    return manifest


def _found(data: DataConfig, out: Path, reporter: Reporter) -> CorpusManifest | None:
    """The manifest where OUT holds this very preparation; None where OUT is free.

    Tells which local files are no longer what was prepared; a corpus that is not here at all is no change.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, not a folder; choose another --out")
    manifest = read_manifest(out) if out.exists() else None
    if manifest is None:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: exists and is not a preparation; choose another --out, or remove the folder")
        return None
    if different := request_differences(request_of(data), manifest.request):
        keys = " and ".join(different)
        raise UserError(f"{out}: holds a preparation with another {keys}; choose another --out, or remove the folder")
    reporter.line(f"{out}: prepared before, nothing to do ({_summary(manifest)})")
    if _is_another(data.tokenizer, out / "tokenizer.json"):
        reporter.line(
            f"tokenizer: warning: {data.tokenizer.path} is another one than the corpus was prepared with; to prepare "
            f"it again, remove {out} or choose another --out"
        )
    origins = read_origins(out)
    for source in data.sources:
        origin = origins.get(source.name)
        try:
            names = _changed_files(origin, source) if origin is not None and origin.files else []
        except UserError:
            continue
        if names:
            reporter.line(
                f"{source.name}: warning: {len(names):,} local file(s) are of another size or time than when they were "
                f"prepared, or came or went ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); to prepare "
                f"them again, remove {out} or choose another --out"
            )
    return manifest


def _summary(manifest: CorpusManifest) -> str:
    train, validation = (sum(s.split(split).tokens for s in manifest.sources.values()) for split in SPLITS)
    counts = f"{train:,} training and {validation:,} validation tokens, vocabulary {manifest.vocab_size:,}"
    return f"{counts}, data hash {manifest.hash[:12]}"


def _write(data: DataConfig, folder: Path, reporter: Reporter) -> CorpusManifest:
    """Read, split, tokenise and cut every source into folder; the manifest comes last."""
    request = request_of(data)
    data = _from_origins(data, folder, reporter)
    corpus = (IngestedCorpus if data.token_budget is None else StreamedCorpus)(data, folder, reporter)
    tokenizer = _tokenizer(data, corpus, folder, reporter)
    sources: dict[str, SourceRecord] = {}
    with tokenising(tokenizer, data.num_proc) as tokenise:
        for number, source in enumerate(data.sources):
            entry = sources[source.name] = corpus.write(number, tokenise)
            unknown = _unknown_share(entry)
            reporter.line(
                f"{source.name}: {entry.train.tokens:,} training tokens in {entry.train.blocks:,} blocks, "
                f"{entry.validation.tokens:,} validation tokens in {entry.validation.blocks:,}"
                + (f"; {unknown:.2%} of it unknown to the tokenizer" if unknown else "")
            )
    corpus.close()
    for warning in _warnings(data, sources, tokenizer):
        reporter.line(warning)
    hashed = [hashlib.sha256(tokenizer.json().encode()).hexdigest(), str(data.block_size_tokens)]
    hashed += [f"{split} {source.split(split).sha256}" for source in sources.values() for split in SPLITS]
    packages = {name: version(name) for name in ("datasets", "tokenizers", "pyarrow")}
    manifest = CorpusManifest(
        format=FORMAT,
        request=request,
        hash=hashlib.sha256("\n".join(hashed).encode()).hexdigest(),
        vocab_size=max(tokenizer.vocab_size, data.tokenizer.padded_vocab_size or 0),
        end_of_text_id=tokenizer.end_of_text_id,
        block_size_tokens=data.block_size_tokens,
        created_at=timestamp(),
        sources=sources,
        packages={"python": platform.python_version(), **packages},
    )
    write_record(folder / MANIFEST, manifest)
    return manifest


def _from_origins(data: DataConfig, folder: Path, reporter: Reporter) -> DataConfig:
    """The same sources, each hub set at the commit that its revision meant when the preparation began.

    A branch may move and a file be edited between two reads of a preparation, or before another one: commits, sizes
    and times are kept in the folder. Raises UserError, before anything is read, for a set that the hub does not give,
    or local files that have changed since an earlier call began to read them.
    """
    known = read_origins(folder)
    for source in data.sources:
        done, before = read_progress(folder, source.name), known.get(source.name)
        if before is None:
            known[source.name] = Origin(commit_of(source, reporter.line), local_files(source))
        elif done == Progress() and data.tokenizer.path is not None:  # nothing that was read of it has been kept
            before.files = local_files(source)
        elif done.entry is None:
            # A time alone says nothing of files whose rows are compared with what was read of them, as all but a hub
            # set's are while a preparation goes on.
            names = _changed_files(before, source, 2 if source.kind == "hub" else 1)
            if names:
                raise changed(source, names)
        write_record(folder / ORIGINS, known)
    return replace(data, sources=tuple(replace(s, revision=known[s.name].commit or s.revision) for s in data.sources))


def _changed_files(before: Origin, source: SourceConfig, n_facts: int = 2) -> list[str]:
    """Names of files that came, went or are not alike in the first of their facts, size and time."""
    a, b = before.files or {}, local_files(source) or {}
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name, [])[:n_facts] != b.get(name, [])[:n_facts]]


def _tokenizer(
    data: DataConfig, corpus: IngestedCorpus | StreamedCorpus, folder: Path, reporter: Reporter
) -> TextTokenizer:
    """The tokenizer that an earlier call wrote, or the one that is asked for; tokenizer.json holds it from now on."""
    path = folder / "tokenizer.json"
    if path.is_file():
        if _is_another(data.tokenizer, path):
            raise UserError(
                f"data.tokenizer.path: {data.tokenizer.path} has changed since the preparation began; restore it, or "
                "remove the unfinished folder (.partial) and run again"
            )
        return TextTokenizer(path.read_text(encoding="utf-8"), data.tokenizer.end_of_text)
    if data.tokenizer.path is not None:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        reporter.line(f"tokenizer: training on up to {TOKENIZER_BYTES:,} bytes")
        with reporter.bar("tokenizer: training", None):
            tokenizer = train_tokenizer(data.tokenizer, corpus.tokenizer_texts(TOKENIZER_BYTES))
        reporter.line(f"tokenizer: trained, {tokenizer.vocab_size:,} entries")
    padded = data.tokenizer.padded_vocab_size
    if padded is not None and padded < tokenizer.vocab_size:
        raise UserError(
            f"data.tokenizer.padded_vocab_size: {padded} is less than the {tokenizer.vocab_size} entries that the "
            f"tokenizer has; set it to {tokenizer.vocab_size} or more, or remove it"
        )
    write_text(path, tokenizer.json())
    return tokenizer


def _is_another(config: TokenizerConfig, kept: Path) -> bool:
    """Whether a local tokenizer is no longer the one that a preparation keeps; one that is not here is no change."""
    if config.path is None or not tokenizer_file(config).is_file():
        return False
    text = kept.read_text(encoding="utf-8")
    try:
        return load_tokenizer(config).json() != TextTokenizer(text, config.end_of_text).json()
    except UserError:
        return True


def _unknown_share(entry: SourceRecord) -> float:
    """Bytes of a source's text that the tokenizer does not know, as a share."""
    return (entry.train.unknown_bytes + entry.validation.unknown_bytes) / entry.text_bytes


def _warnings(data: DataConfig, sources: dict[str, SourceRecord], tokenizer: TextTokenizer) -> Iterator[str]:
    """Numbers that are rarely meant, in words: of each source, and where training reads one far more than another."""
    for name, entry in sources.items():
        tokens, unknown = entry.train.tokens + entry.validation.tokens, _unknown_share(entry)
        if unknown > UNKNOWN_SHARE:
            yield (
                f"{name}: warning: {unknown:.1%} of it is unknown to the tokenizer; take one that knows this text "
                "(data.tokenizer)"
            )
        if tokenizer.vocab_size >= WORDS and entry.text_bytes < TOKEN_BYTES * tokens:
            yield (
                f"{name}: warning: a token stands for {entry.text_bytes / tokens:.2f} bytes of it: the tokenizer "
                "spells it out; take one made for this text (data.tokenizer)"
            )
        share = entry.validation.tokens / tokens
        if share > TIMES_VALIDATION * data.validation_fraction:
            yield (
                f"{name}: warning: validation holds {share:.1%} of its tokens, data.validation_fraction asks for "
                f"{data.validation_fraction:.1%}: whole documents are split off; give more of them, or cut long ones "
                "into several"
            )
    often = {s.name: s.weight / sources[s.name].train.tokens for s in data.sources if s.weight > 0}
    least = min(often, key=lambda name: often[name], default="")
    for name, times in often.items():
        if times > TIMES_READ * often[least]:
            yield (
                f"{name}: warning: by the weights training reads it {times / often[least]:,.0f} times while it reads "
                f"{least} once; give more text, or change data.sources.weight"
            )
