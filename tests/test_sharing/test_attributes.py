"""Attributes and hooks of a weight: carried to its bank, or told, before sharing and after."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_ssn import parameters_of, share
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import banks_of


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))


def told(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    assert all(warning.filename == __file__ for warning in seen)  # where the user's line is
    return [str(warning.message) for warning in seen]


def test_what_all_weights_of_a_bank_have_alike_goes_to_the_bank() -> None:
    """As scripts mark what shall not decay, or another learning rate."""
    model = net()
    for parameter in model.parameters():
        parameter.lr_scale = 0.5
    model[4].weight._no_weight_decay = True
    model[4].weight._is_hf_initialized = True
    assert not told(lambda: share(model, 0.5, mapping={"4.*": "head", "*": "rest"}))
    banks = {bank.group.name: bank for bank in banks_of(model)}
    assert all(p.lr_scale == 0.5 for p in model.parameters())  # gains, too, and no parameter is without
    assert banks["head"].bank._no_weight_decay and not hasattr(banks["rest"].bank, "_no_weight_decay")
    assert not hasattr(banks["head"].bank, "_is_hf_initialized")


@pytest.mark.parametrize("value", [0.5, torch.ones(2)])
def test_what_some_weights_of_a_bank_have_is_told(value: Any) -> None:
    model = net()
    model[0].weight.lr_scale, model[2].weight.lr_scale = value, copy.copy(value)
    (message,) = told(lambda: share(model, 0.5))
    assert message.startswith("the attribute lr_scale of 0.weight, 2.weight is lost") and "mapping=" in message
    assert not any(hasattr(p, "lr_scale") for p in model.parameters())


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_before_is_told(kind: str) -> None:
    model = net()
    getattr(model[2].weight, kind)(lambda _: None)
    (message,) = told(lambda: share(model, 0.5))
    assert message.startswith("a hook for its gradient of 2.weight is lost")
    assert not told(lambda: share(net(), 0.5))
    excluded = net()
    getattr(excluded[2].weight, kind)(lambda _: None)
    assert not told(lambda: share(excluded, 0.5, exclude="2.weight"))


@pytest.mark.parametrize("name", ["lr_scale", "_no_weight_decay", "is_shared"])
def test_an_attribute_of_a_read_weight_is_told(name: str) -> None:
    """`is_shared` is a method of tensors, too."""
    model = share(net(), 0.5)

    def mark() -> None:
        setattr(model.get_submodule("2").weight, name, True)

    (message,) = told(mark)
    assert message.startswith(f"{name} of 2.weight is set on the tensor of this one read")


def test_notes_of_programs_are_no_attributes() -> None:
    model = share(net(), 0.5)

    def use() -> None:
        weight = model.get_submodule("2").weight.detach()
        weight._is_hf_initialized = True
        copy.deepcopy(weight)
        pickle.loads(pickle.dumps(weight))

    assert not told(use)


# --- parameters of a part, where torch uses them


def ways(part: nn.Module, loss: torch.Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(part.parameters(), 1.0),
        "clip_grad_value_": lambda: nn.utils.clip_grad_value_(part.parameters(), 1.0),
        "autograd.grad": lambda: torch.autograd.grad(loss, part.parameters(), retain_graph=True),  # type: ignore[arg-type]
        "zero_grad": lambda: part.zero_grad(),
    }


@pytest.mark.parametrize("way", ["clip_grad_norm_", "clip_grad_value_", "autograd.grad", "zero_grad"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_use_of_a_part_is_told_once_and_where_it_is(way: str, nested: bool) -> None:
    inner = net()
    model = share(nn.ModuleDict({"b": net(), "a": inner}), 0.3)  # the first layer holds the bank
    part: Any = inner if nested else inner[2]
    loss = inner(torch.randn(3, 8)).square().sum()
    loss.backward(retain_graph=True)
    (message,) = told(ways(part, loss)[way])
    kind, names = type(part).__name__, "a.0.weight, a.2.weight, a.4.weight" if nested else "a.2.weight"
    assert message == (
        f"{way} got the parameters of this {kind}, which lack the bank outside of it that generates {names}: use "
        "dist_ssn.parameters_of(part)"
    )
    assert not told(ways(part, loss)[way])
    assert not told(ways(model, loss)[way]) if way != "autograd.grad" else True
    assert parameters_of(part)


LISTS: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda part: list(part.parameters()),
    "a clipped list": lambda part: nn.utils.clip_grad_norm_(list(part.parameters()), 1.0),
    "a count": lambda part: sum(p.numel() for p in part.parameters()),
    "names": lambda part: {name: p.detach() for name, p in part.named_parameters()},
    "two models": lambda part: [p.copy_(q) for p, q in zip(part.parameters(), part.parameters(), strict=True)],
}


@pytest.mark.parametrize("way", LISTS)
def test_a_list_of_a_part_is_told_once_and_where_it_is(way: str) -> None:
    model: Any = share(nn.ModuleDict({"b": net(), "a": net()}), 0.3)
    with torch.no_grad():
        (message,) = told(lambda: LISTS[way](model.a))
    assert message == (
        "the parameters() of this Sequential lack the bank outside of it that generates a.0.weight, a.2.weight, a.4.weight: "
        "use dist_ssn.parameters_of(part); if they shall not train, dist_ssn.freeze(model, …)"
    )
    with torch.no_grad():
        assert not told(lambda: LISTS[way](model.a)) and not told(lambda: LISTS[way](model))


def test_who_wants_something_else_of_a_part_is_not_judged() -> None:
    model: Any = share(nn.ModuleDict({"b": net(), "a": net()}), 0.3)
    framework = compile("count = sum(p.numel() for p in part.parameters())", torch.nn.__file__, "exec")

    def use_it() -> None:
        for part in (model.a, model.a[2]):
            assert len([name for name, _ in part.named_modules()]) == len(list(part.modules()))
            assert next(part.parameters()).device.type == "cpu"
            part.train().requires_grad_(True)
            exec(framework, {"part": part})  # installed code
        nn.utils.clip_grad_norm_(parameters_of(model.a), 1.0)
        nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        dense = net()
        nn.utils.clip_grad_norm_(dense[2].parameters(), 1.0)

    assert not told(use_it)


def test_a_parameter_made_of_a_read_weight_is_refused() -> None:
    """It would train by itself, as `decoder.weight = nn.Parameter(encoder.weight)` does not in a dense model."""
    model = share(net(), 0.5)
    for weight in (model[0].weight, model[0].weight.detach(), model[0].weight[:4]):
        with pytest.raises(ShareError, match=r"Parameter made of 0\.weight would train without the bank.*clone\(\)\)"):
            nn.Parameter(weight)
    copied = nn.Parameter(model[0].weight.detach().clone())
    assert type(copied) is nn.Parameter and torch.equal(copied, model[0].weight)
