"""Parts of a shared model: each call of torch on a part either works, or is refused or warned of when it is made."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import freeze, materialize, parameter_groups, parameters_of, share, unfreeze
from dist_ssn.errors import PlanError, ShareError
from dist_ssn.sharing import part_check
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.parts import outside
from testing.layer_kinds import banks_of, relative_error, shake

EXACT = 1e-12
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "parts-of-a-model.md"
BY_PART: dict[str, Any] = {"mapping": {"encoder.*": "encoder", "*": "rest"}}


class Net(nn.Module):
    """An encoder and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 24, bias=bias), nn.Tanh(), nn.Linear(24, 24, bias=bias), nn.Tanh())
        self.head = nn.Linear(24, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def shared(bias: bool = True, **options: Any) -> Net:
    model = share(Net(bias).double(), 0.4, **({"mapping": "single"} | options))
    shake(model)
    return model  # type: ignore[return-value]


def inputs() -> Tensor:
    return torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def encoder_alone() -> Net:
    """A model whose encoder was shared by itself."""
    model = Net().double()
    share(model.encoder, 0.4)
    shake(model)
    return model


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def collected() -> Iterator[None]:
    """Collects what FSDP1 leaves where it was left: torch 2.8 warns of it, which would fail another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


# ------------------------------------------------------------------------------------------- the table of the guide


@dataclass(frozen=True)
class Case:
    """What a call gets: a module, the shared model around it (or the module itself), and such a module without biases."""

    module: nn.Module
    model: nn.Module
    bare: nn.Module


def _step(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """After one step of SGD every weight and bias of the module has moved."""
    before = materialize(module).state_dict()
    optimizer = torch.optim.SGD(parameters, 0.1)
    module(inputs()).square().mean().backward()
    optimizer.step()
    after = materialize(module).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def _frozen(case: Case) -> None:
    module, model = case.module.requires_grad_(False), case.model
    weights = [p.clone() for p in materialize(module).parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    if trained:
        model(inputs()).square().mean().backward()
        torch.optim.SGD(trained, 0.1).step()
    same = all(torch.equal(a, b) for a, b in zip(weights, materialize(module).parameters(), strict=True))
    assert same == (module is model or not outside(module))  # the warning says so


def _freeze(case: Case) -> None:
    freeze(case.model, "*" if case.module is case.model else "encoder")
    if any(p.requires_grad for p in case.model.parameters()):
        case.model(inputs()).square().mean().backward()
    assert all(p.grad is None for p in case.module.parameters())


def _saved(module: nn.Module) -> None:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    wanted = module(inputs())
    shake(module)
    module.load_state_dict(state)
    assert torch.equal(module(inputs()), wanted)


def _loaded(module: nn.Module) -> None:
    module.load_state_dict({name: p.detach() for name, p in module.named_parameters()}, strict=False)
    found = module.load_state_dict(
        {name: p.detach() for name, p in module.named_parameters()}, strict=False
    ).missing_keys
    if lost := [name for name in found if "bank outside" in name]:
        warnings.warn(f"missing_keys: {lost}", stacklevel=1)


def _follows(module: nn.Module) -> None:
    twin = copy.deepcopy(module).requires_grad_(False)
    shake(module)
    with torch.no_grad():
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            q.copy_(p)
    assert torch.equal(twin(inputs()), module(inputs()))


def _pickled(module: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(inputs()), module(inputs()))


def _half(module: nn.Module) -> None:
    assert module.float()(inputs().float()).dtype == torch.float32
    assert module.to(torch.float64)(inputs()).dtype == torch.float64


def _materialized(module: nn.Module) -> None:
    dense = materialize(module)
    assert torch.allclose(dense(inputs()), module(inputs()))
    assert not banks_of(dense)
    copy.deepcopy(dense)


def _cut(module: nn.Module) -> None:
    dense = materialize(module)
    for kept in (slice(None), slice(0, -1)):
        mine, theirs = (nn.Sequential(*list(m.children())[kept]) for m in (module, dense))
        assert torch.allclose(mine(inputs()), theirs(inputs()))


def _clipped(case: Case, listing: Callable[[Iterator[nn.Parameter]], Any] = lambda parameters: parameters) -> bool:
    """True if the gradient of all that the module trains has the norm afterwards."""
    case.model(inputs()).square().sum().backward()
    nn.utils.clip_grad_norm_(listing(case.module.parameters()), 1e-3)
    gradients = [p.grad for p in parameters_of(case.module) if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients)) < 1e-3 * (1 + 1e-9)


def _differentiated(case: Case) -> bool:
    slopes = torch.autograd.grad(case.model(inputs()).square().sum(), case.module.parameters())  # type: ignore[arg-type]
    return len(slopes) == len(parameters_of(case.module))


def _zeroed(case: Case) -> bool:
    case.model(inputs()).square().sum().backward()
    case.module.zero_grad()
    return all(p.grad is None for p in parameters_of(case.module))


def _averaged(module: nn.Module) -> bool:
    """A moving average by a loop over two models: True if the other one computes the same at its end."""
    around = nn.ModuleDict({"m": module})
    other = _case("whole" if isinstance(module, Net) else "alone" if banks_of(module) else "part").module
    with torch.no_grad():
        for p, q in zip(around.m.parameters(), other.parameters(), strict=True):
            q.copy_(p)
    return torch.equal(other(inputs()), module(inputs()))


def _layer(module: nn.Module) -> Any:
    return next(layer for layer in module.modules() if isinstance(layer, nn.Linear))


def _marked(module: nn.Module) -> None:
    _layer(module).weight.lr_scale = 2.0
    assert not hasattr(_layer(module).weight, "lr_scale")


def _ddp(module: nn.Module) -> None:
    DistributedDataParallel(module)(inputs()).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def _called(module: nn.Module) -> None:
    wanted, seen = module(inputs()), []
    module.train().eval().apply(seen.append)
    handle = module.register_forward_hook(lambda *_: seen.append(handle))
    assert torch.equal(module(inputs()), wanted)
    handle.remove()
    assert seen[-1] is handle
    assert torch.equal(torch.func.functional_call(module, dict(module.named_buffers()), (inputs(),)), wanted)
    torch.testing.assert_close(torch.compile(module, backend="eager")(inputs()), wanted)


LACKS = r"the parameters\(\) of this Sequential lack the bank"


@dataclass(frozen=True)
class Call:
    """A row of the guide: what is called, and what is right for a whole model, a part, and a part that was shared by itself."""

    run: Callable[[Case], Any]
    whole: str = "works"
    part: str = "refused"
    alone: str = "works"


CALLS = {
    "`SGD(m.parameters()).step()`": Call(lambda c: _step(c.module, list(c.module.parameters()))),
    "`SGD(parameters_of(m)).step()`": Call(lambda c: _step(c.module, parameters_of(c.module)), part="warned"),
    "`next(m.parameters())`, without biases": Call(lambda c: next(c.bare.parameters())),
    "`m.requires_grad_(False)`, then a step": Call(_frozen, part="warned"),
    '`freeze(model, "m")`': Call(_freeze, part="warned"),
    "`m.state_dict()`, `m.load_state_dict(…)`": Call(lambda c: _saved(c.module)),
    "`m.load_state_dict(…, strict=False)`": Call(lambda c: _loaded(c.module), part="warned"),
    "`copy.deepcopy(m)`": Call(lambda c: _follows(c.module)),
    "`pickle.dumps(m)`, `torch.save(m)`": Call(lambda c: _pickled(c.module), part="works"),
    "`m.half()`, `m.float()`, `m.to(…)`": Call(lambda c: _half(c.module)),
    "`m.to(…)` without a change": Call(lambda c: c.module.double().to("cpu"), part="works"),
    "`m.share_memory()`": Call(lambda c: c.module.share_memory()),
    "`materialize(m)`": Call(lambda c: _materialized(c.module), part="works"),
    "`nn.Sequential(*list(m.children())[:-1])`": Call(lambda c: _cut(c.module), part="works"),
    "`clip_grad_norm_(m.parameters(), 1)`, `clip_grad_value_`": Call(_clipped, part="warned"),
    "`autograd.grad(loss, m.parameters())`": Call(_differentiated, part="warned"),
    "`m.zero_grad()`": Call(_zeroed, part="warned"),
    "`clip_grad_norm_(list(m.parameters()), 1)`": Call(lambda c: _clipped(c, list), part="warned"),
    "`for p, q in zip(m.parameters(), other.parameters())`": Call(lambda c: _averaged(c.module), part="warned"),
    "`m.layer.weight.lr_scale = 2`": Call(lambda c: _marked(c.module), "warned", "warned", "warned"),
    "`m.layer.weight.register_hook(…)`": Call(
        lambda c: _layer(c.module).weight.register_hook(lambda _: None), "warned", "warned", "warned"
    ),
    "`DistributedDataParallel(m)`": Call(lambda c: _ddp(c.module)),
    "`m(x)`, `train`, `eval`, `apply`, hooks, `functional_call`, `torch.compile`": Call(
        lambda c: _called(c.module), part="works"
    ),
}


def _outcome(run: Callable[[Case], Any], case: Case) -> str:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            right = run(case) is not False
        except (ShareError, StopIteration):
            return "refused"
        except RuntimeError as error:
            assert "generated by a bank outside" in str(error), error
            return "refused"
    if any(issubclass(warning.category, UserWarning) for warning in seen):
        return "warned"
    assert right, "wrong, and nobody said so"
    return "works"


def _case(which: str) -> Case:
    model = encoder_alone() if which == "alone" else shared()
    bare = share(Net(False).encoder, 0.4) if which == "alone" else shared(False)
    return Case(model if which == "whole" else model.encoder, model, bare.encoder if which == "part" else bare)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["whole", "part", "alone"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call(call: str, which: str, group: None) -> None:
    assert _outcome(CALLS[call].run, _case(which)) == getattr(CALLS[call], which)


def test_the_guide_has_exactly_these_rows() -> None:
    rows = re.findall(
        r"^\| (.*?) \| (works|refused|warned) \| (works|refused|warned) \| (\w+) \|", PAGE.read_text(), re.M
    )
    assert rows == [(name, call.whole, call.part, call.alone) for name, call in CALLS.items()]


# ------------------------------------------------------------------------------------------- optimizers


def step_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(inputs()).square().mean().backward()
    optimizer.step()


def test_param_groups_of_parts_without_the_bank_are_refused_at_each_step() -> None:
    model = shared()
    optimizer = torch.optim.Adam([{"params": model.encoder.parameters()}, {"params": model.head.parameters()}])
    for _ in range(2):
        with pytest.raises(ShareError, match=r"no optimizer holds the bank .* encoder\.0\.weight"):
            step_of(optimizer, model)


def test_param_groups_of_parts_with_their_banks_train_like_the_whole_model() -> None:
    model, twin = shared(**BY_PART), shared(**BY_PART)
    twin.load_state_dict(model.state_dict())
    by_part = [{"params": parameters_of(model.encoder)}, {"params": parameters_of(model.head)}]
    for m, optimizer in ((model, torch.optim.SGD(by_part, 0.1)), (twin, torch.optim.SGD(twin.parameters(), 0.1))):
        step_of(optimizer, m)
    assert relative_error(model(inputs()), twin(inputs())) <= EXACT


def test_parts_of_one_bank_cannot_be_two_param_groups() -> None:
    model = shared()
    with pytest.raises(ValueError, match="more than one parameter group"):
        torch.optim.SGD([{"params": parameters_of(model.encoder)}, {"params": parameters_of(model.head)}], 0.1)


def test_parameters_of_a_model_are_its_parameters() -> None:
    for model in (shared(), encoder_alone(), Net()):
        assert [id(p) for p in parameters_of(model)] == [id(p) for p in model.parameters()]


def _two(model: Net) -> list[torch.optim.Optimizer]:
    banks = list(model.dist_ssn.parameters())  # type: ignore[union-attr]
    own = [p for p in model.parameters() if all(p is not bank for bank in banks)]
    return [torch.optim.SGD(own, 0.1), torch.optim.Adam(banks)]


def test_optimizers_that_are_right_step_without_a_word(group: None) -> None:
    """Several optimizers, fine-tuning of a head that is not shared, frozen banks, ZeRO, and another model's optimizer."""
    model = shared()
    keep = _two(model)
    step_of(keep[0], model)
    probe = shared(exclude="head")
    step_of(torch.optim.SGD(probe.head.parameters(), 0.1), probe)
    model = shared()
    model.dist_ssn.requires_grad_(False)  # type: ignore[union-attr]
    step_of(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), model)
    model = freeze(shared(**BY_PART), "encoder")
    step_of(torch.optim.SGD(parameters_of(model.head), 0.1), model)
    dense = Net().double()
    step_of(torch.optim.SGD(dense.encoder.parameters(), 0.1), dense)
    model = shared()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer
    step_of(ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1), model)
    for name in ("Adam", "AdamW", "RMSprop", "Adagrad"):
        step_of(getattr(torch.optim, name)(parameter_groups(model), 0.1), model)


