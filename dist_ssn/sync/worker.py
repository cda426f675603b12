"""A thread that runs one function after the other beside the training."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_Jobs = queue.SimpleQueue[tuple[Callable[[], Any], Future] | None]

_EXIT_SECONDS = 2.0
"""The longest that an interpreter's exit waits for a thread, which may be in a collective that never ends."""
_threads: weakref.WeakKeyDictionary[threading.Thread, _Jobs] = weakref.WeakKeyDictionary()


class Worker:
    """Runs functions in the order in which they were handed over; its thread starts with the first one.

    The order is what makes collectives safe in it: all ranks hand over in the same order. The thread does not keep a process alive.
    """

    def __init__(self) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], Any]) -> Future:
        """Hands over a function; the future has its result or its exception."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._jobs,), name="dist_ssn-sync", daemon=True)
            self._thread.start()
            _threads[self._thread] = self._jobs
        future: Future = Future()
        self._jobs.put((job, future))
        return future

    def __del__(self) -> None:
        self._jobs.put(None)


def _run(jobs: _Jobs) -> None:
    while (handed := jobs.get()) is not None:
        job, future = handed
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        del handed, job, future  # an idle thread holds on to no tensor


@atexit.register
def _end_all() -> None:
    """Ends the threads before the interpreter does: one that frees a tensor while the interpreter ends aborts the process."""
    for thread, jobs in list(_threads.items()):
        jobs.put(None)
        thread.join(_EXIT_SECONDS)
