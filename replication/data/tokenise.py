"""Tokenising pieces of text in worker processes: in order, a bounded number at a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from replication.data.order import Int64
from replication.data.records import Place
from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError

PIECE_BYTES = 1 << 18  # small, so that no process waits long for the others at the end of a source
PIECE_DOCUMENTS = 256
AHEAD = 4  # pieces a worker that are read before the oldest one is waited for

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """Some documents of one source, tokenised together."""

    texts: list[str]
    sizes_bytes: Int64
    """UTF-8 length of each."""
    validation: Bool
    """True for those of validation."""
    place: Place | None = None
    """Of the source after them; none: it cannot be gone on with."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a piece's documents."""

    stream: Int32
    """Documents end to end, each with an end-of-text."""
    lengths: Int64
    """Tokens of each document, end-of-text included."""
    unknown_bytes: Int64
    """Of each document's text, what the tokenizer does not know."""


def batches(texts: Iterable[str], n_documents: int, n_bytes: int) -> Iterator[list[tuple[str, bytes]]]:
    """Texts with their UTF-8 bytes, in lists bounded in number and bytes; the last, of what is left, may be empty."""
    batch: list[tuple[str, bytes]] = []
    size = 0
    for text in texts:
        raw = text.encode()
        batch.append((text, raw))
        size += len(raw)
        if len(batch) >= n_documents or size >= n_bytes:
            yield batch
            batch, size = [], 0
    yield batch


class Pool:
    """Tokenises in num_proc processes, or in this one, with the library's own threads, where num_proc is 1."""

    def __init__(self, tokenizer: TextTokenizer, executor: ProcessPoolExecutor | None, num_proc: int):
        self.tokenizer, self._executor = tokenizer, executor
        self._ahead = AHEAD * num_proc if executor else 0

    @classmethod
    @contextmanager
    def started(cls, tokenizer: TextTokenizer, num_proc: int) -> Iterator[Pool]:
        """A pool whose processes run from the start of the block, before a source is read in earnest, to its end."""
        with library_threads(num_proc == 1):
            if num_proc == 1:
                yield cls(tokenizer, None, 1)
                return
            context = get_context("fork" if sys.platform == "linux" else "spawn")
            executor = ProcessPoolExecutor(num_proc, context, _start_worker, (tokenizer,))
            try:
                with _signals_later():
                    executor.submit(os.getpid).result()
                yield cls(tokenizer, executor, num_proc)
            finally:
                executor.shutdown(wait=True, cancel_futures=True)

    def tokenise(self, pieces: Iterable[Piece]) -> Generator[tuple[Piece, Tokens], None, None]:
        """Each piece with its tokens, in order.

        Raises:
            UserError: a process was killed.
        """
        waiting: deque[tuple[Piece, Future[Tokens]]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, self._submit(piece.texts)))
                if len(waiting) > self._ahead:
                    oldest, future = waiting.popleft()
                    yield oldest, future.result()
            while waiting:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        except BrokenExecutor as error:
            raise UserError(
                "data.num_proc: a process that tokenises ended abruptly (is the memory full?); lower it, then run the "
                "same command again"
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()

    def _submit(self, texts: list[str]) -> Future[Tokens]:
        if self._executor is not None:
            return self._executor.submit(_work, texts)
        done: Future[Tokens] = Future()
        done.set_result(tokens_of(self.tokenizer, texts))
        return done


def tokens_of(tokenizer: TextTokenizer, texts: list[str]) -> Tokens:
    """The tokens of some documents.

    Raises:
        UserError: text that becomes the end-of-text token.
    """
    encoded, unknown = tokenizer.encode_counted(texts)
    lengths = np.fromiter((len(ids) + 1 for ids in encoded), dtype=np.int64, count=len(encoded))
    stream = np.full(int(lengths.sum()), tokenizer.end_of_text_id, dtype=np.int32)
    starts = np.cumsum(lengths) - lengths
    for ids, start in zip(encoded, starts.tolist(), strict=True):
        stream[start : start + len(ids)] = ids
    if np.count_nonzero(stream == tokenizer.end_of_text_id) != len(encoded):
        raise UserError(
            f"data.tokenizer.end_of_text: '{tokenizer.end_of_text}' is also what the tokenizer makes of text that it "
            "does not know; name another of its special tokens, or take another tokenizer"
        )
    return Tokens(stream, lengths, np.array(unknown, dtype=np.int64))


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and the like wait for the end of the block.

    One that comes between the start of a pool's processes and that of the thread which serves them leaves processes
    that wait for work for good, and the program waits for them at its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    came: list[int] = []
    # Handlers, not a mask: a mask is of one thread, and the system hands the signal to another.
    before = {number: signal.signal(number, lambda n, frame: came.append(n)) for number in STOPS}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
        if came:
            signal.raise_signal(came[0])


_worker_tokenizer: TextTokenizer | None = None


def _start_worker(tokenizer: TextTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


def _work(texts: list[str]) -> Tokens:
    assert _worker_tokenizer is not None
    return tokens_of(_worker_tokenizer, texts)


@contextmanager
def library_threads(wanted: bool) -> Iterator[None]:
    """Whether `tokenizers` uses threads of its own; set, this also keeps it from warning of a fork after threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = str(wanted).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
