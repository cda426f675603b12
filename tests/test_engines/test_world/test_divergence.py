"""A bank that differs in one bit on one rank stops all ranks, and they say where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dist_ssn
from dist_ssn.comm import CommMeter
from dist_ssn.engines.world.divergence import OWN, check_equal, fingerprints
from dist_ssn.errors import UserError
from testing.ranks import run_ranks


def made() -> nn.Module:
    torch.manual_seed(0)
    return dist_ssn.share(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), 0.5, mapping="depth:2")


def _compare(rank: int, world_size: int, broken: int | None, what: str) -> tuple[str, int]:
    model = made()
    if rank == broken:
        with torch.no_grad():
            dict(model.named_parameters())[what].view(-1).view(torch.int32)[3] ^= 1
    with CommMeter() as meter:
        try:
            check_equal(model, 100)
            said = "equal"
        except UserError as error:
            said = str(error)
    return said, meter.ledger.totals("metrics").logical_bytes


@pytest.mark.distributed
def test_equal_ranks_go_on_and_send_a_few_bytes() -> None:
    banks = len([name for name in fingerprints(made()) if name != OWN])
    assert banks == 2
    assert run_ranks(_compare, 2, None, "") == [("equal", 16 * (banks + 1))] * 2


@pytest.mark.distributed
@pytest.mark.parametrize("broken", [0, 2])
def test_one_bit_on_one_rank_is_found(broken: int) -> None:
    names = [name for name, _ in made().named_parameters()]
    bank = next(name for name in names if name.endswith("depth-1.bank"))
    for what, called in ((bank, bank.removesuffix(".bank")), ("0.bias", OWN)):
        said = {text for text, _ in run_ranks(_compare, 3, broken, what)}
        assert len(said) == 1
        assert (
            f"after step 100 the ranks no longer hold the same parameters: {called} on rank {broken} differs"
            in said.pop()
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_place_counts_in_every_dtype(dtype: torch.dtype) -> None:
    model = made().to(dtype)
    before = fingerprints(model)
    with torch.no_grad():
        parameter = next(p for n, p in model.named_parameters() if n.endswith("depth-0.bank"))
        parameter.copy_(parameter.flip(0))
    after = fingerprints(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        name for name in before if name.endswith("depth-0")
    ]


def test_one_process_has_nothing_to_compare() -> None:
    check_equal(made(), 1)
