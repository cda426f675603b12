"""How long collectives take on a link, and how much of that a backward hides. Pure arithmetic.

Letters: S bytes that each process hands in, n processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ssn.cluster import Link
from dist_ssn.comm.ledger import RING_BYTES


def all_reduce_seconds(payload: float, processes: int, link: Link) -> float:
    """Time of a ring all-reduce of S bytes: 2 (n - 1) rounds, and S · 2 (n - 1)/n bytes on the wire of each process.

    Source: Thakur, Rabenseifner & Gropp 2005, section 4.
    """
    if processes < 2:
        return 0.0
    on_wire = RING_BYTES["all_reduce"](payload, processes)  # type: ignore[arg-type]
    return 2 * (processes - 1) * link.latency_seconds + on_wire / link.bytes_per_second


@dataclass(frozen=True)
class Sent:
    """A message: when it can start, in seconds, and how long it takes."""

    ready: float
    seconds: float


def lay_over(messages: Sequence[Sent], end: float, slowdown: float = 0.0) -> tuple[float, float]:
    """Messages, which share one link in this order, laid over a computation that would end at `end` without them.

    Args:
        slowdown: seconds of compute that a second of communication beside it costs: what is ready later is ready later still.

    Returns:
        when the computation ends, and how long it then waits for the last message.
    """
    free = lost = 0.0
    for message in messages:
        start = max(free, message.ready + lost)
        free = start + message.seconds
        lost += slowdown * max(0.0, min(free, end + lost) - start)
    return end + lost, max(0.0, free - end - lost)
