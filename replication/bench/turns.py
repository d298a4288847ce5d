"""Trainings that own their loop, paused between blocks: each has a thread, and exactly one thread runs at a time.

Lightning, transformers and LitGPT do not hand control back after some steps. Here each calls `pause` at the end of a
block, from a callback or a loader, and stays there until its next turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


class Elapsed(NamedTuple):
    """What a block took."""

    seconds: float
    cpu_seconds: float  # of all threads of this process: what other processes take away is not in it


Pause = Callable[[], None]
"""What a training calls before the first step of every block."""


class Stopped(BaseException):
    """Ends a paused training from inside; nothing is wrong."""


class Turns:
    """A training in a thread of its own, which runs only inside `block`.

    Args:
        train: the whole training.
    """

    def __init__(self, train: Callable[[Pause], None]) -> None:
        self._train = train
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._instead: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        self._advance()  # to its first pause: what it takes to set up is in no block

    def block(self, instead: Callable[[], None] | None = None) -> Elapsed:
        """Run to the next pause, and wait for the device.

        Args:
            instead: work that is done in the training's thread while the training itself stays where it is. Memory is
                handed out by thread, so that only work in one thread, or in threads of one kind, compares fairly.

        Raises:
            BaseException: what the training raised.
        """
        assert self._thread.is_alive(), "the training has ended before its last block"
        self._instead = instead
        started, cpu_started = time.perf_counter(), time.process_time()
        self._advance()
        return Elapsed(time.perf_counter() - started, time.process_time() - cpu_started)

    def close(self) -> None:
        """End the training where it is paused, or at its next pause, and wait for its thread."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def _advance(self) -> None:
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        self._go.acquire()
        try:
            self._train(self._pause)
        except Stopped:
            pass
        except BaseException as error:  # it is raised again where the block was asked for
            self._error = error
        finally:
            self._paused.release()

    def _pause(self) -> None:
        while True:
            if self._closed:
                raise Stopped
            synchronize()
            self._paused.release()
            self._go.acquire()
            if self._closed:
                raise Stopped
            if self._instead is None:
                return
            self._instead()


def share_one_heap() -> None:
    """Let every thread take memory where the main thread does, as a training that runs alone does.

    glibc otherwise gives threads heaps of their own, which hand large tensors back to the system and take them again at
    every step, each at its own rate: the same step then costs one thread a tenth more than another. To be called before
    the first thread; does nothing where there is no such setting.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
