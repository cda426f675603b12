"""Local updates against a written-out loop in float64, with 2 and 4 processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import LocalUpdates
from testing.ranks import run_ranks

distributed = pytest.mark.distributed
STEPS = 9


class Tied(nn.Module):
    """Two uses of one weight, a bias, a norm, and a parameter that no optimizer gets."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(torch.tanh(self.first(x)))) * self.frozen


def batch(step: int, rank: int, n: int) -> Tensor:
    """This worker's part of the same eight samples."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[rank::n]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    x = x.to(next(model.parameters()).dtype)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trained(model)])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=0.05, momentum=0.5)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=0.01)


Outer = Callable[[Tensor, Tensor], Tensor]
"""(anchor, mean change) → anchor."""


def by_hand_nesterov(rate: float, momentum: float) -> Outer:
    velocity: list[Tensor] = []

    def step(anchor: Tensor, mean: Tensor) -> Tensor:
        before = velocity.pop() if velocity else torch.zeros_like(mean)
        velocity.append(momentum * before + mean)
        return anchor - rate * (mean + momentum * velocity[0])

    return step


def by_hand_adam(rate: float) -> Outer:
    moments: list[Any] = [0.0, 0.0, 0]

    def step(anchor: Tensor, mean: Tensor) -> Tensor:
        first, second, count = moments
        moments[:] = [0.9 * first + 0.1 * mean, 0.99 * second + 0.01 * mean.square(), count + 1]
        corrected = moments[0] / (1 - 0.9 ** moments[2]), moments[1] / (1 - 0.99 ** moments[2])
        return anchor - rate * corrected[0] / (corrected[1].sqrt() + 1e-3)

    return step


def outer_adam(tensors: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, lr=0.02, betas=(0.9, 0.99), eps=1e-3)


def written_out(
    model: nn.Module, inner: Callable[..., Any], n: int, every: int, outer: Outer, delay: int, warmup: int, steps: int
) -> list[Tensor]:
    """The anchor, or the parameters of worker 0, after each step; the last is after `synchronize`."""
    workers = [copy.deepcopy(model) for _ in range(n)]
    optimizers = [inner(worker) for worker in workers]
    anchor = flat(model)
    starts, sent = [anchor.clone() for _ in range(n)], None
    after = []

    def put(worker: nn.Module, values: Tensor) -> None:
        for p, part in zip(trained(worker), values.split([p.numel() for p in trained(worker)]), strict=True):
            p.data.copy_(part.view_as(p))

    for step in range(1, steps + 1):
        for rank, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(worker, batch(step, rank, n)).backward()
            optimizer.step()
        last = step == steps
        if step <= warmup or (step - warmup) % every == 0:
            changes = [start - flat(worker) for start, worker in zip(starts, workers, strict=True)]
            mean = torch.stack(changes).mean(0)
            if step <= warmup:
                anchor = anchor - mean
            elif delay:
                anchor = anchor if sent is None else outer(anchor, sent)
                sent = mean
            else:
                anchor = outer(anchor, mean)
            for rank, worker in enumerate(workers):
                late = delay and step > warmup
                starts[rank] = anchor - changes[rank] if late else anchor.clone()
                put(worker, starts[rank])
        if last:
            mean = torch.stack([start - flat(worker) for start, worker in zip(starts, workers, strict=True)]).mean(0)
            anchor = anchor if sent is None else outer(anchor, sent)
            anchor = outer(anchor, mean) if mean.any() else anchor
            put(workers[0], anchor)
        after.append(flat(workers[0]))
    return after


CASES: dict[str, tuple[dict[str, Any], Callable[[], Outer]]] = {
    "average": ({"outer": "average"}, lambda: by_hand_nesterov(1.0, 0.0)),
    "a slower average": ({"outer": "average", "outer_rate": 0.5}, lambda: by_hand_nesterov(0.5, 0.0)),
    "the default": ({}, lambda: by_hand_nesterov(0.7, 0.6)),
    "DiLoCo": ({"outer_momentum": 0.9}, lambda: by_hand_nesterov(0.7, 0.9)),
    "a function": ({"outer": outer_adam}, lambda: by_hand_adam(0.02)),
    "an optimizer": ({"outer": outer_adam([torch.zeros(1)])}, lambda: by_hand_adam(0.02)),
}
TIMES = {2: [(1, 0, 0), (3, 0, 0), (4, 0, 2), (1, 1, 0), (3, 1, 0), (4, 1, 2)], 4: [(4, 0, 2), (2, 1, 0)]}
"""every, delay, warmup; by number of processes."""


def _train(rank: int, n: int, inner: Callable[..., Any], **options: Any) -> list[Tensor]:
    model = Tied()
    with torch.no_grad():
        model.norm.weight += rank  # the start makes them equal
    optimizer = inner(model)
    after = []
    with LocalUpdates(model, optimizer, **options) as local:
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            loss_of(model, batch(step, rank, n)).backward()
            optimizer.step()
            if step < STEPS:
                after.append(flat(model))
        assert local.step == STEPS
    return [*after, flat(model)]


def _all_cases(rank: int, n: int) -> dict[Any, list[Tensor]]:
    found = {}
    for name, (options, _) in CASES.items():
        for every, delay, warmup in TIMES[n]:
            found[name, every, delay, warmup] = _train(
                rank, n, adam, every=every, delay=delay, warmup=warmup, **options
            )
    found["synchronous"] = _train(rank, n, sgd, every=1, outer="average")
    return found


@distributed
@pytest.mark.parametrize("n", [2, 4])
def test_equals_a_written_out_loop_and_synchronous_training(n: int) -> None:
    ranks = run_ranks(_all_cases, n)
    for name, (_, outer) in CASES.items():
        for every, delay, warmup in TIMES[n]:
            expected = written_out(Tied(), adam, n, every, outer(), delay, warmup, STEPS)
            got = [rank[name, every, delay, warmup] for rank in ranks]
            for step, (mine, theirs) in enumerate(zip(got[0], expected, strict=True), 1):
                assert (mine - theirs).abs().max() < 1e-6, (name, every, delay, warmup, step)
            assert all(torch.equal(rank[-1], got[0][-1]) for rank in got)
    model = Tied()
    optimizer = sgd(model)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step, 0, 1)).backward()
        optimizer.step()
        for rank in ranks:
            torch.testing.assert_close(rank["synchronous"][step - 1], flat(model), rtol=1e-6, atol=1e-6)
