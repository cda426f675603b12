"""What a shared model inside everything that PyTorch does is compared with: the pure twin, or the dense copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn import share
from testing.layer_kinds import be_pure, loss_of, relative_error, shake

EXACT = 1e-10
Gradients = list[Tensor | None]


class Block(nn.Module):
    """Two linear layers around a nonlinearity, beside a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Embedding, blocks and head; `run` is how a block is called."""

    def __init__(self, blocks: int = 3, width: int = 12, run: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(30, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 30)
        self.run = run

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = self.run(block, x) if self.run else block(x)
        return self.head(x)


def net(budget: float = 0.4, morph: str = "offset:gains=true,rank=1", **options: Any) -> nn.Module:
    """A shared `Net` in float64, every time with the same numbers, none of them at its start."""
    torch.manual_seed(0)
    model = share(Net(**options).double(), budget, morph=morph, mapping="single")
    shake(model)
    return model


def gradients(model: nn.Module) -> Gradients:
    """Those of all parameters, which are taken off."""
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def pure_gradients(model: nn.Module, tokens: Tensor) -> Gradients:
    """What one plain backward gives on the pure path."""
    be_pure(model)
    loss_of(model(tokens)).backward()
    be_pure(model, False)
    return gradients(model)


def assert_equal(got: Gradients, wanted: Gradients, tolerance: float = EXACT) -> None:
    assert any(gradient is not None and bool(gradient.any()) for gradient in wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        assert relative_error(mine, theirs) <= tolerance
