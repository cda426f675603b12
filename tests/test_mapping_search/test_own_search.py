"""`dist_ssn.search` for a model, a loss and batches of one's own: the plan, what stays as it was, and the mistakes."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dist_ssn
from dist_ssn.engines import World
from dist_ssn.errors import BudgetError, DataError, PlanError, ShareError, UserError
from dist_ssn.mapping_search import search_recipe
from dist_ssn.mapping_search.own import run as own_run
from dist_ssn.mapping_search.recipe_job import RecipeJob
from dist_ssn.mapping_search.short import ShortRun
from dist_ssn.train.optim import build_optimizer
from dist_ssn.train.recipe.read import load_recipe
from testing.ranks import run_ranks

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Four equal layers, batch norm and dropout between a first and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 12)
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.2)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.inside(x)))
        for block in self.blocks:
            x = x + block(x).relu()
        return self.out(x)


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def loader(count: int = 64) -> DataLoader[Any]:
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=4, shuffle=True)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


OPTIONS: dict[str, dict[str, Any]] = {
    "weights-free": {},
    "random": {"groups": 2},
    "pretrain": {"short_steps": 4},
    "gradients": {"short_steps": 4, "split": "sensitivity"},
    "auto": {"steps": 10, "held_out": 2, "max_steps": 30, "short_steps": 3},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_each_method_finds_one_plan_and_changes_nothing(method: str) -> None:
    model = net()
    loss(model, next(iter(loader()))).backward()  # gradients and running statistics of the caller's
    before = copy.deepcopy(model.state_dict())
    slopes = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    plan = dist_ssn.search(model, loss, loader(), 0.3, method=method, **OPTIONS[method])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)  # a search does not depend on the random state that it finds
    assert dist_ssn.search(model, loss, loader(), 0.3, method=method, **OPTIONS[method]) == plan
    assert not model.training and dist_ssn.shared_plan(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        old is None if p.grad is None else torch.equal(p.grad, old)
        for p, old in zip(model.parameters(), slopes, strict=True)
    )
    names = {"inside.weight", "out.weight", *(f"blocks.{i}.weight" for i in range(4))}
    assert {slot.name for _, slot in plan.slots()} == names
    assert 0.9 * plan.budget <= plan.parameters <= plan.budget
    dist_ssn.share(model, plan=plan)
    loss(model, next(iter(loader()))).backward()


def test_network_takes_a_cluster() -> None:
    plan = dist_ssn.search(net(), loss, loader(), 0.3, method="network", cluster="ethernet-1g", groups=2)
    assert dist_ssn.shared_plan(dist_ssn.share(net(), plan=plan)) == plan


def test_the_seed_chooses_and_selectors_hold() -> None:
    first, second = (dist_ssn.search(net(), loss, loader(), 0.5, method="random", seed=seed) for seed in (0, 1))
    groups = [{frozenset(slot.name for slot in group.slots) for group in plan.groups} for plan in (first, second)]
    assert groups[0] != groups[1]
    plan = dist_ssn.search(net(), loss, loader(), 0.5, method="weights-free", exclude="blocks.0.*", morph="hash")
    slots = [slot for _, slot in plan.slots()]
    assert "blocks.0.weight" not in {slot.name for slot in slots} and {slot.morph for slot in slots} == {"hash"}


def test_no_more_batches_are_read_than_needed() -> None:
    read: list[int] = []

    def endless() -> Iterator[Batch]:
        whole = list(loader())
        for number in itertools.count():
            read.append(number)
            yield whole[number % len(whole)]

    wanted = {"weights-free": 1, "pretrain": 4, "auto": 12}
    for method, count in wanted.items():
        read.clear()
        dist_ssn.search(net(), loss, endless(), 0.3, method=method, **OPTIONS[method])
        assert len(read) == count


def test_auto_reports_its_trials_and_takes_the_callers_optimizer() -> None:
    lines: list[dict[str, Any]] = []
    made: list[nn.Module] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made.append(model)
        return torch.optim.SGD(dist_ssn.parameter_groups(model), lr=0.1)

    model = net()
    options = OPTIONS["auto"]
    plan = dist_ssn.search(model, loss, loader(), 0.3, optimizer=optimizer, report=lines.append, **options)
    trials = [line for line in lines if line["kind"] == "trial"]
    last = [line for line in trials if line["rung"] == max(line["rung"] for line in trials)]
    assert plan.fingerprint == min(last, key=lambda line: line["loss"])["plan"] and "best of" in lines[-1]["note"]
    assert len(made) >= len(trials) > 1 and model not in made


def test_a_model_of_ones_own_and_a_recipe_share_one_search() -> None:
    """The recipe's own model, batches, loss and optimizer, given by hand, lead to the recipe's plan."""
    settings = ["model_args={layers: 2, width: 16, heads: 2, context: 16}", "steps=8", "batch_size=4", "threads=1"]
    recipe = load_recipe(None, [*settings, "share.budget=30%", "schedule.name=constant", "clip_norm=null"])
    job = RecipeJob(recipe, World(0, 1, 0, torch.device("cpu")))
    dense = ShortRun(job, job.world, None, 8).model
    torch.manual_seed(0)
    batches = [job.task.batch(step, 4) for step in range(8)]
    found = dist_ssn.search(
        dense,
        lambda model, batch: job.task.loss(model(batch[0]), batch[1]),
        batches,
        "30%",
        method="gradients",
        short_steps=8,
        optimizer=lambda model: build_optimizer(model, recipe.optimizer),
    )
    assert found == search_recipe(recipe, "gradients", short_steps=8)


# ---------------------------------------------------------------------------------------------------------- mistakes


def search(**changes: Any) -> dist_ssn.Plan:
    given = {"model": net(), "loss": loss, "batches": loader(), "budget": 0.3, "method": "weights-free", **changes}
    return dist_ssn.search(**given)


OUTSIDE = net()


@pytest.mark.parametrize(
    ("changes", "kind", "wanted"),
    [
        ({"method": "pretrian"}, UserError, "unknown method of search 'pretrian': .*; did you mean 'pretrain'"),
        ({"method": "manual"}, UserError, "unknown method of search 'manual': known are auto, gradients, network"),
        ({"short_step": 4}, UserError, "unknown option of search 'short_step': .*did you mean 'short_steps'"),
        ({"max_steps": 4}, UserError, "max_steps goes with the method auto, not with weights-free"),
        ({"trials": "a.jsonl"}, UserError, "trials belongs to a recipe's search"),
        ({"steps": 0}, UserError, "steps must be a whole number of at least 1, got 0"),
        ({"seed": -1}, UserError, "seed must be a whole number of at least 0, got -1"),
        ({"morph": "hsah"}, PlanError, "unknown morph 'hsah'"),
        ({"budget": "ten"}, BudgetError, "'ten'"),
        ({"budget": 5, "morph": "wavg", "method": "auto", "steps": 8}, BudgetError, "allows 5 trainable parameters"),
        ({"batches": []}, DataError, "batches has 0, and the method weights-free needs 1: 1 to train on$"),
        ({"batches": 7}, DataError, "batches is of type int: give a DataLoader"),
        ({"method": "pretrain"}, DataError, "has 16, and the method pretrain needs 100: 100 to train on; short_steps"),
        ({"method": "auto"}, DataError, "the method auto needs 208: 200 to train on and 8 held out; .*itertools.cycle"),
        ({"loss": lambda m, b: m(b[0])}, UserError, r"must return a scalar tensor, got a tensor of shape \(4, 3\)"),
        ({"loss": lambda m, b: loss(m, b).item()}, UserError, "must return a scalar tensor, got float"),
        ({"loss": lambda m, b: loss(m, b).detach()}, UserError, r"has no gradient: return it before \.detach\(\)"),
        ({"loss": lambda m, b: loss(m, b) * torch.nan}, UserError, "is nan on the first batch"),
        (
            {"loss": lambda m, b: loss(OUTSIDE, b)},
            UserError,
            "no gradient to the weights of the model that it is passed",
        ),
        ({"loss": lambda m, b: m(b)}, UserError, "fails on the first batch: TypeError"),
        ({"model": "net"}, UserError, r"search\(\) takes a model, got an object of type str"),
        ({"model": dist_ssn.share(net(), 0.3)}, ShareError, "Net is shared already: search with the dense model"),
        ({"model": nn.DataParallel(net())}, ShareError, r"wrapped in a DataParallel: .*model\.module"),
        ({"model": nn.ReLU()}, ShareError, "cannot share ReLU: there is no trainable"),
    ],
)
def test_mistakes_are_one_sentence(changes: dict[str, Any], kind: type[Exception], wanted: str) -> None:
    with pytest.raises(kind, match=wanted) as caught:
        search(**changes)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_copied_is_said() -> None:
    model = net()
    model.cache = model.inside.weight * 2  # no leaf, which torch does not copy
    with pytest.raises(ShareError, match=r"Net cannot be copied by copy\.deepcopy: RuntimeError"):
        search(model=model)


def test_processes_without_a_process_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, .*init_process_group\(\) first"):
        search()


# ------------------------------------------------------------------------------------------------------------- ranks


def search_on(rank: int, world_size: int) -> str:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # values of their own, which are set aside for those of rank 0
    model = Net()
    batches: Iterable[Batch] = list(loader())[rank:] if rank else loader()
    plan = dist_ssn.search(model, loss, batches, 0.3, method="gradients", **OPTIONS["gradients"])
    with pytest.raises(DataError, match="batches has 1, and the method pretrain needs 2"):
        few = batches if rank else list(batches)[:1]
        dist_ssn.search(model, loss, few, 0.3, method="pretrain", short_steps=2)
    with pytest.raises(UserError, match="fails on the first batch: KeyError"):  # on one rank, told on both
        dist_ssn.search(model, lambda m, b: loss(m, b if rank else {}["x"]), batches, 0.3, method="random")
    return plan.to_json()


@pytest.mark.distributed
def test_ranks_search_together() -> None:
    first, second = run_ranks(search_on, 2)
    assert first == second


def test_the_arguments_of_the_inside_are_those_of_the_outside() -> None:
    """Every keyword of `search` reaches the search: none is taken and forgotten."""
    outside = set(inspect.signature(dist_ssn.search).parameters) - {"include", "exclude"} | {"select"}
    assert outside == set(inspect.signature(own_run).parameters)
