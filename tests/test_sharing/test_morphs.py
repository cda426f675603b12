"""Morphs against a naive reference in numpy float64: plain loops over single numbers, written from the docstrings alone.

And what a plan promises of them: the scale contract, the numbers that are read, and random draws that never change.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dist_ssn import Morph, Plan, make_plan, share
from dist_ssn.errors import BudgetError
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import Group, Slot
from dist_ssn.plan.rules import EMBEDDING_SIZE, MASK_WINDOW, SLOT_MORPHS
from dist_ssn.plan.scales import scales_of
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.bank_values import PARAMETERS
from dist_ssn.sharing.morphs import ELEMENTWISE, MORPHS, Chunks, Stretch, readings
from testing.layer_kinds import banks_of, relative_error, shake

BUDGETS = (0.02, 0.1, 0.5, 1.0, 2.0)
FROZEN_OFFSET = [606, 1111, 1616, -2121, 2626, -3069, 396, -891, -1414, 1881, -2376, -2929, -198]
FROZEN_HASH = [-1699, 170, 715, -2788, -2105, -2974, -1477, -1988, 513, -1006, -269, 2804, 2879]
FROZEN_START = {
    "bank": [-0.46607, 0.40196, -0.81109, 0.05455],
    "coefficients": [-0.49023, -0.87159, -1.0, -1.0],
    "projections": [-0.09159, -0.25521, -0.06427, 0.71195],
    "gains": [1.0, 1.0, 1.0, 1.0],
    "differences": [0.43361, 1.27541, 1.02527, -0.34548],
}
CHOICES = ("avg/inter", "wavg/mask", "emb/repeat", "wavg/wavg", "inter", "mask", "repeat", "offset", "hash", "auto")


# ---------------------------------------------------------------------------------------------------- the reference


def naive_signs(seed: int, name: str, k: int, chunks: int) -> list[float]:
    """The signs of one template's chunks: from a place of the weight's own in a stream of pseudo-random bits."""
    digest = hashlib.sha256(f"sign/{seed}/{name}/{k}".encode()).digest()
    first = int.from_bytes(digest[:4], "little") % 65536
    stream = hashlib.shake_256(f"signs/{seed}".encode()).digest((first + chunks) // 8 + 1)
    bits = [(stream[i // 8] >> (7 - i % 8)) & 1 for i in range(first, first + chunks)]
    return [1.0 if bit else -1.0 for bit in bits]


def naive_order(seed: int, name: str, k: int, count: int, available: int) -> list[int]:
    """The bank's chunks in the order in which template k reads them: one shuffled pass after the other."""
    digest = hashlib.sha256(f"hash/{seed}/{name}/{k}".encode()).digest()
    draw = np.random.RandomState(int.from_bytes(digest[:4], "little"))
    order: list[int] = []
    while len(order) < count:
        order += [int(place) for place in draw.permutation(available)]
    return order[:count]


