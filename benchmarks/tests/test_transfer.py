"""The transfers: the search for a learning rate, and methods that train as many parameters as their names say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.transfer.run import MOST, search
from benchmarks.transfer.transfers import TRANSFERS
from dist_ssn.train.data import Hints


@pytest.mark.parametrize("least", [-3, -1, 0, 1, 2, 9])
def test_the_search_goes_down_and_stops(least: int) -> None:
    tried: list[int] = []

    def loss_at(exponent: int) -> float:
        tried.append(exponent)
        return (exponent - least) ** 2

    assert search(loss_at) == min(least, MOST - 1)
    assert len(tried) == len(set(tried)) <= MOST


HINTS: dict[str, Any] = {"wide resnet": {"classes": 5, "channels": 1}, "vit": {}}
"""Transfer of images → what its model needs to know of the data."""


@pytest.mark.parametrize("name", HINTS)
def test_methods_that_are_compared_train_as_many_parameters(name: str) -> None:
    transfer: Any = TRANSFERS[name]
    torch.manual_seed(0)
    base = transfer.build(Hints(HINTS[name]))
    head = sum(p.numel() for p in base.get_submodule(transfer.head).parameters())
    sizes: dict[str, int] = {}
    for method, (apply, _) in transfer.methods.items():
        model = apply(copy.deepcopy(base))
        model(torch.randn(2, 1, 16, 16)).square().mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained), method
        sizes[method] = sum(p.numel() for p in trained) - head
    assert sizes["full"] == sum(p.numel() for p in base.parameters()) - head and sizes["last layer"] == 0
    budgets = [size for method, size in sizes.items() if method.startswith("keep ")]
    assert len(budgets) == 4
    for method, size in sizes.items():
        if method not in ("full", "last layer", "BitFit"):
            assert min(abs(size / budget - 1) for budget in budgets) <= 0.06, method
