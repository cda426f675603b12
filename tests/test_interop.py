"""Shared models inside everything that PyTorch does with a model. The oracle is the pure twin, or the dense copy."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from dist_ssn import materialize, parameter_groups, share
from dist_ssn.bank import Bank
from tests.layer_kinds import KINDS, Tied, banks_of, be_pure, loss_of, pulled_back, relative_error, shake

EXACT = 1e-10
Gradients = list[Tensor | None]


class Block(nn.Module):
    """Two linear layers around a nonlinearity, beside a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Embedding, blocks and head; `run` is how a block is called."""

    def __init__(self, blocks: int = 3, width: int = 12, run: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(30, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 30)
        self.run = run

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = self.run(block, x) if self.run else block(x)
        return self.head(x)


def net(budget: float = 0.4, morph: str = "offset:gains=true,rank=1", **options: Any) -> nn.Module:
    """A shared `Net` in float64, every time with the same numbers, none of them at its start."""
    torch.manual_seed(0)
    model = share(Net(**options).double(), budget, morph=morph, mapping="single")
    shake(model)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 30, (4, 5), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> Gradients:
    """Those of all parameters, which are taken off."""
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def pure_gradients(model: nn.Module, tokens: Tensor) -> Gradients:
    """What one plain backward gives on the pure path."""
    be_pure(model)
    loss_of(model(tokens)).backward()
    be_pure(model, False)
    return gradients(model)


def assert_equal(got: Gradients, wanted: Gradients, tolerance: float = EXACT) -> None:
    assert any(gradient is not None and bool(gradient.any()) for gradient in wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        assert relative_error(mine, theirs) <= tolerance


# --------------------------------------------------------------------------------------------------------- precision


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
    model, made = share(nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 9)), 0.5), []
    plain = Bank.forward

    def forward(bank: Bank, index: int, *args: Any, **kwargs: Any) -> Tensor:
        weight = plain(bank, index, *args, **kwargs)
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


# ------------------------------------------------------------------------------------------------- modes of autograd


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
    """A layer's own switch reaches its bias. Its weight belongs to the bank, which has a switch for all its weights."""
    model = net()
    wanted = {name: p for (name, _), p in zip(model.named_parameters(), pure_gradients(model, tokens), strict=True)}
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


# --------------------------------------------------------------------------------------------------- copies and files


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


def test_a_copied_layer_takes_its_bank_along() -> None:
    model = net()
    layer = copy.deepcopy(model.get_submodule("head"))
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


# ---------------------------------------------------------------------------------------------------- torch.func & co.


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
    assert "weight" not in {name for name, p in model.get_submodule("head").named_parameters() if p is not None}


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


# -------------------------------------------------------------------------------------------------- hooks and compilers


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


@pytest.mark.parametrize(("kind", "breaks"), [(nn.LSTM, 3), (nn.GRU, 3)])
def test_compiled_recurrent_layers_break_the_graph_and_are_right(kind: type[nn.RNNBase], breaks: int) -> None:
    """As README.md counts them, for two layers; torch itself does not trace such layers."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = kind(6, 5), kind(6, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x)[0], self.second(x)[0]

    torch._dynamo.reset()
    model, x = share(Two(), 0.5), torch.randn(4, 2, 6)
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


# ------------------------------------------------------------------------------------------------ shapes that models take


def test_a_layer_that_is_used_twice(tokens: Tensor) -> None:
    model = net(run=lambda block, x: block(block(x)))
    loss_of(model(tokens)).backward()
    assert_equal(gradients(model), pure_gradients(model, tokens))


def test_tied_weights() -> None:
    """One slot, one weight, both uses in its gradient."""
    model = share(Tied().double(), 0.5)
    assert isinstance(model, Tied)
    assert torch.equal(model.table.weight, model.head.weight)
    tokens = torch.tensor([[1, 2, 29, 2]])
    dense = materialize(model)
    loss_of(model(tokens)).backward()
    loss_of(dense(tokens)).backward()
    table = dense.get_parameter("table.weight").grad
    (bank,) = banks_of(model)
    be_pure(model)
    parts = torch.autograd.grad(bank(0), list(bank.parameters()), table)
    be_pure(model, False)
    assert_equal(gradients(model), list(parts))


class TiedByHand(nn.Module):
    """The root reads its embedding's weight for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.scale = nn.Parameter(torch.randn(3, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.table(tokens) * self.scale.sum(0), self.table.weight)


def test_a_weight_that_another_module_reads() -> None:
    """Inside another layer's forward, and from a root that shares nothing of its own."""
    for exclude in (None, "scale"):
        model = share(TiedByHand().double(), 0.6, exclude=exclude)
        tokens = torch.tensor([[1, 2, 29, 2]])
        dense = materialize(model)
        assert relative_error(model(tokens), dense(tokens)) <= EXACT
        loss_of(model(tokens)).backward()
        assert_equal(gradients(model), pure_gradients(model, tokens))


