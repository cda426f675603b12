"""Autocast, and models in another precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ssn import materialize, parameter_groups, set_generation, share
from dist_ssn.sharing.bank import Bank
from testing.layer_kinds import KINDS, be_pure, loss_of, relative_error, shake
from tests.test_sharing.test_interop.nets import assert_equal, gradients, net, pure_gradients


@pytest.mark.parametrize(
    "kind", ["linear", "conv2d", "conv1d-transposed", "lstm", "attention-packed", "bilinear", "unknown"]
)
def test_autocast(kind: str) -> None:
    """bf16: the dtypes and numbers of the dense copy, gradients in the bank's own precision."""
    model = share(KINDS[kind].build(), 0.5)
    shake(model, 0.02)
    dense = materialize(model)
    inputs = tuple(x.float() for x in KINDS[kind].inputs())
    try:
        with torch.autocast("cpu", torch.bfloat16):
            dense(*inputs)
    except RuntimeError as error:
        pytest.skip(f"this processor does not run the dense layer in 16 bits either: {error}")
    outputs, slopes = [], []
    for each in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            output = each(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().mean().backward()
        outputs.append(output)
        slopes.append({name: p.grad for name, p in each.named_parameters()})
    assert outputs[0].dtype == outputs[1].dtype
    assert relative_error(outputs[0].float(), outputs[1].float()) <= 1e-2
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype == torch.float32
        if name in slopes[1]:
            assert relative_error(slopes[0][name], slopes[1][name]) <= 0.05, name
    be_pure(model)
    fast = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs)
    (output[0] if isinstance(output, tuple) else output).float().square().mean().backward()
    for got, wanted in zip(fast, gradients(model), strict=True):
        assert relative_error(got, wanted) <= 0.05


def test_autocast_makes_the_weight_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, where the operation would only cast it; an embedding's rows stay as they are."""
    model, made = share(nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 9)), 0.5, generate="on_demand"), []
    plain = Bank.forward

    def forward(bank: Bank, index: int, *args: Any, **kwargs: Any) -> Tensor:
        weight: Any = plain(bank, index, *args, **kwargs)
        made.append((bank.group.slots[index].name, weight.dtype))
        return weight

    monkeypatch.setattr(Bank, "forward", forward)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.tensor([1, 2]))
    assert output.dtype == torch.bfloat16
    assert made == [("0.weight", torch.float32), ("1.weight", torch.bfloat16)]


class Careful(nn.Linear):
    """A layer that does without autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(input.float(), self.weight, self.bias)


def test_autocast_that_is_switched_off_inside_a_layer() -> None:
    model = share(nn.Sequential(Careful(10, 12), nn.Linear(12, 6)), 0.6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.randn(2, 10)).dtype == torch.float32  # type: ignore[index]
        model(torch.randn(2, 10)).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_leaves_double_precision_alone(tokens: Tensor) -> None:
    model = net()
    wanted = pure_gradients(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(tokens))
    loss.backward()
    assert_equal(gradients(model), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conversion(dtype: torch.dtype, tokens: Tensor) -> None:
    """`.to(dtype)`, before any forward, after one, and in the middle of a graph that is given up."""
    reference = net()
    model = copy.deepcopy(reference)
    model(tokens)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    output = model(tokens)
    assert output.dtype == dtype
    assert relative_error(output.double(), reference(tokens)) <= 30 * torch.finfo(dtype).eps
    output.double().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    model.zero_grad()
    model.double()
    loss_of(model(tokens)).backward()
    assert all(g is not None for g in gradients(model))


def test_half_and_double(tokens: Tensor) -> None:
    model = net()
    wanted = model(tokens)
    assert model.half()(tokens).dtype == torch.float16
    assert relative_error(model.double()(tokens), wanted) <= 1e-2


LR = 1e-5


class Masters:
    """SGD on float32 copies of 16-bit parameters, as mixed precision with masters has it. Adam would act on the sign of noise."""

    def __init__(self, model: nn.Module, lr: float):
        self.pairs = [(p, p.detach().float().requires_grad_()) for p in model.parameters()]
        self.inner = torch.optim.SGD([master for _, master in self.pairs], lr=lr)

    def step(self) -> None:
        for parameter, master in self.pairs:
            assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16
            master.grad, parameter.grad = parameter.grad.float(), None
        self.inner.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)


@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
def test_a_16_bit_bank_trains_with_float32_masters(mode: str, tokens: Tensor) -> None:
    """Steps that are too small for 16 bits add up in the masters; without them they are lost."""
    model = net(morph="offset:gains=true")
    set_generation(model, mode)
    low, alone = model.bfloat16(), copy.deepcopy(model)
    exact = copy.deepcopy(model).float()
    start = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    masters = Masters(low, LR)
    for one, optimizer in (
        (exact, torch.optim.SGD(exact.parameters(), lr=LR)),
        (low, masters),
        (alone, torch.optim.SGD(alone.parameters(), lr=LR)),
    ):
        for _ in range(20):
            loss_of(one(tokens).float()).backward()  # which counts up to more than 16 bits hold
            optimizer.step()
            one.zero_grad()
    found = {name: master for (name, _), (_, master) in zip(low.named_parameters(), masters.pairs, strict=True)}
    for name, parameter in exact.named_parameters():
        if not name.startswith("dist_ssn"):
            continue
        moved = parameter.detach() - start[name]
        assert (found[name].detach() - start[name] - moved).norm() < 0.2 * moved.norm(), name
        assert (dict(alone.named_parameters())[name].float() - start[name] - moved).norm() > 0.5 * moved.norm(), name
        assert torch.equal(dict(low.named_parameters())[name], found[name].bfloat16())


@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_fused_and_foreach_adam_train_a_bank_as_the_plain_one(kind: str, mode: str, tokens: Tensor) -> None:
    plain = net(morph="offset:gains=true")
    set_generation(plain, mode)
    other = copy.deepcopy(plain)
    for model, options in ((plain, {"foreach": False}), (other, {kind: True})):
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1, lr=1e-3), **options)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(tokens)).backward()
            optimizer.step()
    for (name, ours), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(ours, theirs) < 1e-9, name
