"""A prepared folder: the record that each of its files is written from and read as, and how it appears when complete.

OUT/manifest.json            CorpusManifest; written last: the marker of completeness
OUT/origins.json             {source: Origin}
OUT/tokenizer.json
OUT/<split>/<source>/        datasets.Dataset, one column `tokens`: int32 of fixed length block_size_tokens + 1
OUT.partial/request.json     Request: what a later call must have in common with an interrupted one
OUT.partial/progress/*.json  Progress of each source
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from replication.config import DataConfig, differences, flatten, without_neutral
from replication.errors import UserError, is_disk_full
from replication.runs.files import HELD, read_object, remove_tree, sync, without_locks, write_json
from replication.runs.records import from_json, read_record, write_record

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
MANIFEST = "manifest.json"
ORIGINS = "origins.json"
FORMAT = 1
PROGRESS = "progress"
LOCK = ".lock"
REQUEST = "request.json"
_REMEDIES = {
    True: "what was done is kept; free space, then run the same command again",
    False: "the partial folder was removed; free space or choose another --out",
}
MAX_NAMED = 20


@dataclass(kw_only=True)
class ReadReport:
    """Counts of what reading one source found; filled while its documents are read. All but the first are left out."""

    documents: int = 0  # that hold text
    empty: int = 0  # documents with nothing but white space
    undecodable: int = 0  # files or lines that are not UTF-8 (or not Python, or not JSON)
    undecodable_files: list[str] = field(default_factory=list)  # names of the first 20 of those
    foreign: str = ""  # kind of the first of those, such as "a.txt is UTF-16 text"; "" where that is not known
    hidden: int = 0  # files of a folder whose path has a part that begins with a dot
    other: int = 0  # other files of a folder: of another ending, or pipes, devices and dangling links
    other_files: list[str] = field(default_factory=list)  # names of the first 20 of those

    def left_out(self) -> str:
        """Everything that the documents lack, for the end of a line; "" where that is nothing."""
        counts: list[tuple[int, str, list[str]]] = [
            (self.empty, "empty", []),
            (self.hidden, "hidden", []),
            (self.other, "of other kinds: ", self.other_files),
            (self.undecodable, "undecodable: ", self.undecodable_files),
        ]
        parts = [
            f"{n:,} {what}{', '.join(names)}{', ...' if 0 < len(names) < n else ''}" for n, what, names in counts if n
        ]
        parts += [self.foreign] if self.foreign else []
        return f"; left out {'; '.join(parts)}" if parts else ""


@dataclass
class Origin:
    """Commit (of a hub set) or local files that a source is read from, fixed when its preparation begins."""

    commit: str | None
    files: dict[str, list[int]] | None  # name -> [size in bytes, time of change in ns]


@dataclass(frozen=True)
class Place:
    """The place at which a stream of documents stands."""

    parts: int  # files or shards of the source
    part: str | None  # name of the one it stands in; none: past the last
    turn: int  # that one's number in reading order
    row: Any  # place within it, in the part's own terms (plain values); none: its beginning
    report: ReadReport  # of everything up to there


@dataclass
class BlockState:
    """Blocks that have been written, and the tokens that no whole block has covered yet."""

    tokens: int = 0
    blocks: int = 0  # whole ones on the disk
    predicted_tokens: int = 0
    held: list[int] = field(default_factory=list)
    files: list[list[Any]] = field(default_factory=list)  # [name, length in bytes] of each
    open: bool = False  # whether the last of them is still appended to


@dataclass
class SplitState:
    """A SplitWriter that another process can go on with."""

    documents: int = 0
    text_bytes: int = 0
    unknown_bytes: int = 0  # bytes of text that the tokenizer does not know
    blocks: BlockState = field(default_factory=BlockState)


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """One split of one source, finished."""

    documents: int
    text_bytes: int
    unknown_bytes: int = 0  # folders of earlier versions do not say
    tokens: int
    blocks: int
    predicted_tokens: int
    sha256: str  # of the stream's little-endian int32 bytes


@dataclass(kw_only=True)
class SourceRecord(ReadReport):
    """One source of a prepared corpus."""

    kind: str
    path: str | None
    revision: str | None = None  # commit of a hub set
    share_tokens: int | None = None  # training tokens that the token budget gives it; none: there is no budget
    ended_before_its_share: bool = False
    text_bytes: int
    train: SplitRecord
    validation: SplitRecord

    def split(self, split: Split) -> SplitRecord:
        return self.train if split == "train" else self.validation


@dataclass(frozen=True)
class Progress:
    """Progress of a streamed source: finished, or at a place with what was written up to it."""

    entry: SourceRecord | None = None
    place: Place | None = None
    writer: dict[Split, SplitState] | None = None

    @property
    def training_tokens(self) -> int:
        """Training tokens that are there; all of its share where it will write no more."""
        if self.entry is not None:
            return self.entry.share_tokens or 0
        return self.writer["train"].blocks.tokens if self.writer is not None else 0


Request = dict[str, Any]
"""DataConfig as plain values; a dict, because those of other versions may have other keys, which differences name."""


@dataclass(frozen=True)
class CorpusManifest:
    """A complete preparation."""

    format: int
    request: Request
    hash: str  # SHA-256 over the tokenizer, the block size and every token
    vocab_size: int
    end_of_text_id: int
    block_size_tokens: int
    sources: dict[str, SourceRecord]  # in the order of source numbers, which key the data order
    created_at: str = ""
    packages: dict[str, str] = field(default_factory=dict)


def progress_file(folder: Path, source: str) -> Path:
    return folder / PROGRESS / f"{source}.json"


def read_progress(folder: Path, source: str) -> Progress:
    return read_record(progress_file(folder, source), Progress) or Progress()


def write_progress(folder: Path, source: str, progress: Progress) -> None:
    write_record(progress_file(folder, source), progress)


def read_origins(folder: Path) -> dict[str, Origin]:
    return {name: from_json(Origin, value) for name, value in read_object(folder / ORIGINS).items()}


def read_manifest(folder: Path) -> CorpusManifest | None:
    """The manifest of a prepared folder, or None; raises UserError where it is not JSON, or not of FORMAT."""
    path = folder / MANIFEST
    if (value := read_object(path)) and value.get("format") != FORMAT:
        raise UserError(
            f"{path} is not of format {FORMAT}; remove the folder and run `replicate prepare --out {folder}` again"
        )
    return read_record(path, CorpusManifest)


def request_of(data: DataConfig) -> Request:
    """Everything that a preparation depends on: DataConfig without what changes no token.

    That is the folder, the processes, and the weights too where no token budget is shared by them.
    """
    request = {key: value for key, value in without_neutral(data).items() if key not in ("dir", "num_proc")}
    if data.token_budget is None:
        for source in request["sources"]:
            del source["weight"]
    return request


def request_differences(a: Request, b: Request) -> list[str]:
    """Config keys in which two requests differ, such as `data.sources.web.path` or `data.tokenizer.vocab_size`.

    The place of a source is part of a request: source numbers key the data order.
    """
    flat = []
    for request in (a, b):
        sources = {source["name"]: {**source, "place": i} for i, source in enumerate(request.get("sources", []))}
        flat.append(flatten({**request, "sources": sources}))
    return [f"data.{key}" for key in differences(*flat)]


def changed_sources(a: Request, b: Request) -> list[str]:
    """Sources in which two requests differ where the tokens of all others are the same in both; else none.

    A tokenizer that is trained here depends on the text of every source, and every share on each weight.
    """

    def shared(request: Request) -> Request:
        return {**request, "sources": [(source["name"], source["weight"]) for source in request["sources"]]}

    trained = a["token_budget"] is None or a["tokenizer"]["path"] is None
    if trained or shared(a) != shared(b):
        return []
    return [s["name"] for s, t in zip(a["sources"], b["sources"], strict=True) if s != t]


@contextmanager
def written_whole(out: Path, request: Request | None, notify: Callable[[str], None]) -> Iterator[Path]:
    """Give OUT.partial to write into; on success it becomes OUT.

    Without a request (everything on which the work depends) it is empty, and on any failure it is removed. With one,
    what lies in OUT.partial/progress marks work that a later call with an equal request finds again, after a failure or
    a kill; without such a mark it is removed as well. Where the requests differ in the keys of some sources alone, the
    other sources' work is found, and `notify` gets a line for each that is begun anew.

    Raises:
        UserError: a live process writes there, it holds the work of another request, the place cannot be written, or
            the disk is full.
    """
    partial = out.with_name(out.name + ".partial")
    with closing(_claimed(out, partial)):
        _make_free(partial, request, notify)
        try:
            if request is not None:
                write_json(partial / REQUEST, request)
            yield partial
            _sync(partial)
            os.rename(partial, out)
        except BaseException as error:
            kept = request is not None and _has_work(partial)
            if not kept:
                remove_tree(partial)
            if is_disk_full(error):
                raise UserError(f"disk full while writing {partial}: {_REMEDIES[kept]}") from error
            raise
        # Harmless where a kill leaves them, so they go last: before the rename they are what a later call needs.
        remove_tree(out / PROGRESS)
        for left in (REQUEST, LOCK):
            (out / left).unlink(missing_ok=True)


def _claimed(out: Path, partial: Path) -> IO[str]:
    """Lock OUT.partial for this process; returns the open lock file."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held until the folder is complete
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"disk full while writing {partial}: {_REMEDIES[False]}") from error
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        # A record lock, not flock: worker processes would inherit that, and one that outlives a killed parent keep it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (partial / LOCK).stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
    except FileNotFoundError:
        pass  # another process completed the folder between our open and our lock
    except OSError as error:
        if error.errno not in HELD:
            lock.close()
            raise UserError(without_locks(partial, error)) from error
    lock.close()
    raise UserError(f"{partial}: another process is preparing this corpus; wait for it, or end it, then run again")


