"""Pruning: its schedule, what is zero and stays so, gradients of pruned weights, ranks, resuming, and what cannot be pruned."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dist_ssn import materialize, share
from dist_ssn.errors import UserError
from dist_ssn.train.loop import train
from dist_ssn.train.prune import sparsity, with_thresholds
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.sections import PruneConfig, ScheduleConfig, ShareConfig
from testing.layer_kinds import banks_of, be_pure, relative_error
from testing.ranks import run_ranks
from tests.test_train.test_loop import alone, assert_equal, outcome, recipe

BANK = PruneConfig(final=0.6, begin=2, end=8, every=2)
WEIGHTS = replace(BANK, what="weights")


@given(st.floats(0, 0.99), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_it_grows_to_what_was_asked_and_stays(final: float, begin: int, length: int, rest: int) -> None:
    config, steps = PruneConfig(final=final, begin=begin, end=begin + length), begin + length + rest
    parts = [sparsity(config, step, steps) for step in range(steps + 1)]
    assert all(earlier <= later + 1e-12 for earlier, later in itertools.pairwise(parts))
    assert all(part == 0 for part in parts[:begin]) and parts[begin + length :] == [final] * (rest + 1)


def zeros(tensor: torch.Tensor) -> int:
    return tensor.numel() - int(tensor.count_nonzero())


def test_banks_have_so_many_zeros(tmp_path: Path) -> None:
    result = train(recipe(tmp_path, prune=BANK), progress=False)
    banks = banks_of(result.model)
    numbers = sum(bank.group.size for bank in banks)
    assert len(banks) == 2 and sum(zeros(bank.bank) for bank in banks) == int(0.6 * numbers)
    expected = {"what": "bank", "numbers": numbers, "kept": numbers - int(0.6 * numbers)}
    assert result.summary["pruned"] == expected and result.row["kept_numbers"] == expected["kept"]
    plain = train(recipe(tmp_path / "plain"), progress=False)
    assert plain.summary["pruned"] is None and plain.row["parameters"] == result.row["parameters"]


def test_the_smallest_go_first_and_stay_away(tmp_path: Path) -> None:
    """At once after the first step, so that what stays is known; all later steps leave it so."""
    schedule = ScheduleConfig("constant")
    at_once = PruneConfig(final=0.5, begin=1, end=1, every=1)
    before = train(recipe(tmp_path / "a", steps=1, schedule=schedule), progress=False)
    after = train(recipe(tmp_path / "b", prune=at_once, schedule=schedule), progress=False)
    sizes = torch.cat([bank.bank.abs() / bank.scales[0] for bank in banks_of(before.model)])
    stays = sizes > sizes.kthvalue(int(0.5 * len(sizes)), dim=0).values
    assert torch.equal(torch.cat([bank.bank for bank in banks_of(after.model)]) != 0, stays)


def test_each_weight_has_so_many_zeros(tmp_path: Path) -> None:
    shared = train(recipe(tmp_path, prune=WEIGHTS), progress=False)
    dense = train(recipe(tmp_path / "dense", prune=WEIGHTS, share=ShareConfig()), progress=False)
    made = materialize(shared.model)
    names = [slot.name for bank in banks_of(shared.model) for slot in bank.group.slots]
    assert len(names) == 3
    for model, result in ((made, shared), (dense.model, dense)):
        weights = [model.get_parameter(name) for name in names]
        assert [zeros(weight) for weight in weights] == [int(0.6 * weight.numel()) for weight in weights]
        assert result.summary["pruned"]["kept"] == sum(weight.numel() - zeros(weight) for weight in weights)
    assert all(bank.bank.count_nonzero() == bank.bank.numel() for bank in banks_of(shared.model))


def test_pruned_weights_have_the_gradient_of_what_is_left() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)).double()
    model = with_thresholds(share(layers, 0.3), WEIGHTS)
    for bank in banks_of(model):
        assert bank.thresholds is not None
        bank.thresholds.fill_(0.5 * bank.scales[0])
    pure = copy.deepcopy(model)
    be_pure(pure)
    for tokens in (torch.arange(3), torch.randint(40, (64,))):  # a few rows of the embedding, and the whole of it
        losses = [one(tokens).square().mean() for one in (model, pure)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for loss in losses:
            loss.backward()
        for (_, ours), (_, theirs) in zip(model.named_parameters(), pure.named_parameters(), strict=True):
            assert relative_error(ours.grad, theirs.grad) < 1e-10
    assert any(zeros(bank(index)) for bank in banks_of(model) for index in range(len(bank.group.slots)))


def _train(rank: int, world_size: int, settings: Any) -> dict[str, Any]:
    return outcome(train(settings, progress=False))


@pytest.mark.distributed
@pytest.mark.parametrize("prune", [BANK, WEIGHTS], ids=["bank", "weights"])
def test_ranks_prune_what_one_process_prunes(prune: PruneConfig, tmp_path: Path) -> None:
    one = alone(recipe(tmp_path / "one", prune=prune))
    ranks = run_ranks(_train, 2, recipe(tmp_path / "two", prune=prune))
    for rank in ranks:
        for name, tensor in one["tensors"].items():
            torch.testing.assert_close(rank["tensors"][name], tensor, rtol=1e-3, atol=1e-4)
        assert rank["summary"]["pruned"] == one["summary"]["pruned"]
    assert_equal(*ranks)


@pytest.mark.parametrize(
    ("prune", "budget"), [(BANK, 0.5), (WEIGHTS, 0.5), (WEIGHTS, None)], ids=["bank", "weights", "dense weights"]
)
def test_a_pruned_run_goes_on_exactly(prune: PruneConfig, budget: float | None, tmp_path: Path) -> None:
    share = ShareConfig(budget=budget)
    whole = alone(recipe(tmp_path / "whole", prune=prune, share=share))
    half = recipe(tmp_path / "half", prune=prune, share=share)
    half = replace(half, checkpoint=replace(half.checkpoint, every=5, keep=5, resume=True))
    alone(half)
    for step in (10, 12):
        newest = tmp_path / "half" / "small" / "checkpoints" / f"step-{step:08d}"
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()  # as if it had been killed between step 5 and step 10
    assert_equal(whole, alone(half))


BUDGET = "--share.budget=0.1"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["final=1"], "prune.final must be at least 0 and below 1, got 1"),
        (["final=0.5"], "prune.what is bank, and this model has none"),
        (["final=0.5", BUDGET, "--engine.name=fsdp"], "prune.final goes with the engine ddp or mpi"),
        (["final=0.5", BUDGET, "--prune.end=5000"], "prune.end must lie between prune.begin = 0 and steps = 1000"),
        (["final=0.5", BUDGET, "--prune.every=0"], "prune.every must be at least 1, got 0"),
        (["final=0.5", "--prune.what=banks"], "prune.what is an unknown name 'banks'"),
        (["final=0.5", BUDGET, "--share.control=tied", "--prune.what=weights"], "prune.what is weights, which"),
    ],
)
def test_a_wrong_setting_is_named(options: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_recipe(None, [f"--prune.{options[0]}", *options[1:]])
