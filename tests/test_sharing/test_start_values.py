"""Values that somebody gave a new model by hand: drawn ones are told, trained ones are not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dist_ssn import share
from testing.layer_kinds import banks_of

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def net(width: int = 64) -> nn.Module:
    return share(nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)), 0.2)


def trained(steps: int = 100) -> nn.Module:
    """Its bank has several times the standard deviation that it began with."""
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 5 * X[:, :4].sin()).square().mean().backward()
        optimizer.step()
    assert all(bank.bank.std() > 2 * float(bank.scales[0]) for bank in banks_of(model))
    return model


def copy_of(values: list[torch.Tensor]) -> nn.Module:
    model = net()
    with torch.no_grad():
        for mine, value in zip(model.parameters(), values, strict=True):
            mine.copy_(value)
    return model


def test_trained_parameters_that_are_copied_by_hand_are_no_draw() -> None:
    model = trained()
    twin = copy_of(list(model.parameters()))
    assert torch.equal(twin(X), model(X))


def test_values_like_those_of_share_are_no_draw() -> None:
    """As from a file, where the model that was trained is not here."""
    values = [p.detach().clone() for p in net().parameters()]
    values = [3 * (value + 0.2 * torch.randn_like(value)) for value in values]
    copy_of(values)(X)


@pytest.mark.parametrize("draw", [nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.normal_])
def test_a_loop_that_draws_is_told(draw: Any) -> None:
    model = net(width=512)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            draw(parameter)
    with pytest.warns(UserWarning, match=r"belongs before share\(\).*load_state_dict"):
        model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)
