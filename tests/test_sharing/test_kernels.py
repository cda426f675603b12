"""The Triton kernels against plain autograd and against the block's own operations: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import set_generation, share
from dist_ssn.plan.slots import Slot
from dist_ssn.sharing import blocks
from dist_ssn.sharing.blocks import Block, Given, Placed, make_blocks
from dist_ssn.sharing.morphs import sign_start, sign_table
from testing.layer_kinds import banks_of, loss_of, relative_error, shake

pytest.importorskip("triton", minversion="3.7", reason="older interpreters don't know today's numpy")
KERNELS = {"_generate", "_pull_back", "_row_gains", "_column_gains"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    from dist_ssn.sharing import kernels

    monkeypatch.setattr(blocks, "kernels_on", lambda device: kernels)
    return kernels


class Case:
    """A block of weights that follow each other in a bank."""

    def __init__(self, shapes: list[tuple[int, int]], bank: int, start: int, gains: bool, chunk: int = 16):
        self.size, self.slots, first = bank, [], 0
        for index, shape in enumerate(shapes):
            has = gains and index != 1
            slot = Slot(f"w{index}", shape, "offset", start, 1, chunk=chunk, row_gains=has, column_gains=has)
            self.slots.append(Placed(index, slot, first))
            start, first = (start + slot.numel) % bank, first + slot.gains
        torch.manual_seed(0)
        self.bank = torch.randn(bank, dtype=torch.float64)
        self.scales = torch.rand(1 + len(shapes)) + 0.5
        self.gains = torch.rand(first, dtype=torch.float64) + 0.5 if gains else None
        self.gradient = torch.randn(sum(slot.numel for _, slot, _ in self.slots), dtype=torch.float64)

    def blocks(self, kernels: bool = True) -> list[Block]:
        """Whose weights lie behind each other: one with kernels, some without."""
        with pytest.MonkeyPatch.context() as patched:
            if not kernels:
                patched.setattr(blocks, "kernels_on", lambda device: None)
            cut = make_blocks(self.slots, 3, self.size, (), DEVICE if kernels else torch.device("cpu"))
        assert all((block.kernels is not None) == kernels for block in cut) and (len(cut) == 1 or not kernels)
        return cut

    def run(self, cut: list[Block], dtype: torch.dtype, out: torch.dtype | None = None) -> list[Tensor]:
        """Weights, and gradients of bank and gains, on the processor; the weights' gradient comes in their dtype."""
        device = DEVICE if cut[0].kernels is not None else "cpu"
        scales, gains = self.scales.to(device), None if self.gains is None else self.gains.to(device, dtype)
        given = Given.of(self.bank.to(device, dtype), scales, gains)
        weights = self.gradient.to(device, out or dtype, copy=True)
        sums = [None if tensor is None else torch.zeros_like(tensor) for tensor in (given.bank, given.gains)]
        for block, part in zip(cut, weights.split([block.numel for block in cut]), strict=True):
            block.pull_back(part.clone(), given, *sums)
            block.generate(given, part)
        return [tensor.cpu() for tensor in (weights, *sums) if tensor is not None]

    def by_autograd(self) -> list[Tensor]:
        """The same in float64, element by element."""
        leaves = [tensor.clone().requires_grad_() for tensor in (self.bank, self.gains) if tensor is not None]
        flat = []
        for index, slot, first in self.slots:
            i = torch.arange(slot.numel)
            table = sign_table(3, slot.numel, torch.device("cpu"), torch.float64)
            signs = table[sign_start(3, slot.name, 0) + i // slot.chunk]
            weight = leaves[0][(slot.start + i) % self.size] * signs * self.scales[1 + index]
            if slot.row_gains:
                rows, columns = leaves[1][first : first + slot.gains].split([slot.rows, slot.columns])
                weight = (weight.view(slot.rows, -1) * rows.unsqueeze(1) * columns).flatten()
            flat.append(weight)
        weights = torch.cat(flat)
        weights.backward(self.gradient)
        return [weights.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


CASES = {
    "odd sizes, a bank of less than a tile": lambda gains: Case([(3, 5), (7, 11), (33, 40)], 97, 90, gains),
    "a bank of one tile and a bit": lambda gains: Case([(3, 5), (70, 64), (33, 40)], 1031, 1020, gains),
    "rows longer than a tile, wrapping inside": lambda gains: Case([(2, 1500), (4, 1024), (3, 2049)], 2500, 2, gains),
    "a weight smaller than a chunk": lambda gains: Case([(16, 16), (2, 3)], 5000, 4990, gains),
    "a chunk that is no power of two": lambda gains: Case([(6, 7), (20, 9)], 60, 0, gains, chunk=3),
}


@pytest.mark.parametrize("gains", [True, False], ids=["gains", "no gains"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_autograd_and_plain_operations(name: str, gains: bool, with_kernels: Any) -> None:
    case = CASES[name](gains)
    wanted, sides = case.by_autograd(), [case.blocks(), case.blocks(kernels=False)]
    assert len(wanted) == 2 + gains
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        for side in sides:
            for got, value in zip(case.run(side, dtype), wanted, strict=True):
                assert got.dtype == dtype
                assert relative_error(got.double(), value) <= tolerance


def test_lower_precision_is_rounded_to_once_and_summed_exactly(with_kernels: Any) -> None:
    """Out in bfloat16, and in again as the gradient. The interpreter rounds towards zero, a GPU to the nearest."""
    case = Case([(3, 5), (70, 64), (33, 40)], 1031, 1020, gains=True)
    weights, bank, gains = case.run(case.blocks(), torch.float32, torch.bfloat16)
    exact = case.run(case.blocks(), torch.float32)[0]
    assert weights.dtype == torch.bfloat16 and bank.dtype == torch.float32
    assert ((weights.float() - exact).abs() <= exact.abs() * 2**-7).all()
    case.gradient = case.gradient.bfloat16().double()
    _, wanted_bank, wanted_gains = case.by_autograd()
    assert relative_error(bank.double(), wanted_bank) <= 2e-6
    assert relative_error(gains.double(), wanted_gains) <= 2e-6


def test_signs_of_zeros(with_kernels: Any) -> None:
    case = Case([(4, 16), (4, 16)], 128, 0, gains=False)
    case.bank.zero_()
    got, wanted = (case.run(case.blocks(kernels), torch.float32)[0] for kernels in (True, False))
    assert torch.equal(torch.signbit(got), torch.signbit(wanted)) and torch.signbit(got).any()


def test_gradients_are_the_same_in_every_run(with_kernels: Any) -> None:
    case = Case([(70, 64), (33, 40)], 517, 3, gains=True)
    once, again = (case.run(case.blocks(), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_entries_read_every_element_once_and_in_order(with_kernels: Any) -> None:
    case = Case([(3, 5), (7, 11), (33, 40), (1, 1)], 97, 90, gains=False)
    places = [part.place() for part in case.blocks()[0].parts]
    entries, firsts = with_kernels.entries_of([with_kernels.Place(*place) for place in places], 97, tile=10)
    seen: list[tuple[int, int]] = []
    for tile, (low, high) in enumerate(itertools.pairwise(firsts)):
        for weight, its, first in entries[low:high].tolist():
            assert its == tile
            _, rows, columns, start, *_ = places[weight]
            inside = [k for k in range(10) if tile * 10 + k < 97 and 0 <= first + k < rows * columns]
            assert inside and all((start + first + k) % 97 == tile * 10 + k for k in inside)
            seen += [(weight, first + k) for k in inside]
    assert sorted(seen) == [(w, i) for w, place in enumerate(places) for i in range(place[1] * place[2])]


@pytest.mark.parametrize("autocast", [False, True], ids=["exact", "autocast"])
def test_a_model_has_the_gradients_of_generation_on_demand(autocast: bool, with_kernels: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 21), nn.Tanh(), nn.Linear(21, 5)]
    dtype = torch.float32 if autocast else torch.float64
    model = share(nn.Sequential(*layers).to(DEVICE, dtype), 0.3, morph="offset:gains=true")
    shake(model)
    other = copy.deepcopy(model)
    x = torch.randn(6, 24, device=DEVICE, dtype=dtype)
    for one, mode in ((model, "on_demand"), (other, "per_step")):
        set_generation(one, mode)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss_of(one(x)).backward()
    made = [bank.per_step.sheets for bank in banks_of(other) if bank.per_step is not None]
    assert made and all(block.kernels is not None for sheets in made for s in sheets.values() for block in s.blocks)
    for (name, parameter), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert its.grad is not None and parameter.grad is not None
        assert relative_error(its.grad, parameter.grad) <= (0.02 if autocast else 1e-10), name


def test_kernels_run_on_a_gpu_with_triton_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks.kernels_on(torch.device("cpu")) is None and blocks.kernels_on(torch.device("meta")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert blocks.kernels_on(torch.device("cuda")) is None, "nobody has asked for them"
    monkeypatch.setenv("DIST_SSN_KERNELS", "1")
    assert blocks.kernels_on(torch.device("cuda")) is not None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert blocks.kernels_on(torch.device("cuda")) is None


@pytest.mark.processes
def test_kernels_compile_for_gpus_that_are_not_there() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "testing.kernel_binaries"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"80", "90"} and {line[3] for line in lines} == KERNELS
    assert all(int(line[4]) > 0 for line in lines)