def test_gradient_clipping(tokens: Tensor) -> None:
    model = net()
    norms, results = [], []
    for pure in (False, True):
        be_pure(model, pure)
        loss_of(model(tokens)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        results.append(gradients(model))
    assert relative_error(*norms) <= EXACT and float(norms[0]) > 0.1
    assert_equal(*results)
    total = torch.stack([g.square().sum() for g in results[0] if g is not None]).sum().sqrt()
    assert abs(float(total) - 0.1) < 1e-5


def test_two_shared_models_in_one_process(tokens: Tensor) -> None:
    """Same names, same plan, other numbers; their graphs interleave, one feeds the other."""
    first, second = net(), net()
    shake(second)
    alone = [pure_gradients(first, tokens), pure_gradients(second, tokens)]
    losses = [loss_of(first(tokens)), loss_of(second(tokens))]
    (losses[0] + losses[1]).backward()
    assert_equal(gradients(first), alone[0])
    assert_equal(gradients(second), alone[1])
    results = []
    for pure in (False, True):
        be_pure(first, pure)
        be_pure(second, pure)
        x = second.get_submodule("blocks.0")(first.get_submodule("table")(tokens))
        loss_of(first.get_submodule("head")(x)).backward()
        results.append(gradients(first) + gradients(second))
    assert_equal(*results)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(training: bool) -> None:
    """In eval mode torch's fused fast path would read raw weights: same output as the dense copy, whichever path it takes."""
    layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = share(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.5).train(training)
    shake(model)
    dense = materialize(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for arguments in ({}, {"src_key_padding_mask": mask}):
        with torch.no_grad():
            got, wanted = model(x, **arguments), dense(x, **arguments)
        real = ~mask if arguments else torch.ones_like(mask)
        assert relative_error(got[real], wanted[real]) <= EXACT
        model(x, **arguments)[real].square().sum().backward()
        got_slopes = gradients(model)
        be_pure(model)
        model(x, **arguments)[real].square().sum().backward()
        be_pure(model, False)
        assert_equal(got_slopes, gradients(model))


class Generated(nn.Module):
    """A parametrization that makes a weight by the pure path."""

    def __init__(self, bank: Bank, index: int) -> None:
        super().__init__()
        self.source = (bank, index)

    def forward(self, _: Tensor) -> Tensor:
        bank, index = self.source
        return bank(index)


def test_parametrizations_as_an_oracle(tokens: Tensor) -> None:
    """torch's own way to generate a weight, on the dense model, from the same banks."""
    model = net()
    loss_of(model(tokens)).backward()
    (bank,) = banks_of(model)
    wanted = {name: p.grad for name, p in bank.named_parameters()}
    own = {name: p.grad for name, p in model.named_parameters() if not name.startswith("dist_ssn")}
    output = model(tokens)
    model.zero_grad()
    dense = materialize(model)
    be_pure(model)
    for index, slot in enumerate(bank.group.slots):
        layer, _, name = slot.name.rpartition(".")
        parametrize.register_parametrization(dense.get_submodule(layer), name, Generated(bank, index), unsafe=True)
    assert relative_error(dense(tokens), output) <= EXACT
    loss_of(dense(tokens)).backward()
    for name, parameter in bank.named_parameters():
        assert relative_error(wanted[name], parameter.grad) <= EXACT, name
    for name, gradient in own.items():
        assert relative_error(gradient, dense.get_parameter(name).grad) <= EXACT, name


class Graph(nn.Module):
    """A graph layer: its adjacency is a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 9) * 0.3)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, x @ self.mix)


def test_sparse_tensors_inside_a_layer() -> None:
    model = share(Graph().double(), 0.6)
    adjacency = torch.eye(5, dtype=torch.float64).to_sparse()
    x = torch.randn(5, 6, dtype=torch.float64)
    results = []
    for pure in (False, True):
        be_pure(model, pure)
        loss_of(model(adjacency, x)).backward()
        results.append(gradients(model))
    assert_equal(*results)


def test_an_index_out_of_range_is_the_dense_models_error() -> None:
    model = share(nn.Embedding(30, 8), 0.5)
    for bad in (30, -1):
        with pytest.raises(IndexError, match="out of range"):
            model(torch.tensor([1, bad]))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "LBFGS"])
def test_optimizers_train_it(name: str, tokens: Tensor) -> None:
    """A few steps bring the loss down, with the groups that decay what should."""
    model = net()
    parameters = list(model.parameters()) if name == "LBFGS" else parameter_groups(model, 1e-4)
    optimizer = getattr(torch.optim, name)(parameters, lr=1e-2)
    targets = tokens.roll(1, 1).reshape(-1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).reshape(-1, 30), targets)
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(5):
        optimizer.step(closure)
    assert float(closure().detach()) < first
