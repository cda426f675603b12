"""Everything that autograd can be asked for: parts of a step, checkpoints, frozen parameters, hooks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_ssn import freeze, materialize, set_generation, share
from dist_ssn.sharing.bank import Bank
from testing.layer_kinds import banks_of, loss_of, pulled_back, relative_error
from tests.test_sharing.test_interop.nets import EXACT, assert_equal, gradients, net, pure_gradients


def test_accumulation(tokens: Tensor) -> None:
    """Two halves make the whole, and gradients add to what is there."""
    model = net()

    def loss(rows: Tensor) -> Tensor:
        return model(rows).square().sum()

    loss(tokens).backward()
    whole = gradients(model)
    loss(tokens[:2]).backward()
    loss(tokens[2:]).backward()
    assert_equal(gradients(model), whole)
    (loss(tokens[:2]) + loss(tokens[2:])).backward()
    assert_equal(gradients(model), whole)


def test_interleaved_graphs(tokens: Tensor) -> None:
    """Two forwards before the first backward, backwards in either order."""
    model = net()
    wanted = pure_gradients(model, tokens)
    for order in ((0, 1), (1, 0)):
        losses = [loss_of(model(tokens)), loss_of(model(tokens))]
        losses[order[0]].backward()
        assert_equal(gradients(model), wanted)
        losses[order[1]].backward()
        assert_equal(gradients(model), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients; nothing but the blocks' inputs is kept; weights are made again and not kept either."""
    kept: list[int] = []

    def run(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    plain, model = net(), net(run=run)
    loss_of(plain(tokens)).backward()
    wanted = gradients(plain)
    made = []
    fast = Bank.fast
    monkeypatch.setattr(Bank, "fast", lambda *a, **k: made.append(1) or fast(*a, **k))
    loss = loss_of(model(tokens))
    forward = len(made)
    loss.backward()
    assert len(made) >= forward + 6, "six weights of three blocks are made again"
    assert_equal(gradients(model), wanted)
    for each in (plain, model):
        saved: list[int] = []

        def pack(x: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(x.untyped_storage().nbytes())
            return x.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_of(each(tokens))
        kept.append(sum(saved))
    assert kept[1] < 0.6 * kept[0], kept


@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
@pytest.mark.parametrize("saved", [torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.tanh])
def test_selective_checkpointing(mode: str, saved: Any, tokens: Tensor) -> None:
    """It counts the operations, so the recomputation must have those of the forward."""
    policies = {True: CheckpointPolicy.MUST_SAVE, False: CheckpointPolicy.PREFER_RECOMPUTE}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policies[operation.overloadpacket is saved]

    def run(block: nn.Module, x: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(lambda x: block(x) * 1.5, x, use_reentrant=False, context_fn=contexts)

    plain, model = net(run=lambda block, x: block(x) * 1.5), net(run=run)
    set_generation(model, mode)
    for each in (plain, model):
        loss_of(each(tokens)).backward()
    assert_equal(gradients(model), gradients(plain))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_within_checkpointing(tokens: Tensor) -> None:
    for outer in (True, False):
        for inner in (True, False):

            def twice(block: nn.Module, x: Tensor, outer: bool = outer, inner: bool = inner) -> Tensor:
                def body(x: Tensor) -> Tensor:
                    return checkpoint(block, torch.tanh(x), use_reentrant=inner) + checkpoint(
                        block, x, use_reentrant=inner
                    )

                return checkpoint(body, x, use_reentrant=outer)

            model = net(run=twice)
            wanted = pure_gradients(net(run=lambda block, x: block(torch.tanh(x)) + block(x)), tokens)
            loss_of(model(tokens)).backward()
            assert_equal(gradients(model), wanted)


def test_hooks_on_saved_tensors_around_the_model(tokens: Tensor) -> None:
    """`save_on_cpu` and its like still see every activation, and no weight."""
    model = net()
    wanted = pure_gradients(model, tokens)
    shapes = []

    def pack(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model(tokens))
    loss.backward()
    assert_equal(gradients(model), wanted)
    assert (4, 5, 24) in shapes or (20, 24) in shapes
    assert not {(12, 24), (24, 12), (12, 30), (30, 12)} & set(shapes)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model(tokens))
    loss.backward()
    assert_equal(gradients(model), wanted)


def test_no_grad_and_inference_mode(tokens: Tensor) -> None:
    """The same output, without a graph; and training goes on afterwards, whatever was made in inference mode."""
    model = net()
    wanted, output = pure_gradients(model, tokens), model(tokens)
    with torch.inference_mode():
        assert torch.equal(model(tokens), output) and model(tokens).is_inference()
        fresh = share(nn.Linear(23, 31), 0.5, seed=991)
    with torch.no_grad():
        assert torch.equal(model(tokens), output) and not model(tokens).requires_grad
    loss_of(model(tokens)).backward()
    assert_equal(gradients(model), wanted)
    again = share(nn.Linear(23, 31), 0.5, seed=991)
    again(torch.randn(2, 23)).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    with torch.inference_mode():
        assert fresh(torch.randn(2, 23)).shape == (2, 31)


class Standardized(nn.Linear):
    """Weight standardization: statistics without a gradient, read before the weight is used."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            spread = self.weight.std()
        return F.linear(input, self.weight / spread, self.bias)


def test_a_weight_that_is_first_read_without_gradient() -> None:
    """What was made for the first read must not be taken for the second."""
    model = share(nn.Sequential(Standardized(10, 12), Standardized(12, 6)).double(), 0.6, mapping="single")
    x = torch.randn(3, 10, dtype=torch.float64)
    dense = materialize(model)
    for each in (model, dense):
        loss_of(each(x)).backward()
    wanted = pulled_back(model, dense)  # the pure twin reads its weight through the same layer: no oracle here
    assert len(wanted) == len(list(banks_of(model)[0].parameters()))
    for name, gradient in wanted.items():
        assert gradient is not None and bool(gradient.any())
        assert relative_error(model.get_parameter(name).grad, gradient) <= EXACT, name


def test_freezing_everything(tokens: Tensor) -> None:
    """No gradient for parameters, the right one for inputs; and back again."""
    model = net()
    wanted = pure_gradients(model, tokens)
    model.requires_grad_(False)
    assert not model(tokens).requires_grad
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(model.get_submodule("blocks.0")(x)), x)
    (same,) = torch.autograd.grad(loss_of(materialize(model).get_submodule("blocks.0")(x)), x)
    assert relative_error(slope, same) <= EXACT
    model.requires_grad_(True)
    loss_of(model(tokens)).backward()
    assert_equal(gradients(model), wanted)


def test_freezing_parts(tokens: Tensor) -> None:
    """A part's own switch reaches its biases, and its weights, as `freeze` does; the bank has a switch for all its weights."""
    model, other = net(), net()
    with pytest.warns(UserWarning, match=r"frozen weights blocks\.0\.up\.weight"):
        freeze(other, "blocks.0")
    loss_of(other(tokens)).backward()
    wanted = {name: parameter.grad for name, parameter in other.named_parameters()}
    model.get_submodule("blocks.0").requires_grad_(False)
    loss_of(model(tokens)).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("blocks.0.")
        assert parameter.requires_grad != frozen
        assert parameter.grad is None if frozen else relative_error(parameter.grad, wanted[name]) <= EXACT
    model.zero_grad()
    banks_of(model)[0].requires_grad_(False)
    loss_of(model(tokens)).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"blocks.1.up.bias", "blocks.1.down.bias", "blocks.2.up.bias", "blocks.2.down.bias", "head.bias"}
    for name in got:
        assert relative_error(model.get_parameter(name).grad, wanted[name]) <= EXACT


def test_switches_that_change_between_forwards(tokens: Tensor) -> None:
    """As with a GAN, whose halves are frozen in turn."""
    model = net()
    wanted = pure_gradients(model, tokens)
    for _ in range(2):
        loss_of(model(tokens)).backward()
        assert_equal(gradients(model), wanted)
        model.requires_grad_(False)
        x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
        model.get_submodule("blocks.1")(x).sum().backward()
        assert x.grad is not None and all(g is None for g in gradients(model))
        model.requires_grad_(True)


@pytest.mark.parametrize("morph", ["offset:gains=true,rank=1", "wavg/mask", "hash", "inter"])
def test_retained_graphs(morph: str, tokens: Tensor) -> None:
    """Backward twice through one graph doubles the gradients; without retain_graph, torch's own error."""
    model = net(1.5 if "wavg" in morph else 0.4, morph)
    wanted = pure_gradients(model, tokens)
    loss = loss_of(model(tokens))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert_equal([g / 2 if g is not None else None for g in gradients(model)], wanted)
    loss.backward()
    assert_equal(gradients(model), wanted)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_of_some_inputs(tokens: Tensor) -> None:
    """`autograd.grad` and `backward(inputs=…)` for parts of a bank, for own parameters only, and for both."""
    model = net()
    names = [name for name, _ in model.named_parameters()]
    wanted = dict(zip(names, pure_gradients(model, tokens), strict=True))
    for chosen in (names[:1], ["head.bias"], [n for n in names if n.endswith(".bank")], names[-2:], names[::2]):
        parts = torch.autograd.grad(loss_of(model(tokens)), [model.get_parameter(name) for name in chosen])
        for name, part in zip(chosen, parts, strict=True):
            assert relative_error(part, wanted[name]) <= EXACT, name
        assert all(g is None for g in gradients(model)), "autograd.grad leaves .grad alone"
        loss_of(model(tokens)).backward(inputs=[model.get_parameter(name) for name in chosen])
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in chosen)
            if name in chosen:
                assert relative_error(parameter.grad, wanted[name]) <= EXACT, name
        gradients(model)


def test_hooks_on_bank_parameters(tokens: Tensor) -> None:
    """Each fires once per backward, with the final gradient, and what it returns counts."""
    model = net()
    wanted = pure_gradients(model, tokens)
    seen: dict[str, list[Tensor]] = {}
    after: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: seen.setdefault(name, []).append(g.clone()) or 2 * g)
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: after.append(name))
    loss_of(model(tokens)).backward()
    assert sorted(after) == sorted(seen) == sorted(name for name, _ in model.named_parameters())
    assert all(len(calls) == 1 for calls in seen.values())
    assert_equal([calls[0] for calls in (seen[name] for name, _ in model.named_parameters())], wanted)
    assert_equal([g / 2 if g is not None else None for g in gradients(model)], wanted)


def test_an_optimizer_that_steps_within_backward(tokens: Tensor) -> None:
    """Fused optimizers step in a hook as soon as a gradient is there: no weight may be made from a bank after that."""
    model, plain = net(), net()
    optimizers = {id(p): torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[id(parameter)].step()
        optimizers[id(parameter)].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        loss_of(model(tokens)).backward()
        loss_of(plain(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(mine.detach(), theirs.detach()) <= EXACT
