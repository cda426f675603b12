"""What is known about a cluster, as one frozen and typed value; the keys of `clusters/*.yaml` are the fields below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LAUNCHERS = ("torchrun", "deepspeed", "mpirun", "slurm", "kubernetes")


@dataclass(frozen=True)
class Link:
    """What lies between two processes.

    Args:
        latency_us: microseconds that one small message takes, one way, from process to process
        bandwidth_mbit: Mbit/s that one process of a node can send over it, while the node's other processes are silent
    """

    latency_us: float
    bandwidth_mbit: float

    @property
    def latency_seconds(self) -> float:
        return self.latency_us / 1e6

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth_mbit * 1e6 / 8


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes meet.

    Args:
        address: name or address of node 0, as the other nodes reach it; None: not known before the start
        port: a free TCP port there
    """

    address: str | None = None
    port: int = 29500


@dataclass(frozen=True)
class Cluster:
    """A cluster.

    Args:
        nodes: number of nodes
        processes_per_node: processes to start on each; "gpu": one per GPU
        within: link between two processes of one node
        between: link between two processes of different nodes
        launcher: what starts the processes, one of LAUNCHERS
        interface: network device between the nodes; None: gloo, NCCL or MPI choose
        rendezvous: where the processes meet
        environment: variables of every process, beside those of the launcher
        image: container image (kubernetes)
        emulated: the lab can build it on one machine: each node a network namespace, `between` a rate limit
        delay_ms: milliseconds by which the lab delays every packet, one way; part of between.latency_us
        loss_percent: percentage of the packets that the lab drops
        name: of the file, without its ending
    """

    nodes: int
    processes_per_node: int | str
    within: Link
    between: Link
    launcher: str = "torchrun"
    interface: str | None = None
    rendezvous: Rendezvous = Rendezvous()
    environment: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    emulated: bool = False
    delay_ms: float = 0.0
    loss_percent: float = 0.0
    name: str = field(default="cluster", compare=False)

    def link(self, nodes: int) -> Link:
        """The link that a collective over so many nodes waits for."""
        return self.between if nodes > 1 else self.within