def test_a_part_without_biases_whose_norm_is_held() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 24, bias=False), nn.LayerNorm(24))
            self.head = nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = share(Normed().double(), 0.5, exclude="head")
    with pytest.warns(UserWarning, match=LACKS):
        listed = [*model.body.parameters(), *model.head.parameters()]  # type: ignore[union-attr]
    with pytest.raises(ShareError, match=r"1\.weight, 1\.bias of Sequential.*body\.0\.weight"):
        step_of(torch.optim.SGD(listed, 0.1), model)


def test_an_empty_parameter_group_is_told() -> None:
    model = share(Net(bias=False).double(), 0.5, exclude="head")
    groups = [{"params": model.encoder.parameters()}, {"params": model.head.parameters()}]  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"group of SGD is empty.*encoder\.0\.weight.*parameters_of"):
        step_of(torch.optim.SGD(groups, 0.1), model)


def test_the_trunk_of_two_models() -> None:
    class Head(nn.Module):
        def __init__(self, trunk: nn.Module, bias: bool) -> None:
            super().__init__()
            self.trunk, self.out = trunk, nn.Linear(24, 8, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.trunk(x))

    for bias in (True, False):
        trunk = nn.Linear(8, 24, bias=bias)
        actor, critic = Head(trunk, bias).double(), Head(trunk, bias).double()
        share(actor, 0.5)
        with pytest.raises(ShareError, match=r"trunk\.weight"):
            step_of(torch.optim.SGD(critic.parameters(), 0.1), critic)
        kept = (
            torch.optim.SGD(actor.out.parameters(), 0.1) if bias else None
        )  # else the actor's head is in no optimizer
        step_of(torch.optim.SGD(parameters_of(critic), 0.1), critic)
        del kept


