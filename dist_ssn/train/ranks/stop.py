"""Ends of a run from outside: signals that preempt it, and a time limit for processes that wait for ever."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dist_ssn.comm import in_flight
from dist_ssn.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that Slurm, Kubernetes and torchrun send before they end a job."""
EXIT_REQUEUE = 75
"""Exit code of a run that was preempted and saved: "temporary failure, try again", EX_TEMPFAIL in sysexits.h."""
EXIT_LOST = 1
GRACE_SECONDS = 20.0  # for a collective to end after SIGTERM; torchrun ends a process 30 s after it
SPARE_SECONDS = 10.0  # beyond twice the time-out: backends that give up by themselves do so before
LOOK_SECONDS = 1.0


class Stop:
    """Records the signals in `SIGNALS` while it is entered, instead of ending at once; and ends this process if it hangs.

    Python runs signal handlers on the main thread, between two instructions, so they do not run while that thread waits for a
    collective. Therefore a thread of its own does both.

    Args:
        timeout_seconds: after which a collective has failed.
        last_words: makes the message to print before a hanging process is ended; it may take a while.
    """

    def __init__(self, timeout_seconds: float, last_words: Callable[[str], str]) -> None:
        self.number = 0
        """Number of the received signal, 0 for none."""
        self.begun = False
        """The first step is done: from now on a signal makes a checkpoint."""
        self._starting = False
        self._limit = 2 * timeout_seconds + SPARE_SECONDS
        self._last_words = last_words
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._wakeup = -1
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._look, name="limits of waiting", daemon=True)

    @property
    def name(self) -> str:
        """Name of the received signal."""
        return signal.Signals(self.number).name if self.number else "no signal"

    def __enter__(self) -> Stop:
        self._theirs.setblocking(False)
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        self._theirs.close()  # ends the thread
        self._thread.join()
        self._ours.close()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Ends the run at a signal, at once, while nothing is there to be saved: data are read, or the model is built.

        Python goes on with a read that a signal interrupted, unless the handler raises; so it does.

        Raises:
            Preempted: a signal came.
        """
        self._starting = True
        try:
            self._end_start()
            yield
        except Exception:
            if self.number:  # the interrupted code may have turned it into an error of its own
                raise Preempted(self._before_start()) from None
            raise
        finally:
            self._starting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._end_start()

    def _end_start(self) -> None:
        # In a collective, the other ranks wait for this one: the thread ends it if they wait for too long.
        if self.number and self._starting and in_flight.oldest() is None:
            raise Preempted(self._before_start())

    def _before_start(self) -> str:
        return f"the run was preempted by signal {self.number} before its first step: nothing is lost, start it again"

    def _look(self) -> None:
        while True:
            if select.select([self._ours], [], [], LOOK_SECONDS)[0]:
                numbers = self._ours.recv(64)
                if not numbers:
                    return
                for number in set(numbers) & set(SIGNALS):
                    self.number, self._since = number, time.monotonic()
            operation, now = in_flight.oldest(), time.monotonic()
            if operation is None:
                if self.number and not self.begun and now - self._since > GRACE_SECONDS:
                    print(f"dist-ssn: {self._before_start()}", file=sys.stderr, flush=True)
                    os._exit(EXIT_REQUEUE)  # a read in the kernel, or other code that returns to no handler
                continue
            after_signal = self.number == signal.SIGTERM and now - max(operation.began, self._since) > GRACE_SECONDS
            if after_signal or now - operation.began > self._limit:
                why = f"{GRACE_SECONDS:g} s after {self.name}" if after_signal else "its time is up"
                print(f"dist-ssn: {self._last_words(why)}", file=sys.stderr, flush=True)
                os._exit(EXIT_LOST)  # no exception reaches the main thread while it waits
