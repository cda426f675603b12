"""Gradients: the hot path against its pure twin, and against plain autograd on materialized weights. float64, 1e-10.

A covering array of morphs and kinds of layers, each at every budget, with and without gains and low-rank differences, and
embeddings with a row that stays zero. What a budget cannot hold must raise; nothing is skipped.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_ssn
from dist_ssn import Morph, Plan, make_plan, materialize
from dist_ssn.errors import BudgetError, PlanError
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import Group, Slot
from testing.layer_kinds import (
    KINDS,
    STRUCTURES,
    Inputs,
    Twins,
    banks_of,
    be_pure,
    covering,
    loss_of,
    pulled_back,
    relative_error,
    shake,
)

BUDGETS = (0.02, 0.1, 0.5, 1.0, 2.0)
DOWN, UP, ANY = ("avg", "wavg", "emb"), ("inter", "mask", "repeat", "wavg"), ("offset", "hash")
CHOICES = {
    **{name: f"{name}/inter" for name in DOWN},
    **{f"{name}-up" if name == "wavg" else name: name if name != "wavg" else "wavg/wavg" for name in UP},
    **{name: name for name in ANY},
}
"""Name of the case → what a user writes."""
OPTIONS = [(False, 0), (True, 0), (False, 2), (True, 2)]
"""(gains, rank)."""
CASES = covering([*CHOICES], least=2)
"""(name of the choice, kind of layer)."""
TOLERANCE = 1e-10

Gradients = dict[str, Tensor | None]
share = functools.partial(dist_ssn.share, generate="on_demand")  # test_per_step.py compares the other mode with it


def run(model: nn.Module, inputs: Inputs) -> tuple[Gradients, Gradients]:
    """(gradients of the parameters, outputs' loss and gradients of the inputs)."""
    model.zero_grad(set_to_none=True)
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    loss = loss_of(model(*inputs))
    loss.backward()
    around: Gradients = {f"input {i}": x.grad for i, x in enumerate(inputs)} | {"loss": loss.detach()}
    return {name: p.grad for name, p in model.named_parameters()}, around


def check(model: nn.Module, inputs: Inputs, what: str) -> None:
    """Holds the hot path of a shared model against both oracles."""
    shake(model)
    hot, around = run(model, inputs)
    be_pure(model)
    pure, pure_around = run(model, inputs)
    be_pure(model, False)
    dense = materialize(model)
    plain, plain_around = run(dense, inputs)
    plain |= pulled_back(model, dense)
    assert any(float(g.abs().max()) > 0 for name, g in hot.items() if g is not None and name.startswith("dist_ssn"))
    for oracle, wanted in (("pure", pure | pure_around), ("materialized", plain | plain_around)):
        for name, gradient in (hot | around).items():
            error = relative_error(gradient, wanted[name])
            assert error <= TOLERANCE, f"{what}: {name} is off the {oracle} one by {error:.1e}"


def allowed_morphs(choice: str, bank: int, numel: int) -> set[str]:
    """The plan's rule in our own words: down for a bank of twice the weight, up for one that is smaller than it.

    A bank may be larger than the slots were cut for, by what they leave over; so smaller banks' morphs are right too.
    """
    down, up = choice.split("/")[0], choice.split("/")[-1]
    if choice in ANY:
        return {choice}
    allowed = {"wavg-up" if up == "wavg" else up}
    if bank >= numel:
        allowed.add("repeat")
    if bank >= 2 * numel:
        allowed.add(down if down in DOWN else "wavg")
    return allowed


def options_of(case: str, kind: str) -> list[tuple[bool, int]]:
    """The options at each budget. They go round, so that every morph meets each of them at every budget."""
    turn = [k for c, k in CASES if c == case].index(kind)
    return [OPTIONS[(turn + number) % len(OPTIONS)] for number in range(len(BUDGETS))]


def test_the_cases_cover_what_they_promise() -> None:
    assert sorted(kind for kinds in STRUCTURES.values() for kind in kinds) == sorted(KINDS)
    assert len(set(CASES)) == len(CASES)
    structure_of = {kind: structure for structure, kinds in STRUCTURES.items() for kind in kinds}
    met = {(case, structure_of[kind]) for case, kind in CASES}
    assert met == {(case, structure) for case in CHOICES for structure in STRUCTURES}
    for kind in KINDS:
        assert len({case for case, k in CASES if k == kind}) >= 2, kind
        assert {option for case, k in CASES if k == kind for option in options_of(case, kind)} == set(OPTIONS), kind
    for case in CHOICES:
        for number, budget in enumerate(BUDGETS):
            assert {options_of(c, kind)[number] for c, kind in CASES if c == case} == set(OPTIONS), (case, budget)


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_gradients_equal_those_of_plain_autograd(case: str, kind: str) -> None:
    """The hot path gives, for all that can be trained and for the inputs, what the oracles give."""
    choice, seen = CHOICES[case], set()
    largest = max(weight.numel for weight in find_specs(Twins(KINDS[kind])).weights)
    for number, (budget, (gains, rank)) in enumerate(zip(BUDGETS, options_of(case, kind), strict=True)):
        # The mixtures of templates need a bank of twice the weight: something large beside it, at a low budget.
        filler = int(3 * largest / budget) if case in DOWN else 0
        what = f"{case}, {kind}, budget {budget}, gains {gains}, rank {rank}"
        model = Twins(KINDS[kind], filler).double()
        morph = Morph(choice, gains=gains, rank=rank)
        total = find_specs(model).numel
        try:
            plan = make_plan(model, budget, mapping="single", morph=morph, seed=number)
        except BudgetError as error:
            found = re.search(r"smallest possible budget is ([\d,]+)", str(error))
            assert found, f"{what}: {error}"
            least = int(found[1].replace(",", ""))
            assert least > budget * total, f"{what}: {error}"
            plan = make_plan(model, least, mapping="single", morph=morph, seed=number)
        else:
            assert plan.parameters <= budget * total, what
        for group, slot in plan.slots():
            assert slot.morph in allowed_morphs(choice, group.size, slot.numel), f"{what}: {slot}"
            assert (slot.gains > 0, slot.rank) == (gains, min(rank, slot.rows, slot.columns)), f"{what}: {slot}"
            seen.add(slot.morph)
        share(model, plan=plan)
        check(model, KINDS[kind].inputs(), what)
    assert case in seen, f"{case} was never used: {seen}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_larger_than_the_weights_can_be_read_by_every_upward_morph(kind: str) -> None:
    """Plans by hand: the rules choose other morphs there, but a plan may say so."""
    for budget in (1.0, 2.0):
        for morph in ("inter", "mask", "repeat", "wavg-up"):
            model = Twins(KINDS[kind]).double()
            specs = find_specs(model)
            size = int(budget * specs.numel)
            slots = []
            for place, weight in enumerate(specs.weights):
                fields: dict[str, Any] = {"zero_row": weight.zero_row, "aliases": weight.aliases}
                if morph == "inter":
                    fields |= {"template_shape": (weight.rows, max(1, weight.columns // 2))}
                elif morph == "wavg-up":
                    fields |= {"template_shape": (2, weight.numel // 2 + 1), "coefficients": 4}
                templates, start = 2 if morph == "wavg-up" else 1, (7 * place) % size
                slots.append(Slot(weight.name, weight.shape, morph, start, templates, **fields))
            extras = sum(slot.extras for slot in slots)
            scales = {"by-hand": (0.5, *[1.3] * len(slots))}
            plan = Plan((Group("by-hand", size, tuple(slots)),), size + extras, scales=scales)
            share(model, plan=Plan.from_json(plan.to_json()))
            check(model, KINDS[kind].inputs(), f"{morph}, {kind}, bank {budget}")


@pytest.mark.parametrize("morph", DOWN)
def test_templates_larger_than_the_bank_are_refused(morph: str) -> None:
    """A mixture of whole templates needs a bank that holds them."""
    coefficients = {"avg": 0, "wavg": 1, "emb": 8}[morph]
    slot = Slot("weight", (10, 10), morph, 0, 1, coefficients=coefficients)
    for size in (2, 50, 99):
        plan = Plan((Group("all", size, (slot,)),), 1000)
        with pytest.raises(PlanError, match="do not fit"):
            Plan.from_json(plan.to_json())


@pytest.mark.parametrize("morph", [*ANY, "inter", "mask", "emb", "wavg-up"])
def test_several_templates_and_odd_chunks(morph: str) -> None:
    """K from 1 to 5, and chunks that divide neither a row nor the weight."""
    choice = CHOICES[morph]
    for templates in (1, 2, 3, 5):
        for chunk in (1, 3, 7, 64) if morph in ANY else (None,):
            model = nn.Sequential(
                nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 33)
            ).double()
            chosen = Morph(choice, templates=templates, chunk=chunk, gains=True, rank=1)
            share(model, 0.9, mapping="single", morph=chosen)
            check_sequential(model, f"{morph}, K = {templates}, chunk {chunk}")


def check_sequential(model: nn.Sequential, what: str) -> None:
    """`check` for a root that lists its children, where the first layer owns the banks."""
    x = torch.randn(4, 10, dtype=torch.float64)
    shake(model)
    hot, around = run(model, (x,))
    be_pure(model)
    pure, pure_around = run(model, (x,))
    for name, gradient in (hot | around).items():
        error = relative_error(gradient, (pure | pure_around)[name])
        assert error <= TOLERANCE, f"{what}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("morph", CHOICES)
@pytest.mark.parametrize("trained", ["bank", "coefficients", "projections", "gains", "differences"])
def test_any_part_of_a_bank_can_be_trained_alone(morph: str, trained: str) -> None:
    """With the other parts frozen, the gradient of the one that is left is what it was."""
    budget = 0.9 if morph in DOWN else 0.6

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Twins(KINDS["linear"], 4000 if morph in DOWN else 0).double()
        return share(model, budget, mapping="single", morph=Morph(CHOICES[morph], templates=2, gains=True, rank=1))

    whole, part = build(), build()
    parameters = {name.rpartition(".")[2]: p for name, p in part.named_parameters() if name.startswith("dist_ssn")}
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(name.startswith("dist_ssn") and name.endswith(f".{trained}"))
    inputs = KINDS["linear"].inputs()
    loss_of(whole(*inputs)).backward()
    loss = loss_of(part(*inputs))
    assert loss.requires_grad == (trained in parameters)
    if trained in parameters:
        loss.backward()
        wanted = dict(whole.named_parameters())
        for name, parameter in part.named_parameters():
            got = parameter.grad
            if parameter.requires_grad:
                assert relative_error(got, wanted[name].grad) <= TOLERANCE
                assert got is not None
                assert float(got.abs().max()) > 0 or trained == "differences"
            else:
                assert got is None, name


def test_slots_with_and_without_gains_in_one_frozen_bank() -> None:
    """Where only gains are trained, a weight that has none has nothing to hand back."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(2, 64)).double()
    share(model, 0.3, morph="hash", mapping="single")
    (bank,) = banks_of(model)
    assert {slot.gains > 0 for slot in bank.group.slots} == {True, False}
    bank.requires_grad_(False)
    assert bank.gains is not None
    bank.gains.requires_grad_(True)
    x = torch.randn(3, 64, dtype=torch.float64)
    loss_of(model(x)).backward()
    got = bank.gains.grad
    bank.gains.grad = None
    be_pure(model)
    loss_of(model(x)).backward()
    assert got is not None
    assert relative_error(got, bank.gains.grad) <= TOLERANCE


def test_a_row_that_stays_zero_gets_no_gradient() -> None:
    """An embedding's padding row is zero, and what its numbers would get goes nowhere."""
    model = nn.Sequential(nn.Embedding(30, 8, padding_idx=3)).double()
    share(model, 0.5, morph=Morph("offset", gains=True, rank=1))
    shake(model)
    embedding = model[0]
    assert isinstance(embedding, nn.Embedding)
    assert not embedding.weight[3].any() and embedding.weight[2].all()
    assert not model(torch.tensor([3])).any()
    model(torch.tensor([3, 3])).sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_second_derivatives_with_respect_to_inputs_are_right() -> None:
    """A gradient penalty needs d²/dx dW: the regenerated weight stands in the graph as the stored one would."""
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 6)).double()
    share(model, 0.5, morph=Morph("offset", gains=True, rank=1))
    shake(model)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    results = []
    for pure in (False, True):
        be_pure(model, pure)
        model.zero_grad()
        (slope,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
        slope.square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    for got, wanted in zip(*results, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE


def test_second_derivatives_with_respect_to_a_bank_are_refused() -> None:
    """They are not there on the fast path, and that is said rather than left out; the pure path has them."""
    model = share(nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 6)).double(), 0.5)
    x = torch.randn(4, 10, dtype=torch.float64)
    parameters = list(model.parameters())

    def curvature() -> Tensor:
        slopes = torch.autograd.grad(loss_of(model(x)), parameters, create_graph=True)
        return torch.stack([slope.square().sum() for slope in slopes]).sum()

    with pytest.raises(RuntimeError, match="differentiate twice"):
        curvature().backward()
    be_pure(model)
    model.zero_grad()
    curvature().backward()
    assert math.isfinite(sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None))
