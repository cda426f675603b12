"""The simulated workers compute what processes compute, and the queue measures each cell once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.ladder import cells, simulate
from benchmarks.ladder.cells import AVERAGE, cell, identity, recipe_of, without
from benchmarks.ladder.rungs import shortest
from benchmarks.ladder.suites import NESTEROV, frontier
from dist_ssn.engines import World
from dist_ssn.sync.local_updates import LocalUpdates
from dist_ssn.train.build import build
from dist_ssn.train.models import build_model
from dist_ssn.train.optim import build_optimizer, build_schedule
from testing.ranks import run_ranks

RANKS = 2
WORLD = World(0, 1, 0, torch.device("cpu"))
TINY = {"layers": 1, "width": 16, "heads": 2, "context": 16}


def _short() -> dict[str, Any]:
    tiny = {"model_args": TINY, "steps": 8, "schedule.warmup": 2, "evaluate_every": 8, "evaluate_batches": 2}
    return {**cells.TASKS["gpt"], "data.path": None, **tiny}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPT of one small layer, eight steps."""
    monkeypatch.setitem(cells.TASKS, "gpt", _short())


@pytest.mark.parametrize(("task", "kind"), [("gpt", "bank"), ("gpt", "hashed"), ("lstm", "bank"), ("wrn", "bank")])
def test_a_twin_computes_what_the_shared_model_computes(task: str, kind: str) -> None:
    recipe = recipe_of(cell(task, kind, 0.25, 1e-3))
    data, model = build(recipe, WORLD)
    dense = build_model(recipe.model, recipe.model_args, data)
    worker = simulate.Worker(model, recipe, dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    inputs, targets = data.batch(0, 16, 0, 4)
    found = []
    for called in (model, worker.called):
        model.zero_grad()
        loss = data.loss(called(inputs), targets)
        loss.backward()
        found.append((loss.detach(), worker.gradient()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def _local_updates(rank: int, world_size: int, kind: str, codec: str, outer: tuple[float, float]) -> list[Tensor]:
    """Parameters of a worker after `LocalUpdates` in a loop as a user writes it."""
    cells.TASKS["gpt"] = _short()
    recipe = recipe_of(cell("gpt", kind, None if kind == "dense" else 0.25, 3e-3))
    task, model = build(recipe, WORLD)
    optimizer = build_optimizer(model, recipe.optimizer)
    schedule = build_schedule(optimizer, recipe.schedule, recipe.steps)
    settings = {
        "outer": "nesterov" if outer[1] else "average",
        "outer_rate": outer[0],
        "outer_momentum": outer[1] or None,
    }
    with LocalUpdates(model, optimizer, every=4, codec=codec, **settings):
        for step in range(recipe.steps):
            inputs, targets = task.batch(step, recipe.batch_size, rank, world_size)
            task.loss(model(inputs), targets).backward()
            clip_grad_norm_(model.parameters(), recipe.clip_norm or 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "codec", "outer"),
    [("dense", "none", NESTEROV), ("bank", "int4", NESTEROV), ("bank", "sparse", AVERAGE)],
)
def test_simulated_workers_are_local_updates_on_processes(kind: str, codec: str, outer: tuple[float, float]) -> None:
    found = run_ranks(_local_updates, RANKS, kind, codec, outer)
    budget = None if kind == "dense" else 0.25
    recipe = recipe_of(wanted := cell("gpt", kind, budget, 3e-3, 4, codec, outer, small=None))
    task, model = build(recipe, WORLD)
    dense = build_model(recipe.model, recipe.model_args, task)
    met = [one for one in simulate.local_updates(wanted, recipe, task, model, dense, RANKS) if one is not None]
    assert len(met) == recipe.steps // 4
    for mine, first, second in zip(model.parameters(), *found, strict=True):
        torch.testing.assert_close(mine.detach(), first, rtol=1e-4, atol=1e-5)
        assert torch.equal(first, second)


def test_cells_are_measured_once_in_the_order_of_the_queue() -> None:
    first = without(frontier("gpt", []), [])
    assert len({identity(one) for one in first}) == len(first)
    lines = [{**one, "validation_loss": 1.0 + index} for index, one in enumerate(first[:3])]
    assert identity(without(frontier("gpt", lines), lines)[0]) == identity(first[3])


def test_a_grid_of_learning_rates_grows_until_its_best_is_inside() -> None:
    tried = [one for one in frontier("gpt", []) if one["kind"] == "dense" and one["every"] == 1][:3]
    lines = [{**one, "validation_loss": one["lr"]} for one in tried]
    assert without(frontier("gpt", lines), lines)[0]["lr"] == min(one["lr"] for one in tried) / 2


def test_the_shortest_run_to_denses_loss_counts() -> None:
    assert shortest({2000: -0.02, 500: 0.1, 1000: 0.0}) == 1000
    assert shortest({500: 0.1, 1000: 0.05}) == 1000


def test_bytes_are_those_of_the_codec() -> None:
    dense = simulate.run(cell("gpt", "dense", None, 1e-3, 4, "none", NESTEROV))
    sparse = simulate.run(cell("gpt", "dense", None, 1e-3, 4, "sparse", NESTEROV))
    fewer = simulate.run(cell("gpt", "dense", None, 1e-3, 4, "sparse", NESTEROV, small=None))
    assert dense["bytes"] == 2 * 4 * dense["parameters"]
    assert dense["ring_bytes"] == 1.5 * dense["bytes"]
    matrices = 256 * 16 + 16 * 16 + 12 * 16 * 16
    plain = dense["parameters"] - matrices
    values, whole = matrices % 4096, matrices // 4096
    assert sparse["bytes"] == 2 * (2 * plain + whole * 116 + 4 + -(-(values // 64) * 12 // 8) + -(-(values // 64) // 4))
    assert sparse["ring_bytes"] == 3 * sparse["bytes"]
    assert sparse["bytes"] - fewer["bytes"] == 2 * (2 * plain - (2 + -(-plain // 2)))
    assert 4.0 < sparse["validation_loss"] < 6.0
    assert [point["step"] for point in sparse["agreement"]] == [4, 8]
    assert all(-1 <= point["cosine"] <= 1 and 1 / 64 <= point["largest"] <= 1 for point in sparse["agreement"])


def test_small_dense_models_have_at_least_a_banks_parameters() -> None:
    def parameters(kind: str, task: str, budget: float) -> int:
        _, model = build(recipe_of(cell(task, kind, budget, 1e-3)), WORLD)
        return sum(one.numel() for one in model.parameters())

    for task, budget in cells.SMALL:
        if task != "gpt":  # this module has another GPT
            assert 0 <= parameters("small", task, budget) / parameters("bank", task, budget) - 1 < 0.1
