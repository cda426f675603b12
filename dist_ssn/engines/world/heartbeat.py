"""Signs of life: they show which process is missing when a collective does not end.

A thread of each process writes some 100 bytes to the key-value store of the rendezvous every few seconds. They are read only after
a collective has failed. A process that is killed, stopped or cut off writes no more signs; a slow process still does.
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

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # torch documents it there

from dist_ssn.comm import in_flight
from dist_ssn.engines.world.join import World
from dist_ssn.errors import Preempted, RanksLost, UserError, describe

SOONEST, LATEST = 0.5, 5.0  # seconds between two signs of life
ANSWER_SECONDS = 10  # in which the store must answer
ROUNDS = 2.5  # number of signs that a process may miss before it counts as silent
_MARKS = ("gloo", "closed by peer", "Connection reset", "Timed out waiting", "NCCL", "Broken pipe")

_SOURCE = re.compile(r"\[\S+\.cc:\d+\] ")  # position in gloo's source, at the start of its messages


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Args:
        count: number of signs so far.
        host: name of the process's host.
        step: number of steps that the process has made.
        started: number of collectives that it has started.
        ended: reason for its end; None while it runs.
        lost: it ends because other processes are missing.
    """

    count: int
    host: str
    step: int
    started: int
    ended: str | None = None
    lost: bool = False


class Heartbeat:
    """Gives signs of life while it is entered, and names the missing processes when a collective fails.

    Args:
        world: this process among the job's.
        timeout_seconds: after which a collective counts as failed.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world = world
        self.seconds = min(LATEST, max(SOONEST, timeout_seconds / 10))
        self.step = 0
        """Number of steps that were made; the training loop sets it."""
        self._count = 0
        self._host = socket.gethostname()
        self._ends = threading.Event()
        self._store: TCPStore | None = None
        self._thread = threading.Thread(target=self._live, name="signs of life", daemon=True)

    def __enter__(self) -> Heartbeat:
        in_flight.forget_failures()
        if self.world.world_size > 1 and self.world.store is not None:
            # A connection of its own, because the process may be waiting on the process group's.
            host, port = self.world.store
            self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS))
            self._write()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER_SECONDS)

    @contextmanager
    def explaining_failures(self, advice: Callable[[], str]) -> Iterator[None]:
        """Turns the failure of a collective inside into one message that names the missing processes and the collective.

        Args:
            advice: makes the last clause of the message, how to resume.

        Raises:
            RanksLost: a collective has failed.
        """
        try:
            yield
        except (UserError, Preempted):
            raise  # all ranks raise it
        except BaseException as error:
            failed = _of_a_collective(error)
            self._announce_end(describe(error), lost=failed)
            if not failed:
                raise
            raise RanksLost(f"{self.missing(str(error))}; {advice()}") from error

    def missing(self, reason: str) -> str:
        """Message that names the processes missing in the collective that failed or hangs; takes a few seconds.

        Args:
            reason: the error's text.
        """
        operation = in_flight.first_failed() or in_flight.oldest() or in_flight.last_started()
        what = f"the {operation}" if operation is not None else "a collective"
        began = f", {time.monotonic() - operation.began:.0f} s after it began" if operation is not None else ""
        first = _SOURCE.sub("", (reason.strip().splitlines() or [""])[0]).partition(". This is typically")[0]
        return (
            f"rank {self.world.rank} gave up {what} after step {self.step}{began}: "
            f"{self._missing_ranks(operation.number if operation is not None else 0)} ({first})"
        )

    def _missing_ranks(self, number: int) -> str:
        if self._store is None:
            return "which rank is missing is not known"
        before, now = self._signs(), None
        if before is not None:
            time.sleep(ROUNDS * self.seconds)
            now = self._signs()
        if before is None or now is None:
            assert self.world.store is not None
            host, port = self.world.store
            why = "the launcher there has ended, or the host or the network is down"
            return f"nothing answers at {host}:{port}, the address of the rendezvous: {why}"
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
                f"rank {rank} on {sign.host} lives and has not reached it (it has made {sign.step} steps)"
                for rank, sign in sorted(now.items())
                if rank != self.world.rank and not sign.lost and sign.started < number
            ]
        unheard = [str(rank) for rank in range(self.world.world_size) if rank not in now]
        found += [f"rank {', '.join(unheard)} never gave a sign of life"] if unheard else []
        return "; ".join(found) or "all ranks live, so the network between some of them has failed"

    def _live(self) -> None:
        while not self._ends.wait(self.seconds):
            try:
                self._write()
            except RuntimeError:
                return  # the store is gone; the other processes notice that no more signs come

    def _write(self, **end: Any) -> None:
        assert self._store is not None
        self._count += 1
        last = in_flight.last_started()
        sign = Sign(self._count, self._host, self.step, last.number if last is not None else 0, **end)
        self._store.set(self._key(self.world.rank), json.dumps(vars(sign)))

    def _announce_end(self, reason: str, lost: bool) -> None:
        self._ends.set()
        if self._store is not None:
            _within(ANSWER_SECONDS, lambda: self._write(ended=reason, lost=lost))

    def _signs(self) -> dict[int, Sign] | None:
        """The last sign of each rank; None if the store does not answer."""
        store = self._store
        if store is None:
            return None

        def ask() -> dict[int, Sign]:
            ranks = [rank for rank in range(self.world.world_size) if store.check([self._key(rank)])]
            return {rank: Sign(**json.loads(store.get(self._key(rank)))) for rank in ranks}

        return _within(ANSWER_SECONDS, ask)

    def _key(self, rank: int) -> str:
        return f"dist_ssn/{self.world.rendezvous_id}/life/{rank}"


def _of_a_collective(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    if any(mark in str(error) for mark in _MARKS):
        return True
    time.sleep(0.2)  # the thread that records a failure may do so after the exception
    return in_flight.first_failed() is not None


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """The result of `action`; None if it fails, or takes longer (a connection to a dead host waits for minutes)."""
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
