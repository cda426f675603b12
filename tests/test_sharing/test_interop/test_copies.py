"""Copies of a shared model, and files of it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import share
from testing.layer_kinds import KINDS, banks_of, loss_of, relative_error, shake
from tests.test_sharing.test_interop.nets import EXACT, assert_equal, gradients, net, pure_gradients


def check_copy(model: nn.Module, twin: nn.Module, tokens: Tensor) -> None:
    """`twin` is equal to `model`, and independent of it."""
    assert torch.equal(model(tokens), twin(tokens))
    before = model(tokens)
    loss_of(twin(tokens)).backward()
    assert all(p.grad is None for p in model.parameters())
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert torch.equal(model(tokens), before) and not torch.equal(twin(tokens), before)
    assert len(banks_of(twin)) == len(banks_of(model))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.zero_grad()
    loss_of(twin(tokens)).backward()
    assert_equal(gradients(twin), pure_gradients(twin, tokens))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str, tokens: Tensor) -> None:
    """Also in the middle of a graph, whose nodes stay behind."""
    model = net()
    loss = loss_of(model(tokens))
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    check_copy(model, twin, tokens)
    loss.backward()
    assert_equal(gradients(model), pure_gradients(model, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_can_be_copied_and_pickled(kind: str) -> None:
    model = share(KINDS[kind].build().double(), 0.6)
    inputs = KINDS[kind].inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss_of(twin(*inputs)), loss_of(model(*inputs)))
        loss_of(twin(*inputs)).backward()
        assert all(bank.bank.grad is None for bank in banks_of(model))
        assert all(bank.bank.grad is not None for bank in banks_of(twin))


def test_a_pickled_layer_takes_its_bank_along() -> None:
    model = net()
    layer = pickle.loads(pickle.dumps(model.get_submodule("head")))
    x = torch.randn(2, 12, dtype=torch.float64)
    assert torch.equal(layer(x), model.get_submodule("head")(x))


def test_averaged_model(tokens: Tensor) -> None:
    """torch's EMA copies a model and averages its parameters, so that of banks."""
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    average.update_parameters(model)
    shake(model)
    average.update_parameters(model)
    for mean, first, second in zip(average.module.parameters(), before, model.parameters(), strict=True):
        assert relative_error(mean, (first + second) / 2) <= EXACT
    assert average(tokens).shape == (4, 5, 30)
