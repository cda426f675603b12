"""The public API: sharing from a plan, state dicts, the way back to dense, parameter groups, and what users get wrong."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.nn.utils import prune

from dist_ssn import Plan, make_plan, materialize, parameter_groups, share, shared_plan, summary
from dist_ssn.engines import DDPEngine
from dist_ssn.errors import PlanError, ShareError, UserError
from dist_ssn.sharing.bank import Bank
from testing.layer_kinds import KINDS, Tied, Twins, banks_of, loss_of, relative_error, shake, tensors


class Net(nn.Module):
    """A little of everything: an embedding, convolution, norm, a tied head and a raw parameter."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width)
        self.shift = nn.Parameter(torch.randn(7, width) * 0.02)
        self.head = nn.Linear(width, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.shift[: tokens.shape[1]]
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x + self.back(torch.relu(self.hidden(x)))))


SINGLE: dict[str, Any] = {"mapping": "single"}


def shared(budget: float = 0.2, **options: Any) -> nn.Module:
    return share(Net(), budget, **(SINGLE | options))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 40, (3, 7))


# ------------------------------------------------------------------------------------------- plans and state dicts


@pytest.mark.parametrize(
    "options", [{}, {"morph": "inter"}, {"mapping": "shape"}, {"mapping": "depth:2", "morph": "hash"}]
)
def test_a_plan_rebuilds_the_model_exactly(options: dict[str, Any], tokens: Tensor) -> None:
    """Through JSON, and whatever the random seed of the day: banks start the same, and make the same weights."""
    first = shared(seed=5, **options)
    plan = shared_plan(first)
    assert plan is not None and plan == make_plan(Net(), 0.2, seed=5, **(SINGLE | options))
    torch.manual_seed(77)
    second = share(Net(), plan=Plan.from_json(plan.to_json()))
    assert shared_plan(second) == plan
    for mine, theirs in zip(banks_of(first), banks_of(second), strict=True):
        for name, parameter in mine.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name)), name
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens), second(tokens))


def test_share_returns_the_model_itself() -> None:
    model = Net()
    assert share(model, 0.2) is model
    assert isinstance(model.hidden, nn.Linear) and isinstance(model.table, nn.Embedding)


def test_a_state_dict_holds_each_bank_once(tokens: Tensor) -> None:
    """The names are those of the banks and of what the model has of its own; no weight is left, no bank comes twice."""
    model = shared(mapping="depth:2")
    plan = shared_plan(model)
    assert plan is not None
    state = model.state_dict()
    numbers = sum(value.numel() for name, value in state.items() if not name.endswith(("_extra_state", ".scales")))
    assert numbers == summary(model).parameters == plan.parameters + summary(model).own_parameters
    assert {name for name in state if name.endswith(".bank")} == {"dist_ssn.depth-0.bank", "dist_ssn.depth-1.bank"}
    assert not {slot.name for _, slot in plan.slots()} & set(state)
    pointers = [value.data_ptr() for name, value in state.items() if not name.endswith("_extra_state")]
    assert len(set(pointers)) == len(pointers)


