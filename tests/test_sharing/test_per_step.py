"""All weights at once, per forward: the same as on demand in float64, whatever a script does between and inside of steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_ssn import freeze, materialize, set_generation, share
from dist_ssn.errors import ShareError
from dist_ssn.sharing.per_step import SMALL
from testing.layer_kinds import KINDS, Twins, banks_of, loss_of, relative_error, shake

TOLERANCE = 1e-10


class Net(nn.Module):
    """Two blocks around a repeated layer, with matrices whose rows are, and are not, whole chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.middle = nn.Linear(48, 48)
        self.odd = nn.Linear(48, 21)
        self.last = nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.odd(torch.tanh(self.middle(hidden)))))


def net(**options: object) -> Net:
    torch.manual_seed(0)
    model = share(Net().double(), 0.3, morph="offset:gains=true", **options)  # type: ignore[arg-type]
    shake(model)
    assert isinstance(model, Net)
    return model


def pair() -> tuple[Net, Net]:
    """(generated on demand, generated per step): the same model twice."""
    one = net(generate="on_demand")
    other = copy.deepcopy(one)
    set_generation(other, "per_step")
    return one, other


def batch(seed: int = 1) -> Tensor:
    return torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def made(model: nn.Module) -> int:
    """Number of weights that were generated at once for the last forward."""
    sheets = (made for bank in banks_of(model) if bank.per_step is not None for made in bank.per_step.made.values())
    return sum(len(sheet.weights) for sheet in sheets)


def same(one: nn.Module, other: nn.Module) -> None:
    for name, gradient in gradients(one).items():
        error = relative_error(gradients(other)[name], gradient)
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("gains", [True, False], ids=["gains", "no gains"])
@pytest.mark.parametrize("budget", [0.35, 0.8])
@pytest.mark.parametrize("name", KINDS)
def test_equals_on_demand_and_the_dense_model(name: str, budget: float, gains: bool) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    model: nn.Module = Twins(kind, 600).double()
    share(model, budget, morph=f"offset:templates=1,gains={str(gains).lower()}", generate="on_demand")
    shake(model)
    inputs = kind.inputs()
    loss = loss_of(model(*inputs))
    loss.backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    set_generation(other, "per_step")
    loss_of(other(*inputs)).backward()
    assert made(other) > 0
    same(model, other)
    dense = materialize(other)
    assert relative_error(loss_of(dense(*inputs)), loss) <= TOLERANCE


def _accumulate(model: Net) -> None:
    for seed in range(3):
        loss_of(model(batch(seed))).backward()


def _two_forwards(model: Net) -> None:
    (loss_of(model(batch(1))) + loss_of(model(batch(2)))).backward()


def _kept_graph(model: Net) -> None:
    loss = loss_of(model(batch()))
    loss.backward(retain_graph=True)
    loss.backward()


def _losses_of_one_forward(model: Net) -> None:
    output = model(batch())
    output[:3].sum().backward(retain_graph=True)
    model(batch(2))
    output[3:].square().sum().backward()


def _checkpoint(reentrant: bool) -> Callable[[Net], None]:
    class Around(nn.Module):
        def __init__(self, inner: Net):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(
                lambda x: torch.tanh(self.inner.middle(self.inner.first(x))), x, use_reentrant=reentrant
            )
            assert isinstance(hidden, Tensor)
            return self.inner.last(self.inner.odd(hidden))

    def run(model: Net) -> None:
        plain = Net.forward
        try:
            Net.forward = lambda self, x: Around(self)(x)  # type: ignore[method-assign]
            loss_of(model(batch().requires_grad_())).backward()
        finally:
            Net.forward = plain  # type: ignore[method-assign]

    return run


