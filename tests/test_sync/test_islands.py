"""Islands: data parallelism within, local updates between; two islands of two train like two workers of double batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import CommMeter, LocalUpdates
from dist_ssn.errors import UserError
from dist_ssn.torch_private import number_of_groups
from testing.ranks import run_ranks
from tests.test_sync.test_local_updates import Tied, adam, batch, by_hand_nesterov, loss_of, written_out

distributed = pytest.mark.distributed
STEPS = 7


def _whole(model: nn.Module) -> Tensor:
    return torch.cat(
        [getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters() if p.requires_grad]
    )


def _islands(rank: int, n: int) -> dict[str, Any]:
    within = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    found: dict[str, Any] = {}
    for name in ("ddp", "fsdp"):
        for delay in (0, 1):
            model = Tied()
            model.frozen.data += rank // 2  # the start makes them equal
            if name == "ddp":
                wrapped: nn.Module = DistributedDataParallel(model, process_group=within)
            else:
                mesh = DeviceMesh.from_group(within, "cpu")
                wrapped = fully_shard(model, mesh=mesh)  # pyright: ignore[reportAssignmentType]
            optimizer = adam(model)
            with LocalUpdates(wrapped, optimizer, every=3, delay=delay, group=across) as local:
                for step in range(1, STEPS + 1):
                    optimizer.zero_grad()
                    loss_of(wrapped, batch(step, rank // 2, 2)[rank % 2 :: 2]).backward()
                    optimizer.step()
                with CommMeter() as meter:
                    local.synchronize()
            found[name, str(delay)] = _whole(model)
            found[name, str(delay), "bytes"] = meter.totals("synchronization").logical_bytes
    found["groups"] = number_of_groups()
    found["refused"] = _refused(within, across)
    return found


def _refused(within: Any, across: Any) -> list[str]:
    sharded = fully_shard(Tied(), mesh=DeviceMesh.from_group(within, "cpu"))
    wrapped = DistributedDataParallel(Tied(), process_group=within)
    model: Any = sharded
    sentences = []
    for model, group in ((sharded, None), (wrapped, within)):
        with pytest.raises(UserError) as caught:
            LocalUpdates(model, torch.optim.SGD(model.parameters()), group=group)  # type: ignore[arg-type]
        sentences.append(str(caught.value))
    return sentences


@distributed
def test_two_islands_of_two_equal_two_workers_of_double_batch() -> None:
    ranks = run_ranks(_islands, 4)
    for delay in (0, 1):
        expected = written_out(Tied(), adam, 2, 3, by_hand_nesterov(0.7, 0.6), delay, 0, STEPS)[-1]
        for name in ("ddp", "fsdp"):
            for found in ranks:
                assert (found[name, str(delay)] - expected).abs().max() < 1e-6, (name, delay)
                assert torch.equal(found[name, str(delay)], ranks[0][name, str(delay)])
    reports, change = 2 * 6 * 8, 4 * 28
    for rank, found in enumerate(
        ranks
    ):  # of an island whose processes hold the same, one exchanges and tells the other
        assert found["ddp", "0", "bytes"] == reports + (2 * change if rank % 2 == 0 else change)
    assert sum(found["fsdp", "0", "bytes"] for found in ranks) == 4 * reports + 2 * change
    assert len({found["groups"] for found in ranks}) == 1  # torch names later groups by it
    for rank, found in enumerate(ranks):
        other = rank + 1 if rank % 2 == 0 else rank - 1
        assert found["refused"][0].startswith(f"FSDP2 averages over rank {other} on every step")
        assert found["refused"][1].startswith(f"DistributedDataParallel averages over rank {other} on every step")