def test_a_state_dict_goes_through_a_file_without_code(tokens: Tensor) -> None:
    model = shared()
    shake(model)
    plan = shared_plan(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = share(Net(), plan=plan)
    assert not torch.equal(loaded(tokens), model(tokens))
    assert loaded.load_state_dict(torch.load(file, weights_only=True)) == ([], [])
    assert torch.equal(loaded(tokens), model(tokens))


def test_a_state_dict_can_be_assigned(tokens: Tensor) -> None:
    """`assign=True` replaces the parameters: reads and gradients follow."""
    model, other = shared(), shared()
    shake(model)
    other(tokens).sum().backward()
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(other(tokens), model(tokens))
    for each in (model, other):
        each.zero_grad()
        loss_of(each(tokens)).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"budget": 0.3}, "bank 'all' has"),
        ({"budget": 0.2, "mapping": "depth:2"}, "it has banks depth-0, depth-1, the model has all"),
        ({"budget": 0.2, "seed": 1}, "seed differ"),
        ({"budget": 0.2, "morph": "hash:gains=false,rank=0"}, "its bank 'all' has|is 'hash'"),
        ({"budget": 0.2, "exclude": "mix"}, "bank 'all' has|'mix.weight' is shared only in the model"),
    ],
)
def test_a_state_dict_of_another_plan_is_refused(other: dict[str, Any], said: str, tokens: Tensor) -> None:
    """And it is said which plan differs where."""
    model = shared()
    with pytest.raises(PlanError, match="belongs to another plan") as error:
        model.load_state_dict(share(Net(), **(SINGLE | other)).state_dict())
    assert any(part in str(error.value) for part in said.split("|")), error.value


def test_a_dense_state_dict_is_refused() -> None:
    with pytest.raises((UserError, RuntimeError), match="dist_ssn"):
        shared().load_state_dict(Net().state_dict())


def test_a_state_dict_with_a_broken_plan_is_refused() -> None:
    model = shared()
    for broken in (
        torch.zeros(3),
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.tensor([255, 254], dtype=torch.uint8),
    ):
        state = model.state_dict()
        state["dist_ssn._extra_state"] = broken
        with pytest.raises(PlanError):
            model.load_state_dict(state)


class Pair(nn.Module):
    """Two linear layers, tied or not."""

    def __init__(self, tied: bool, size: int = 30) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    ("theirs", "mine", "said"),
    [
        (lambda: Pair(False), lambda: Pair(True), "second.weight is tied to first.weight in the model"),
        (lambda: Pair(True), lambda: Pair(False), "tied to second.weight only in the plan"),
        (
            lambda: Pair(False, 30),
            lambda: Pair(False, 31),
            "first.weight is [30, 30] in the plan and [31, 31] in the model",
        ),
        (lambda: Pair(False), lambda: nn.Linear(30, 30), "'first.weight' that Linear does not have"),
        (lambda: Pair(False), lambda: Pair(False).requires_grad_(False), "frozen"),
    ],
)
def test_a_plan_of_another_model_is_refused(
    theirs: Callable[[], nn.Module], mine: Callable[[], nn.Module], said: str
) -> None:
    """With the weight, and what it is in each; and the model stays as it was."""
    plan, model = make_plan(theirs(), 0.3), mine()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        share(model, plan=plan)
    assert said in str(error.value)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_budget_or_a_plan_is_needed_not_both() -> None:
    plan = make_plan(Net(), 0.2)
    for arguments in ({}, {"budget": 0.2, "plan": plan}):
        with pytest.raises(ShareError, match="either a budget"):
            share(Net(), **arguments)


# ----------------------------------------------------------------------------------------------- the way back to dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0.3, 1.5])
def test_materialize_gives_an_ordinary_model_with_the_same_output(kind: str, budget: float) -> None:
    original = Twins(KINDS[kind]).double()
    order, classes = list(original.state_dict()), [type(module) for module in original.modules()]
    model = share(copy.deepcopy(original), budget)
    shake(model)
    inputs = KINDS[kind].inputs()
    dense = materialize(model)
    assert [type(module) for module in dense.modules()] == classes
    assert list(dense.state_dict()) == order, "an optimizer's state goes by the order of parameters"
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert not banks_of(dense) and shared_plan(dense) is None and shared_plan(model) is not None
    for got, wanted in zip(tensors(dense(*inputs)), tensors(model(*inputs)), strict=True):
        assert relative_error(got, wanted) <= 1e-12
    original.load_state_dict(dense.state_dict())
    for got, wanted in zip(tensors(original(*inputs)), tensors(model(*inputs)), strict=True):
        assert relative_error(got, wanted) <= 1e-12
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert any(bool(parameter.any()) for parameter in model.parameters()), "the copy must have memory of its own"