def _has_work(partial: Path) -> bool:
    return (partial / REQUEST).is_file() and any((partial / PROGRESS).glob("*.json"))


def _make_free(partial: Path, request: Request | None, notify: Callable[[str], None]) -> None:
    """Remove what OUT.partial holds, unless it is work of this request; of sources that were corrected, theirs alone.

    Raises UserError, with the keys, where it is the work of another request.
    """
    if not _has_work(partial):
        for left in partial.iterdir():
            if left.name != LOCK:
                remove_tree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return
    found = read_object(partial / REQUEST)
    changed = changed_sources(request, found) if request is not None else []
    for name in changed:
        progress_file(partial, name).unlink(missing_ok=True)
        write_record(partial / ORIGINS, {other: o for other, o in read_origins(partial).items() if other != name})
        for split in SPLITS:
            remove_tree(partial / split / name)
        notify(f"{name}: its keys have changed since; begun anew, what the other sources have is kept")
    if changed or found == request:
        return
    if request is None:
        difference = f"a data.token_budget of {found['token_budget']:,}, and this config has none"
    else:
        keys = request_differences(request, found)
        difference = "another " + " and ".join(key.replace("data.packages.", "version of ") for key in keys[:3])
    raise UserError(
        f"{partial}: holds unfinished work with {difference}; set what it has and go on, or remove the folder, or "
        "choose another --out"
    )


def _sync(folder: Path) -> None:
    """Bring every file to the disk before the rename, so that a power cut cannot leave a complete-looking half."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
