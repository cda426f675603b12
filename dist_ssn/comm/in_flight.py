"""Which collectives of this process have started and not ended: what it waits for, should it wait for ever.

A meter keeps this account, so there is one only while a `CommMeter` is entered. Collectives that nobody tells the end of (on CUDA,
and gloo's reduce-scatter) count as ended when they have started.
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
    """A collective under way. number: how many this process has started, this one included; began: by `time.monotonic`."""

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
    """Notes a collective before it starts."""
    global _last
    with _lock:
        _last = Operation(next(_count), collective, purpose, time.monotonic())
        _open[_last.number] = _last
        return _last


def ended(operation: Operation, failed: bool = False) -> None:
    """Notes that it has ended; a second time is no mistake."""
    global _failed
    with _lock:
        _open.pop(operation.number, None)
        if failed and _failed is None:
            _failed = operation


@contextmanager
def waiting(collective: str, purpose: str) -> Iterator[None]:
    """Put around a wait for a collective that no meter sees."""
    operation = started(collective, purpose)
    try:
        yield
    finally:
        ended(operation)


def oldest() -> Operation | None:
    """What has been under way for longest."""
    with _lock:
        return next(iter(_open.values()), None)


def first_failed() -> Operation | None:
    """The first collective that failed since `forget_failures`."""
    return _failed


def last_started() -> Operation | None:
    """The newest one, ended or not."""
    return _last


def forget_failures() -> None:
    """A new run begins."""
    global _failed
    with _lock:
        _failed = None
        _open.clear()
