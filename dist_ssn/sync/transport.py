"""The network of an exchange: three collectives on flat tensors, over a torch process group or over MPI.

Letters: n = ranks, S = bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssn.comm.in_flight import waiting
from dist_ssn.comm.meter import beside, book, purpose
from dist_ssn.errors import UserError
from dist_ssn.torch_private import all_gather_single, number_of_groups, timeout_of


class Transport(Protocol):
    """Collectives among ranks; each waits until it is done, and is booked in the active meters.

    Attributes:
        rank: this process's rank among them.
        ranks: n.
    """

    rank: int
    ranks: int

    def all_gather(self, data: Tensor, name: str) -> Tensor:
        """Gathers equally many bytes from each rank.

        Args:
            data: uint8 [S].
            name: purpose in the ledger.

        Returns:
            uint8 [n, S], by rank.
        """
        ...

    def all_to_all(self, data: Tensor, sizes: Sequence[int], name: str) -> Tensor:
        """Sends each rank its piece, and receives the pieces that the ranks have for this one.

        Args:
            data: uint8, the pieces one behind the other.
            sizes: bytes of each rank's piece; the same on all ranks.
            name: purpose in the ledger.

        Returns:
            uint8 [n, sizes[rank]], by sender.
        """
        ...

    def all_reduce(self, data: Tensor, name: str) -> Tensor:
        """Sums over the ranks.

        Args:
            data: float32 [size]; it may be overwritten.
            name: purpose in the ledger.
        """
        ...

    def twin(self) -> Transport:
        """A transport between the same ranks whose messages have an order of their own; all ranks ask for it together.

        Its collectives may be issued by another thread, while this one's go on.
        """
        ...


class GroupTransport:
    """Collectives of a torch process group; a single rank without `torch.distributed`.

    Args:
        group: the process group; None is the default one.
        background: the caller is a thread beside the one that trains, so that its waiting is nobody's exposed time.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, background: bool = False) -> None:
        single = not dist.is_available() or not dist.is_initialized()
        self.group = group
        self.rank = 0 if single else dist.get_rank(group)
        self.ranks = 1 if single else dist.get_world_size(group)
        self._background = background
        if self.rank < 0:
            raise UserError("this process is not a member of the process group that it was given")

    def all_gather(self, data: Tensor, name: str) -> Tensor:
        """See `Transport`."""
        found = data.new_empty(self.ranks, data.numel())
        with purpose(name):
            self._wait(all_gather_single, found.view(-1), data)
        return found

    def all_to_all(self, data: Tensor, sizes: Sequence[int], name: str) -> Tensor:
        """See `Transport`."""
        own = sizes[self.rank]
        found = data.new_empty(self.ranks, own)
        with purpose(name):
            self._wait(dist.all_to_all_single, found.view(-1), data, [own] * self.ranks, list(sizes))
        return found

    def all_reduce(self, data: Tensor, name: str) -> Tensor:
        """See `Transport`."""
        with purpose(name):
            self._wait(dist.all_reduce, data)
        return data

    def twin(self) -> GroupTransport:
        """See `Transport`."""
        if self.ranks == 1:
            return self
        whole = self.group is None or self.group is dist.group.WORLD
        # Trap: without a timeout of its own a new group has torch's default, half an hour.
        timeout = timeout_of(self.group or dist.group.WORLD)  # pyright: ignore[reportArgumentType]
        with purpose("initialization"):
            group: Any = dist.new_group(timeout=timeout) if whole else self._group_of_members(timeout)
        return GroupTransport(group, background=True)

    def _group_of_members(self, timeout: timedelta) -> Any:
        """A new process group, for which only its members call.

        Trap: torch names it by its members and by the number of groups that the caller is in already. Members with different
        numbers would wait for each other until the time-out, so those with fewer groups first make groups of their own.
        """
        numbers = [0] * self.ranks
        dist.all_gather_object(numbers, number_of_groups(), group=self.group)
        for _ in range(max(numbers) - number_of_groups()):
            dist.new_group([dist.get_rank()], use_local_synchronization=True)
        ranks = dist.get_process_group_ranks(self.group)
        return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)

    def _wait(self, collective: Callable[..., Any], *arguments: Any) -> None:
        if self._background:  # the meter takes a wait inside of a collective for exposed time
            with beside():
                collective(*arguments, group=self.group, async_op=True).wait()
        else:
            collective(*arguments, group=self.group)


class MPITransport:
    """Collectives of mpi4py; tensors on another device pass through host memory.

    Args:
        comm: the communicator, `mpi4py.MPI.COMM_WORLD` or another. Its messages must come from one thread at a time.
        background: as in `GroupTransport`.
    """

    def __init__(self, comm: Any, *, background: bool = False) -> None:
        from mpi4py import MPI

        self.comm, self._mpi = comm, MPI
        self.rank, self.ranks = comm.rank, comm.size
        self._background = background

    def all_gather(self, data: Tensor, name: str) -> Tensor:
        """See `Transport`."""
        found = torch.empty(self.ranks, data.numel(), dtype=torch.uint8)
        self._call("all_gather", name, data.nbytes, lambda: self.comm.Allgather(_host(data), found.numpy()))
        return found.to(data.device)

    def all_to_all(self, data: Tensor, sizes: Sequence[int], name: str) -> Tensor:
        """See `Transport`."""
        own = sizes[self.rank]
        found = torch.empty(self.ranks, own, dtype=torch.uint8)
        send, receive = [_host(data), list(sizes)], [found.numpy(), [own] * self.ranks]
        self._call("all_to_all", name, data.nbytes, lambda: self.comm.Alltoallv(send, receive))
        return found.to(data.device)

    def all_reduce(self, data: Tensor, name: str) -> Tensor:
        """See `Transport`."""
        values = data.cpu()
        self._call("all_reduce", name, data.nbytes, lambda: self.comm.Allreduce(self._mpi.IN_PLACE, values.numpy()))
        return values.to(data.device)

    def twin(self) -> MPITransport:
        """See `Transport`.

        Raises:
            UserError: this MPI cannot be called by two threads at a time.
        """
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            raise UserError("an exchange beside the training needs an MPI with MPI_THREAD_MULTIPLE: use average()")
        return MPITransport(self.comm.Dup(), background=True)

    def _call(self, collective: str, name: str, payload: int, call: Callable[[], Any]) -> None:
        """Calls MPI, and books what the meters cannot see."""
        started = time.perf_counter()
        with waiting(collective, name):
            call()
        exposed = 0.0 if self._background else time.perf_counter() - started
        book(collective, name, payload, self.ranks, exposed=exposed)


def _host(data: Tensor) -> Any:
    return data.contiguous().cpu().numpy()
