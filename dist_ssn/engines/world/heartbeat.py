"""Who is missing, when a collective does not end: each process says now and then that it lives, and what it is doing.

They say so in the key-value store by which they have met, some 100 bytes every few seconds, on a thread. Nobody reads it until a
collective has failed. A process that is killed, stopped or cut off says nothing more; one that is only slow still does.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore

from dist_ssn.comm import in_flight as under_way
from dist_ssn.engines.world.join import World
from dist_ssn.errors import Preempted, RanksLost, UserError, told

SOONEST, LATEST = 0.5, 5.0  # seconds between two signs of life
ANSWER_SECONDS = 10  # in which the store must answer
ROUNDS = 2.5  # signs of life that a process may leave out before it counts as silent
_MARKS = ("gloo", "closed by peer", "Connection reset", "Timed out waiting", "NCCL", "Broken pipe")

_SOURCE = re.compile(r"\[\S+\.cc:\d+\] ")  # where in gloo's source a message comes from


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Args:
        count: of signs so far
        host: name of the process's host
        step: steps that it has made
        started: collectives that it has started
        ended: why it ends, if it does
        lost: it ends because others are missing
    """

    count: int
    host: str
    step: int
    started: int
    ended: str | None = None
    lost: bool = False


class Watch:
    """Gives signs of life while it is entered, and says who is missing when a collective fails.

    Args:
        timeout_seconds: after which a collective counts as failed.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world = world
        self.seconds = min(LATEST, max(SOONEST, timeout_seconds / 10))
        self.step = 0
        """Steps that were made: whoever trains sets it."""
        self._count = 0
        self._host = socket.gethostname()
        self._ends = threading.Event()
        self._store: TCPStore | None = None
        self._thread = threading.Thread(target=self._live, name="signs of life", daemon=True)

    def __enter__(self) -> Watch:
        under_way.forget_failures()
        if self.world.world_size > 1 and self.world.store is not None:
            # A connection of its own: on the group's, a process may be waiting.
            host, port = self.world.store
            self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS))
            self._say()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER_SECONDS)

    @contextmanager
    def blaming(self, advice: Callable[[], str]) -> Iterator[None]:
        """Turns the failure of a collective inside into one sentence that says who is missing, where and what for.

        Args:
            advice: how to go on, as half a sentence.

        Raises: RanksLost.
        """
        try:
            yield
        except (UserError, Preempted):
            raise  # all have the same to say
        except BaseException as error:
            failed = _of_a_collective(error)
            self._tell_end(told(error), lost=failed)
            if not failed:
                raise
            raise RanksLost(f"{self.missing(str(error))}; {advice()}") from error

    def missing(self, reason: str) -> str:
        """Who is missing in the collective that failed, or that has not ended; asks the store, which takes a few seconds."""
        operation = under_way.first_failed() or under_way.oldest() or under_way.last_started()
        what = f"the {operation}" if operation is not None else "a collective"
        began = f", {time.monotonic() - operation.began:.0f} s after it began" if operation is not None else ""
        first = _SOURCE.sub("", (reason.strip().splitlines() or [""])[0]).partition(". This is typically")[0]
        return (
            f"rank {self.world.rank} gave up {what} after step {self.step}{began}: "
            f"{self._who(operation.number if operation is not None else 0)} ({first})"
        )

    def _who(self, number: int) -> str:
        if self._store is None:
            return "which rank is missing is not known"
        before, now = self._signs(), None
        if before is not None:
            time.sleep(ROUNDS * self.seconds)
            now = self._signs()
        if before is None or now is None:
            assert self.world.store is not None
            host, port = self.world.store
            why = "the launcher there has ended, or the host or the way to it is down"
            return f"nobody answers at {host}:{port}, where the ranks meet: {why}"
        found = []
        for rank, sign in sorted(now.items()):
            if rank == self.world.rank:
                continue
            who = f"rank {rank} on {sign.host}"
            if sign.ended is not None and not sign.lost:
                found.append(f"{who} ended by {sign.ended}")
            elif sign.ended is None and sign.count == before[rank].count:
                found.append(f"{who} gives no sign of life: it was killed, is stopped, or cannot be reached")
        if not found:
            found = [
                f"rank {rank} on {sign.host} lives and has not come to it (it has made {sign.step} steps)"
                for rank, sign in sorted(now.items())
                if rank != self.world.rank and not sign.lost and sign.started < number
            ]
        unheard = [str(rank) for rank in range(self.world.world_size) if rank not in now]
        found += [f"rank {', '.join(unheard)} never said anything"] if unheard else []
        return "; ".join(found) or "all ranks live, so the network between some of them has failed"

    def _live(self) -> None:
        while not self._ends.wait(self.seconds):
            try:
                self._say()
            except RuntimeError:
                return  # the store is gone: the others see that nothing more is said

    def _say(self, **end: Any) -> None:
        assert self._store is not None
        self._count += 1
        last = under_way.last_started()
        sign = Sign(self._count, self._host, self.step, last.number if last is not None else 0, **end)
        self._store.set(self._key(self.world.rank), json.dumps(vars(sign)))

    def _tell_end(self, reason: str, lost: bool) -> None:
        self._ends.set()
        if self._store is not None:
            _within(ANSWER_SECONDS, lambda: self._say(ended=reason, lost=lost))

    def _signs(self) -> dict[int, Sign] | None:
        """The last sign of each rank; None when the store does not answer."""
        store = self._store
        if store is None:
            return None

        def ask() -> dict[int, Sign]:
            ranks = [rank for rank in range(self.world.world_size) if store.check([self._key(rank)])]
            return {rank: Sign(**json.loads(store.get(self._key(rank)))) for rank in ranks}

        return _within(ANSWER_SECONDS, ask)

    def _key(self, rank: int) -> str:
        return f"dist_ssn/{self.world.meeting}/life/{rank}"


def _of_a_collective(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    if any(mark in str(error) for mark in _MARKS):
        return True
    time.sleep(0.2)  # the thread that notes a failure may come later than the exception
    return under_way.first_failed() is not None


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """What `action` returns; None if it fails, or takes longer: a connection to a dead host waits for minutes."""
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append(action())
        except RuntimeError:
            answer.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
