"""Validation on all ranks together."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.comm import CommMeter
from dist_ssn.comm.meter import purpose
from dist_ssn.engines import World
from dist_ssn.sharing.bank import banks_of
from dist_ssn.train.data import Task
from dist_ssn.train.recipe.schema import Recipe


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    world: World,
    meter: CommMeter,
    autocast: AbstractContextManager[object],
) -> dict[str, float]:
    """Means of the task's metrics over the validation samples of all ranks; "validation_" is put before each key."""
    equal_buffers(model, world)
    model.eval()
    sums: dict[str, Tensor] = {}
    for batch in task.validation(recipe.batch_size, world.rank, world.world_size, recipe.evaluate_batches):
        inputs, targets = (part.to(world.device, non_blocking=True) for part in batch)
        with autocast:
            found = task.metrics(model(inputs), targets)
        for key, value in found.items():
            sums[key] = sums.get(key, 0) + value.double()
    model.train()
    stacked = torch.stack([sums[key] for key in sorted(sums)])
    if world.world_size > 1:
        with meter.purpose("metrics"):
            dist.all_reduce(stacked)
    totals = dict(zip(sorted(sums), stacked.tolist(), strict=True))
    count = totals.pop("count")
    return {f"validation_{key}": value / count for key, value in totals.items()}


def equal_buffers(model: nn.Module, world: World) -> None:
    """Gives every rank the running statistics of rank 0, which are also the saved ones; DDP does so before its next forward.

    Args:
        model: its buffers that are saved are overwritten.
        world: this process among the job's.
    """
    if world.world_size == 1:
        return
    kept = model.state_dict(keep_vars=True)
    fixed = {id(buffer) for bank in banks_of(model) for buffer in bank.fixed_buffers()}
    with purpose("metrics"):
        for name, buffer in model.named_buffers():
            if name in kept and id(buffer) not in fixed:
                dist.broadcast(buffer, src=0)
