"""Comparison of the parameters of all processes, by fingerprints of a few bytes."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.comm.meter import purpose
from dist_ssn.engines.world.join import is_distributed
from dist_ssn.errors import ShareError, UserError
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.bank_set import shared_plan
from dist_ssn.sharing.bases import as_rows, kept_fingerprints

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OWN = "the model's own parameters"


def fingerprints(model: nn.Module) -> dict[str, Tensor]:
    """Fingerprints of 64 bits, on the device: name of a bank, or `OWN` for all other parameters → fingerprint."""
    banks = {
        id(p): name for name, module in model.named_modules() if isinstance(module, Bank) for p in module.parameters()
    }
    sums: dict[str, Tensor] = {}
    for parameter in model.parameters():
        name = banks.get(id(parameter), OWN)
        before = sums.get(name, torch.zeros((), dtype=torch.int64, device=parameter.device))
        sums[name] = before * 31 + _bits(parameter)
    return sums


def _bits(tensor: Tensor) -> Tensor:
    """The sum Σ bits_i · (2 i + 1) modulo 2⁶⁴; a change of any single element changes it."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()]).to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum()


def check_equal(model: nn.Module, step: int) -> None:
    """Compares the parameters of all processes bit for bit, by their fingerprints: 16 bytes per bank.

    The host waits for the device. With one process it does nothing.

    Args:
        model: shared or dense.
        step: number of steps that were made, for the message.

    Raises:
        UserError: they differ; the message names the banks and the ranks. All ranks raise it.
    """
    if not is_distributed():
        return
    sums = fingerprints(model)
    mine = torch.stack(list(sums.values()))
    extremes = torch.cat([mine, ~mine])  # ~x falls as x rises, and does not overflow
    with purpose("metrics"):
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        highest, lowest = extremes.chunk(2)
        if torch.equal(highest, ~lowest):
            return
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
    raise UserError(_difference(list(sums), torch.stack(gathered).tolist(), step))


def _difference(names: list[str], by_rank: list[list[int]], step: int) -> str:
    parts = []
    for place, name in enumerate(names):
        values = [sums[place] for sums in by_rank]
        usual, _ = Counter(values).most_common(1)[0]
        if ranks := [str(rank) for rank, value in enumerate(values) if value != usual]:
            parts.append(f"{name} on rank {', '.join(ranks)}")
    return (
        f"after step {step} the ranks no longer hold the same parameters: {'; '.join(parts)} differs from the others; "
        "something changes parameters on some ranks only, or a machine computes wrongly: go on from the last checkpoint"
    )


def require_one_plan(model: nn.Module) -> None:
    """Checks that the models of all ranks follow one plan, and keep the same values; sends 16 bytes, and 16 for each kept tensor.

    DDP copies rank 0's parameters to all ranks, but not the plan with which each rank reads them, and no kept values.

    Raises:
        ShareError: the ranks' plans or kept values differ. All ranks raise it.
    """
    plan = shared_plan(model)
    number = int(plan.fingerprint, 16) >> 1 if plan is not None else 0
    extremes = torch.tensor([number, -number], device=next(model.parameters()).device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise ShareError(
            "the ranks' models follow different plans, so each would read the same bank differently: give all ranks the same "
            "seed before the model is built, or one plan, share(model, plan=...)"
        )
    if plan is not None and plan.keep:
        _require_one_base(model)


def _require_one_base(model: nn.Module) -> None:
    """Checks that all ranks keep the same values; sends 16 bytes for each tensor.

    Raises:
        ShareError: a rank has other values than rank 0; the message names rank and tensor. All ranks raise it.
    """
    found = kept_fingerprints(model)
    mine = as_rows(found.values(), next(model.parameters()).device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    for rank, theirs in enumerate(gathered):
        if others := [
            name for name, same in zip(found, theirs.eq(gathered[0]).all(1).tolist(), strict=True) if not same
        ]:
            raise ShareError(
                f"rank {rank} keeps other values of {others[0]} than rank 0 ({len(others)} of {len(found)} tensors differ), and "
                "nobody sends them: load the same pretrained values on all ranks"
            )
