"""The baselines of the benchmarks keep to their papers' rules: against loops that one process writes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.network.methods import START, cosines, from_cosines, method
from dist_ssn.comm import CommMeter
from dist_ssn.sync.local_updates import LocalUpdates
from dist_ssn.sync.reports import REPORT_BYTES
from testing.ranks import run_ranks

RANKS, STEPS, RATE = 2, 12, 0.05
CLIP = 10.0
"""Above the norm of every gradient here, and below that of the signs of all 528 numbers, which is 23."""


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8, bias=False))


def _loss(model: nn.Module, rank: int, step: int) -> Tensor:
    data = torch.Generator().manual_seed(100 * step + rank)
    return (model(torch.randn(6, 24, generator=data)) - torch.randn(6, 8, generator=data)).square().mean()


def _train(rank: int, world_size: int, name: str) -> dict[str, Any]:
    model = _model()
    engine = method(name)(model, torch.optim.SGD(model.parameters(), lr=RATE), clip_norm=CLIP)
    sent = []
    with CommMeter() as meter:
        for step in range(STEPS):
            engine.backward(_loss(engine.model, rank, step))
            engine.step()
            sent.append(sum(row["logical_bytes"] for row in meter.ledger.rows()))
    return {"parameters": [p.detach() for p in model.parameters()], "sent": sent}


def _grads(models: list[nn.Sequential], step: int) -> list[list[Tensor]]:
    return [
        list(torch.autograd.grad(_loss(model, rank, step), list(model.parameters())))
        for rank, model in enumerate(models)
    ]


@torch.no_grad()
def _move(models: list[nn.Sequential], updates: list[list[Tensor]]) -> None:
    for model, update in zip(models, updates, strict=True):
        for parameter, change in zip(model.parameters(), update, strict=True):
            parameter -= RATE * change


def _mean(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(part).mean(0) for part in zip(*parts, strict=True)]


@torch.no_grad()
def _set(models: list[nn.Sequential], values: list[Tensor]) -> None:
    for model in models:
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


def _local(period: int) -> list[Tensor]:
    models = [_model() for _ in range(RANKS)]
    for step in range(STEPS):
        grads = _grads(models, step)
        _move(models, [_mean(grads)] * RANKS if step < START else grads)
        if step >= START and (step - START) % period == 0:
            _set(models, _mean([list(model.parameters()) for model in models]))
    return list(models[0].parameters())


def _diloco(period: int) -> list[Tensor]:
    models = [_model() for _ in range(RANKS)]
    shared = [p.detach().clone() for p in models[0].parameters()]
    momenta = [torch.zeros_like(p) for p in shared]
    for step in range(STEPS):
        _move(models, _grads(models, step))
        if (step + 1) % period == 0:
            means = _mean([list(model.parameters()) for model in models])
            changes = [old - new.detach() for old, new in zip(shared, means, strict=True)]
            momenta = [0.9 * m + change for m, change in zip(momenta, changes, strict=True)]
            shared = [p - 0.7 * (change + 0.9 * m) for p, change, m in zip(shared, changes, momenta, strict=True)]
            _set(models, shared)
    return list(models[0].parameters())


def _by_local_updates(rank: int, world_size: int, period: int) -> list[Tensor]:
    """Post-local SGD by `LocalUpdates`: it averages after each of the first steps, and then every `period` steps."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with LocalUpdates(model, optimizer, every=period, outer="average", warmup=START + 1):
        for step in range(STEPS):
            _loss(model, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.distributed
def test_local_updates_are_post_local_sgd() -> None:
    ranks = run_ranks(_by_local_updates, RANKS, 3)
    for mine, theirs, right in zip(*ranks, _local(3), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def _signs(_: int) -> list[Tensor]:
    models = [_model() for _ in range(RANKS)]
    for step in range(STEPS):
        _move(models, [[mean.sign() for mean in _mean(_grads(models, step))]] * RANKS)
    return list(models[0].parameters())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("local", 3, _local),
        ("diloco", 4, _diloco),
        ("demo", 24 * 16, _signs),  # a whole chunk: nothing is left for later
    ],
)
def test_a_method_keeps_to_its_rule(name: str, number: int, expected: Callable[[int], list[Tensor]]) -> None:
    ranks = run_ranks(_train, RANKS, f"{name}:{number}")
    for mine, theirs, right in zip(ranks[0]["parameters"], ranks[1]["parameters"], expected(number), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("powersgd:1", 4 * (16 + 24 + 16 + 8 + 16)),  # two factors for each matrix, and the bias as it is
        ("local:3", 4 * (24 * 16 + 16 + 16 * 8) / 3),
        ("diloco:6", (4 * (24 * 16 + 16 + 16 * 8) + REPORT_BYTES) / 6),
        ("demo:2", 6 * 2 * 3),  # three chunks
    ],
)
def test_a_method_sends_what_its_rule_says(name: str, each: float) -> None:
    sent = run_ranks(_train, RANKS, name)[0]["sent"]
    assert (sent[-1] - sent[-7]) / 6 == each


@pytest.mark.parametrize("shape", [(128, 192), (24, 16), (70,), (8, 3, 5)])
def test_cosines_keep_everything(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    coefficients = cosines(values)
    assert coefficients.numel() == values.numel()
    torch.testing.assert_close(from_cosines(coefficients, values.shape), values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coefficients.norm(), values.norm())


@pytest.mark.parametrize("text", ["", "powersgd", "powersgd:0", "nobody:3", "local:x"])
def test_an_unknown_method_says_which_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="there are powersgd:N, local:N, diloco:N, demo:N"):
        method(text)
