"""The beginning of local updates: who the workers are, and one worker's values for all."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.errors import UserError
from dist_ssn.sharing.bases import sent_at_the_start
from dist_ssn.sync.reports import Workers
from dist_ssn.sync.trained import values_of
from dist_ssn.sync.transport import Transport


def workers_of(
    group: dist.ProcessGroup | Transport | None,
    device: torch.device,
    island: dist.ProcessGroup | None = None,
    sharded: bool = False,
) -> Workers:
    """The workers of a process group; this process alone without torch.distributed.

    With a transport, only the changes travel through it; all else goes through the default process group.

    Raises:
        UserError: this process is not in the group, or there is no torch.distributed, and a group or a launcher of several.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise UserError(
                "LocalUpdates got a group, but torch.distributed is not initialized: init_process_group comes first, also over MPI"
            )
        if (size := os.environ.get("WORLD_SIZE", "1")).isdigit() and int(size) > 1:
            raise UserError(
                f"the launcher has started {size} processes (WORLD_SIZE), and torch.distributed is not initialized, so that "
                "nothing would be averaged: call torch.distributed.init_process_group before LocalUpdates is made"
            )
        return Workers((0,), 0, None, None, device)
    rank = dist.get_rank()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise UserError(_not_in(rank))
    if group is not None and not isinstance(group, dist.ProcessGroup) and not hasattr(group, "ranks"):  # of a Transport
        raise UserError(f"group must be a torch.distributed process group or None, got {type(group).__name__}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if (group.ranks, group.rank) != (dist.get_world_size(), dist.get_rank()):
            raise UserError(
                f"the transport that LocalUpdates got has rank {group.rank} of {group.ranks}, and torch.distributed has rank "
                f"{dist.get_rank()} of {dist.get_world_size()}: both must have the same processes in the same order"
            )
        group = None
    if group is not None and dist.get_rank(group) < 0:
        raise UserError(_not_in(rank))
    leader = None if island is None or sharded else dist.get_process_group_ranks(island)[0]
    return Workers(tuple(dist.get_process_group_ranks(group)), rank, group, island, device, leader)


def _not_in(rank: int) -> str:
    return f"rank {rank} is not in the group that LocalUpdates got: give each process a group that it belongs to"


def came_too_late(workers: Workers) -> str | None:
    """A sentence if torch.distributed was initialized after this process had begun alone."""
    if workers.count > 1 or workers.group is not None or not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size() == 1:
        return None
    return (
        f"torch.distributed has {dist.get_world_size()} processes, and was initialized after LocalUpdates was made, so that "
        "nothing would be averaged: call init_process_group first"
    )


def forms_of(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Name, shape and dtype of a model's parameters and buffers, in the order in which the first worker sends them."""
    whole = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor.shape, tensor.dtype) for name, tensor in whole]


def send_from_first(model: nn.Module, workers: Workers) -> None:
    """Sets all parameters and buffers to those of the first worker, by one broadcast per dtype; a second one in an island.

    Values that `share(keep=True)` keeps are not sent; they are equal already (`reports.require_same`).
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in map(values_of, sent_at_the_start(model)):  # of a sharded one its shard, to the same shard elsewhere
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        if workers.count > 1 and workers.leader in (None, workers.rank):
            dist.broadcast(flat.view(torch.uint8), src=workers.ranks[0], group=workers.group)
        if workers.leader is not None:
            dist.broadcast(flat.view(torch.uint8), src=workers.leader, group=workers.island)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))
