"""Kept weights under the engines and under local updates: nothing of them is sent, and a rank with others is named on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import LocalUpdates, materialize, parameter_groups, share
from dist_ssn.comm import CommMeter
from dist_ssn.engines import engine_class
from dist_ssn.errors import ShareError, UserError
from testing.ranks import run_ranks

distributed = pytest.mark.distributed


class Net(nn.Module):
    """0.5 MB of weights, and 0.1 MB beside that are not generated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.beside, self.head = nn.Linear(128, 1000), nn.Linear(1000, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.beside(self.body(x).tanh()))


def shared(rank: int, change: str) -> nn.Module:
    base = Net()
    if rank and change:
        with torch.no_grad():
            base.get_parameter(change).view(-1)[0] += 1e-3
    return share(base, 500, keep=True, exclude="beside", train="head")


def train(rank: int, size: int, name: str, change: str = "") -> Any:
    """Three steps of an engine; the error's text, or (bytes at the start, sum of all weights)."""
    model, engine_type = shared(rank, change), engine_class(name)
    with CommMeter() as meter:
        try:
            model = engine_type.prepare(model)
            engine = engine_type(model, torch.optim.AdamW(parameter_groups(model, lr=1e-2)))
        except ShareError as error:
            return str(error)
        start = meter.ledger.totals().logical_bytes
        for _ in range(3):
            with engine.accumulating(True):
                engine.backward(engine.model(torch.ones(4, 128) * (rank + 1)).square().mean())
            engine.step()
        parameters, _ = engine.gathered()
    return start, {key: value.sum().item() for key, value in parameters.items()}


@distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_an_engine_sends_what_is_trained_and_fingerprints(name: str) -> None:
    trained = sum(p.nbytes for p in shared(0, "").parameters() if p.requires_grad)
    (start, mine), (_, theirs) = run_ranks(train, 2, name)
    assert trained <= start <= trained + 2000
    assert mine == theirs
    assert mine["beside.weight"] == Net().beside.weight.sum().item()


@distributed
@pytest.mark.parametrize("change", ["body.weight", "beside.bias"])
def test_all_ranks_name_the_rank_and_the_tensor(change: str) -> None:
    both = run_ranks(train, 2, "ddp", change)
    assert both[0] == both[1]
    assert both[0].startswith(f"rank 1 keeps other values of {change} than rank 0 (1 of ")


def local(rank: int, size: int, change: str) -> Any:
    """One round of local updates."""
    model = shared(rank, change)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    with CommMeter() as meter:
        try:
            LocalUpdates(model, optimizer, every=2)
        except UserError as error:
            return str(error)
        start = meter.ledger.totals().logical_bytes
        for _ in range(2):
            model(torch.ones(4, 128) * (rank + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return start, meter.ledger.totals().logical_bytes, materialize(model)(torch.ones(1, 128)).sum().item()


@distributed
def test_local_updates_send_no_kept_value() -> None:
    trained = sum(p.nbytes for p in shared(0, "").parameters() if p.requires_grad)
    (start, whole, mine), (_, _, theirs) = run_ranks(local, 2, "")
    assert start <= trained + 2000 and whole <= 3 * trained + 4000
    assert mine == theirs
    for change in ("body.weight", "beside.bias"):
        both = run_ranks(local, 2, change)
        assert both[0] == both[1] and both[0].startswith("the kept values on rank 1 differ from those on the others")
