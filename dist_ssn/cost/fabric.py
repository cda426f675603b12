"""The processes of a job and their links: time of an all-reduce, by algorithm. Pure arithmetic.

Letters: S bytes that each process hands in, n processes, m nodes of g processes each.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dist_ssn.cluster import Cluster, Link
from dist_ssn.cost.network import all_reduce_seconds

ALGORITHMS = ("ring", "trees", "hierarchical")


@dataclass(frozen=True)
class Fabric:
    """Processes and their links. The processes of a node share the link `between`.

    Args:
        nodes: m.
        per_node: g.
        within: link between processes of one node.
        between: link of a node to the others.
        algorithm: of ALGORITHMS, or "best", like a library that chooses by size (NCCL).
    """

    nodes: int
    per_node: int
    within: Link
    between: Link
    algorithm: str = "ring"

    @property
    def processes(self) -> int:
        """Number of processes, n."""
        return self.nodes * self.per_node

    @property
    def link(self) -> Link:
        """The slowest link, which a ring or a tree through all processes waits for."""
        return self.between if self.nodes > 1 else self.within

    def at(self, bandwidth_mbit: float) -> Fabric:
        """The same processes, with another bandwidth of `link`, in Mbit/s."""
        link = dataclasses.replace(self.link, bandwidth_mbit=bandwidth_mbit)
        return dataclasses.replace(self, **{"between" if self.nodes > 1 else "within": link})

    def all_reduce_seconds(self, payload: float, algorithm: str | None = None) -> float:
        """Time of an all-reduce, in seconds.

        - ring: 2 (n - 1) rounds, see `network.all_reduce_seconds`.
        - trees: two binary trees, each for half of S, up and down: 2 log2(n) rounds and 2 S on the wire. The time to fill the
          pipelines is left out.
        - hierarchical: reduce-scatter within nodes, rings of S/g between them, all-gather within nodes.

        Args:
            payload: S.
            algorithm: of ALGORITHMS, or "best"; None: the fabric's.

        Source: Sanders, Speck & Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (trees).
        """
        algorithm = algorithm or self.algorithm
        if algorithm == "best":
            return min(self.all_reduce_seconds(payload, one) for one in ALGORITHMS)
        if self.processes < 2:
            return 0.0
        if algorithm == "ring":
            return all_reduce_seconds(payload, self.processes, self.link)
        if algorithm == "trees":
            rounds = 2 * math.ceil(math.log2(self.processes))
            return rounds * self.link.latency_seconds + 2 * payload / self.link.bytes_per_second
        # Each ring between nodes carries its share, and the g rings of a node share its link.
        between = all_reduce_seconds(payload, self.nodes, self.between)
        return all_reduce_seconds(payload, self.per_node, self.within) + between


def fabric_of(cluster: Cluster, processes: int, per_node: int) -> Fabric:
    """A number of processes on nodes of the cluster's kind; the last node counts as full.

    Args:
        cluster: gives the links.
        processes: n.
        per_node: processes of a node, which the cluster may leave to the number of GPUs.
    """
    g = min(per_node, processes)
    # On GPUs, NCCL chooses by size; gloo and MPI's larger messages go round a ring.
    algorithm = "best" if cluster.processes_per_node == "gpu" else "ring"
    return Fabric(math.ceil(processes / g), g, cluster.within, cluster.between, algorithm)
