"""Hooks around layers and banks, and `torch.compile`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_ssn import materialize, share
from dist_ssn.errors import ShareError
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
@pytest.mark.parametrize(("mode", "graphs"), [("on_demand", 2), ("per_step", 3)])
def test_compiled_recurrent_layers_stay_out_of_graphs(kind: type[nn.RNNBase], mode: str, graphs: int) -> None:
    """As torch's own do: no graph is made after the first step. Per step, one more makes the weights."""
    torch.manual_seed(0)

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), kind(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            hidden = self.second(hidden)[0]
            return self.third(hidden)

    model, x = share(Between().double(), 0.5, generate=mode), torch.randn(4, 2, 6, dtype=torch.float64)
    model(x).square().mean().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    torch._dynamo.reset()
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        model.zero_grad()
        compiled(x).square().mean().backward()
        assert len(made) == graphs
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            assert parameter.grad is not None and gradient is not None
            torch.testing.assert_close(parameter.grad, gradient)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
def test_recurrent_layers_are_in_a_graph_that_takes_them(mode: str) -> None:
    """`torch.export` takes them, and so does torch.compile if it is told to, as with a dense model."""
    torch.manual_seed(0)
    model, x = share(nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 5)), 0.5, generate=mode), torch.randn(4, 2, 6)
    wanted = model(x)[0]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)[0]
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()
    # A strict export of torch 2.8 copies layers without their banks.
    strict = getattr(torch._dynamo.config, "install_free_tensors_for_export", False)
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x)[0], wanted)
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile asks for it
def test_a_compiled_function_takes_a_weight() -> None:
    """As a fused loss takes the head's; one graph for weights of one shape, and a write is refused there, too."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    penalty = torch.compile(lambda weight: (weight.t() @ torch.ones(16)).square().sum(), backend=graphs)
    model: Any = share(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), 0.5)
    wanted = torch.stack([layer.weight.sum(0).square().sum() for layer in model]).sum()
    found = torch.stack([penalty(layer.weight) for layer in model]).sum()
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(total, banks_of(model)[0].bank)[0] for total in (found, wanted)]
    assert relative_error(*slopes) <= 1e-5
    assert graphs.frame_count == 1
    assert model[0].weight._base._base is None  # compilers go from base to base
    double = torch.compile(lambda weight: weight.mul_(2), backend="eager")
    with torch.no_grad(), pytest.raises(ShareError, match=r"0\.weight is generated .* would be lost"):
        double(model[0].weight)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
def test_fake_tensors_leave_nothing_behind(mode: str) -> None:
    """As estimates of memory run a model; the first forward, and a later one."""
    torch.manual_seed(0)
    model, x = (
        share(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), 0.5, generate=mode),
        torch.randn(2, 16),
    )
    wanted = materialize(model)(x)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(2, 16)).sum().backward()
        model.zero_grad()
        found = model(x)
        assert type(found) is Tensor
        torch.testing.assert_close(found, wanted)
        found.sum().backward()
        assert all(type(p.grad) is Tensor for p in model.parameters())
        model.zero_grad()
