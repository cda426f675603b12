"""What the benchmarks compute from what they measured; that they measure is seen when they run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.bench import AS_ROOT, PROFILES
from benchmarks.compute import gpu, large
from benchmarks.compute.generation import nanoseconds, stack
from benchmarks.compute.memory import allocations, measure
from benchmarks.compute.memory import table as memory_table
from benchmarks.network.scaling import CLUSTERS, WORKERS
from benchmarks.network.scaling import tables as scaling_tables
from benchmarks.network.target_runs import losses_of, steps_to
from benchmarks.network.time_to_target import curves_of, target
from benchmarks.network.time_to_target import table as time_table
from benchmarks.quality import searches
from benchmarks.quality.cells import TWIN, cell, recipe_of
from benchmarks.quality.run import run
from benchmarks.quality.suites import SUITES
from benchmarks.quality.tasks import EQUAL, SHALLOW, TASKS
from dist_ssn.train.build import share_as
from dist_ssn.train.data import data_hints
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.check import validate


def cells(table) -> list[tuple[str, ...]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_every_step_of_make_bench_is_a_benchmark() -> None:
    names = {step.split()[0] for steps in PROFILES.values() for step in steps}
    assert set(AS_ROOT) <= names
    for name in names:
        assert importlib.util.find_spec(f"benchmarks.{name}") is not None, name


def test_every_allocation_is_seen() -> None:
    changes = allocations(lambda: torch.ones(1000).sum())
    assert changes[0] == 4000 and sum(changes) == 0
    kept = []
    assert sum(allocations(lambda: kept.append(torch.ones(500, dtype=torch.float64)))) == 4000


def test_a_bank_takes_less_memory_than_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    small = (lambda: torch.nn.Linear(256, 256), torch.randn(8, 256), torch.randint(256, (8,)))
    monkeypatch.setattr("benchmarks.compute.memory.MODELS", {"small": lambda: small})
    dense, shared = measure("small", None, "on_demand"), measure("small", 0.1, "on_demand")
    assert dense["gradient_bytes"] == 4 * dense["parameters"] == 4 * (256 * 256 + 256)
    assert dense["optimizer_bytes"] >= 8 * dense["parameters"] > 8 * shared["parameters"]
    assert dense["held_bytes"] >= 12 * dense["parameters"]
    assert shared["peak_bytes"] < dense["peak_bytes"] and dense["left_bytes"] == shared["left_bytes"] == 0
    kept = measure("small", 0.1, "per_step")
    assert shared["peak_bytes"] < kept["peak_bytes"] < dense["peak_bytes"] and kept["left_bytes"] == 0
    assert cells(memory_table([dense, shared]))[1][-1] == f"{shared['peak_bytes'] / dense['peak_bytes']:.3f}"


def test_generation_is_timed_for_every_weight() -> None:
    banks = stack(layers=3, width=32, budget=1000)
    assert sum(len(bank.group.slots) for bank in banks) == 3 and sum(bank.group.size for bank in banks) <= 1000
    before = [parameter.clone() for bank in banks for parameter in bank.parameters()]
    found = nanoseconds(banks, repetitions=3)
    for middle, least, most in found.values():
        assert 0 < least <= middle <= most
    assert all(torch.equal(a, b) for a, b in zip(before, (p for bank in banks for p in bank.parameters()), strict=True))


def test_efficiency_is_what_the_network_leaves() -> None:
    cell = {"what": "measured", "hosts": 4, "batch": 16, "mbit": 50.0, "budget": None}
    times = [(400, 100), (500, 110), (600, 90)]
    lines = [
        {**cell, "repetition": i, "slow_ms": slow, "fast_ms": fast, "slow_predicted_ms": 450, "fast_predicted_ms": 90}
        for i, (slow, fast) in enumerate(times)
    ]
    measured, modelled = scaling_tables(lines)
    assert cells(measured) == [("4", "16 (weak and strong)", "50", "dense", "500 (400-600)", "100", "20%", "20%")]
    assert cells(modelled) == []
    sides = {"dense_ms_per_step": 200.0, "dense_efficiency": 0.5, "shared_ms_per_step": 100.0, "shared_efficiency": 1.0}
    rows = [{"what": "modelled", "cluster": CLUSTERS[0], "processes": count, **sides} for count in WORKERS]
    dense, shared = cells(scaling_tables(rows)[1])
    assert dense[:3] == (CLUSTERS[0], "dense", "50% (200 ms)") and shared[1:3] == ("shared", "100% (100 ms)")


def test_time_is_steps_to_the_target_times_seconds_per_step() -> None:
    runs = {
        "dense": {1500: {0: {1e-3: 1.25, 2e-3: 1.5}, 1: {1e-3: 1.5}}},
        "10%": {
            1000: {0: {1e-3: 1.25}, 1: {1e-3: 1.75}},
            1500: {0: {1e-3: 1.125}, 1: {1e-3: 1.625}},  # the mean is dense's
            2000: {0: {1e-3: 1.0}, 1: {1e-3: 1.0}},
        },
        "dense, fp16": {1500: {0: {1e-3: 1.25}}},  # one seed, held against dense's of the same
        "5%": {1500: {0: {1e-3: 1.3}}},
    }
    dense = target(runs)
    assert dense == {0: 1.25, 1: 1.5}
    assert steps_to(dense, losses_of(runs["10%"])) == steps_to(dense, losses_of(runs["dense, fp16"])) == 1500
    assert steps_to(dense, losses_of(runs["5%"])) is None
    assert curves_of("10%, fp16", 2, runs) == [(1500, 1e-3)]
    one = {"what": "step", "task": "gpt-wide", "mbit": 100.0, "bytes_per_step_ring": 2000}
    lines = [{**one, "side": side, "ms_per_step": ms} for side, ms in (("dense", 1000), ("10%", 250), ("5%", 100))]
    assert cells(time_table(runs, lines)) == [
        ("dense", "2", "0.001 (0.001, 0.002)", "1,500", "1.375 (1.250, 1.500)", "1000 (1000-1000); 1,500 s; 1.0"),
        ("10%", "2", "0.001 (0.001)", "1,500", "1.375 (1.125, 1.625)", "250 (250-250); 375 s; 4.0"),
        ("5%", "2", "0.001 (0.001)", "not in 1,500", "1.300 (1.300)", "100 (100-100); never"),
    ]


@pytest.mark.processes
def test_what_a_search_finds_is_trained_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"layers": 2, "width": 32, "heads": 2, "context": 16}
    short = {"model_args": small, "steps": 4, "evaluate_every": 4, "evaluate_batches": 1, "schedule.warmup": 0}
    monkeypatch.setitem(TASKS, "gpt-small", {**TASKS["gpt-small"], **short})
    wanted = {one["mapping"]: one for one in searches.cells(["gpt-small"]) if one["seed"] == 1}
    lines = [searches.measured(wanted[name]) for name in ("single", "random", "auto")]
    assert all(line["overrides"] == wanted[line["mapping"]]["overrides"] for line in lines)
    assert lines[1]["search_steps"] == 0 < lines[2]["search_steps"] <= 4 and lines[2]["search_seconds"] > 0
    assert len({line["validation_loss"] for line in lines}) > 1
    shown = searches.rows(lines, "gpt-small")
    assert sorted(row[0] for row in shown) == ["auto", "random", "single"]
    assert {row[2] for row in shown if row[0] == "single"} == {""}


@pytest.mark.parametrize(("budget", "task"), [(budget, task) for budget, tasks in EQUAL.items() for task in tasks])
def test_a_small_dense_model_has_no_fewer_parameters_than_the_bank(budget: float, task: str) -> None:
    counts = {}
    for kind in ("dense", "shared", "equal", *(["shallow"] if task in SHALLOW[budget] else [])):
        recipe = recipe_of(cell(task, kind, 1e-3, budget=budget), "runs")
        sizes = data_hints(recipe.data, context=recipe.model_args.get("context"))
        model = share_as(build_model(recipe.model, recipe.model_args, sizes), recipe.share)
        counts[kind] = sum(parameter.numel() for parameter in model.parameters())
    assert counts["shared"] < 0.2 * counts["dense"]
    for small in set(counts) - {"dense", "shared"}:
        assert counts["shared"] <= counts[small] <= 1.2 * counts["shared"], small


@pytest.mark.processes
def test_every_suite_names_runs_that_can_be_made() -> None:
    for name, suite in SUITES.items():
        cells = list(suite())
        assert cells, name
        for one in {one["task"]: one for one in cells}.values():
            told = {"distill.teacher": "dense"} if "distill.teacher" in one["overrides"] else {}  # it has no folder yet
            validate(recipe_of({**one, "overrides": {**one["overrides"], **told}}, "runs"), world_size=1)


@pytest.mark.processes
def test_a_teacher_trains_first_at_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"model_args": {"layers": 1, "width": 16}, "steps": 4, "evaluate_every": 4, "schedule.warmup": 0}
    monkeypatch.setitem(TASKS, "digits", {**TASKS["digits"], **short})
    taught = [
        run(cell("digits", "shared", 1e-3, more={"distill.teacher": f"{TWIN}{rate}", "distill.weight": 1.0}))
        for rate in (1e-3, 1e-1)
    ]
    assert taught[0]["overrides"]["distill.teacher"] == "dense at 0.001"
    assert taught[0]["validation_loss"] != taught[1]["validation_loss"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at its inputs'
@pytest.mark.parametrize(
    "cell",
    [
        *("step", "launch-bound", "memory", "kernels"),
        *(pytest.param(c, marks=pytest.mark.distributed) for c in ("nccl", "gloo")),
    ],
)
def test_what_a_gpu_will_measure_is_rehearsed(cell: str) -> None:
    """Tiny models on the processor, and a compiler that compiles nothing."""
    torch._dynamo.reset()
    line = gpu.measure((cell, gpu.Setting("cpu", 2, backend="eager")))
    sides = {found["side"] for found in line["lines"]}
    if cell == "kernels":
        assert sides == {"kernels", "operations"}
        errors = {found["what"]: found["error"] for found in line["lines"]}
        assert max(errors.values()) < 0.01 and errors["weights of the large GPT in float32"] < 1e-6
    else:
        assert {"dense", "10% per_step", "10% on_demand", "25% per_step"} <= sides
        assert all(found["ratio"] > 0 for found in line["lines"])
    rows = cells(gpu.table([{"hardware": "a processor", **line}]))
    assert [row[2] for row in rows] == ["cpu"] * len(line["lines"]) + ["not measured"] * (len(gpu.CELLS) - 1)


def test_large_models_are_planned_and_shared() -> None:
    lines = [large.measure((cell, 0.1)) for cell in ("10M share", "8B plan keep")]
    assert all(line["seconds"] > 0 for line in lines)  # the peak means something in a process of its own
    assert lines[1]["parameters"] > 8e9 and lines[1]["seconds"] < 20
    rows = cells(large.table(lines))
    assert [row[0] for row in rows] == ["0.01 B", "8.20 B, keep"] and [row[-1] == "" for row in rows] == [False, True]