def _part_without_gradient(model: Net) -> None:
    plain = Net.forward

    def forward(self: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.middle(self.first(x))
        return self.last(torch.tanh(self.odd(self.middle(self.first(x)) - teacher.cos())))

    try:
        Net.forward = forward  # type: ignore[method-assign]
        loss_of(model(batch())).backward()
    finally:
        Net.forward = plain  # type: ignore[method-assign]


def _frozen(model: Net) -> None:
    with pytest.warns(UserWarning, match="other weights train their bank"):
        freeze(model, "middle")
    loss_of(model(batch())).backward()


def _frozen_parameters(model: Net) -> None:
    for bank in banks_of(model):
        bank.bank.requires_grad_(False)
    loss_of(model(batch())).backward()


def _alone(model: Net) -> None:
    loss_of(model.middle(model.first(batch()))).backward()


def _written_to_data(model: Net) -> None:
    """As old optimizers and averages of weights do it: autograd's version counters don't see it."""
    loss_of(model(batch())).backward()
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    loss_of(model(batch())).backward()


def _steps(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model(batch(seed))).backward()
        optimizer.step()


def _modes_in_turn(model: Net) -> None:
    on = any(bank.per_step is not None for bank in banks_of(model))
    for seed, mode in enumerate(["per_step", "on_demand", "per_step"]):
        set_generation(model, mode if on else "on_demand")
        loss_of(model(batch(seed))).backward()


def _read_directly(model: Net) -> None:
    plain = Net.forward
    try:
        Net.forward = lambda self, x: self.first(x) @ self.middle.weight.T  # type: ignore[method-assign]
        loss_of(model(batch())).backward()
    finally:
        Net.forward = plain  # type: ignore[method-assign]


def _functional(model: Net) -> None:
    swapped = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
    loss_of(torch.func.functional_call(model, swapped, (batch(),))).backward()
    for name, parameter in model.named_parameters():
        parameter.grad = swapped[name].grad


SCRIPTS: dict[str, Callable[[Net], None]] = {
    "accumulation": _accumulate,
    "two forwards before a backward": _two_forwards,
    "a graph that is kept": _kept_graph,
    "two losses, a forward between": _losses_of_one_forward,
    "checkpoint": _checkpoint(False),
    "reentrant checkpoint": _checkpoint(True),
    "a part without gradient": _part_without_gradient,
    "a frozen layer": _frozen,
    "frozen banks, trained gains": _frozen_parameters,
    "a part alone": _alone,
    "values written to .data": _written_to_data,
    "steps": _steps,
    "modes in turn": _modes_in_turn,
    "a weight read outside of its layer": _read_directly,
    "functional_call": _functional,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_whatever_a_script_does(script: str) -> None:
    one, other = pair()
    SCRIPTS[script](one)
    SCRIPTS[script](other)
    assert any(gradient is not None for gradient in gradients(one).values())
    same(one, other)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert relative_error(b, a) <= TOLERANCE


def test_without_gradient_and_in_inference_mode() -> None:
    one, other = pair()
    with torch.no_grad():
        assert relative_error(other(batch()), one(batch())) <= TOLERANCE and made(other)
    with torch.inference_mode():
        assert relative_error(other(batch()), one(batch())) <= TOLERANCE
    same_loss = loss_of(other(batch()))
    same_loss.backward()
    loss_of(one(batch())).backward()
    same(one, other)


def dtypes(model: nn.Module) -> list[torch.dtype]:
    """Of the weights that were generated at once, in the layers' order."""
    (bank,) = banks_of(model)
    assert bank.per_step is not None
    (made,) = bank.per_step.made.values()
    return [made.weights[index].dtype for index in sorted(made.weights)]


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_makes_the_lower_precision_at_once(lower: torch.dtype) -> None:
    """The same weights as on demand, and float32 sums. A layer that runs twice adds its two gradients up in the lower precision."""
    one, other = (model.float() for model in pair())
    with torch.autocast("cpu", lower):
        wanted, got = one(batch().float()), other(batch().float())
    assert got.dtype == wanted.dtype == lower
    assert torch.equal(got, wanted)
    assert dtypes(other) == [lower] * 4
    loss_of(wanted).backward()
    loss_of(got).backward()
    for name, gradient in gradients(one).items():
        assert gradient is not None and gradient.dtype == torch.float32
        assert relative_error(gradients(other)[name], gradient) <= 4e-3, name


def test_autocast_between_and_inside_of_forwards() -> None:
    """Each forward has the precision that it asks for, also if only a part of it asks."""

    class Half(nn.Module):
        def __init__(self, inner: Net):
            super().__init__()
            self.inner, self.lower = inner, False

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = torch.tanh(self.inner.middle(self.inner.first(x)))
            return self.inner.last(self.inner.odd(hidden.float()))

    for script in ((False, True, False, True), (True, True, False)):
        one, other = (model.float() for model in pair())
        for on in script:
            outputs = []
            for model in (one, other):
                with torch.autocast("cpu", torch.bfloat16, enabled=on):
                    outputs.append(model(batch().float()))
                loss_of(outputs[-1]).backward()
            assert relative_error(*outputs) <= 1e-6
            assert set(dtypes(other)) == {torch.bfloat16 if on else torch.float32}
        for name, gradient in gradients(one).items():
            assert relative_error(gradients(other)[name], gradient) <= 4e-3, name
    results = []
    for mode in ("on_demand", "per_step"):
        torch.manual_seed(0)
        model = share(Half(Net()), 0.3, morph="offset:gains=true", generate=mode)
        loss_of(model(batch().float())).backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        assert relative_error(results[1][name], gradient) <= 1e-6, name


def test_autocast_leaves_what_is_not_lowered_exact() -> None:
    """A table that a head shares, and a weight that is read outside of its layer."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
            self.head.weight = self.table.weight
            self.seen: list[tuple[torch.dtype, Tensor]] = []

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.inner(self.table(tokens))
            self.seen.append((hidden.dtype, self.inner.weight.norm()))
            return self.head(hidden)

    norms = []
    for mode in ("on_demand", "per_step"):
        torch.manual_seed(0)
        model = share(Text(), 0.5, morph="offset", generate=mode)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.arange(40).view(2, 20))
        assert logits.dtype == torch.bfloat16
        norms.append(model.seen[0])
        logits.float().square().mean().backward()
    assert norms[0][0] == norms[1][0] == torch.bfloat16 and torch.equal(norms[0][1], norms[1][1])
    (bank,) = banks_of(model)
    assert bank.per_step is not None
    found = [weight.dtype for made in bank.per_step.made.values() for weight in made.weights.values()]
    assert sorted(map(str, found)) == ["torch.bfloat16", "torch.float32"]


def test_a_kept_model_is_lowered_after_the_difference_is_added() -> None:
    outputs = []
    for mode in ("on_demand", "per_step"):
        torch.manual_seed(0)
        model = share(Net(), 0.3, morph="offset", keep=True, generate=mode)
        shake(model)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(batch().float()))
        loss_of(outputs[-1]).backward()
    assert torch.equal(*outputs)
    assert dtypes(model) == [torch.bfloat16] * 4


@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
def test_a_16_bit_bank_trains_as_the_float64_one(mode: str) -> None:
    exact = net(generate=mode)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    with torch.no_grad():
        for theirs, ours in zip(exact.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)
    for one in (exact, model):
        loss_of(one(batch().to(next(one.parameters()).dtype))).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.dtype == torch.bfloat16
        assert relative_error(gradient.double(), gradients(exact)[name]) <= 0.03, name


def test_the_buffer_is_used_again_unless_a_graph_holds_it() -> None:
    _, model = pair()
    (bank,) = banks_of(model)

    def place() -> int:
        assert bank.per_step is not None
        return bank.per_step.sheets[None].weights[0].data_ptr()

    loss = loss_of(model(batch()))
    first = place()
    loss.backward()
    model(batch())
    assert place() == first
    held = model(batch())
    second = place()
    model(batch())
    assert place() != second
    loss_of(held).backward()


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    _, model = pair()
    loss = loss_of(model(batch()))
    with torch.no_grad():
        banks_of(model)[0].bank.add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_an_exception_in_forward_leaves_nothing_stale() -> None:
    one, other = pair()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        other(batch()[:, :5])
    for model in (one, other):
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    assert relative_error(other.first(batch()), one.first(batch())) <= TOLERANCE


def test_copies_and_pickles_keep_the_mode_and_share_nothing() -> None:
    one, other = pair()
    loss = loss_of(other(batch()))
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2)
        copied(batch())
        assert made(copied)
    loss.backward()
    loss_of(one(batch())).backward()
    same(one, other)


def test_a_materialized_copy_has_no_hooks() -> None:
    _, model = pair()
    dense = materialize(model)
    assert not dense._forward_pre_hooks and not dense._forward_hooks and not dense._forward_hooks_always_called


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at its inputs'
@pytest.mark.parametrize("autocast", [False, True], ids=["exact", "autocast"])
@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
def test_compile_has_no_graph_break(mode: str, autocast: bool) -> None:
    torch._dynamo.reset()
    model, other = (net(generate=mode) for _ in range(2))
    if autocast:
        model, other = model.float(), other.float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        x = batch(seed) if not autocast else batch(seed).float()
        for one in (compiled, other):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = one(x)
            loss_of(output).backward()
    for name, gradient in gradients(other).items():
        assert relative_error(gradients(model)[name], gradient) <= (0.01 if autocast else TOLERANCE), name
    assert all(not bank.compiled for bank in banks_of(model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_all_weights_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the graph of the model itself, and in one of a function around it; on demand there is none."""
    torch._dynamo.reset()
    for mode, wanted in (("per_step", 1), ("on_demand", 0)):
        model, graphs = net(generate=mode), []

        def backend(graph: torch.fx.GraphModule, inputs: object, graphs: list[torch.fx.GraphModule] = graphs) -> object:
            graphs.append(graph)
            return graph.forward

        def loss(x: Tensor, model: nn.Module = model) -> Tensor:
            return loss_of(model(x))

        for function in (loss, model):
            graphs.clear()
            found = torch.compile(function, backend=backend)(batch())
            nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes]
            assert sum("all_weights" in name for name in nodes) == wanted, nodes
            assert found.requires_grad


def test_other_morphs_and_pruned_weights_are_generated_on_demand() -> None:
    model = share(Net().double(), 0.3, morph="inter", generate="per_step")
    assert all(bank.per_step is None for bank in banks_of(model))
    model = net(generate="per_step")
    for bank in banks_of(model):
        bank.thresholds = torch.full((len(bank.group.slots),), 0.01, dtype=torch.float64)
    model(batch())
    assert not made(model)


def test_auto_decides_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(generate="auto")
    model(batch())
    assert made(model)
    for limit, weights in ((100, 0), (2**22, 4)):
        monkeypatch.setitem(SMALL, "cpu", limit)
        for one in (model, copy.deepcopy(model), net(generate="per_step") if weights else model):
            one(batch())
            assert made(one) == weights


def test_bad_input() -> None:
    with pytest.raises(ShareError, match=r"generate 'per-step'.*did you mean 'per_step'"):
        share(Net(), 0.3, generate="per-step")
    with pytest.raises(ShareError, match="not shared"):
        set_generation(Net(), "per_step")


def test_a_step_runs_fewer_operations() -> None:
    """Less than a third of what generation on demand adds to the dense step's operations."""
    counts = {}
    one, other = pair()
    for name, model in {"on_demand": one, "per_step": other, "dense": materialize(one)}.items():
        loss_of(model(batch())).backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            loss_of(model(batch())).backward()
        counts[name] = sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))
    assert counts["per_step"] - counts["dense"] < (counts["on_demand"] - counts["dense"]) / 2, counts
