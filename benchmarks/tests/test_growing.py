"""A tiled bank gives the same weights and the same sum of gradients; the queue compares at equal bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_ssn
from benchmarks.growing.tiling import MOMENTS, carry_moments, grown, grown_plan, likeness
from benchmarks.models import lstm
from dist_ssn.errors import PlanError
from dist_ssn.plan import Plan
from dist_ssn.sharing.bank import banks_of
from dist_ssn.train.models import build_model
from testing.layer_kinds import shake


def _dense(kind: str) -> nn.Module:
    if kind == "gpt":
        return build_model("gpt", {"layers": 2, "width": 32, "heads": 2, "context": 16})
    return lstm(layers=2, width=24, context=16)


def _shared(kind: str, budget: float = 0.15) -> nn.Module:
    """A shared model in float64, with gains, none of whose parameters has its initial value."""
    torch.manual_seed(0)
    model = dist_ssn.share(_dense(kind), budget, morph="offset:chunk=16,gains=true").double()
    shake(model)
    return model


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(dist_ssn.materialize(model).state_dict())


def _loss(model: nn.Module, seed: int = 0) -> Tensor:
    inputs = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(seed))
    return model(inputs).square().mean()


@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_a_tiled_bank_gives_the_same_weights_bit_for_bit(kind: str, mode: str) -> None:
    model = _shared(kind).float()
    larger = grown(model, _dense(kind))
    for one in (model, larger):
        dist_ssn.set_generation(one, mode)
    for old, new in zip(banks_of(model), banks_of(larger), strict=True):
        assert new.bank.numel() == 3 * old.bank.numel() == new.group.size
        assert new.group.size % 2 == 1
    mine, theirs = _weights(larger), _weights(model)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert torch.equal(_loss(larger), _loss(model))


@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_gradients_of_the_copies_add_up_to_the_old_gradient(kind: str, mode: str) -> None:
    model = _shared(kind)
    larger = grown(model, _dense(kind).double())
    for one in (model, larger):
        dist_ssn.set_generation(one, mode)
        _loss(one).backward()
    for (name, old), new in zip(model.named_parameters(), larger.parameters(), strict=True):
        assert old.grad is not None and new.grad is not None
        found = new.grad if new.shape == old.shape else new.grad.view(3, -1).sum(0).view_as(old)
        torch.testing.assert_close(found, old.grad, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("factor", [3, 5])
def test_starts_are_congruent_and_each_copy_gets_an_equal_part_of_the_uses(factor: int) -> None:
    plan = dist_ssn.plan_of(_shared("gpt").state_dict())
    for old, new in zip(plan.groups, grown_plan(plan, factor).groups, strict=True):
        used: Counter[int] = Counter()
        for was, slot in zip(old.slots, new.slots, strict=True):
            assert (slot.start - was.start) % old.size == 0
            assert replace(slot, start=was.start) == was
            used.update((slot.start + i) % new.size for i in range(slot.numel))
        assert len(used) == new.size
        assert max(used.values()) - min(used.values()) <= 1


def test_starts_of_any_plan_stay_congruent() -> None:
    plan = dist_ssn.plan_of(_shared("gpt").state_dict())
    (group,) = plan.groups
    slots = tuple(replace(slot, start=(37 * i * i + 5) % group.size) for i, slot in enumerate(group.slots))
    plan = replace(plan, groups=(replace(group, slots=slots),))
    torch.manual_seed(0)
    model = dist_ssn.share(_dense("gpt"), plan=plan)
    mine, theirs = _weights(grown(model, _dense("gpt"))), _weights(model)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def _refused(plan: Plan, factor: int) -> str:
    with pytest.raises(PlanError) as error:
        grown_plan(plan, factor)
    return str(error.value)


def test_what_cannot_grow_says_why() -> None:
    plan = dist_ssn.plan_of(_shared("gpt").state_dict())
    assert "odd factor" in _refused(plan, 2)
    assert "odd factor" in _refused(plan, 1)
    assert "no bank can grow 11 times" in _refused(plan, 11)  # more elements than the weights have
    hashed = dist_ssn.share(_dense("gpt"), 0.1, morph="hash")
    assert "'offset'" in _refused(dist_ssn.plan_of(hashed.state_dict()), 3)


def _trained(model: nn.Module, steps: int = 3) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, 0.1, lr=1e-3))
    for step in range(steps):
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("moments", MOMENTS)
def test_moments_are_tiled_and_scaled(moments: str) -> None:
    model = _shared("lstm")
    former = _trained(model)
    larger = grown(model, _dense("lstm").double())
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(larger, 0.1, lr=1e-3))
    carry_moments(larger, optimizer, model, former, moments)
    for old, new in zip(model.parameters(), larger.parameters(), strict=True):
        mine, theirs = optimizer.state.get(new, {}), former.state[old]
        is_tiled = old.shape != new.shape
        if is_tiled and MOMENTS[moments] is None:
            assert not mine
            continue
        powers = (MOMENTS[moments] if is_tiled else None) or (0, 0)
        assert float(mine["step"]) == 3
        for key, power in zip(("exp_avg", "exp_avg_sq"), powers, strict=True):
            copies = mine[key].view(3 if is_tiled else 1, -1)
            expected = (theirs[key] * 3.0**power).view(1, -1).expand_as(copies)
            torch.testing.assert_close(copies, expected, rtol=1e-12, atol=0)


def test_with_moments_for_equal_gradients_the_first_update_is_the_old_bank_s_if_gradients_are_equal() -> None:
    """The definition of "equal": were all copies' gradients a third of the old one, training would go on as before."""
    states: list[Any] = []
    for grows in (False, True):
        model = _shared("lstm")
        optimizer = _trained(model)
        gradients = [torch.full_like(p, 1e-3) for p in model.parameters()]
        if grows:
            larger = grown(model, _dense("lstm").double())
            later = torch.optim.AdamW(dist_ssn.parameter_groups(larger, 0.1, lr=1e-3))
            carry_moments(larger, later, model, optimizer, "equal")
            sizes = [p.shape for p in model.parameters()]
            gradients = [
                gradient if p.shape == size else torch.full_like(p, 1e-3 / 3)
                for p, gradient, size in zip(larger.parameters(), gradients, sizes, strict=True)
            ]
            model, optimizer = larger, later
        for group in optimizer.param_groups:
            group.update(lr=1e-3, weight_decay=0.0, eps=0.0)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        states.append(_weights(model))
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=1e-10, atol=1e-12)


def test_likeness_is_a_third_squared_for_equal_gradients_and_a_third_for_independent_ones() -> None:
    larger = grown(_shared("gpt"), _dense("gpt").double())
    (bank,) = banks_of(larger)
    one = torch.randn(bank.bank.numel() // 3, dtype=torch.float64)
    bank.bank.grad = one.repeat(3).view_as(bank.bank)
    assert likeness(larger) == pytest.approx(1 / 9)
    bank.bank.grad = torch.randn(bank.bank.numel(), dtype=torch.float64).view_as(bank.bank)
    assert likeness(larger) == pytest.approx(1 / 3, rel=0.1)
