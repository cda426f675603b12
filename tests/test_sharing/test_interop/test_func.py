"""`torch.func`: functional calls, per-sample gradients, ensembles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import share
from testing.layer_kinds import KINDS, banks_of, be_pure, loss_of, relative_error, shake
from tests.test_sharing.test_interop.nets import EXACT, assert_equal, gradients, net, pure_gradients


def test_functional_call(tokens: Tensor) -> None:
    """Other parameters, and the backward after the call has put the model's own back."""
    model = net()
    others = {name: (p.detach() * 1.5 + 0.1).requires_grad_() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(others[name])
    wanted = pure_gradients(twin, tokens)
    output = torch.func.functional_call(model, others, (tokens,))
    assert torch.equal(output, twin(tokens))
    parts = torch.autograd.grad(loss_of(output), list(others.values()))
    assert_equal(list(parts), wanted)
    assert all(p.grad is None for p in model.parameters())
    loss_of(model(tokens)).backward()
    assert_equal(gradients(model), pure_gradients(model, tokens))


def test_a_step_of_maml(tokens: Tensor) -> None:
    """The adapted parameters are part of a graph; first order on the fast path, as for the pure one."""
    model = net()
    names = [name for name, _ in model.named_parameters()]
    results = []
    for pure in (False, True):
        be_pure(model, pure)
        slopes = torch.autograd.grad(loss_of(model(tokens)), list(model.parameters()))
        adapted = {n: p - 0.01 * g for (n, p), g in zip(model.named_parameters(), slopes, strict=True)}
        loss = loss_of(torch.func.functional_call(model, adapted, (tokens.flip(0),)))
        loss.backward()
        results.append(gradients(model))
    assert len(results[0]) == len(names)
    assert_equal(*results)


def test_generated_weights_cannot_be_replaced_in_a_functional_call(tokens: Tensor) -> None:
    """They are no parameters: a replacement must not be taken and ignored."""
    model = net()
    with pytest.raises((ValueError, KeyError, AttributeError, RuntimeError)):
        torch.func.functional_call(model, {"head.weight": torch.zeros(30, 12).double()}, (tokens,))
    assert model.get_submodule("head")._parameters.get("weight") is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_func_grad_and_per_sample_gradients(tokens: Tensor) -> None:
    model = net()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (tokens,)).square().sum()

    slopes = torch.func.grad(loss)(parameters, tokens)
    be_pure(model)
    model(tokens).square().sum().backward()
    be_pure(model, False)
    assert_equal(list(slopes.values()), gradients(model))
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    assert_equal([sample.sum(0) for sample in samples.values()], list(slopes.values()))
    product = torch.func.jvp(lambda p: loss(p, tokens), (parameters,), (slopes,))[1]
    assert relative_error(product, torch.stack([g.square().sum() for g in slopes.values()]).sum()) <= EXACT


def test_ensembles_and_batched_gradients(tokens: Tensor) -> None:
    """Many models of one plan under vmap; Jacobians of inputs in one go. For parameters that is refused, never wrong."""
    models = [net() for _ in range(3)]
    for model in models[1:]:
        shake(model)
    stacked, _ = torch.func.stack_module_state(models)
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, (tokens,)))(stacked)
    assert relative_error(outputs, torch.stack([model(tokens) for model in models])) <= EXACT
    block = models[1].get_submodule("blocks.0")
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    together = torch.autograd.functional.jacobian(block, x, vectorize=True)
    assert isinstance(together, Tensor)
    one_by_one = torch.autograd.functional.jacobian(block, x)
    assert isinstance(one_by_one, Tensor) and relative_error(together, one_by_one) <= EXACT
    (bank,) = banks_of(models[1])
    units = torch.eye(12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.autograd.grad(block(x), bank.bank, units, is_grads_batched=True)
    be_pure(models[1])
    (slopes,) = torch.autograd.grad(block(x), bank.bank, units, is_grads_batched=True)
    (first,) = torch.autograd.grad(block(x), bank.bank, units[0])
    assert relative_error(slopes[0], first) <= EXACT


def test_channels_last() -> None:
    """Activations in another memory order, and the model moved to it."""
    model = share(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double(), 0.5)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    results = []
    for pure in (False, True):
        be_pure(model, pure)
        loss_of(model(x)).backward()
        results.append(gradients(model))
    assert_equal(*results)


def test_per_sample_gradients_of_a_layer_with_odd_reads() -> None:
    """Attention and recurrent layers, and a layer that is the root itself."""
    for kind in ("attention-packed", "unknown", "gru-cell"):
        model = share(KINDS[kind].build().double(), 0.6)
        inputs = KINDS[kind].inputs()
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], model: nn.Module = model, inputs: Any = inputs) -> Tensor:
            return loss_of(torch.func.functional_call(model, parameters, inputs))

        slopes = torch.func.grad(loss)(parameters)
        loss_of(model(*inputs)).backward()
        assert_equal(list(slopes.values()), gradients(model))