@pytest.mark.parametrize("by_part", [False, True])
def test_a_part_that_is_left_out_of_the_optimizer_is_told_where_it_trains(by_part: bool) -> None:
    model = shared(**(BY_PART if by_part else {}))
    before = materialize(model.encoder).state_dict()
    with nullcontext() if by_part else pytest.warns(UserWarning, match=LACKS):
        kept = parameters_of(model.encoder) if by_part else list(model.encoder.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if all(p is not other for other in kept)], 0.1)
    with nullcontext() if by_part else pytest.warns(UserWarning, match=r"SGD holds .*encoder\.0\.weight.*freeze"):
        step_of(optimizer, model)
    after = materialize(model.encoder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) == by_part
    step_of(optimizer, model)  # told once


def test_biases_that_nobody_trains_are_fine() -> None:
    model = shared()
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    step_of(torch.optim.SGD(weights, 0.1), model)
    first = torch.optim.SGD([p for name, p in model.named_parameters() if name.startswith("encoder")], 0.1)
    step_of(torch.optim.SGD([*weights, model.head.bias], 0.1), model)
    del first


def test_a_check_is_made_once() -> None:
    model = shared()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step_of(optimizer, model)
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_check, "check_optimizer", calls.append)
        step_of(optimizer, model)
        assert not calls
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        step_of(optimizer, model)
        assert calls == [optimizer]


