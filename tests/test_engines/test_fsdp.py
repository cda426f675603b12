"""FSDP2 with a bank: uneven parts, two forwards in a step, HSDP, 16-bit gathers, parameters frozen late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import dist_ssn
from dist_ssn.comm import CommMeter
from dist_ssn.engines.fsdp import FSDPEngine
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.bank_set import BankSet
from testing.ranks import run_ranks

pytestmark = pytest.mark.distributed
STEPS = 3


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 13), nn.Linear(13, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def made() -> nn.Module:
    torch.manual_seed(0)
    return dist_ssn.share(Two().double(), 0.5)


def loss_of(model: nn.Module, x: Tensor, twice: bool) -> Tensor:
    y = model(x)
    return (model(y) if twice else y).square().mean()


def train(model: nn.Module, data: Tensor, twice: bool, frozen: bool, engine: FSDPEngine | None = None) -> None:
    """Steps over data [step, sample, 6], by an engine or by plain autograd."""
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("bias"))
    optimizer = engine.optimizer if engine else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in data:
        if engine:
            with engine.accumulating(True):
                engine.backward(loss_of(engine.model, x, twice))
            engine.step()
        else:
            loss_of(model, x, twice).backward()
            optimizer.step()
            optimizer.zero_grad()


def _compare(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    data = torch.randn(STEPS, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    twice, frozen = options.get("twice", False), options.get("frozen", False)
    alone = made()
    train(alone, data, twice, frozen)

    mesh = init_device_mesh("cpu", options["mesh"], mesh_dim_names=("copies", "parts")) if "mesh" in options else None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if options.get("bf16") else None
    model = made()
    for block in model.children() if options.get("blocks") else ():
        if isinstance(block, BankSet):
            continue
        fully_shard(block)  # its own parameters; the bank that it reads is the root's
    model = FSDPEngine.prepare(model, mesh=mesh, mp_policy=policy)
    engine = FSDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with CommMeter() as meter:
        train(model, data[:, rank::world_size], twice, frozen, engine)
    found, _ = engine.gathered()
    expected = dict(alone.named_parameters())
    gathers = [r for r in meter.ledger.rows() if (r["purpose"], r["collective"]) == ("parameters", "all_gather")]
    (bank,) = (module for module in alone.modules() if isinstance(module, Bank))
    return {
        "difference": max(float((found[name] - expected[name]).abs().max()) for name in expected),
        "gathers": sum(row["operations"] for row in gathers) / STEPS,
        "uneven": bank.bank.numel() % world_size != 0,
        "gathered_bytes": sum(row["logical_bytes"] for row in gathers) // STEPS,
    }


@pytest.mark.parametrize(
    ("ranks", "options", "gathers"),
    # FSDP2 reduces at the end of each forward's backward, and gathers again for the next.
    [(3, {"twice": True}, 2), (2, {"frozen": True}, 1), (4, {"mesh": (2, 2)}, 1), (2, {"blocks": True}, 5)],
    ids=["two forwards in a step, 3 ranks", "frozen after wrapping", "HSDP", "blocks in groups of their own"],
)
def test_it_equals_plain_autograd(ranks: int, options: dict[str, Any], gathers: int) -> None:
    for found in run_ranks(_compare, ranks, options):
        assert found["uneven"]
        assert found["difference"] <= 1e-12
        assert found["gathers"] == gathers


def test_a_16_bit_gather_is_a_quarter_of_one_in_float64() -> None:
    (whole, *_), (half, *_) = run_ranks(_compare, 2, {}), run_ranks(_compare, 2, {"bf16": True})
    assert 1e-12 < half["difference"] < 1e-2  # weights are made in bf16
    assert half["gathered_bytes"] == pytest.approx(whole["gathered_bytes"] / 4, rel=0.1)


def _sequential(rank: int, world_size: int) -> str:
    """The bank of a container belongs to its first layer, which is sharded alone here."""
    torch.manual_seed(0)
    model = dist_ssn.share(nn.Sequential(nn.Linear(6, 13), nn.Linear(13, 6)), 0.5)
    for block in model.children():
        fully_shard(block)
    model = FSDPEngine.prepare(model)
    try:
        model(torch.ones(2, 6))
    except ShareError as error:
        return str(error)
    return "nothing was raised"


def test_a_bank_that_was_taken_apart_is_one_sentence() -> None:
    assert "is sharded by FSDP2 where it is read" in run_ranks(_sequential, 2)[0]