def naive_resize(template: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear, pixel centres at halves, edges repeated."""
    height, width = template.shape
    result = np.zeros((rows, columns))
    for i in range(rows):
        y = min(max((i + 0.5) * height / rows - 0.5, 0.0), height - 1.0)
        for j in range(columns):
            x = min(max((j + 0.5) * width / columns - 0.5, 0.0), width - 1.0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = template[top, left] * (1 - (x - left)) + template[top, right] * (x - left)
            lower = template[bottom, left] * (1 - (x - left)) + template[bottom, right] * (x - left)
            result[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return result


def naive_base(slot: Slot, seed: int, bank: np.ndarray, coefficients: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """[n]: what the morph makes of the bank, one number after the other."""
    n, size, templates = slot.numel, len(bank), slot.templates
    base = np.zeros(n)
    if slot.morph in ("avg", "wavg", "emb", "repeat"):
        for k in range(templates):
            mixed = {
                "avg": lambda k: 1 / templates,
                "wavg": lambda k: coefficients[k],
                "emb": lambda k: sum(coefficients[e] * projection[e, k] for e in range(EMBEDDING_SIZE)),
                "repeat": lambda k: 1.0,
            }[slot.morph](k)
            for i in range(n):
                base[i] += mixed * bank[(slot.start + k * n + i) % size]
    elif slot.morph == "inter":
        height, width = slot.template_shape
        small = np.zeros((height, width))
        for k in range(templates):
            for y in range(height):
                for x in range(width):
                    place = (slot.start + k * height * width + y * width + x) % size
                    small[y, x] += (coefficients[k] if templates > 1 else 1.0) * bank[place]
        base = naive_resize(small, slot.rows, slot.columns).reshape(-1)
    elif slot.morph == "mask":
        for i in range(n):
            turn, place = divmod(i, size)  # the first pass over the bank is plain, the others have a window each
            mask = 1.0 if turn == 0 else coefficients[(turn - 1) * MASK_WINDOW + place % MASK_WINDOW]
            base[i] = mask * bank[(slot.start + i) % size]
    elif slot.morph == "wavg-up":
        for i in range(n):
            piece, place = divmod(i, width := slot.template_shape[1])
            for k in range(templates):
                base[i] += coefficients[piece * templates + k] * bank[(slot.start + k * width + place) % size]
    else:
        chunks = -(-n // slot.chunk)
        for k in range(templates):
            signs = naive_signs(seed, slot.name, k, chunks)
            order = naive_order(seed, slot.name, k, chunks, size // slot.chunk)
            for i in range(n):
                chunk, within = divmod(i, slot.chunk)
                place = order[chunk] * slot.chunk + within if slot.morph == "hash" else slot.start + k * n + i
                base[i] += (coefficients[k] if templates > 1 else 1.0) * signs[chunk] * bank[place % size]
    return base


def naive_weight(bank: Bank, index: int) -> np.ndarray:
    """The weight of a slot, from the bank's parameters as they lie there."""
    slot = bank.group.slots[index]
    values = {name: np.zeros(0) for name in PARAMETERS}
    values |= {name: p.detach().double().flatten().numpy() for name, p in bank.named_parameters()}
    before = bank.group.slots[:index]

    def own(name: str) -> np.ndarray:
        start = sum(getattr(other, name) for other in before)
        return values[name][start : start + getattr(slot, name)]

    projection = np.zeros((0, 0))
    if slot.morph == "emb":
        start = sum(EMBEDDING_SIZE * k for k in bank.group.projections if k < slot.templates)
        projection = values["projections"][start : start + EMBEDDING_SIZE * slot.templates]
        projection = projection.reshape(EMBEDDING_SIZE, slot.templates)
    base = naive_base(slot, bank.seed, values["bank"], own("coefficients"), projection)
    gains, differences = own("gains"), own("differences")
    column_gains = gains[slot.rows if slot.row_gains else 0 :]
    left = differences[: slot.rows * slot.rank].reshape(slot.rows, slot.rank)
    right = differences[slot.rows * slot.rank :].reshape(slot.rank, slot.columns)
    weight = np.zeros((slot.rows, slot.columns))
    for i in range(slot.rows):
        for j in range(slot.columns):
            number = float(bank.scales[1 + index]) * base[i * slot.columns + j]
            number *= gains[i] if slot.row_gains else 1.0
            number *= column_gains[j] if slot.column_gains else 1.0
            number += sum(left[i, r] * right[r, j] for r in range(slot.rank))
            weight[i, j] = 0.0 if i == slot.zero_row else number
    return weight.reshape(slot.shape)


# ------------------------------------------------------------------------------------------------------- comparisons


def slots_by_hand(morph: str, size: int) -> list[Slot]:
    """Weights of several shapes for one bank of `size` numbers, with and without everything that a slot can have."""
    slots = []
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((6, 8), {}),
        ((5, 2, 3), {"row_gains": True}),
        ((8, 3), {"column_gains": True, "rank": 2}),
        ((4, 7), {"row_gains": True, "column_gains": True, "rank": 1, "zero_row": 2}),
    ]
    for place, (shape, options) in enumerate(cases):
        n = math.prod(shape)
        for templates in (3, 1) if morph in ("offset", "hash", "inter", "wavg-up", "avg", "wavg", "emb") else (1,):
            if morph in ("avg", "wavg", "emb") and templates * n > size:
                continue
            fields: dict[str, Any] = {"templates": templates}
            if morph == "inter":
                fields |= {"template_shape": (min(shape[0], 2 + place), min(n // shape[0], 2))}
                fields |= {"coefficients": templates if templates > 1 else 0}
            elif morph == "mask":
                fields |= {"coefficients": MASK_WINDOW * (math.ceil(n / size) - 1)}
            elif morph == "wavg-up":
                width = size // templates
                fields |= {"template_shape": (-(-n // width), width), "coefficients": -(-n // width) * templates}
            elif morph in ("offset", "hash"):
                fields |= {"chunk": (4, 5, 1, 16)[place], "coefficients": templates if templates > 1 else 0}
            else:
                fields |= {"coefficients": {"avg": 0, "wavg": templates, "emb": EMBEDDING_SIZE, "repeat": 0}[morph]}
            name = f"weight-{place}-{templates}"
            slots.append(Slot(name, shape, morph, (11 * place) % size, **fields, **options))
    return slots


def bank_by_hand(morph: str, size: int, seed: int = 3) -> Bank:
    """A bank in float64, every number of it random."""
    bank = Bank(Group("by-hand", size, tuple(slots_by_hand(morph, size))), seed, dtype=torch.float64)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return bank


@pytest.mark.parametrize("size", [20, 61, 200])
@pytest.mark.parametrize("morph", SLOT_MORPHS)
def test_pure_and_fast_path_equal_the_naive_reference(morph: str, size: int) -> None:
    """Banks smaller than a weight, larger than one, and larger than three templates of it."""
    if size < 24 and morph in ("avg", "wavg", "emb"):
        assert not slots_by_hand(morph, size), "no weight fits such a bank"
        return
    bank = bank_by_hand(morph, size)
    assert bank.group.slots
    for index, slot in enumerate(bank.group.slots):
        wanted = torch.from_numpy(naive_weight(bank, index))
        for pure in (True, False):
            bank.pure = pure
            got = bank(index)
            assert got.shape == slot.shape
            assert relative_error(got, wanted) <= 1e-14, f"{'pure' if pure else 'fast'}: {slot}"
            with torch.no_grad():
                assert relative_error(bank(index), wanted) <= 1e-14, f"without gradients: {slot}"


@pytest.mark.parametrize("morph", SLOT_MORPHS)
def test_some_rows_are_those_of_the_whole_weight(morph: str) -> None:
    """What an embedding looks up, rows in any order and more than once, and no row at all."""
    bank = bank_by_hand(morph, 61)
    for index, slot in enumerate(bank.group.slots):
        for rows in (torch.tensor([2, 0, 2, slot.rows - 1]), torch.tensor([], dtype=torch.long)):
            for pure in (True, False):
                bank.pure = pure
                got, whole = bank(index, rows), bank(index).reshape(slot.rows, slot.columns)
                assert got.shape == (len(rows), slot.columns)
                assert torch.allclose(got, whole[rows], rtol=1e-14, atol=1e-14)


def test_every_morph_of_a_plan_has_a_function() -> None:
    assert set(MORPHS) == set(SLOT_MORPHS)
    assert set(MORPHS) >= ELEMENTWISE


@given(
    size=st.integers(1, 40),
    start=st.integers(0, 39),
    length=st.integers(1, 150),
    chunk=st.integers(1, 7),
    data=st.data(),
)
def test_giving_is_the_transpose_of_taking(size: int, start: int, length: int, chunk: int, data: st.DataObject) -> None:
    """⟨take(bank), part⟩ = ⟨bank, give(part)⟩, and `at` names the same places, for every way to read a bank."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    for reading in (Stretch(start % size, length), Chunks((1, "weight", 0), min(chunk, size), length)):
        bank, part = torch.randn(size, dtype=torch.float64), torch.randn(length, dtype=torch.float64)
        taken, total = reading.take(bank), torch.zeros(size, dtype=torch.float64)
        assert torch.equal(taken, bank[reading.at(torch.arange(length), size)])
        reading.give(total, part)
        assert torch.allclose(taken @ part, bank @ total, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------- what plans promise


def layers() -> nn.Sequential:
    """Weights of several shapes and initial standard deviations, the largest more than twice the smallest."""
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 96), nn.Conv2d(16, 64, 3), nn.Linear(200, 64))
    nn.init.normal_(model.get_parameter("3.weight"), std=0.02)
    return model


def plan_for(budget: float, mapping: str, morph: str | Morph, model: nn.Module | None = None, seed: int = 0) -> Plan:
    """The plan of `layers()` for a budget, or for the smallest possible one, which the error must name."""
    model = model or layers()
    try:
        return make_plan(model, budget, mapping=mapping, morph=morph, seed=seed)
    except BudgetError as error:
        found = re.search(r"smallest possible budget is ([\d,]+)", str(error))
        assert found, str(error)
        least = int(found[1].replace(",", ""))
        with pytest.raises(BudgetError):
            make_plan(model, least - 1, mapping=mapping, morph=morph, seed=seed)
        return make_plan(model, least, mapping=mapping, morph=morph, seed=seed)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mapping", ["single", "shape"])
def test_weights_start_with_their_layers_own_standard_deviation(choice: str, budget: float, mapping: str) -> None:
    """The scale contract. Over seeds, since a small bank's draw is one of few numbers; within four standard errors."""
    squares: dict[str, list[float]] = {}
    independent: dict[str, int] = {}
    wanted: dict[str, float] = {}
    seeds = range(6)
    model = layers()
    weights = find_specs(model).weights
    stds = {weight.name: weight.init_std for weight in weights}
    for seed in seeds:
        plan = plan_for(budget, mapping, choice, model, seed=seed)
        for group, scales in zip(plan.groups, scales_of(plan, weights).values(), strict=True):
            bank = Bank(group, plan.seed, scales=scales)
            bank.reset_parameters()
            for index, slot in enumerate(group.slots):
                squares.setdefault(slot.name, []).append(float(bank(index).detach().double().square().mean()))
                wanted[slot.name] = stds[slot.name]
                read = math.prod(slot.template_shape) if slot.morph == "inter" else min(slot.numel, group.size)
                independent[slot.name] = max(1, read // slot.templates if slot.morph == "wavg-up" else read)
    for name, values in squares.items():
        error = math.sqrt(np.mean(values)) / wanted[name] - 1
        allowed = 4 * math.sqrt(0.5 / (independent[name] * len(seeds))) + 1e-3
        assert abs(error) <= allowed, f"{choice}, {budget}: {name} starts with {error:+.1%} of its standard deviation"


@pytest.mark.parametrize("choice", CHOICES)
def test_gains_and_differences_do_not_change_the_start(choice: str) -> None:
    """Gains start at one and U·V at zero, so that they add what can be learned, and no noise."""
    budget = 0.5
    options = Morph(choice, gains=True, rank=2)
    for mapping in ("single", "shape"):
        plan = plan_for(budget, mapping, options)
        for group in plan.groups:
            bank = Bank(group, plan.seed, dtype=torch.float64)
            bank.reset_parameters()
            weights = [bank(index) for index in range(len(group.slots))]
            assert bank.gains is not None and bank.differences is not None
            with torch.no_grad():
                assert bool((bank.gains == 1).all())
                for index, weight in enumerate(weights):
                    slot = group.slots[index]
                    bare = Slot(**(slot.__dict__ | {"row_gains": False, "column_gains": False, "rank": 0}))
                    slots = tuple(bare if i == index else other for i, other in enumerate(group.slots))
                    alone = Bank(Group(group.name, group.size, slots), plan.seed, dtype=torch.float64)
                    for name in ("bank", "coefficients", "projections"):
                        mine, theirs = getattr(alone, name), getattr(bank, name)
                        if mine is not None:
                            mine.copy_(theirs)
                    assert relative_error(alone(index), weight) <= 1e-12


def unread(plan: Plan) -> dict[str, float]:
    """Each bank's part that no weight reads."""
    parts = {}
    for group in plan.groups:
        read = np.zeros(group.size, dtype=bool)
        for slot in group.slots:
            for reading in readings(slot, plan.seed, group.size):
                read[reading.at(torch.arange(reading.length), group.size).numpy()] = True
        parts[group.name] = 1 - float(read.mean())
    return parts


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_number_of_a_bank_is_read(choice: str, budget: float) -> None:
    """What is paid for must be of use, but for a hundredth.

    Templates of "inter" have whole sides, which costs a small bank up to a tenth; and where "hash" draws n numbers out of
    B, (1 - n/B) of them are left each time.
    """
    for gains, rank in ((False, 0), (True, 2)):
        for mapping in ("single", "shape"):
            plan = plan_for(budget, mapping, Morph(choice, gains=gains, rank=rank))
            for group in plan.groups:
                missed = math.prod(
                    max(0.0, 1 - slot.numel / group.size) for slot in group.slots for _ in range(slot.templates)
                )
                allowed = {"inter": 0.1, "hash": missed + 0.02}.get(group.slots[0].morph, 0.01)
                assert unread(plan)[group.name] <= allowed, f"{mapping}, gains {gains}, {group}"


def test_a_tight_budget_is_not_spent_on_numbers_that_nobody_reads() -> None:
    """Where what weights have of their own takes nearly all, the rest of the bank must still fit the way it is cut."""
    model = nn.ModuleList([nn.Linear(5, 24), nn.Linear(6, 24), nn.Linear(280, 64), nn.Linear(5, 24)])
    for percent in range(5, 60, 5):
        plan = plan_for(percent / 100, "single", Morph("emb/inter", gains=True, rank=2), model)
        assert unread(plan)["all"] <= 0.1, f"{percent} %: {unread(plan)} of {plan.groups[0].size} is not read"


# ------------------------------------------------------------------------------------------------ draws that never change


def test_pseudo_random_draws_are_frozen() -> None:
    """A checkpoint holds no sign and no order: were they drawn otherwise one day, every checkpoint would be worthless."""
    bank = Bank(
        Group(
            "all",
            32,
            (
                Slot("a.weight", (8, 8), "offset", 5, 2, coefficients=2, chunk=4),
                Slot("b.weight", (8, 8), "hash", 0, 2, coefficients=2, chunk=4),
            ),
        ),
        seed=7,
        dtype=torch.float64,
    )
    with torch.no_grad():
        bank.bank.copy_(torch.arange(1.0, 33.0).unsqueeze(1))
        assert bank.coefficients is not None
        bank.coefficients.copy_(torch.tensor([1.0, 100.0, 1.0, 100.0]))
    assert bank(0).reshape(-1)[::5].long().tolist() == FROZEN_OFFSET
    assert bank(1).reshape(-1)[::5].long().tolist() == FROZEN_HASH


def test_initial_values_are_frozen() -> None:
    """Every rank makes them for itself, on its own machine, from the plan alone, whatever its random state is."""
    slots = (
        Slot("a.weight", (8, 8), "wavg", 0, 2, coefficients=2, row_gains=True, rank=1),
        Slot("b.weight", (8, 8), "mask", 0, 1, coefficients=9),
        Slot("c.weight", (8, 8), "emb", 0, 3, coefficients=8),
    )
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        bank = Bank(Group("all", 200, slots), seed=7, scales=(0.5, 1.0, 1.0, 1.0))
        bank.reset_parameters()
        starts.append({name: parameter.detach().flatten() for name, parameter in bank.named_parameters()})
    first, second = starts
    assert all(torch.equal(first[name], second[name]) for name in first) and set(first) == set(PARAMETERS)
    assert {name: [round(number, 5) for number in first[name][:4].tolist()] for name in first} == FROZEN_START


@pytest.mark.parametrize("morph", SLOT_MORPHS)
def test_half_precision_comes_close(morph: str) -> None:
    """The same function in bf16 and fp16; only rounding differs."""
    exact = bank_by_hand(morph, 200)
    wanted = [exact(index).detach() for index in range(len(exact.group.slots))]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)):
        bank = bank_by_hand(morph, 200)
        bank.load_state_dict(exact.state_dict())
        bank.to(dtype)
        for index, weight in enumerate(wanted):
            got = bank(index)
            assert got.dtype == dtype
            assert relative_error(got.double(), weight) <= tolerance


def test_seeds_and_names_give_different_weights() -> None:
    """Two weights that read the same stretch with other signs are not copies of each other."""
    for morph in ("offset", "hash"):
        slots = tuple(Slot(name, (16, 16), morph, 0, 1, chunk=4) for name in ("a", "b"))
        banks = [Bank(Group("all", 64, slots), seed) for seed in (0, 1)]
        for bank in banks:
            with torch.no_grad():
                bank.bank.copy_(torch.arange(1.0, 65.0).unsqueeze(1))
        weights = [bank(index).detach() for bank in banks for index in (0, 1)]
        for i, one in enumerate(weights):
            for other in weights[:i]:
                assert not torch.equal(one, other)
                assert not torch.equal(one, -other)


def test_shaken_layers_still_follow_the_reference() -> None:
    """The whole way from `share` on, after a step: not only slots that were made by hand."""
    for choice in CHOICES:
        model = share(nn.Sequential(nn.Linear(9, 14), nn.Linear(14, 9), nn.Conv1d(3, 4, 5)).double(), 0.8, morph=choice)
        shake(model)
        for bank in banks_of(model):
            for index in range(len(bank.group.slots)):
                assert relative_error(bank(index), torch.from_numpy(naive_weight(bank, index))) <= 1e-13
