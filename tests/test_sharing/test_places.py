"""Layers that are moved or removed after `share`: the state dict says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_ssn import materialize, share


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def permuted(model: Any) -> None:
    model.layers = nn.ModuleList([model.layers[i] for i in (3, 1, 2, 0)])


def dropped(model: Any) -> None:
    del model.layers[1]


MOVES: dict[Callable[[Any], None], str] = {
    permuted: r"^layers\.0\.weight reads the weight that share\(\) made for layers\.3\.weight, as 2 layers do",
    dropped: r"^layers\.1\.weight reads the weight that share\(\) made for layers\.2\.weight",
}


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.ModuleDict({"net": m})])
def test_layers_that_changed_places_are_told_once(move: Callable[[Any], None], around: Any) -> None:
    model = share(Stack(), 0.3)
    model.state_dict()
    move(model)
    with pytest.warns(UserWarning, match=MOVES[move]):
        around(model).state_dict()
    model.state_dict()
    dense, x = materialize(model), torch.randn(2, 16)
    torch.testing.assert_close(dense(x), model(x))  # which has the weights where their layers are


def test_what_leaves_layers_in_their_places_is_not_told() -> None:
    def last(model: Any) -> None:
        del model.layers[-1]

    def wrapped(model: Any) -> None:
        model.layers[0] = nn.Sequential(model.layers[0])

    for change in (last, wrapped):
        model = share(Stack(), 0.3)
        change(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.state_dict()


def test_tied_layers_are_in_their_places() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(32, 16), "rest": nn.Linear(16, 16), "head": nn.Linear(16, 32)})
    model["head"].weight = model["table"].weight
    share(model, 0.3).state_dict()