def test_materialize_keeps_ties() -> None:
    dense = materialize(share(Tied(), 0.5))
    assert isinstance(dense, Tied)
    assert dense.head.weight is dense.table.weight
    assert isinstance(dense.head.weight, nn.Parameter)


def test_materialize_of_parts_that_were_shared_apart_leaves_no_bank(tokens: Tensor) -> None:
    model = Pair(False)
    share(model.first, 0.4)
    share(model.second, 0.3)
    x = torch.randn(2, 30)
    dense = materialize(model)
    assert not banks_of(dense)
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in Pair(False).named_parameters()]
    assert torch.allclose(dense(x), model(x))
    counted = sum(p.numel() for p in model.parameters())
    assert summary(model).parameters == counted
    assert summary(model).own_parameters == 60
    with pytest.raises(ShareError, match="shared separately"):
        shared_plan(model)
    with pytest.raises(ShareError, match="shared already"):
        share(model, 0.2)


def test_materialize_needs_a_shared_model() -> None:
    with pytest.raises(ShareError, match="is not shared"):
        materialize(Net())


def test_a_materialized_model_can_be_shared_again(tokens: Tensor) -> None:
    model = share(materialize(shared()), 0.3)
    assert model(tokens).shape == (3, 7, 40)


# ------------------------------------------------------------------------------------------------ groups and summaries


@pytest.mark.parametrize("morph", ["auto", "wavg/mask", "emb/inter", "offset:gains=true,rank=2"])
@pytest.mark.parametrize("budget", [0.3, 2.0])
def test_parameter_groups_hold_each_trainable_parameter_once(morph: str, budget: float) -> None:
    model = share(Net(), budget, morph=morph)
    model.get_submodule("norm").requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.3)
    held = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            wanted = 0.3 if last in ("bank", "differences") else 0.0
            assert decay[id(parameter)] == wanted, name
    torch.optim.AdamW(groups, lr=1e-3)


def test_rates_under_adam_grow_with_the_uses_of_a_bank_and_decay_does_not() -> None:
    inner = share(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.1, mapping="single", morph="offset:gains=true")
    model = nn.Sequential(inner, nn.Linear(64, 3))
    of = {name: p for name, p in model.named_parameters()}
    groups = {id(p): group for group in parameter_groups(model, 0.2, lr=1e-3) for p in group["params"]}
    rates = {name: groups[id(p)]["lr"] for name, p in of.items()}
    bank = next(name for name in of if name.endswith(".bank"))
    uses = 2 * 64 * 64 / of[bank].numel()
    high = pytest.approx(1e-3 * uses ** (3 / 8))
    assert rates.pop("1.weight") == 1e-3 and uses > 10  # a matrix that is not shared
    assert len(rates) == 5 and all(rate == high for rate in rates.values())
    assert groups[id(of[bank])]["lr"] * groups[id(of[bank])]["weight_decay"] == pytest.approx(1e-3 * 0.2)
    assert all("lr" not in group for group in parameter_groups(model, 0.2))
    assert {group["lr"] for group in parameter_groups(nn.Linear(4, 4), lr=1e-3)} == {1e-3}


def test_parameter_groups_of_a_dense_model_decay_matrices_only() -> None:
    model = Net()
    decay = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert all(decay[id(p)] == (0.1 if p.ndim >= 2 else 0.0) for p in model.parameters())
    assert len(decay) == len(list(model.parameters()))


def test_summary_counts() -> None:
    dense, model = summary(Net()), shared()
    plan, counted = shared_plan(model), summary(model)
    assert plan is not None
    assert dense.parameters == dense.own_parameters == sum(p.numel() for p in Net().parameters())
    assert dense.plan is None and "dense" in str(dense)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.own_parameters == 24 * 2 + 24 + 48 + 24  # norm, and the biases of mix, hidden and back
    assert counted.parameters - counted.own_parameters == plan.parameters <= plan.budget
    assert counted.plan == plan and f"{counted.parameters:,}" in str(counted)


