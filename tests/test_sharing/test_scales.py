"""Scales of a bank: data in a buffer, which follow the bank wherever it goes, and are the same on all ranks."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import Plan, make_plan, materialize, plan_of, share, shared_plan
from dist_ssn.errors import PlanError
from dist_ssn.sharing.bank import Bank, banks_of


def odd(number: int, **options: Any) -> nn.Sequential:
    """A shared model with scales that no formula gives, different for each number."""
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Linear(32, 8))
    for layer, std in zip((model[0], model[2], model[3]), (0.031, 0.047, 0.083), strict=True):
        nn.init.normal_(layer.weight, std=std)  # pyright: ignore
    return share(model, 0.3, **({"morph": "offset:gains=true,templates=2"} | options))  # type: ignore[return-value]


def scales(model: nn.Module) -> Tensor:
    (bank,) = banks_of(model)
    return bank.scales


X = torch.randn(5, 32)


def test_models_of_two_seeds_differ_in_their_scales_alone() -> None:
    one, other = odd(0), odd(1)
    plan = shared_plan(other)
    assert plan is not None and shared_plan(one) == plan
    assert plan_of(one.state_dict()).to_json() == plan.to_json()
    assert not torch.equal(scales(one), scales(other))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_adopts_the_scales(assign: bool) -> None:
    one, other = odd(0), odd(1)
    other.load_state_dict(copy.deepcopy(one.state_dict()), assign=assign)
    assert torch.equal(one(X), other(X))


def test_loading_in_place_adopts_the_scales() -> None:
    """As `torch.distributed.checkpoint.load` does, which writes into the tensors of the state dict."""
    one, other = odd(0), odd(1)
    other(X)
    for mine, theirs in zip(other.state_dict().values(), one.state_dict().values(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(one(X), other(X))


def test_a_state_dict_of_half_precision_loads() -> None:
    one, other = odd(0), odd(1)
    state = {name: value.half() for name, value in one.state_dict().items()}
    other.load_state_dict(state)
    assert scales(other).dtype == torch.float32
    torch.testing.assert_close(one(X), other(X), rtol=2e-2, atol=2e-3)
    other.load_state_dict(state, assign=True)
    assert scales(other).dtype == torch.float32


def test_a_mean_of_state_dicts_has_the_mean_scales() -> None:
    states = [odd(seed).state_dict() for seed in (0, 1)]
    model = odd(2)
    model.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    (name,) = (name for name in states[0] if name.endswith(".scales"))
    torch.testing.assert_close(scales(model), (states[0][name] + states[1][name]) / 2)


def test_other_precisions_keep_the_scales_whole() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = odd(0).to(dtype)
        assert scales(model).dtype == torch.float32 and torch.equal(scales(model), scales(odd(0)))
        assert model(X.to(dtype)).dtype == dtype
    model = odd(0).half().float()
    torch.testing.assert_close(model(X), odd(0)(X), rtol=1e-2, atol=1e-3)


def test_copies_and_pickles_have_their_own() -> None:
    model = odd(0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    expected = model(X)
    with torch.no_grad():
        scales(model).mul_(2)
    for other in copies:
        assert torch.equal(other(X), expected) and scales(other).data_ptr() != scales(model).data_ptr()
    torch.testing.assert_close(materialize(copies[0])(X), expected)


def test_a_bank_of_version_0_1_0_has_its_scales_in_its_slots() -> None:
    model = odd(0)
    (bank,) = banks_of(model)
    expected = model(X)
    std, *factors = bank.scales.tolist()
    object.__setattr__(bank.group, "init_std", std)
    for slot, factor in zip(bank.group.slots, factors, strict=True):
        object.__setattr__(slot, "scale", factor)
    del bank._buffers["scales"], bank._buffers["structure"]
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), expected)


def test_an_average_of_the_weights_over_time_keeps_the_scales() -> None:
    model = odd(0)
    for use_buffers in (False, True):
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
        )
        for _ in range(3):
            average.update_parameters(model)
        torch.testing.assert_close(scales(average), scales(model), rtol=1e-6, atol=0)


def test_functional_call_takes_other_scales() -> None:
    one, other = odd(0), odd(1)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(one, state, (X,)), other(X))
    both = torch.func.stack_module_state([one, other])  # type: ignore[arg-type]
    found = torch.func.vmap(lambda p, b: torch.func.functional_call(one, (p, b), (X,)))(*both)
    torch.testing.assert_close(found, torch.stack([one(X), other(X)]))


def test_a_compiled_model_reads_the_buffer() -> None:
    """No graph break, and no new compilation where a checkpoint has other scales."""
    model, other = odd(0), odd(1)
    count = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(X), other(X))
    assert count == 1


def test_plan_of_finds_the_plan_under_any_prefix() -> None:
    model = odd(0)
    state, plan = model.state_dict(), shared_plan(model)
    for prefix in ("", "module.", "model.", "_orig_mod.", "model.net."):
        assert plan_of({f"{prefix}{key}": value for key, value in state.items()}) == plan
    assert plan_of({**state, **{f"ema.{key}": value for key, value in state.items()}}) == plan
    clone = odd(1, seed=0)
    share_again = share(materialize(clone), plan=plan_of(state))
    share_again.load_state_dict(state)
    assert torch.equal(share_again(X), model(X))


def test_plan_of_says_what_is_missing() -> None:
    state = odd(0).state_dict()
    for wrong, message in (
        (nn.Linear(3, 3).state_dict(), "no key ends with 'dist_ssn._extra_state': give the whole state_dict"),
        ({"state_dict": state, "epoch": 3}, "give its entry 'state_dict'"),
        ([state], "needs a state dict, not an object of type list"),
        (
            {
                **{f"a.{k}": v for k, v in state.items()},
                **{f"b.{k}": v for k, v in odd(0, seed=4).state_dict().items()},
            },
            r"has 2 different plans .a\.0\.dist_ssn\._extra_state, b\.0\.dist_ssn\._extra_state",
        ),
        ({"dist_ssn._extra_state": "text"}, "has no plan: it was not written by dist_ssn"),
    ):
        with pytest.raises(PlanError, match=message):
            plan_of(wrong)  # type: ignore[arg-type]


def test_a_bank_by_hand_has_the_scales_of_equal_weights() -> None:
    plan = make_plan(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40)), 3.0, mapping="single", morph="avg")
    (group,) = Plan.from_json(plan.to_json()).groups
    assert Bank(group, 0).scales.tolist() == pytest.approx([1.0, *(slot.templates**0.5 for slot in group.slots)])
