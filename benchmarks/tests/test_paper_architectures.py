"""Nine architectures of the paper, shared with nothing said but a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.quality import paper_architectures
from benchmarks.quality.paper_architectures import (
    ARCHITECTURES,
    BUDGET,
    CONTEXT,
    LONGEST,
    SHORTEST,
    SHOWN,
    SIDES,
    Architecture,
    built,
    rates,
    rows,
    spans,
)
from dist_ssn import materialize, share, shared_plan
from testing.layer_kinds import pulled_back, relative_error, shake

TEXT = torch.randint(256, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
TINY_BUDGET = 0.3
"""At 10 % a bank of the narrow models has a single parameter, whose gradient before a norm is zero but for rounding."""
IMAGES = torch.randn(4, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROUNDING = 1e-15
"""Gradients below it are zero but for rounding."""


def _batch(architecture: Architecture) -> tuple[Tensor, Tensor]:
    return (TEXT if architecture.data.name == "text" else IMAGES), torch.arange(4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_those_of_plain_autograd(name: str) -> None:
    """Of banks and of own parameters, in float64, against the dense twin's gradients and the pure generation."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = share(architecture.build(**architecture.small).double(), TINY_BUDGET)
    shake(model, 0.02)
    architecture.loss(model, *_batch(architecture), torch.Generator().manual_seed(0)).backward()
    dense = materialize(model)
    architecture.loss(dense, *_batch(architecture), torch.Generator().manual_seed(0)).backward()
    wanted = {name: parameter.grad for name, parameter in dense.named_parameters()} | pulled_back(model, dense)
    reached = 0
    for parameter_name, parameter in model.named_parameters():
        oracle = wanted[parameter_name]
        if oracle is not None and float(oracle.abs().max()) < ROUNDING:  # a key's bias, which a softmax cancels
            assert float(parameter.grad.abs().max()) < ROUNDING  # type: ignore[union-attr]
            continue
        error = relative_error(parameter.grad, oracle)
        assert error <= 1e-10, f"{name}: {parameter_name} is off by {error:.1e}"
        reached += parameter.grad is not None and parameter_name.startswith("dist_ssn") and bool(parameter.grad.any())
    assert reached, f"{name}: no bank has a gradient"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nearly_all_of_it_is_shared_and_its_control_is_as_large(name: str) -> None:
    shared, small, dense = (built(name, side, seed=0) for side in ("shared", "small", "dense"))
    plan = shared_plan(shared)
    assert plan is not None
    weights = sum(slot.numel for group in plan.groups for slot in group.slots)
    matrices = sum(p.numel() for p in dense.parameters() if p.dim() > 1)
    assert weights >= 0.95 * matrices and plan.parameters <= BUDGET * weights
    ours, control = (sum(p.numel() for p in model.parameters()) for model in (shared, small))
    assert ours <= control <= 1.3 * ours


def test_a_question_shows_both_ends_of_its_span() -> None:
    distinct = torch.arange(CONTEXT).repeat(50, 1)
    questions, ends = spans(distinct, torch.Generator().manual_seed(0))
    first, last = ends.unbind(1)
    length = last - first + 1
    assert (first.min(), length.min(), length.max()) == (0, SHORTEST, LONGEST) and last.max() < CONTEXT
    steps = torch.arange(SHOWN)
    assert torch.equal(questions, torch.cat([first[:, None] + steps, last[:, None] - SHOWN + 1 + steps], 1))


def test_a_side_is_shown_at_its_best_rate_of_those_that_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_architectures, "RATES", (1e-2, 1e-3))
    assert len(list(rates())) == 2 * len(SIDES) * len(ARCHITECTURES)
    losses = {"dense": (2.0, 1.0), "small": (3.0, 4.0), "shared": (1.2, 1.1)}
    lines = [
        {
            **{"architecture": "ALBERT", "side": side, "rate": rate, "seed": 0},
            **{"parameters": 10, "validation_loss": loss},
        }
        for side, both in losses.items()
        for rate, loss in zip((1e-3, 1e-2), both, strict=True)
    ]
    dense, small, shared = rows(lines)
    assert dense[1:] == ("10", "0.01", "1.000", "", "2.000, 1.000")
    assert small[1:] == ("10", "0.001", "3.000", "+200.0%", "3.000, 4.000")
    assert shared[1:] == ("10", "0.01", "1.100", "+10.0%", "1.200, 1.100")
    assert [row[2] for row in rows(lines[:-1])] == ["0.001"] * 3 and not list(rows(lines[:4]))