# ------------------------------------------------------------------------------------------------------------- misuse


def test_sharing_twice_is_refused() -> None:
    model = shared()
    for again in (lambda: share(model, 0.2), lambda: share(model.get_submodule("hidden"), 0.5)):
        with pytest.raises(ShareError, match="shared already"):
            again()
    outer = nn.Sequential(nn.Linear(24, 24), model)
    with pytest.raises(ShareError, match=r"1(\.table)? is shared already"):
        share(outer, 0.2)


def test_an_optimizer_that_was_made_before_is_found_out(tokens: Tensor) -> None:
    """It holds weights that would be gone."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ShareError, match=r"an optimizer \(SGD\) holds .*, which no layer would read"):
        share(model, 0.2)
    assert isinstance(model.hidden.weight, nn.Parameter)  # nothing was changed
    other = Net()
    with pytest.raises(UserError, match=r"make the optimizer after share\(\)"):
        DDPEngine(share(other, 0.2), optimizer)
    del optimizer
    share(model, 0.2)
    model(tokens).sum().backward()


def test_a_model_that_was_wrapped_before_is_found_out() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(ShareError, match="wrapped in a DistributedDataParallel"):
            share(wrapper.module, 0.2)
    finally:
        dist.destroy_process_group()


def test_what_is_left_out_is_listed_with_the_reason() -> None:
    model = share(Net(), 0.2, exclude="hidden")
    assert ("hidden.weight", "excluded") in summary(model).left_out
    assert "left as they are: hidden.weight (excluded)" in str(summary(model))


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_a_dense_model_is_refused(strict: bool) -> None:
    state = Net().state_dict()
    with pytest.raises(RuntimeError, match="is generated from a bank"):
        share(Net(), 0.2).load_state_dict(state, strict=strict)


def test_a_slot_that_a_plan_lacks_is_named() -> None:
    plan = make_plan(Net(), 0.3)
    (name, *_) = (slot.name for _, slot in plan.slots() if slot.name != "table.weight")
    groups = [
        dataclasses.replace(group, slots=tuple(slot for slot in group.slots if slot.name != name))
        for group in plan.groups
    ]
    cut = dataclasses.replace(plan, groups=tuple(group for group in groups if group.slots))
    with pytest.warns(UserWarning, match=rf"the plan has no slot for {name} \(1 weights in all\), which stays dense"):
        model = share(Net(), plan=cut)
    assert name in dict(model.named_parameters())
    share(Net(), plan=cut, exclude=name)  # it is meant: no warning, which would be an error here
    share(Net(), plan=plan)
    zero = Net()
    nn.init.zeros_(zero.hidden.weight)  # no plan would share it
    share(zero, plan=make_plan(zero, 0.3))


def test_a_bank_of_few_elements_is_told() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(64, 64))

    with pytest.warns(
        UserWarning, match=r"bank \S+ has 1 element for the 12 of 0\.weight \(1 such banks in all\).*exclude="
    ):
        share(net(), 0.02, mapping="shape")
    share(net(), 0.02, mapping="single")
    share(net(), plan=make_plan(net(), 0.02, mapping="shape"))  # a plan that one has seen


def test_a_plan_is_a_plan() -> None:
    with pytest.raises(PlanError, match=r"plan is of type str: read it first, Plan\.from_json"):
        share(Net(), plan="plan.json")


WRITES: dict[str, Callable[[nn.Linear], Any]] = {
    "assignment": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(48, 24))),
    "assignment of a tensor": lambda layer: setattr(layer, "weight", torch.zeros(48, 24)),
    "deletion": lambda layer: delattr(layer, "weight"),
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(48, 24))),
    "register_buffer": lambda layer: layer.register_buffer("weight", torch.zeros(48, 24)),
    "weight_norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "nn.init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "nn.init.kaiming_uniform_": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "nn.init.orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "nn.init.trunc_normal_": lambda layer: nn.init.trunc_normal_(tensor=layer.weight),
    "nn.init of a part": lambda layer: nn.init.zeros_(layer.weight.chunk(2)[0]),
    "data.normal_": lambda layer: layer.weight.data.normal_(),
    "data =": lambda layer: setattr(layer.weight, "data", torch.zeros(48, 24)),
    "data[...] =": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "data[i].zero_": lambda layer: layer.weight.data[3].zero_(),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(48, 24)),
    "detach().copy_": lambda layer: layer.weight.detach().copy_(torch.zeros(48, 24)),
    "[...] =": lambda layer: layer.weight.__setitem__((0, 1), 1.0),
    "+=": lambda layer: layer.weight.__iadd__(1.0),
    "*= of data": lambda layer: layer.weight.data.__imul__(2.0),
    "add_": lambda layer: layer.weight.add_(1.0),
    "T.zero_": lambda layer: layer.weight.T.zero_(),
    "t().zero_": lambda layer: layer.weight.t().zero_(),
    "view(-1).zero_": lambda layer: layer.weight.data.view(-1).zero_(),
    "flatten().zero_": lambda layer: layer.weight.data.flatten().zero_(),
    "unbind": lambda layer: layer.weight.data.unbind(0)[0].zero_(),
    "out=": lambda layer: torch.zeros(48, 24, out=layer.weight.data),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight.data], 2.0),  # pyright: ignore
    "clamp_": lambda layer: layer.weight.data.clamp_(-0.1, 0.1),
    "requires_grad =": lambda layer: setattr(layer.weight, "requires_grad", False),
}


@pytest.mark.parametrize("way", WRITES)
def test_writing_to_a_generated_weight_is_refused(way: str, tokens: Tensor) -> None:
    """It would be lost without a word. One sentence, with the weight's name, and nothing has changed."""
    model = shared()
    before = model(tokens)
    torch_says = {"register_buffer": KeyError, "prune": Exception, "weight_norm": Exception}.get(way)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, pytest.raises(torch_says or ShareError, match=None if torch_says else r"(hidden|Linear)\.weight"):
            WRITES[way](model.get_submodule("hidden"))  # type: ignore[arg-type]
    assert torch.equal(model(tokens), before)


