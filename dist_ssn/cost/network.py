"""Time of collectives on a link, and the part of it that backward does not hide. Pure arithmetic.

Letters: S bytes that each process hands in, n processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ssn.cluster import Link
from dist_ssn.comm.ledger import RING_BYTES


def all_reduce_seconds(payload: float, processes: int, link: Link) -> float:
    """Seconds of a ring all-reduce of S bytes: 2 (n - 1) rounds, and S · 2 (n - 1)/n bytes on the wire of each process.

    Source: Thakur, Rabenseifner & Gropp 2005, section 4.
    """
    if processes < 2:
        return 0.0
    on_wire = RING_BYTES["all_reduce"](payload, processes)  # type: ignore[arg-type]
    return 2 * (processes - 1) * link.latency_seconds + on_wire / link.bytes_per_second


@dataclass(frozen=True)
class Sent:
    """A message's times, in seconds.

    Args:
        ready: the earliest start.
        seconds: its duration without compute beside it.
        drag: the additional duration beside compute.
    """

    ready: float
    seconds: float
    drag: float = 0.0


def exposed_seconds(messages: Sequence[Sent], end: float) -> float:
    """Seconds from `end`, when backward is done, until the last message has arrived; messages share one link in this order."""
    free = 0.0
    for message in messages:
        start, slow = max(free, message.ready), message.seconds + message.drag
        if start + slow <= end or not slow:
            free = start + slow
        else:  # the part that is not sent by `end` is sent at full speed
            travelled = max(0.0, end - start) / slow
            free = max(start, end) + (1 - travelled) * message.seconds
    return max(0.0, free - end)
