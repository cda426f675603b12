"""The beginning of local updates: who the workers are, and one worker's values for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_ssn.errors import UserError
from dist_ssn.sharing.bases import sent_at_the_start
from dist_ssn.sync.reports import Workers
from dist_ssn.sync.trained import Trained
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
        UserError: this process is not in the group, or there is a group and no torch.distributed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise UserError(
                "LocalUpdates got a group, but torch.distributed is not initialized: init_process_group comes first, also over MPI"
            )
        return Workers((0,), 0, None, None, device)
    if group is not None and not isinstance(group, dist.ProcessGroup) and not hasattr(group, "ranks"):  # of a Transport
        raise UserError(f"group must be a torch.distributed process group or None, got {type(group).__name__}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if (group.ranks, group.rank) != (dist.get_world_size(), dist.get_rank()):
            raise UserError(
                f"the transport that LocalUpdates got has rank {group.rank} of {group.ranks}, and torch.distributed has rank "
                f"{dist.get_rank()} of {dist.get_world_size()}: both must have the same processes in the same order"
            )
        group = None
    rank = dist.get_rank()
    if group is not None and dist.get_rank(group) < 0:
        raise UserError(
            f"rank {rank} is not in the group that LocalUpdates got: give each process a group that it belongs to"
        )
    leader = None if island is None or sharded else dist.get_process_group_ranks(island)[0]
    return Workers(tuple(dist.get_process_group_ranks(group)), rank, group, island, device, leader)


def send_from_first(model: nn.Module, trained: Sequence[Trained], workers: Workers) -> None:
    """Sets all parameters and buffers to those of the first worker, by one broadcast per dtype; a second one in an island.

    Values that `share(keep=True)` keeps are not sent; they are equal already (`reports.require_same`).
    """
    whole = [t.detach() for t in sent_at_the_start(model) if not isinstance(t, DTensor)]
    of_shards = [t.values for t in trained if isinstance(t.parameter, DTensor)]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in (*whole, *of_shards):
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        if workers.count > 1 and workers.leader in (None, workers.rank):
            dist.broadcast(flat.view(torch.uint8), src=workers.ranks[0], group=workers.group)
        if workers.leader is not None:
            dist.broadcast(flat.view(torch.uint8), src=workers.leader, group=workers.island)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))