def test_writing_to_recurrent_and_attention_weights_is_refused() -> None:
    lstm, attention = share(nn.LSTM(20, 30), 0.5), share(nn.MultiheadAttention(20, 4), 0.5)
    assert isinstance(lstm, nn.LSTM) and isinstance(attention, nn.MultiheadAttention)
    hidden: Any = lstm.weight_hh_l0
    for write in (
        lambda: nn.init.orthogonal_(hidden),
        lambda: hidden.data.chunk(4)[1].fill_(1.0),
        lambda: nn.init.xavier_uniform_(lstm.all_weights[0][0]),
        lambda: attention._reset_parameters(),
        lambda: nn.init.xavier_uniform_(attention.in_proj_weight),
    ):
        with pytest.raises(ShareError, match="generated from a bank"):
            write()
    nn.init.zeros_(lstm.get_parameter("bias_hh_l0"))  # the layer's own, and free to be written to


def test_reading_a_generated_weight_is_free(tokens: Tensor) -> None:
    """Everything that only looks works, and gives ordinary tensors that one may change."""
    model = shared()
    layer = model.get_submodule("hidden")
    assert isinstance(layer, nn.Linear)
    weight = layer.weight
    assert weight.shape == (48, 24) and weight.requires_grad and not weight.is_leaf
    assert torch.equal(weight, layer.weight) and "Linear" in repr(layer) and repr(weight).startswith("GeneratedWeight")
    copied = weight.detach().clone()
    copied.zero_()
    (weight * 2).data.add_(1.0)
    (weight + 1).add_(1.0)
    assert float(weight.detach().norm()) > 0 and weight.detach().numpy().std() > 0
    (gradient,) = torch.autograd.grad(weight.square().sum(), banks_of(model)[0].bank)
    assert bool(gradient.any())


