"""A backward that fails, or whose inputs were changed before it; anomaly mode and threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_ssn import share
from testing.layer_kinds import banks_of, loss_of
from tests.test_sharing.test_interop.nets import assert_equal, gradients, net, pure_gradients


class Fails(torch.autograd.Function):
    """Passes its input on; its backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_an_exception_in_the_middle_of_backward(reentrant: bool | None, tokens: Tensor) -> None:
    """What the dead pass had summed up must not get into the next step."""
    model, fail = net(), False

    def run(block: nn.Module, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return block(Fails.apply(x) if fail else x)  # type: ignore[arg-type]

        return body(x) if reentrant is None else checkpoint(body, x, use_reentrant=reentrant)

    model.run = run  # type: ignore[assignment]
    wanted = pure_gradients(model, tokens)
    for _ in range(2):
        fail = True
        with pytest.raises(ArithmeticError):
            loss_of(model(tokens)).backward()
        gradients(model)
        fail = False
        loss_of(model(tokens)).backward()
        assert_equal(gradients(model), wanted)


@pytest.mark.parametrize("what", ["input", "weight's output"])
def test_saved_activations_that_were_modified(what: str) -> None:
    """Autograd does not check versions of what went through hooks: we do, and never give a wrong gradient in silence."""
    model = share(nn.Sequential(nn.Linear(10, 12), Sigmoid(12)), 0.6)
    x = torch.randn(3, 10)
    hidden = model[0](x) * 1.0  # type: ignore[index]
    output = model[1](hidden)  # type: ignore[index]
    with torch.no_grad():
        (hidden if what == "input" else output).add_(1.0)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        output.sum().backward()


class Sigmoid(nn.Module):
    """Keeps its output for backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.kernel)


@pytest.mark.parametrize("morph", ["offset", "hash", "inter"])
@pytest.mark.parametrize("change", ["optimizer", "copy"])
def test_banks_that_were_modified_between_forward_and_backward(morph: str, change: str, tokens: Tensor) -> None:
    """Weights would be made again from other numbers: an error, as for any parameter."""
    model = net(morph=morph)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model(tokens)).backward()
    loss = loss_of(model(tokens))
    if change == "optimizer":
        optimizer.step()
    else:
        with torch.no_grad():
            banks_of(model)[0].bank.copy_(torch.zeros_like(banks_of(model)[0].bank))
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        loss.backward()
    model.zero_grad()
    loss_of(model(tokens)).backward()
    assert_equal(gradients(model), pure_gradients(model, tokens))


def test_anomaly_mode(tokens: Tensor) -> None:
    model = net()
    wanted = pure_gradients(model, tokens)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        loss_of(model(tokens)).backward()
    assert_equal(gradients(model), wanted)


def test_threads(tokens: Tensor) -> None:
    """A step in another thread than the one that made the model, and two models stepping at the same time."""
    models = [net(), net()]
    wanted = pure_gradients(models[0], tokens)
    failures: list[BaseException] = []

    def step(model: nn.Module) -> None:
        try:
            for _ in range(3):
                loss_of(model(tokens)).backward()
                assert_equal(gradients(model), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=step, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
