"""Islands: processes with fast links between them, which average on every step, while local updates run between islands."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssn.comm.meter import purpose
from dist_ssn.errors import UserError, unknown_choice
from dist_ssn.sync.exchange import Exchange

_NAME_BYTES = 128


@dataclass(frozen=True)
class Islands:
    """The process groups of this process.

    Args:
        within: the processes of its island.
        across: one process of each island: those at the same place in theirs.
    """

    within: dist.ProcessGroup
    across: dist.ProcessGroup


def islands_of(kind: str) -> Islands:
    """The islands of all processes; all of them call it together.

    Args:
        kind: a key of `KINDS`: "node" makes one island of each node.

    Raises:
        UserError: unknown kind, less than two islands, or islands of different sizes. All processes raise it.
    """
    if kind not in KINDS:
        raise UserError(unknown_choice("kind of island", kind, KINDS))
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError("islands need several processes: init_process_group comes first, as torchrun's processes do")
    with purpose("initialization"):
        names = _names_of_all(KINDS[kind]())
        by_name: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            by_name.setdefault(name, []).append(rank)
        check_islands(by_name)
        mine, groups = dist.get_rank(), {}
        members = list(by_name.values())
        # All processes make all groups, in one order.
        for what, lists in (("within", members), ("across", list(zip(*members, strict=True)))):
            for ranks in lists:
                group: Any = dist.new_group(list(ranks))
                if mine in ranks:
                    groups[what] = group
    return Islands(**groups)


def check_islands(by_name: dict[str, list[int]]) -> None:
    """Checks that there are several islands, of one size.

    Args:
        by_name: name → ranks.

    Raises:
        UserError: there is only one, or their sizes differ.
    """
    if len(by_name) < 2:
        name, ranks = next(iter(by_name.items()))
        raise UserError(
            f"all {len(ranks)} processes are on one node ({name}), so there is nothing between nodes: leave out within, or start "
            "processes on at least two nodes"
        )
    if len({len(ranks) for ranks in by_name.values()}) > 1:
        sizes = ", ".join(f"{len(ranks)} on {name}" for name, ranks in by_name.items())
        raise UserError(f"the nodes have different numbers of processes ({sizes}): start equally many on each")


def _node() -> str:
    """Name of this process's node: torchrun's number of it, or else the host's name."""
    number = os.environ.get("GROUP_RANK")
    return socket.gethostname() if number is None or "LOCAL_WORLD_SIZE" not in os.environ else f"node {number}"


KINDS: dict[str, Callable[[], str]] = {"node": _node}
"""Kind of island → the name of this process's."""


def _names_of_all(name: str) -> Sequence[str]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [bytes(row.tolist()).decode(errors="replace").strip() for row in found]


class LeaderExchange:
    """An `Exchange` between islands whose processes hold the same: one of each exchanges, and gives the mean to the others.

    Args:
        exchange: of this process with those at its place in the other islands.
        island: the processes of its island.
    """

    def __init__(self, exchange: Exchange, island: dist.ProcessGroup) -> None:
        self._exchange, self._island = exchange, island
        self._leader = dist.get_process_group_ranks(island)[0]
        self._leads = dist.get_rank() == self._leader
        self.codec, self.route, self.size = exchange.codec, exchange.route, exchange.size
        self.packed_bytes = exchange.packed_bytes if self._leads else 0

    def average(self, change: Tensor) -> Tensor:
        """See `Exchange`."""
        return self._spread(self._exchange.average(change) if self._leads else torch.empty_like(change))

    def start(self, change: Tensor) -> Spread:
        """See `Exchange`."""
        self._exchange.prepare()  # on all: torch names later groups by the number of those that a process is in
        pending = self._exchange.start(change) if self._leads else None
        return Spread(lambda: self._spread(torch.empty_like(change) if pending is None else pending.wait()))

    def _spread(self, mean: Tensor) -> Tensor:
        with purpose("synchronization"):
            dist.broadcast(mean, src=self._leader, group=self._island)
        return mean

    def forget(self) -> None:
        """See `Exchange`."""
        self._exchange.forget()

    def state_dict(self) -> dict[str, Any]:
        """See `Exchange`."""
        return self._exchange.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Exchange`."""
        self._exchange.load_state_dict(state)


@dataclass(frozen=True)
class Spread:
    """A mean that is on its way to the processes of an island.

    Args:
        wait: waits for it and gives it; once.
    """

    wait: Callable[[], Tensor]
