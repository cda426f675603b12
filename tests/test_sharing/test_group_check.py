"""An optimizer that was made as for a dense model is recognized by its groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_ssn import parameter_groups, share
from dist_ssn.sharing.group_check import group_fault, warn_of_groups

DECAY, DENSE_LR = "gains, coefficients, biases or norms decay", "banks have the learning rate of a dense weight"


def net(mapping: str = "single") -> nn.Module:
    return share(nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)), 0.2, mapping=mapping)


def test_our_groups_have_no_fault() -> None:
    """With or without the learning rate, scheduled, for SGD, on a dense model, and for what the model doesn't have."""
    model = net()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, 1e-3), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    for lr in (None, 1e-3, 7e-3):
        assert group_fault(model, optimizer, lr) is None
    assert group_fault(model, torch.optim.SGD(parameter_groups(model, 0.1), lr=1e-3), 1e-3) is None
    assert group_fault(nn.Linear(4, 4), torch.optim.AdamW(net().parameters(), weight_decay=1), 1e-3) is None
    assert group_fault(model, torch.optim.AdamW(net().parameters(), lr=1e-3, weight_decay=1), 1e-3) is None


@pytest.mark.parametrize("mapping", ["single", "shape"])
def test_a_dense_models_optimizer(mapping: str) -> None:
    model = net(mapping)
    assert group_fault(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)) == DECAY
    assert group_fault(model, torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.1)) == DECAY
    assert group_fault(model, torch.optim.SGD(model.parameters(), lr=1e-3)) is None
    assert group_fault(model, torch.optim.Adam(model.parameters(), lr=1e-3), 1e-3) == DENSE_LR
    scheduled = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.1)
    assert group_fault(model, scheduled, 1e-3) == DENSE_LR


def test_parameters_that_an_engine_has_flattened() -> None:
    """DeepSpeed's optimizers hold none of the model's parameters: the learning rates alone are judged."""
    model, flat = net(), [nn.Parameter(torch.zeros(9))]
    assert group_fault(model, torch.optim.Adam(flat, lr=1e-3), 1e-3, engine=True) == DENSE_LR
    ours = [{"params": [nn.Parameter(torch.zeros(9))], "lr": g["lr"]} for g in parameter_groups(model, lr=1e-3)]
    for optimizer in (torch.optim.Adam(ours), torch.optim.SGD(flat, lr=1e-3)):
        assert group_fault(model, optimizer, 1e-3, engine=True) is None


def test_one_group_of_two_has_a_fault() -> None:
    """A table that is left dense has the learning rate of the bank: the ratio is wrong."""
    model = share(nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 64), nn.Linear(64, 16)), 0.1, exclude="0.*")
    assert group_fault(model, torch.optim.Adam(model.parameters(), lr=1e-3)) == DENSE_LR


def test_the_warning() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match=f"made as for a dense model, and {DECAY}: do this"):
        warn_of_groups(model, optimizer, "do this")
    warn_of_groups(model, optimizer, "do this")  # once
    warn_of_groups(model, None, "do this")
    warn_of_groups(model, torch.optim.AdamW(parameter_groups(model, lr=1e-3)), "do this")
