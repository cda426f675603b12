"""Collectives of this process that have started and not ended: a process that hangs waits for one of them.

A meter fills this list, so it is empty unless a `CommMeter` is entered. Collectives whose end cannot be observed (on CUDA, and
gloo's reduce-scatter) count as ended as soon as they have started.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operation:
    """A collective in flight.

    Args:
        number: number of collectives that this process has started, this one included.
        collective: its name in the ledger.
        purpose: one of `ledger.PURPOSES`.
        began: seconds, by `time.monotonic`.
    """

    number: int
    collective: str
    purpose: str
    began: float = field(compare=False)

    def __str__(self) -> str:
        return f"{self.collective} of {self.purpose}"


_lock = threading.Lock()
_count = itertools.count(1)
_open: dict[int, Operation] = {}  # in the order in which they have started
_failed: Operation | None = None  # the first one
_last: Operation | None = None


def started(collective: str, purpose: str) -> Operation:
    """Records a collective before it starts."""
    global _last
    with _lock:
        _last = Operation(next(_count), collective, purpose, time.monotonic())
        _open[_last.number] = _last
        return _last


def ended(operation: Operation, failed: bool = False) -> None:
    """Records that it has ended; a second call does no harm."""
    global _failed
    with _lock:
        _open.pop(operation.number, None)
        if failed and _failed is None:
            _failed = operation


@contextmanager
def waiting(collective: str, purpose: str) -> Iterator[None]:
    """Surrounds a wait for a collective that no meter sees."""
    operation = started(collective, purpose)
    try:
        yield
    finally:
        ended(operation)


def oldest() -> Operation | None:
    """The collective that has been in flight for longest."""
    with _lock:
        return next(iter(_open.values()), None)


def first_failed() -> Operation | None:
    """The first collective that failed since `forget_failures`."""
    return _failed


def last_started() -> Operation | None:
    """The newest one, ended or not."""
    return _last


def forget_failures() -> None:
    """Empties the list when a new run begins."""
    global _failed
    with _lock:
        _failed = None
        _open.clear()