# ------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("pure", [False, True])
def test_a_frozen_weight_sends_no_gradient(pure: bool) -> None:
    """The bank's gradient is that of the other weights alone: computed by detaching the frozen ones in the dense twin's chain."""
    model = shared()
    (bank,) = banks_of(model)
    weights = [bank._make(i, None, bank._tensors(), None) for i in range(3)]
    biases = [model.encoder[0].bias, model.encoder[2].bias, model.head.bias]
    weights[0], weights[1] = weights[0].detach(), weights[1].detach()
    x = inputs()
    for i in range(3):
        x = nn.functional.linear(x, weights[i], biases[i].detach())  # type: ignore[union-attr]
        x = torch.tanh(x) if i < 2 else x
    wanted = torch.autograd.grad(x.square().mean(), bank.bank)[0]
    with pytest.warns(
        UserWarning, match=r"frozen weights encoder\.0\.weight, encoder\.2\.weight .* other weights train"
    ):
        freeze(model, "encoder.*")
    bank.pure = pure
    model(inputs()).square().mean().backward()
    assert relative_error(bank.bank.grad, wanted) <= EXACT
    assert model.encoder[0].bias.grad is None
    model.zero_grad()
    unfreeze(model, "encoder")
    assert not bank.frozen
    model(inputs()).square().mean().backward()
    assert relative_error(bank.bank.grad, wanted) > 0.01
    assert model.encoder[0].bias.grad is not None


