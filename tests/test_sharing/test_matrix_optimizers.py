"""Optimizers that make matrices orthogonal: refused for banks, fine for what stays dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_ssn import materialize, share
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import banks_of

REFUSED = r"^{} makes matrices orthogonal, and the bank of 0\.weight is a list of values.*: give banks to AdamW"


class Stand(torch.optim.SGD):
    """In the place of optimizers that are not installed here: only their names, groups and states matter."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)


class Muon(Stand):
    """As torch's, from 2.9 on, and others'."""


class SingleDeviceMuonWithAuxAdam(Stand):
    """As in https://github.com/KellerJordan/Muon, where a group says `use_muon`."""


class MuonClip(Muon):
    """A relative."""


class Wrapped(Muon):
    """A class whose base says what it does."""


class Dion(Stand):
    """As in https://github.com/microsoft/dion, where a group says its algorithm."""


def made() -> nn.Module:
    torch.manual_seed(0)
    return share(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)), 0.5, exclude="2.*")


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 8)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


KINDS = [Muon, MuonClip, Wrapped, Dion]
if hasattr(torch.optim, "Muon"):
    KINDS.append(torch.optim.Muon)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_is_refused_at_the_first_step_and_stays(kind: type[torch.optim.Optimizer]) -> None:
    model = made()
    before = banks_of(model)[0].bank.detach().clone()
    optimizer = kind(matrices(model))  # type: ignore[call-arg]
    for _ in range(2):
        with pytest.raises(ShareError, match=REFUSED.format(kind.__name__)):
            step(model, optimizer)
    assert torch.equal(banks_of(model)[0].bank, before)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_matrices_beside_banks_and_a_materialized_model_are_fine(kind: type[torch.optim.Optimizer]) -> None:
    model = made()
    banks = {p for bank in banks_of(model) for p in bank.parameters()}
    own = [p for p in matrices(model) if p not in banks]
    rest = [p for p in model.parameters() if not any(p is q for q in own)]
    step(model, kind(own), torch.optim.AdamW(rest, weight_decay=0.0))  # type: ignore[call-arg]
    dense = materialize(model)
    step(dense, kind(matrices(dense)), torch.optim.AdamW([p for p in dense.parameters() if p.ndim < 2]))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("groups", "refused"),
    [
        ({"use_muon": False}, False),
        ({"use_muon": True}, True),
        ({"algorithm": "adamw"}, False),
        ({"algorithm": "lion"}, False),
        ({"algorithm": "normuon"}, True),
    ],
)
def test_a_group_says_by_what_it_is_trained(groups: dict[str, Any], refused: bool) -> None:
    model = made()
    optimizer = SingleDeviceMuonWithAuxAdam([{"params": list(model.parameters()), **groups}])
    if refused:
        with pytest.raises(ShareError, match=REFUSED.format("SingleDeviceMuonWithAuxAdam")):
            step(model, optimizer)
    else:
        step(model, optimizer)


def test_a_state_says_it_too() -> None:
    """As Moonlight's Muon, which is made with two lists and marks their parameters."""
    model = made()
    optimizer = Muon(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter]["use_muon"] = False
    before = banks_of(model)[0].bank.detach().clone()
    step(model, optimizer)
    assert not torch.equal(banks_of(model)[0].bank, before)