@pytest.mark.parametrize("name", ["forward", "plan", "training", "banks", "parameters", "_modules"])
def test_group_names_that_torch_needs_are_refused(name: str) -> None:
    model = Net()
    order = list(model.state_dict())
    with pytest.raises(PlanError, match="group name"):
        share(model, 0.2, mapping={"*": name})
    assert list(model.state_dict()) == order


def test_an_attribute_of_our_name_is_not_overwritten() -> None:
    model = Net()
    model.register_buffer("dist_ssn", torch.ones(3))
    order = list(model.state_dict())
    with pytest.raises(ShareError, match="dist_ssn"):
        share(model, 0.2)
    assert list(model.state_dict()) == order and isinstance(model.hidden.weight, nn.Parameter)


def test_names_with_glob_characters_and_names_that_contain_each_other() -> None:
    model = nn.ModuleDict(
        {"a[0]": nn.Linear(30, 30), "a0": nn.Linear(30, 30), "b*": nn.Linear(30, 30), "b": nn.Linear(30, 30)}
    )
    model["a"] = nn.ModuleDict({"weight": nn.Linear(30, 30), "Linear": nn.Linear(30, 30)})
    share(model, 0.2)
    plan = shared_plan(model)
    assert plan is not None and len(list(plan.slots())) == 6
    for layer in (model["a[0]"], model["b*"], model["b"], model["a"]["Linear"]):  # type: ignore[index]
        assert layer(torch.randn(2, 30)).shape == (2, 30)
    dense = materialize(model)
    again = share(dense, plan=plan)
    assert shared_plan(again) == plan


# ------------------------------------------------------------------------------------------------- what a layer stays


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_layer_looks_like_its_base_class(kind: str) -> None:
    """Names, kinds and signatures: what other libraries look at to know what a layer is."""
    plain, layer = KINDS[kind].build(), share(KINDS[kind].build(), 0.5)
    for mine, theirs in zip(layer.modules(), plain.modules(), strict=False):
        if isinstance(mine, Bank) or "dist_ssn" in type(mine).__module__:
            continue
        assert isinstance(mine, type(theirs))
        assert type(mine).__name__ == type(theirs).__name__
        assert type(mine).__module__ == type(theirs).__module__
        assert type(mine).__doc__ == type(theirs).__doc__
        assert inspect.signature(mine.forward) == inspect.signature(theirs.forward)
        if not isinstance(mine, nn.ParameterList):  # which says of each of its items whether it is a Parameter
            assert mine.extra_repr() == theirs.extra_repr()
    for name, _ in plain.named_parameters():
        found: Any = layer
        for part in name.split("."):
            found = found[int(part)] if isinstance(found, nn.ParameterList) else getattr(found, part)
        assert isinstance(found, Tensor) and found.shape == plain.get_parameter(name).shape


def test_the_class_of_a_shared_layer_makes_ordinary_layers() -> None:
    """As `model.head = type(model.head)(16, 3)` does for another number of classes."""
    model: Any = share(nn.ModuleList([nn.Linear(20, 20), nn.LSTM(20, 20), nn.Embedding(20, 20)]), 0.5)
    for layer, sizes in zip(model, [(16, 3), (16, 3), (16, 3)], strict=True):
        made = type(layer)(*sizes)
        assert type(made) is type(layer)._dist_ssn_base
        assert len(made.state_dict()) == len(list(made.parameters())) > 0


def test_a_base_class_that_keeps_a_list_of_its_subclasses_is_left_alone() -> None:
    known: dict[str, type] = {}

    class Registered(nn.Linear):
        def __init_subclass__(cls, *, kind: str) -> None:
            known[kind] = cls

    class Layer(Registered, kind="layer"):
        pass

    share(nn.Sequential(Layer(16, 16), nn.Tanh(), Layer(16, 4)), 0.5)
    assert known == {"layer": Layer}