def test_a_part_with_its_own_bank_is_frozen_whole() -> None:
    model = shared(**BY_PART)
    before = materialize(model.encoder).state_dict()
    freeze(model, "encoder")
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), 0.1)
    for _ in range(3):
        step_of(optimizer, model)
    after = materialize(model.encoder)
    assert all(torch.equal(before[name], value) for name, value in after.state_dict().items())
    assert not any(p.requires_grad for p in after.parameters())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_freeze_works_on_dense_models_and_names_a_pattern_without_a_match() -> None:
    model = freeze(Net(), "encoder.*")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    with pytest.raises(ShareError, match="'decoder' matches no parameter of Net"):
        freeze(shared(), "decoder")


def test_unfreezing_all_of_a_kept_model_trains_what_trained_before() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "task[0]": nn.Linear(32, 4), "norm": nn.LayerNorm(32)})
    share(model, 0.3, keep=True, train="task[0]", include="a")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained > {"task[0].weight", "task[0].bias"} and not trained & {"a.bias", "norm.weight"}
    freeze(model, "a", "task[0]")
    assert not model["task[0]"].weight.requires_grad  # a name is no glob
    unfreeze(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    unfreeze(model, "norm")
    assert model["norm"].weight.requires_grad


def test_freezing_the_first_layer_of_a_sequential_freezes_no_other() -> None:
    """The first layer holds the banks of all, since a container calls all of its children."""
    for freeze_first, said in (
        (lambda m: m[:2].requires_grad_(False), True),
        (lambda m: freeze(m, "0"), False),
        (lambda m: m[0].bias.requires_grad_(False), False),
    ):
        model = share(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)).double(), 0.5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            freeze_first(model)
            step_of(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), model)
        found = [str(w.message) for w in seen if "2.weight do not train" in str(w.message)]
        assert bool(found) == said, found


