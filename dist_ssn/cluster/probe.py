"""Measures the links between the processes of a running job: latency and bandwidth, within nodes and between them.

Pairs of ranks take turns, while all others wait: on an idle network a pair has its link to itself.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist

from dist_ssn.cluster.file import cluster_to_yaml
from dist_ssn.cluster.types import Cluster, Launcher, Link, Rendezvous
from dist_ssn.engines import World

SMALL, FIRST, LARGEST = (
    8,
    1 << 18,
    1 << 26,
)  # bytes of a message: for latency; for bandwidth from the first to the largest
ROUNDS, LEAST_ROUNDS, WARM_UP = 500, 20, 10  # small messages, there and back
LONGEST = 3.0  # seconds that they may take, if that leaves LEAST_ROUNDS
TRANSFERS = 5  # large messages, after one
ENOUGH = 0.2  # seconds that a large message should take
MAX_PAIRS = 8  # of each kind


@dataclass(frozen=True)
class Measured:
    """Measurement of one pair of ranks, `within` a node or between two.

    least_us: of all round trips, half the shortest; far below the latency, it tells that the processors were busy
    """

    within: bool
    latency_us: float
    least_us: float
    bandwidth_mbit: float


@dataclass(frozen=True)
class Probe:
    """A measured cluster, and how it was measured, in words for the top of its file."""

    cluster: Cluster
    comment: str

    def to_yaml(self) -> str:
        """Text of the cluster's file."""
        """The measured cluster as the text of a cluster file."""
        return cluster_to_yaml(self.cluster, self.comment)


def probe(world: World) -> Probe:
    """Measures the links between the ranks of a group; every rank calls it, and gets the same.

    Takes a few seconds per pair, and at most MAX_PAIRS pairs of each kind.
    """
    nodes = _gather(world, _node_id())
    node_of = [sorted(set(nodes), key=nodes.index).index(node) for node in nodes]  # numbered by their first rank
    mine: list[Measured] = []
    for a, b in chosen_pairs(node_of):
        if world.rank in (a, b):
            latency, least = _latency(world, b if world.rank == a else a, first=world.rank == a)
            bandwidth = _bandwidth(world, b if world.rank == a else a, latency, first=world.rank == a)
            if world.rank == a:
                mine.append(Measured(node_of[a] == node_of[b], latency * 1e6, least * 1e6, bandwidth * 8 / 1e6))
        _barrier(world)
    everybody = list(itertools.chain.from_iterable(_gather(world, mine)))
    return Probe(_cluster(world, node_of, everybody), _comment(world, node_of, everybody))