def test_equal_layers_share_one_class() -> None:
    """Compiled code is specialized by class: twelve equal blocks must not be twelve classes."""
    model = share(nn.ModuleList([nn.Linear(20, 20) for _ in range(5)]), 0.5)
    assert len({type(layer) for layer in model.children()}) == 1


class Stack(nn.Sequential):
    """A container of one's own."""


@pytest.mark.parametrize("cls", [nn.Sequential, Stack])
def test_a_sequential_root_stays_a_sequential(cls: type[nn.Sequential]) -> None:
    """Its length, items, slices and output are those of its layers."""
    parts = [nn.Linear(20, 30), nn.ReLU(), nn.Sequential(nn.Linear(30, 30), nn.Tanh()), nn.Linear(30, 5)]
    model = share(cls(*parts), 0.4)
    assert isinstance(model, cls)
    assert len(model) == 4 and list(model) == parts and model[-1] is parts[3] and model[2][0] is parts[2][0]  # type: ignore[index]
    x = torch.randn(3, 20)
    wanted = x
    for part in parts:
        wanted = part(wanted)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model[1:](model[0](x)), wanted)
    assert torch.equal(materialize(model)(x), wanted)
    assert sum(p.numel() for p in model.parameters()) == summary(model).parameters


def test_other_containers_as_roots() -> None:
    modules = share(nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20)]), 0.4)
    assert isinstance(modules, nn.ModuleList) and len(modules) == 2 and len(list(modules)) == 2
    named = share(nn.ModuleDict({"one": nn.Linear(20, 20), "two": nn.Linear(20, 20)}), 0.4)
    assert isinstance(named, nn.ModuleDict) and list(named) == ["one", "two"]
    for layers in (modules, named.values()):
        x = torch.randn(2, 20)
        for layer in layers:
            x = layer(x)
        x.sum().backward()
    assert all(p.grad is not None for model in (modules, named) for p in model.parameters())


def test_a_single_layer_as_root() -> None:
    for kind in ("linear", "lstm", "attention-packed", "embedding-few", "unknown"):
        model = share(KINDS[kind].build().double(), 0.6)
        loss_of(model(*KINDS[kind].inputs())).backward()
        assert all(bank.bank.grad is not None for bank in banks_of(model))


@pytest.mark.parametrize("root", [nn.Sequential, nn.ModuleList])
def test_a_parametrized_layer_can_be_shared(root: Callable[..., nn.Module]) -> None:
    """What torch's weight_norm holds for a layer is a weight like others; and its list of parametrizations stays as it is."""
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(20, 30)), nn.Linear(30, 5)]
    model = share(root(*layers) if root is nn.Sequential else root(layers), 0.5).double()
    shake(model)
    dense, x = materialize(model), torch.randn(3, 20, dtype=torch.float64)
    for each in (model, dense):
        assert len(each.get_submodule("0.parametrizations.weight")) == 1  # type: ignore[arg-type]
    hidden, wanted = model.get_submodule("0")(x), dense.get_submodule("0")(x)
    assert relative_error(hidden, wanted) <= 1e-12
    model.get_submodule("1")(hidden).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_root_that_calls_all_its_children() -> None:
    """Banks are children of the root there: called like a layer, they pass their input on."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x

    model = share(Root(), 0.5)
    assert model(torch.randn(3, 20)).shape == (3, 5)


def test_what_is_left_out_stays_as_it_was(tokens: Tensor) -> None:
    model = Net()
    kept = model.mix.weight
    share(model, 0.2, exclude="mix")
    assert model.mix.weight is kept and type(model.mix) is nn.Conv1d
    assert "mix.weight" in model.state_dict()
    loss_of(model(tokens)).backward()
    assert kept.grad is not None
