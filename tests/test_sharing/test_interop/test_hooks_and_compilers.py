"""Hooks around layers and banks, and `torch.compile`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import share
from testing.layer_kinds import banks_of, loss_of, relative_error
from tests.test_sharing.test_interop.nets import assert_equal, gradients, net, pure_gradients


def test_forward_hooks(tokens: Tensor) -> None:
    """Before and after a layer, and around its backward; they may read the weight and change what goes through."""
    model, calls = net(), []
    head = model.get_submodule("head")

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(("before", tuple(module.weight.shape)))  # type: ignore[union-attr]
        return (args[0] * 2,)

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append(("after", tuple(module.weight.shape)))  # type: ignore[union-attr]
        return output + 1

    def backward(module: nn.Module, inputs: Any, outputs: Any) -> None:
        calls.append(("backward", tuple(outputs[0].shape)))

    handles = [
        head.register_forward_pre_hook(before),
        head.register_forward_hook(after),
        head.register_full_backward_hook(backward),
    ]
    loss_of(model(tokens)).backward()
    got = gradients(model)
    assert calls == [("before", (30, 12)), ("after", (30, 12)), ("backward", (4, 5, 30))]
    assert_equal(got, pure_gradients(model, tokens))
    for handle in handles:
        handle.remove()
    loss_of(model(tokens)).backward()
    assert not all(
        torch.equal(a, b) for a, b in zip(got, gradients(model), strict=True) if a is not None and b is not None
    )


def test_hooks_of_a_bank_fire_around_every_read(tokens: Tensor) -> None:
    """What ZeRO-3 and FSDP2 gather with; in backward too, when weights are made again."""
    model, calls = net(), []
    (bank,) = banks_of(model)
    bank.register_forward_pre_hook(lambda module, args: calls.append("before"))
    bank.register_forward_hook(lambda module, args, output: calls.append("after"))
    loss = loss_of(model(tokens))
    forward = len(calls)
    assert forward == 2 * 8 and calls == ["before", "after"] * 8
    loss.backward()
    assert len(calls) > forward and calls == ["before", "after"] * (len(calls) // 2)


@pytest.mark.slow
@pytest.mark.parametrize("morph", ["offset:gains=true,rank=1", "hash"])
def test_compile(morph: str, tokens: Tensor) -> None:
    """No error, no graph break, one graph for all equal blocks' classes, and the same gradients."""
    torch._dynamo.reset()
    model = net(0.4, morph, blocks=2)
    wanted = pure_gradients(model, tokens)
    explained = torch._dynamo.explain(model)(tokens)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(2):
            loss_of(compiled(tokens)).backward()
            assert_equal(gradients(model), wanted)
    torch._dynamo.reset()
    loss_of(model(tokens)).backward()
    assert_equal(gradients(model), wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at its inputs'
@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("mode", "breaks"), [("on_demand", 3), ("per_step", 4)])
def test_compiled_recurrent_layers_break_the_graph_and_are_right(
    kind: type[nn.RNNBase], mode: str, breaks: int
) -> None:
    """For two layers; torch itself does not trace such layers. Per step, the graph that makes all weights is one more."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = kind(6, 5), kind(6, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x)[0], self.second(x)[0]

    torch._dynamo.reset()
    model, x = share(Two(), 0.5, generate=mode), torch.randn(4, 2, 6)
    assert torch._dynamo.explain(model)(x).graph_break_count == breaks
    compiled = torch.compile(model, backend="eager")
    for found, wanted in zip(compiled(x), model(x), strict=True):
        assert relative_error(found, wanted) <= 1e-6
    torch._dynamo.reset()


def test_compiling_before_any_eager_forward_does_not_spoil_later_ones() -> None:
    """Trap: tables cached while tensors are fake would be fake for ever."""
    torch._dynamo.reset()
    for morph, size in (("offset", 41), ("hash", 43)):
        model = share(nn.Linear(size, 17), 0.5, morph=morph, seed=size)
        x = torch.randn(2, size)
        program = torch.export.export(model, (x,), strict=False)
        assert relative_error(program.module()(x), model(x)) <= 1e-5
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()
