"""What `save`, `load` and `merge` must not lose, mix up or round without a word."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dist_ssn import initialize, load, make_plan, merge, save, share
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import banks_of

TOKENS = torch.arange(40).view(8, 5)


class Tied(nn.Module):
    """A table that is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.norm = nn.Embedding(40, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.table(tokens))))


def fresh(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model, with everything that trains moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for bank in banks_of(model):
        bank.at_start = False  # so that it is not taken for a mistake
    return model


@pytest.mark.parametrize("train", ["head", "table", "head.weight", "*d.weight"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tied_parameter_is_saved_by_each_of_its_names(tmp_path: Path, train: str, frozen: bool) -> None:
    """Also where it is frozen now, as before an export: its trained values are in the file, and are not taken for the base's."""
    model = shaken(share(fresh(Tied), 0.5, keep=True, train=train))
    model.requires_grad_(not frozen)
    save(model, tmp_path)
    assert torch.equal(load(fresh(Tied), tmp_path)(TOKENS), model(TOKENS))


def test_a_layer_that_was_trained_and_replaced_is_named(tmp_path: Path) -> None:
    """As adapters replace layers."""
    model = shaken(share(fresh(Tied), 0.5, keep=True, train="norm"))
    model.norm = nn.Sequential(model.norm)
    with pytest.raises(ShareError, match=r"norm\.weight was trained whole, and Tied does not have it any more"):
        save(model, tmp_path)


class Heads(nn.Module):
    """Heads whose names are globs, which match other heads or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 64)
        self.heads = nn.ModuleDict({name: nn.Linear(64, 8) for name in ("task[0]", "task*", "task1", "task?")})

    def forward(self, x: Tensor) -> Tensor:
        return sum((head(self.body(x)) for head in self.heads.values()), x.new_zeros(()))


@pytest.mark.parametrize("train", ["heads.task[0]", "heads.task*", "heads.task?.weight", "heads", "heads.*", "*.bias"])
def test_a_name_is_no_glob(tmp_path: Path, train: str) -> None:
    x = torch.linspace(-1, 1, 64).view(4, 16)
    model = shaken(share(fresh(Heads), 0.5, keep=True, train=train))
    save(model, tmp_path)
    again, merged = load(fresh(Heads), tmp_path), merge(fresh(Heads), {tmp_path: 1.0})
    assert torch.equal(again(x), model(x)) and torch.allclose(merged(x), model(x), atol=1e-5)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "dist_ssn" not in name]
    assert names == [n for n, p in again.named_parameters() if p.requires_grad and "dist_ssn" not in n]
    wanted = {"heads.task[0]": 2, "heads.task*": 2, "heads.task?.weight": 1, "*.bias": 5}.get(train, 8)
    assert len(names) == wanted


def test_a_name_is_no_glob_in_initialize() -> None:
    model = share(fresh(Heads), 0.9, mapping="single")
    initialize(model, {"heads.task[0].weight": 3.0})
    assert model.heads["task[0]"].weight.detach().std() > 10 * model.heads["task1"].weight.detach().std()


def test_a_name_is_no_glob_in_exclude() -> None:
    plan = make_plan(fresh(Heads), 0.5, exclude=["heads.task?", "heads.task*.weight", "heads.task[1]"])
    assert {slot.name for _, slot in plan.slots()} == {"body.weight", "heads.task[0].weight"}


class Normed(nn.Module):
    """A batch norm, whose statistics are buffers, a mask, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)
        self.register_buffer("mask", torch.tensor([0.1, -math.inf, 0.3, 0.7]))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def normed(seed: int, scale: float) -> nn.Module:
    """A difference beside which the statistics moved."""
    model = shaken(share(fresh(Normed), 0.5, keep=True, train="head", seed=seed), seed)
    for _ in range(40):
        model.train()(torch.randn(64, 16) * scale)
    return model.eval()


def test_a_sum_extrapolates_no_statistics(tmp_path: Path) -> None:
    """Their mean stays between those of the base and of the differences, whatever the weights sum to; parameters are summed."""
    base, a, b = fresh(Normed), normed(1, 0.1), normed(2, 0.3)
    save(a, tmp_path / "a")
    save(b, tmp_path / "b")
    variance = [model.get_buffer("norm.running_var") for model in (base, a, b)]
    x = torch.randn(4, 16)
    for weights, shares in (
        ((1.0, 1.0), (0.0, 0.5, 0.5)),
        ((3.0, 1.0), (0.0, 0.75, 0.25)),
        ((2.0, 0.0), (0.0, 1.0, 0.0)),
        ((0.25, 0.5), (0.25, 0.25, 0.5)),
        ((-1.0, 0.5), (0.5, 0.0, 0.5)),
        ((-1.0, -2.0), (1.0, 0.0, 0.0)),
        ((0.0, 0.0), (1.0, 0.0, 0.0)),
    ):
        merged = merge(base, {tmp_path / "a": weights[0], tmp_path / "b": weights[1]}).eval()
        wanted = sum(value * share for value, share in zip(variance, shares, strict=True))
        assert torch.allclose(merged.get_buffer("norm.running_var"), wanted, atol=1e-6), weights
        assert merged.get_buffer("norm.running_var").min() >= 0 and merged(x).isfinite().all()
        assert torch.equal(merged.get_buffer("mask"), base.get_buffer("mask")) and merged.get_buffer("count") == 0
        start = base.get_parameter("head.weight")
        moved = [model.get_parameter("head.weight") - start for model in (a, b)]
        assert torch.allclose(
            merged.get_parameter("head.weight"), start + weights[0] * moved[0] + weights[1] * moved[1], atol=1e-5
        )


@pytest.mark.parametrize("weight", [numpy.float32(0.5), numpy.float64(0.5), numpy.int64(1), Fraction(1, 2)])
def test_weights_of_any_real_type(tmp_path: Path, weight: Any) -> None:
    save(shaken(share(fresh(Tied), 0.5, keep=True)), tmp_path)
    merged, wanted = (merge(fresh(Tied), {tmp_path: one}) for one in (weight, float(weight)))
    assert torch.equal(merged(TOKENS), wanted(TOKENS))
