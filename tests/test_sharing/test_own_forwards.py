"""Layers whose forward is not torch's: what they compute is right, what they write is refused. Forward-mode differentiation."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from dist_ssn import materialize, share
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import banks_of
from testing.layer_kinds import relative_error, shake

MODES = pytest.mark.parametrize("mode", ["on_demand", "per_step"])
TOLERANCE = 1e-10


class Own(nn.Linear):
    """Calls `write` on its weight, and goes on as its base class does."""

    def __init__(self, write: Callable[[Tensor], object]):
        super().__init__(32, 48)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.weight)
        return super().forward(x)


def _mask(weight: Tensor) -> None:
    weight.data *= torch.ones(48, 1).tril()


def _clamp(weight: Tensor) -> None:
    with torch.no_grad():
        weight.clamp_(min=0)


def _copy(weight: Tensor) -> None:
    weight.detach().copy_(torch.zeros(48, 32))


def _set(weight: Tensor) -> None:
    weight.data = weight.data / 2


def _renormalize(weight: Tensor) -> None:
    F.embedding(torch.tensor([1]), weight, max_norm=0.1)


@MODES
@pytest.mark.parametrize("write", [_mask, _clamp, _copy, _set, _renormalize])
def test_what_a_forward_writes_to_its_weight_is_refused(mode: str, write: Callable[[Tensor], object]) -> None:
    """It would be lost: masked convolutions, constrained layers, codebooks."""
    model = share(nn.Sequential(Own(write), nn.Linear(48, 4)), 0.3, generate=mode)
    with pytest.raises(ShareError, match=r"0\.weight is generated .* would be lost: compute with a copy.*exclude="):
        model(torch.randn(3, 32))


class Masked(nn.Conv2d):
    """A convolution that computes with a masked weight, standardized."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(3, 3, dtype=x.dtype).triu()
        weight = self.weight * mask
        weight = (weight - weight.mean()) / weight.std()
        return self._conv_forward(x, weight, self.bias)


class Elementwise(nn.Linear):
    """A linear layer whose weight autocast does not lower."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.middle, self.last = Masked(3, 8, 3), Elementwise(8, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.conv(x)).mean((-1, -2)))))


def net(mode: str, dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    share(model, 0.4, morph="offset:gains=true", generate=mode)
    shake(model)
    return model


@MODES
def test_what_a_forward_computes_from_its_weight_is_right(mode: str) -> None:
    model = net(mode, torch.float64)
    dense = materialize(model)
    inputs = [torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    for each, x in zip((model, dense), inputs, strict=True):
        each(x).square().sum().backward()
    assert relative_error(inputs[0].grad, inputs[1].grad) <= TOLERANCE
    for name, bias in dense.named_parameters():
        if name.endswith("bias"):
            assert relative_error(model.get_parameter(name).grad, bias.grad) <= TOLERANCE


class Spectral(nn.Module):
    """A filter of frequencies, whose weight is stored as pairs of real numbers."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pairs, self.use = nn.Parameter(torch.randn(12, 12, 2)), use

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.complex128) @ self.use(torch.view_as_complex(self.pairs)).to(torch.complex128)
        return torch.view_as_real(y).flatten(-2)


@MODES
@pytest.mark.parametrize(
    "use",
    [lambda w: w, lambda w: w.conj(), lambda w: w.conj().imag, lambda w: w[:, ::2].t().conj().t(), lambda w: w.imag],
)
def test_a_weight_that_is_read_as_complex_numbers(mode: str, use: Callable[[Tensor], Tensor]) -> None:
    """Backward needs that view of the weight, and not the numbers as they are stored."""
    model = share(nn.Sequential(Spectral(use)).double(), 0.5, generate=mode)
    dense, slopes = materialize(model), []
    for each in (model, dense):
        x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        each(x).square().sum().backward()
        slopes.append(x.grad)
    assert relative_error(slopes[0], slopes[1]) <= TOLERANCE
    bank = banks_of(model)[0].bank
    weight: Any = model[0].pairs  # type: ignore[index, union-attr]
    (expected,) = torch.autograd.grad(weight, bank, dense.get_parameter("0.pairs").grad)
    assert relative_error(bank.grad, expected) <= TOLERANCE


class Listed(nn.Module):
    """A chain of matrices of a ParameterList, which it reads by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(12, 12)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices[:-2]:
            x = torch.tanh(x @ matrix)
        return x @ self.matrices[-1] + x @ self.matrices[1:3][1]


@MODES
def test_a_slice_of_a_list_of_weights_has_the_weights(mode: str) -> None:
    model = share(Listed().double(), 0.5, generate=mode)
    dense, x = materialize(model), torch.randn(5, 12, dtype=torch.float64)
    for each in (model, dense):
        each(x).square().sum().backward()
    assert torch.equal(model(x), dense(x))
    bank = banks_of(model)[0].bank
    weights = [model.get_submodule("matrices")[index] for index in range(4)]  # type: ignore[index]
    slopes = [parameter.grad for parameter in dense.parameters()]
    expected = torch.autograd.grad(weights, bank, slopes)[0]
    assert relative_error(bank.grad, expected) <= TOLERANCE


@MODES
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_lowers_what_it_lowers_in_the_dense_layer(mode: str, lower: torch.dtype) -> None:
    model = net(mode, torch.float32)
    dense, x = materialize(model), torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", lower), torch.no_grad():
        assert torch.equal(model.conv(x), dense.conv(x))
        features = torch.randn(4, 8)
        found = model.middle(features)
        assert found.dtype == torch.float32
        assert torch.equal(found, dense.middle(features))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it, for decompositions
@MODES
def test_forward_mode_differentiation(mode: str) -> None:
    """Over the inputs, and over the parameters of a bank by themselves."""
    model = net(mode, torch.float64)
    dense, x = materialize(model), torch.randn(4, 3, 6, 6, dtype=torch.float64)

    def tangent_of_inputs(each: nn.Module) -> Tensor:
        tangent = forward_ad.unpack_dual(each(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert tangent is not None
        return tangent.detach()

    with forward_ad.dual_level():
        assert relative_error(tangent_of_inputs(model), tangent_of_inputs(dense)) <= TOLERANCE
    values = {name: value.detach() for name, value in model.named_parameters()}
    for name in ("dist_ssn.all.bank", "dist_ssn.all.gains"):
        with forward_ad.dual_level():
            duals = values | {name: forward_ad.make_dual(values[name], torch.ones_like(values[name]))}
            found = forward_ad.unpack_dual(functional_call(model, duals, (x,))).tangent

        def output(value: Tensor, name: str = name) -> Tensor:
            return functional_call(model, values | {name: value}, (x,))

        _, expected = torch.func.jvp(output, (values[name],), (torch.ones_like(values[name]),))
        assert relative_error(found, expected) <= TOLERANCE, name


def test_a_saved_weight_is_an_ordinary_tensor() -> None:
    model = share(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 4)), 0.3)
    file = io.BytesIO()
    torch.save({"weight": model[0].weight, "values": model[0].weight.detach(), "part": model[0].weight[:2]}, file)
    file.seek(0)
    found = torch.load(file)
    dense = materialize(model)[0].weight.detach()
    assert all(type(tensor) is Tensor for tensor in found.values())
    assert torch.equal(found["weight"], dense) and torch.equal(found["values"], dense)
    assert torch.equal(found["part"], dense[:2])