def test_requires_grad_of_one_layer_freezes_its_weight() -> None:
    model = shared()
    model.head.requires_grad_(False)
    (bank,) = banks_of(model)
    assert [bank.weight_name(i) for i in bank.frozen] == ["head.weight"]
    model.head.requires_grad_()
    assert not bank.frozen
    for module in model.modules():
        module.requires_grad_(False)
    model.requires_grad_(True)
    model(inputs()).sum().backward()
    assert not bank.frozen and all(p.grad is not None for p in model.parameters())
    model.head.requires_grad_(False)
    model.requires_grad_(True)
    assert not bank.frozen
    model.head.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    with (
        pytest.warns(UserWarning, match=r"has frozen head\.weight, but other weights train their bank"),
        pytest.warns(UserWarning, match=r"has frozen head\.weight, and its bias trains again"),
    ):
        step_of(torch.optim.SGD(model.parameters(), 0.1), model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_requires_grad_of_parts(bias: bool, own: bool) -> None:
    """A frozen part with a bank of its own stays; with a common one the step says that it moves."""
    model = shared(bias=bias, mapping={"encoder.*": "encoder", "*": "rest"} if own else "auto")
    before = [layer.weight.detach().clone() for layer in (model.encoder[0], model.head)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.encoder.requires_grad_(False)
    with nullcontext() if own else pytest.warns(UserWarning, match=r"has frozen encoder\.0\.weight, .* change them"):
        step_of(optimizer, model)
    assert torch.equal(model.encoder[0].weight, before[0]) == own and not torch.equal(model.head.weight, before[1])
    for part, parts in ((model.head, "head"), (model.encoder, "encoder")):  # the last layers alone, by freezing all
        model.requires_grad_(False)
        part.requires_grad_(True)
        weights = {
            bank.weight_name(i).split(".")[0]
            for bank in banks_of(model)
            for i in range(len(bank.group.slots))
            if bank.bank.requires_grad and i not in bank.frozen
        }
        assert weights == {parts}
    model.requires_grad_(True)
    assert not any(bank.frozen for bank in banks_of(model)) and all(p.requires_grad for p in model.parameters())


def test_layers_that_are_chosen_by_the_names_of_parameters() -> None:
    model = shared()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    with pytest.warns(
        UserWarning, match=r"generates head\.weight has requires_grad=False, so these weights do not train"
    ):
        step_of(torch.optim.SGD(model.parameters(), 0.1), model)
    for name, parameter in model.named_parameters():  # all biases: nothing is chosen
        parameter.requires_grad_(name.endswith("bias"))
    with warnings.catch_warnings(action="error") if sys.version_info >= (3, 11) else nullcontext():
        step_of(torch.optim.SGD(model.parameters(), 0.1), model)


# ------------------------------------------------------------------------------------------- state dicts


def test_the_message_of_a_missing_weight_names_it() -> None:
    model = shared()
    with pytest.warns(UserWarning, match=LACKS):
        state = {f"{name}": p.detach() for name, p in model.encoder.named_parameters()}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*0\.weight \(generated by a bank outside of this part"):
        model.encoder.load_state_dict(state)
    with pytest.raises(ShareError, match=r"state dict of this Sequential would lack its weights \(encoder\.0\.weight"):
        model.encoder.state_dict(prefix="encoder.")
    around = nn.ModuleDict({"model": model, "part": model.encoder})
    assert around.state_dict().keys() >= {"model.dist_ssn.all.bank"}


def test_the_mean_of_state_dicts_loads() -> None:
    """As by federated averaging: by mean, by weights, in half precision, and by torch's averaged model."""
    models = [shared() for _ in range(3)]
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    weighted = {name: sum(w * state[name] for w, state in zip((0.2, 0.3, 0.5), states, strict=True)) for name in mean}
    target = shared()
    for average in (weighted, mean):
        target.load_state_dict(average)
    banks = [model.dist_ssn.all.bank for model in models]  # type: ignore[union-attr]
    assert relative_error(target.dist_ssn.all.bank, sum(banks) / 3) <= EXACT  # type: ignore[union-attr]
    for dtype in (torch.float16, torch.bfloat16):
        target.load_state_dict({name: value.to(dtype) for name, value in mean.items()})
    old = dict(mean) | {"dist_ssn._extra_state": mean["dist_ssn._extra_state"].round().to(torch.uint8)}
    target.load_state_dict(old)  # as version 0.1.0 wrote it
    total = {name: states[0][name] + states[1][name] for name in mean}
    with pytest.raises(PlanError, match=r"different plans, or by a sum|not valid JSON"):
        target.load_state_dict(total)


def test_banks_whose_plan_was_dropped_are_told() -> None:
    """A filter by shapes drops a plan whose text has another length. Parameters alone never have a plan, and pass."""
    saved, target = shared(seed=1).state_dict(), shared(seed=12_345)
    own = target.state_dict()
    same_shape = {name: value for name, value in saved.items() if value.shape == own[name].shape}
    assert "dist_ssn.all.bank" in same_shape and "dist_ssn._extra_state" not in same_shape
    with pytest.warns(UserWarning, match=r"banks but not their plan, dist_ssn\._extra_state"):
        target.load_state_dict(same_shape, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(dict(target.named_parameters()), strict=False)
        target.load_state_dict({}, strict=False)
        with pytest.raises(PlanError, match="another plan"):
            target.load_state_dict(saved, strict=False)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.8's own checkpoints use it
def test_loading_in_place_checks_the_plan_at_the_next_read(group: None) -> None:
    """`dcp.load` fills the tensors of `state_dict()`, and calls nothing of the model."""
    saved, other, same = shared(seed=1), shared(seed=2), shared(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"model": saved.state_dict()}, checkpoint_id=folder)
        for model in (other, same):
            dcp.load({"model": model.state_dict()}, checkpoint_id=folder)
    assert torch.equal(same(inputs()), saved(inputs()))
    with pytest.raises(PlanError, match="another plan"):
        other(inputs())


def test_a_state_dict_keeps_no_model_alive() -> None:
    model = shared()
    state = model.state_dict()
    gc.collect()
    gc.disable()
    try:
        banks = {id(bank) for bank in banks_of(model)}
        del model
        assert not [thing for thing in gc.get_objects() if type(thing) is Bank and id(thing) in banks]
    finally:
        gc.enable()
    assert state


# ------------------------------------------------------------------------------------------- copies and wrappers


def test_a_deep_copy_of_a_part_is_refused_by_name() -> None:
    model = shared()
    with pytest.raises(ShareError, match=r"deep copy of this Sequential .*encoder\.0\.weight.* share\(part"):
        copy.deepcopy(model.encoder)
    with pytest.raises(ShareError, match="deep copy of this Linear"):
        copy.deepcopy({"head": model.head})
    twin = copy.deepcopy({"model": model, "head": model.head})
    assert twin["head"] is twin["model"].head  # type: ignore[union-attr]


def test_a_pickled_part_is_not_trained_without_its_bank() -> None:
    part = pickle.loads(pickle.dumps(shared().encoder))
    with pytest.raises(ShareError, match="no optimizer holds the bank"):
        step_of(torch.optim.SGD(part.parameters(), 0.1), part)
    step_of(torch.optim.SGD(parameters_of(part), 0.1), part)


def test_conversion_of_a_part_names_it() -> None:
    for convert in (nn.Module.half, nn.Module.share_memory, lambda m: m.to("meta")):
        with pytest.raises(ShareError, match=r"converting this Sequential .*encoder\.0\.weight"):
            convert(shared().encoder)
        with pytest.raises(ShareError, match=r"converting this Linear .*head\.weight"):
            convert(shared().head)
    assert shared().half().encoder[0].weight.dtype == torch.float16


def test_the_bank_is_the_second_child() -> None:
    model = shared()
    assert [name for name, _ in model.named_children()] == ["encoder", "dist_ssn", "head"]
    assert list(model.children())[-1] is model.head


# PyTorch's log of its first compilation reads that attribute, and hides the warning, but not from this filter.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_is_shared_inside() -> None:
    model = Net().double()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(inputs())
    assert share(compiled, 0.4) is compiled
    assert "_orig_mod.dist_ssn.all.bank" in compiled.state_dict() or banks_of(model)
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    assert compiled._orig_mod.state_dict().keys() == share(Net().double(), 0.4).state_dict().keys()
    assert torch.allclose(compiled(inputs()), materialize(model)(inputs()))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_fsdp1_that_comes_too_early_or_flattens_the_bank(group: None, collected: None) -> None:
    with pytest.raises(ShareError, match="sharded already"):
        share(FullyShardedDataParallel(Net(), device_id=torch.device("cpu")), 0.4)
    flat = FullyShardedDataParallel(shared(), device_id=torch.device("cpu"))
    with pytest.raises(ShareError, match="has flattened it: give it use_orig_params=True"):
        flat(inputs())
    whole = FullyShardedDataParallel(shared(), device_id=torch.device("cpu"), use_orig_params=True)
    whole(inputs()).sum().backward()


def test_wrappers_that_come_too_early_or_miss_the_bank(group: None) -> None:
    early = Net()
    fully_shard(early.encoder)
    with pytest.raises(ShareError, match=r"encoder\.0\.weight is sharded already"):
        share(early, 0.4)
    with pytest.raises(ShareError, match=r"wraps a part .*encoder\.0\.weight"):
        DistributedDataParallel(shared().encoder)(inputs())
    frozen: Any = shared(**BY_PART)
    frozen.dist_ssn.encoder.requires_grad_(False)
    DistributedDataParallel(frozen.encoder)(inputs()).sum().backward()  # there is no gradient to average


def test_fsdp2_around_the_parts_alone_is_refused(group: None) -> None:
    model: Any = shared()
    for part in (model.encoder, model.head):
        fully_shard(part)
    with pytest.raises(ShareError, match=r"fully_shard has wrapped the layer of .*weight and not its bank"):
        step_of(torch.optim.SGD(model.parameters(), 0.1, foreach=False), model)
    model = shared()
    for part in (model.encoder, model.head, model):
        fully_shard(part, reshard_after_forward=False)
    step_of(torch.optim.SGD(model.parameters(), 0.1), model)


def test_replicas_of_data_parallel_are_refused() -> None:
    with pytest.raises(ShareError, match="DistributedDataParallel"):
        shared().head._replicate_for_data_parallel()