def chosen_pairs(node_of: Sequence[int], most: int = MAX_PAIRS) -> list[tuple[int, int]]:
    """At most `most` pairs of ranks within nodes, and as many between them, spread evenly over all that there are."""
    pairs = list(itertools.combinations(range(len(node_of)), 2)) if len(node_of) <= 256 else _neighbours(len(node_of))
    within = [pair for pair in pairs if node_of[pair[0]] == node_of[pair[1]]]
    between = [pair for pair in pairs if node_of[pair[0]] != node_of[pair[1]]]
    return [
        kind[i * len(kind) // min(most, len(kind))] for kind in (within, between) for i in range(min(most, len(kind)))
    ]


def _neighbours(ranks: int) -> list[tuple[int, int]]:
    """The ring's pairs, where all pairs would be too many to list."""
    return [(rank, rank + 1) for rank in range(ranks - 1)]


def _node_id() -> str:
    """Name of this machine and network namespace: equal for two processes that reach each other without a network."""
    parts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"),
        lambda: os.readlink("/proc/self/ns/net"),
    ):
        try:
            parts.append(read())
        except OSError:  # not Linux: the name has to do
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _latency(world: World, peer: int, *, first: bool) -> tuple[float, float]:
    """Seconds of one small message, one way: half the median, and half the shortest, of there and back."""
    message = torch.zeros(SMALL, dtype=torch.uint8, device=world.device)

    def rounds(number: int) -> list[float]:
        seconds = []
        for _ in range(number):
            start = time.perf_counter()
            if first:
                dist.send(message, peer)
                dist.recv(message, peer)
            else:
                dist.recv(message, peer)
                dist.send(message, peer)
            _wait_for_device(world)
            seconds.append((time.perf_counter() - start) / 2)
        return seconds

    once = 2 * statistics.median(rounds(WARM_UP))
    number = _agreed(world, min(ROUNDS, max(LEAST_ROUNDS, LONGEST // once)), peer, first=first)
    seconds = rounds(int(number))
    return statistics.median(seconds), min(seconds)


def _bandwidth(world: World, peer: int, latency: float, *, first: bool) -> float:
    """Bytes per second that the first of the two can send, by the median of messages that take long enough.

    Two latencies, the message's and the answer's, are no part of it: a cost model adds them again.
    """
    size = FIRST
    while True:
        # What was there before may have left a rate limit with credit: the second message counts.
        _send(world, peer, size, first=first)
        seconds = _agreed(world, _send(world, peer, size, first=first), peer, first=first)
        if seconds >= ENOUGH or size >= LARGEST:
            break
        size = min(LARGEST, max(2 * size, int(size * min(16, ENOUGH / seconds))))
    seconds = statistics.median(_send(world, peer, size, first=first) for _ in range(TRANSFERS))
    return size / (seconds - 2 * latency if seconds > 4 * latency else seconds)


def _send(world: World, peer: int, size: int, *, first: bool) -> float:
    """Seconds in which the first of the two sends `size` bytes to the other, and hears that they came.

    One sends at a time: gloo now and then carries two messages in opposite directions one after the other.
    """
    message, answer = (torch.zeros(n, dtype=torch.uint8, device=world.device) for n in (size, 1))
    _wait_for_device(world)
    start = time.perf_counter()
    if first:
        dist.send(message, peer)
        dist.recv(answer, peer)
    else:
        dist.recv(message, peer)
        dist.send(answer, peer)
    _wait_for_device(world)
    return time.perf_counter() - start


def _agreed(world: World, value: float, peer: int, *, first: bool) -> float:
    """The first one's value, on both."""
    message = torch.tensor([value], dtype=torch.float64, device=world.device)
    if first:
        dist.send(message, peer)
    else:
        dist.recv(message, peer)
    return message.item()


def _wait_for_device(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _barrier(world: World) -> None:
    dist.all_reduce(torch.zeros(1, device=world.device))
    _wait_for_device(world)


def _gather(world: World, value: object) -> list:
    values: list = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def _link(measured: Iterable[Measured]) -> Link | None:
    found = list(measured)
    if not found:
        return None
    latency = statistics.median(pair.latency_us for pair in found)
    bandwidth = statistics.median(pair.bandwidth_mbit for pair in found)
    return Link(rounded(latency), rounded(bandwidth))


def _cluster(world: World, node_of: Sequence[int], measured: Sequence[Measured]) -> Cluster:
    within = _link(pair for pair in measured if pair.within)
    between = _link(pair for pair in measured if not pair.within)
    either = within or between
    assert either is not None, "a group of several ranks has a pair"
    nodes = max(node_of) + 1
    per_node = max(node_of.count(node) for node in range(nodes))
    gpus = world.device.type == "cuda" and per_node == torch.cuda.device_count()
    launcher = launcher_of(os.environ)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    known = nodes > 1 and address and launcher in ("torchrun", "deepspeed")
    interface = (os.environ.get("NCCL_SOCKET_IFNAME" if gpus else "GLOO_SOCKET_IFNAME") or "").lstrip("=")
    return Cluster(
        nodes=nodes,
        processes_per_node="gpu" if gpus and launcher != "mpirun" else per_node,
        launcher=launcher,
        interface=interface if nodes > 1 and interface and not {",", "^"} & set(interface) else None,
        rendezvous=Rendezvous(address, int(port) if port.isdecimal() else 29500) if known else Rendezvous(),
        within=within or either,
        between=between or either,
    )


def launcher_of(environ: os._Environ[str] | dict[str, str]) -> Launcher:
    """Launcher that has started this process, by the variables that it sets."""
    if "SLURM_JOB_ID" in environ:
        return "slurm"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environ else "mpirun" if "WORLD_SIZE" not in environ else "torchrun"


def _comment(world: World, node_of: Sequence[int], measured: Sequence[Measured]) -> str:
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{os.cpu_count()} processors"
    lines = [
        f"Measured by `dist-ssn cluster probe`, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, with {dist.get_backend()}",
        f"(torch {torch.__version__}): ranks {world.world_size}, nodes {max(node_of) + 1} of {kind} ({platform.machine()}) each.",
        f"Of each pair of ranks: latency is half the median of up to {ROUNDS} round trips of {SMALL} bytes, bandwidth that of",
        f"{TRANSFERS} messages from the one to the other, of a size that takes about {ENOUGH:g} s (at most {LARGEST >> 20} MiB),",
        "less the latency of the message and of the answer.",
        "The figures below are the medians of all pairs:",
    ]
    for name, inside in (("within", True), ("between", False)):
        pairs = [pair for pair in measured if pair.within is inside]
        if pairs:
            latency, bandwidth = (
                sorted(rounded(getattr(pair, key)) for pair in pairs) for key in ("latency_us", "bandwidth_mbit")
            )
            lines.append(
                f"- {name}: pairs {len(pairs)}, latency {latency[0]:g} to {latency[-1]:g} µs (shortest single message "
                f"{rounded(min(pair.least_us for pair in pairs)):g} µs), {bandwidth[0]:g} to {bandwidth[-1]:g} Mbit/s"
            )
        else:
            lines.append(f"- {name}: there was no such pair")
    return "\n".join(lines)


def rounded(value: float) -> float:
    """To three digits: more are not the link's."""
    return float(f"{value:.3g}")
