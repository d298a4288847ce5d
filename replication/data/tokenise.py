"""Tokenising pieces of text in worker processes: in order, a bounded number at a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from replication.data.folder import Place
from replication.data.order import Int64
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
    sizes_bytes: Int64  # UTF-8 length of each
    validation: Bool  # true for those of validation
    place: Place | None = None  # of the source after them; none: it cannot be gone on with


@dataclass(frozen=True)
class Tokens:
    """The tokens of some documents."""

    stream: Int32  # documents end to end, each with an end-of-text
    lengths: Int64  # tokens of each document, end-of-text included
    unknown_bytes: Int64  # of each document's text, what the tokenizer does not know

    def chosen(self, documents: Bool) -> Tokens:
        """Those of the documents for which it is true."""
        of_tokens = np.repeat(documents, self.lengths)
        return Tokens(self.stream[of_tokens], self.lengths[documents], self.unknown_bytes[documents])


Tokenised = Generator[tuple[Piece, Tokens], None, None]
"""Each piece with its tokens, in order. Raises UserError where a process was killed."""
Tokenise = Callable[[Iterable[Piece]], Tokenised]


def tokens_of(tokenizer: TextTokenizer, texts: list[str]) -> Tokens:
    """The tokens of some documents; raises UserError for text that becomes the end-of-text token."""
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


@contextmanager
def tokenising(tokenizer: TextTokenizer, num_proc: int) -> Iterator[Tokenise]:
    """Tokenise in num_proc processes, or in this one, with the library's own threads, where that is 1.

    The processes run from the start of the block, before a source is read in earnest, to its end.
    """
    with library_threads(num_proc == 1):
        if num_proc == 1:
            yield lambda pieces: ((piece, tokens_of(tokenizer, piece.texts)) for piece in pieces)
            return
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        executor = ProcessPoolExecutor(num_proc, context, _start_worker, (tokenizer,))
        try:
            with _signals_later():
                executor.submit(os.getpid).result()
            yield partial(_in_order, executor, AHEAD * num_proc)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _in_order(executor: ProcessPoolExecutor, ahead: int, pieces: Iterable[Piece]) -> Tokenised:
    waiting: deque[tuple[Piece, Future[Tokens]]] = deque()
    left = iter(pieces)
    try:
        while True:
            for piece in islice(left, ahead + 1 - len(waiting)):
                waiting.append((piece, executor.submit(_work, piece.texts)))
            if not waiting:
                return
            oldest, future = waiting.popleft()
            yield oldest, future.result()
    except BrokenExecutor as error:
        raise UserError(
            "data.num_proc: a process that tokenises ended abruptly (is the memory full?); lower it, then run the same "
            "command again"
        ) from error
    finally:
        for _, future in waiting:
            future.cancel()


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
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # Handlers, not a mask: a mask is of one thread, and the system hands the signal to another.
    before = {stop: signal.signal(stop, lambda n, frame: came.append(n)) for stop in stops}
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
