"""An all-reduce as single messages on single links, played event by event: a second way to the figures of `dist_ssn.cost`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

from dist_ssn.cluster import Link


class Network:
    """Messages in the order in which they are sent; a link carries one at a time, and `sharers` of them at once share it evenly."""

    def __init__(self) -> None:
        self.free: dict[Hashable, float] = defaultdict(float)

    def send(self, way: Hashable, payload: float, link: Link, ready: float, sharers: int = 1) -> float:
        """When a message that is ready at a time has arrived."""
        gone = max(ready, self.free[way]) + sharers * payload / link.bytes_per_second
        self.free[way] = gone
        return gone + link.latency_seconds


def ring(
    ready: list[float], payload: float, link: Link, rounds: int, sharers: int = 1, name: Hashable = 0
) -> list[float]:
    """When each process of a ring has all, after `rounds` rounds of one part each to the next process."""
    network, n = Network(), len(ready)
    have = list(ready)
    for _ in range(rounds):
        arrived = [network.send((name, process), payload / n, link, have[process], sharers) for process in range(n)]
        # A process goes on when it has the part that comes next, and has added its own.
        have = [max(have[process], arrived[process - 1]) for process in range(n)]
    return have


def all_reduce(n: int, payload: float, link: Link) -> float:
    """By a ring: n - 1 rounds to reduce parts, n - 1 to gather them."""
    return max(ring([0.0] * n, payload, link, 2 * (n - 1))) if n > 1 else 0.0


def hierarchical(m: int, g: int, payload: float, within: Link, between: Link) -> float:
    """Reduce-scatter in each node, a ring for each part between the nodes, all-gather in each node."""
    have = [[0.0] * g for _ in range(m)]
    if g > 1:
        have = [ring(node, payload, within, g - 1, name=i) for i, node in enumerate(have)]
    if m > 1:
        rings = [ring([node[j] for node in have], payload / g, between, 2 * (m - 1), g, j) for j in range(g)]
        have = [[rings[j][i] for j in range(g)] for i in range(m)]
    if g > 1:
        have = [ring(node, payload, within, g - 1, name=i) for i, node in enumerate(have)]
    return max(latest(have))


def latest(have: Iterable[list[float]]) -> list[float]:
    return [max(node) for node in have]


def trees(n: int, payload: float, link: Link, parts: int) -> float:
    """Up and down one binary tree, in so many parts that follow each other. Each link carries what one of two trees would."""
    depth = (n - 1).bit_length()
    network = Network()
    ready = [0.0] * parts
    for hop in range(2 * depth):  # along the longest way: from the deepest leaf to the root, and back
        ready = [network.send(hop, payload / parts, link, when) for when in ready]
    return max(ready)
