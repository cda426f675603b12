"""What `save`, `load` and `merge` must not lose, mix up or round without a word."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dist_ssn import initialize, load, make_plan, merge, save, share
from dist_ssn.errors import CheckpointError, ShareError
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


class Outer(nn.Module):
    """A model around another one, as a trainer's module or an adapter's wrapper is."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.extra = Tied(), nn.Linear(40, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.extra(self.model(tokens))


def test_a_part_is_saved_by_itself(tmp_path: Path) -> None:
    """The plan's names are those of the part, so a file of the whole would mix two kinds of names."""
    outer = fresh(Outer)
    shaken(share(outer.model, 0.5, keep=True, train="norm"))
    save(outer.get_submodule("model"), tmp_path)
    for action in (save, load):
        with pytest.raises(ShareError, match=r"on its part model, so give model\.get_submodule\('model'\)"):
            action(outer, tmp_path)
    again = fresh(Outer)
    load(again.get_submodule("model"), tmp_path)
    assert torch.equal(again(TOKENS), outer(TOKENS))


def test_two_parts_are_saved_by_themselves(tmp_path: Path) -> None:
    both = nn.ModuleDict({name: share(fresh(Tied), 0.5, keep=True) for name in ("a", "b")})
    with pytest.raises(ShareError, match=r"on its part a and b, so give model\.get_submodule\('a'\)"):
        save(both, tmp_path)


def test_a_model_is_not_saved_by_a_part(tmp_path: Path) -> None:
    model = share(fresh(Outer), 0.5, keep=True)
    with pytest.raises(ShareError, match="it is a part of a model that is shared: give that model"):
        save(model.model, tmp_path)
    save(model, tmp_path)
    with pytest.raises(ShareError, match="it is a part of a model that is shared: give that model"):
        load(model.model, tmp_path)
    with pytest.raises(ShareError, match="Tied is shared: merge onto the dense base"):
        merge(model.model, {tmp_path: 1.0})


def test_no_model(tmp_path: Path) -> None:
    save(share(fresh(Tied), 0.5, keep=True), tmp_path)
    nothing: Any = None
    for action in (
        lambda: save(nothing, tmp_path),
        lambda: load(nothing, tmp_path),
        lambda: merge(nothing, {tmp_path: 1}),
    ):
        with pytest.raises(ShareError, match="an object of type NoneType is no model"):
            action()


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_a_container_is_a_whole_model(tmp_path: Path, kind: type[nn.Module]) -> None:
    """Its banks are held by a layer inside of it."""
    models = [kind([fresh(Tied)]) if kind is nn.ModuleList else kind(fresh(Tied)) for _ in range(2)]
    save(copy.deepcopy(shaken(share(models[0], 0.5, keep=True))), tmp_path)
    load(models[1], tmp_path)
    assert torch.equal(models[0][0](TOKENS), models[1][0](TOKENS))


def test_layers_that_were_wrapped(tmp_path: Path) -> None:
    model = share(fresh(Tied), 0.5, keep=True)
    model.body = nn.Sequential(model.body)
    with pytest.raises(ShareError, match=r"its layers were replaced or renamed since share\(\)"):
        save(model, tmp_path)


class Untied(Tied):
    """The table's values are the head's, and its parameter is not."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.table.weight.detach().clone())


def test_a_model_with_more_parameters_is_another_one(tmp_path: Path) -> None:
    """A head that was trained by its tie, and is not tied here, would stay as it is."""
    save(shaken(share(fresh(Tied), 0.5, keep=True, train="head")), tmp_path)
    for action in (lambda: load(fresh(Untied), tmp_path), lambda: merge(fresh(Untied), {tmp_path: 1.0})):
        with pytest.raises(CheckpointError, match=r"was trained on a model without head\.weight, which this one has"):
            action()


def test_nothing_is_rounded(tmp_path: Path) -> None:
    """What was trained whole, buffers, and banks go where they have their dtype."""
    model = fresh(Tied).bfloat16()
    model.norm.float()
    save(shaken(share(model, 0.5, keep=True, train="norm")), tmp_path)
    other = fresh(Tied).bfloat16()
    for action in (lambda: load(other, tmp_path), lambda: merge(other, {tmp_path: 1.0})):
        with pytest.raises(
            CheckpointError, match=r"has norm\.(weight|bias) in float32, and here it is in bfloat16: convert"
        ):
            action()
    other.norm.float()
    load(other, tmp_path)
    assert torch.equal(other.norm.weight, model.norm.weight)
    other.to(torch.bfloat16).norm.float()
    with pytest.raises(
        CheckpointError, match=r"has all\.bank in float32, and here it is in bfloat16: load it onto the dense"
    ):
        load(other, tmp_path)


def test_a_bank_in_16_bits_goes_into_one_in_32(tmp_path: Path) -> None:
    model = shaken(share(fresh(Tied).bfloat16(), 0.5, keep=True)).to(torch.bfloat16)
    save(model, tmp_path)
    assert torch.equal(load(fresh(Tied).bfloat16(), tmp_path)(TOKENS), model(TOKENS))


def test_meta_has_no_values(tmp_path: Path) -> None:
    save(shaken(share(fresh(Tied), 0.5, keep=True, train="norm")), tmp_path)
    with torch.device("meta"):
        empty = Tied()
    for action in (lambda: load(empty, tmp_path), lambda: merge(empty, {tmp_path: 1.0})):
        with pytest.raises(ShareError, match=r"table\.weight is on 'meta' and has no values: load the pretrained ones"):
            action()
    part = fresh(Tied)
    part.norm = nn.LayerNorm(16, device="meta")
    with pytest.raises(ShareError, match=r"norm\.weight is on 'meta' and has no values"):
        load(part, tmp_path)
    with pytest.raises(ShareError, match=r"norm\.weight is on 'meta' and has no values"):
        save(share(part, 0.5, keep=True, train="norm"), tmp_path)


def test_a_sharded_model_is_named(tmp_path: Path) -> None:
    save(share(fresh(Tied), 0.5, keep=True), tmp_path)
    for model in (fresh(Tied), share(fresh(Tied), 0.5, keep=True)):
        setattr(model.norm.weight, "device_mesh", None)  # noqa: B010 - as a DTensor has it
        for action in (save, load):
            if action is load or banks_of(model):
                with pytest.raises(ShareError, match=r"norm\.weight is sharded: save and load before fully_shard"):
                    action(model, tmp_path)


def test_a_switch_of_a_frozen_model_leaves_it_frozen(tmp_path: Path) -> None:
    model = shaken(share(fresh(Tied), 0.5, keep=True, train="norm"))
    save(model, tmp_path)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    load(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters()) and not model(TOKENS).requires_grad
    dense = fresh(Tied).requires_grad_(False)
    assert [name for name, p in load(dense, tmp_path).named_parameters() if p.requires_grad] == trained
